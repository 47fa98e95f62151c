"""The Hugging Face hub: a quick check whether it can be reached, and downloads from it.

The hub's own libraries try for a minute or two before they give up. A run without a network should
report that at once, and should work if the cache already holds what it needs.
"""

from collections.abc import Sequence
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

from lrc.system.errors import UserError, reason

REACH_SECONDS = 3.0
"""Time for the hub to answer before it counts as unreachable."""


@cache
def hub_problem() -> str | None:
    """Why the hub cannot be reached, in a few words; None if it can.

    This is checked once per process.
    """
    from huggingface_hub import constants, get_session

    if constants.is_offline_mode():
        return "HF_HUB_OFFLINE is set"
    try:
        get_session().head(constants.ENDPOINT, timeout=REACH_SECONDS)
    except Exception as error:
        return f"{constants.ENDPOINT} does not answer: {reason(error)}"
    return None


def cache_alone_if_unreachable() -> str | None:
    """If the hub cannot be reached, make its libraries use only their caches.

    This does what HF_HUB_OFFLINE does. Otherwise the libraries would try for a minute first.

    Returns:
        Why the hub cannot be reached; None if it can.
    """
    problem = hub_problem()
    if problem:
        import datasets
        from huggingface_hub import constants

        constants.HF_HUB_OFFLINE = True
        datasets.config.HF_HUB_OFFLINE = True
    return problem


def no_way(problem: str | None, error: BaseException) -> str:
    """The reason for an error, for a message: the hub's problem if it could not be reached."""
    return f"the hub cannot be reached: {problem}" if problem else reason(error)


def download(
    name: str, revision: str | None, files: Sequence[str], weights: Sequence[str] = ()
) -> Path:
    """Return the folder in the hub's cache with files of a model's repository.

    Args:
        name: the hub id.
        revision: branch, tag or commit; None means the main branch.
        files: patterns of the files.
        weights: further patterns; only the first one that matches a file is used.

    Raises:
        UserError: if they are not in the cache and cannot be downloaded.
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
            "`hf auth login` if it is private or gated."
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
    """The first pattern that matches a file; the first of all if none does."""
    for pattern in patterns:
        if any(fnmatch(name, pattern) and "/" not in name for name in there):
            return pattern
    return patterns[0]
