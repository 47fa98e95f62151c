"""Publish a model on the hub: its folder, its card with what was measured, and a GGUF file."""

import logging
import tempfile
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path

from lrc.evaluation.evaluation import results_folder
from lrc.evaluation.results import Evaluation
from lrc.evaluation.subject import fingerprint_of
from lrc.exporting.card_changes import CARD, card_of, new_card, published_card, read_evaluation
from lrc.exporting.formats import Dtype
from lrc.exporting.gguf_file import convert_to_gguf, gguf_kind
from lrc.model.teacher import model_files
from lrc.run import student_of
from lrc.system.errors import UserError, reason
from lrc.system.progress import task
from lrc.system.tables import size

logger = logging.getLogger(__name__)

CURVES = "curves.png"

WEIGHTS = "model*.safetensors*"
"""Files of weights, and of their index."""


def push(
    model: str,
    repo: str,
    *,
    private: bool = False,
    gguf: Dtype | None = None,
    dry_run: bool = False,
) -> str | None:
    """Publish a model of this machine in one commit.

    The token is huggingface_hub's own (`hf auth login`, or HF_TOKEN); nothing here reads it.

    Args:
        model: a run's folder, the folder of a tuning, or a model folder.
        repo: the hub id of the repository, which is created if it does not exist.
        private: whether a new repository is private.
        gguf: element type of a GGUF file to add; None: none.
        dry_run: whether to show what would be sent, and send nothing.

    Returns:
        The address of the commit; None for a dry run.

    Raises:
        UserError: if the model is not a local folder, the name is not one, there is no valid login,
            or the hub refuses.
    """
    _check_name(repo)
    source, title = student_of(model), repo.rpartition("/")[2]
    files = model_files(source)
    if not any(file.name == "config.json" for file in files):
        raise UserError(f"{model} is not a model folder of this machine: give one, or a run.")
    if not dry_run:
        need_login()
    with tempfile.TemporaryDirectory(prefix="lrc-push-") as scratch:
        found: dict[str, Path | bytes] = {file.name: file for file in files if file.name != CARD}
        if gguf is not None:
            path = Path(scratch) / f"{title}-{gguf}.gguf"
            with task(f"Writing {path.name}", unit="tensors") as shown:
                convert_to_gguf(source, path, gguf_kind(gguf), shown.update, title)
            found[path.name] = path
        if (curves := Path(model) / CURVES).is_file():
            found[CURVES] = curves
        evaluation = _evaluation(model, source)
        name = f"{title}-{gguf}.gguf" if gguf else None
        card = card_of(source) or new_card(title)
        found[CARD] = published_card(card, repo, evaluation, CURVES in found, name).encode()
        for name, content in sorted(found.items()):
            count = len(content) if isinstance(content, bytes) else content.stat().st_size
            logger.info("%s: %s", name, size(count))
        if dry_run:
            logger.info("Nothing was sent. This would go to %s.", repo)
            return None
        with task(f"Sending to {repo}"):
            address = send(found, repo, private)
    logger.info("The model is at %s.", address)
    return address


def _evaluation(model: str, source: str) -> Evaluation | None:
    """The model's evaluation; None if there is none, or its files have changed since."""
    folder = results_folder(model, "evaluation", "evaluations")
    evaluation = read_evaluation(folder)
    if evaluation is None or evaluation.models[0].fingerprint == fingerprint_of(source):
        return evaluation
    logger.warning(
        "The evaluation in %s is of other files than these, so the card does not show it: run "
        "`lrc eval %s` again.",
        folder,
        model,
    )
    return None


def _check_name(repo: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repo)
        if "/" not in repo:
            raise HFValidationError("it has no user or organization")
    except HFValidationError as error:
        raise UserError(
            f"'{repo}' is not a name for a repository ({reason(error)}): write it as USER/NAME."
        ) from error


def need_login() -> None:
    """Refuse to continue without a login.

    Raises:
        UserError: if huggingface_hub knows no token.
    """
    from huggingface_hub import get_token

    if get_token() is None:
        raise UserError(
            "There is no login for the hub: run `hf auth login`, or set HF_TOKEN, and try again."
        )


def send(files: Mapping[str, Path | bytes], repo: str, private: bool) -> str:
    """Create a repository, if it does not exist, and commit files to it.

    Args:
        files: paths or contents by their names in the repository.
        repo: its hub id.
        private: whether a new repository is private.

    Returns:
        The address of the repository.

    Raises:
        UserError: if the hub refuses or cannot be reached.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi()
    try:
        made = api.create_repo(repo, private=private or None, exist_ok=True)
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            CommitOperationAdd(name, content) for name, content in files.items()
        ]
        # Weights of an earlier model there would be loaded in place of these.
        old = [name for name in api.list_repo_files(made.repo_id) if fnmatch(name, WEIGHTS)]
        operations += [CommitOperationDelete(name) for name in old if name not in files]
        api.create_commit(made.repo_id, operations, commit_message="Upload with lrc push")
    except Exception as error:  # the hub's library may raise anything
        raise UserError(
            f"The hub did not take {repo} ({reason(error)}): check the name, your rights and the "
            "connection, and try again."
        ) from error
    return str(made)
