"""Publish a model on the hub: its folder, its card with what was measured, and a GGUF file."""

import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path

from gguf import GGMLQuantizationType as Kind

from lrc.evaluation.evaluation import results_folder
from lrc.exporting.card_changes import CARD, card_of, new_card, published_card, read_evaluation
from lrc.exporting.formats import LLAMA_NAMES, Dtype
from lrc.exporting.gguf_file import convert_to_gguf
from lrc.model.teacher import model_files
from lrc.run import student_of
from lrc.system.errors import UserError, reason
from lrc.system.progress import Progress, task
from lrc.system.tables import size

logger = logging.getLogger(__name__)

CURVES = "curves.png"


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
    source = student_of(model)
    files = model_files(source)
    if not any(file.name == "config.json" for file in files):
        raise UserError(f"{model} is not a model folder of this machine: give one, or a run.")
    if not dry_run:
        need_login()
    with tempfile.TemporaryDirectory(prefix="lrc-push-") as scratch:
        found: dict[str, Path | bytes] = {file.name: file for file in files if file.name != CARD}
        if gguf is not None:
            path = Path(scratch) / f"{repo.rpartition('/')[2]}-{gguf}.gguf"
            with task(f"Writing {path.name}", unit="tensors") as shown:
                found[path.name] = _write_gguf(source, path, gguf, shown.update)
        if (curves := Path(model) / CURVES).is_file():
            found[CURVES] = curves
        evaluation = read_evaluation(results_folder(model, "evaluation", "evaluations"))
        name = f"{repo.rpartition('/')[2]}-{gguf}.gguf" if gguf else None
        card = card_of(source) or new_card(repo.rpartition("/")[2])
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


def _check_name(repo: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repo)
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
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi()
    try:
        made = api.create_repo(repo, private=private or None, exist_ok=True)
        operations = [CommitOperationAdd(name, content) for name, content in files.items()]
        api.create_commit(made.repo_id, operations, commit_message="Upload with lrc push")
    except Exception as error:  # the hub's library may raise anything
        raise UserError(
            f"The hub did not take {repo} ({reason(error)}): check the name, your rights and the "
            "connection, and try again."
        ) from error
    return str(made)


def _write_gguf(source: str, path: Path, dtype: Dtype, progress: Progress) -> Path:
    convert_to_gguf(source, path, Kind[LLAMA_NAMES.get(dtype, dtype).upper()], progress)
    return path
