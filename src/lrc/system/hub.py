"""The Hugging Face hub: whether it can be reached, told within seconds, and downloads from it.

The hub's own libraries try for a minute or two before they give up; a run without a network should
say so at once, and work where the cache already holds what it needs.
"""

from collections.abc import Sequence
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

from lrc.system.errors import UserError, reason

REACH_SECONDS = 3.0
"""How long the hub may take to answer before it counts as unreachable."""


@cache
def hub_problem() -> str | None:
    """Why the hub cannot be reached, in a few words; None where it can. Asked once a process."""
    from huggingface_hub import constants, get_session

    if constants.is_offline_mode():
        return "HF_HUB_OFFLINE is set"
    try:
        get_session().head(constants.ENDPOINT, timeout=REACH_SECONDS)
    except Exception as error:
        return f"{constants.ENDPOINT} does not answer: {reason(error)}"
    return None


def cache_alone_if_unreachable() -> str | None:
    """Where the hub cannot be reached, let its libraries look into their caches at once, as
    HF_HUB_OFFLINE does, rather than try for a minute first.

    Returns:
        Why it cannot be reached; None where it can.
    """
    problem = hub_problem()
    if problem:
        import datasets
        from huggingface_hub import constants

        constants.HF_HUB_OFFLINE = True
        datasets.config.HF_HUB_OFFLINE = True
    return problem


def no_way(problem: str | None, error: BaseException) -> str:
    """The reason of an error for a message: that of the hub, if it could not be reached."""
    return f"the hub cannot be reached: {problem}" if problem else reason(error)


def download(
    name: str, revision: str | None, files: Sequence[str], weights: Sequence[str] = ()
) -> Path:
    """Files of a model's repository, in the hub's cache.

    Args:
        name: the hub id.
        revision: branch, tag or commit; None: the main branch.
        files: patterns of the files.
        weights: patterns of which the first that matches anything is taken, too.

    Raises:
        UserError: they are neither in the cache nor can be downloaded.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    problem = hub_problem()
    try:
        patterns = list(files)
        if weights and not problem:
            there = HfApi().list_repo_files(name, revision=revision)
            patterns += [_first_present(there, weights)]
        elif weights:
            patterns += weights
        folder = snapshot_download(
            name,
            revision=revision,
            allow_patterns=patterns,
            ignore_patterns=["*/*"],
            local_files_only=bool(problem),
        )
        return Path(folder)
    except (GatedRepoError, RepositoryNotFoundError) as error:
        at = f" at revision '{revision}'" if revision else ""
        raise UserError(
            f"The hub has no model '{name}'{at} that you may read: check the name, or log in with "
            "`hf auth login` where it is private or gated."
        ) from error
    except (OSError, ValueError, HfHubHTTPError) as error:
        if problem:
            raise UserError(
                f"There is no model '{name}' on this machine and the hub cannot be reached "
                f"({problem}): check the name and the connection, or give a model folder or a "
                ".gguf file."
            ) from error
        raise UserError(
            f"The model '{name}' cannot be downloaded ({reason(error)}): check its name and "
            "revision and the connection, and try again."
        ) from error


def _first_present(there: Sequence[str], patterns: Sequence[str]) -> str:
    """The first pattern that matches a file, or the first of all."""
    for pattern in patterns:
        if any(fnmatch(name, pattern) and "/" not in name for name in there):
            return pattern
    return patterns[0]
