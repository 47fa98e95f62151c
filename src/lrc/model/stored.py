"""Read the tensors in a model's files: names, shapes, element types and checksums.

Nothing is converted or renamed here. The tensors are as in the files, for comparison with the model
that transformers makes of them.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from gguf import GGUFReader
from safetensors import safe_open
from torch import Tensor

from lrc.model.locate import ModelFiles, refuse_pointer
from lrc.system.checksums import remembered
from lrc.system.errors import UserError
from lrc.system.files import read_json, reading

SAFETENSORS, PICKLED = "model.safetensors", "pytorch_model.bin"

AGAIN = "download it again, or give another model"


class StoredTensor(NamedTuple):
    """A tensor in a file."""

    file: Path
    dtype: str
    """The file's own name for the element type: `BF16`, `F8_E4M3`, `torch.float16`, `Q4_K`."""
    shape: tuple[int, ...]


def weight_files(files: ModelFiles) -> list[Path]:
    """List the weight files that transformers would read: safetensors before pickled files.

    Raises:
        UserError: if there are none, a file that the index names is missing, or a file is only a
            Git LFS pointer.
    """
    found = [files.gguf_path] if files.gguf_path is not None else _of_folder(files.folder)
    if not found:
        raise UserError(
            f"'{files.name}' holds no weights (no {SAFETENSORS}, no {PICKLED} and no index of "
            "several files): give a folder with the model's weights."
        )
    for path in found:
        if not path.is_file():
            raise UserError(f"{path} is missing: {AGAIN}.")
        refuse_pointer(path)
    return found


def _of_folder(folder: Path) -> list[Path]:
    for name in (SAFETENSORS, PICKLED):
        if (folder / name).is_file():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if index.is_file():
            refuse_pointer(index)
            entries = read_json(index, AGAIN).get("weight_map")
            if not isinstance(entries, dict) or not entries:
                raise UserError(f"{index} names no weights (no weight_map): {AGAIN}.")
            names = sorted({str(value) for value in entries.values()})
            outside = [name for name in names if Path(name).name != name]
            if outside:
                raise UserError(f"{index} names '{outside[0]}' outside its folder: {AGAIN}.")
            return [folder / name for name in names]
    return []


def stored_tensors(files: ModelFiles) -> dict[str, StoredTensor]:
    """Return every tensor of the files by its name there, reading only the headers.

    Raises:
        UserError: if a file is missing or damaged, or two files hold the same tensor.
    """
    found: dict[str, StoredTensor] = {}
    for path in weight_files(files):
        for name, tensor in _headers(path):
            if name in found:
                raise UserError(
                    f"The tensor '{name}' is in both {found[name].file.name} and {path.name}: "
                    f"{AGAIN}."
                )
            found[name] = tensor
    return found


def stored_tensor(tensor: StoredTensor, name: str) -> Tensor:
    """Read one tensor of a safetensors or pickled file.

    Raises:
        UserError: if the file is damaged.
    """
    with reading(tensor.file, AGAIN):
        if tensor.file.suffix == ".safetensors":
            with safe_open(tensor.file, framework="pt") as opened:
                return opened.get_tensor(name)
        return _pickled(tensor.file)[name]


def model_checksums(files: ModelFiles) -> dict[str, str]:
    """The SHA-256 of every tensor of a model, by name, remembered while its files do not change.

    Raises:
        UserError: if a file is damaged.
    """
    tensors: dict[str, str] = {}
    for path in weight_files(files):
        with reading(path, "check the file"):
            tensors |= remembered(path, "tensors", file_checksums)
    return tensors


def file_checksums(path: Path) -> dict[str, str]:
    """Return the SHA-256 of every tensor in a weight file, by name: of its bytes, type and shape.

    Raises:
        UserError: if the file is damaged.
    """
    with reading(path, AGAIN):
        if path.suffix == ".gguf":
            return {
                tensor.name: _digest(tensor.tensor_type.name, _shape_of(tensor), tensor.data)
                for tensor in GGUFReader(path).tensors
            }
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as opened:
                return {name: tensor_checksum(opened.get_tensor(name)) for name in opened.keys()}  # noqa: SIM118
        return {name: tensor_checksum(value) for name, value in _pickled(path).items()}


def tensor_checksum(tensor: Tensor) -> str:
    """SHA-256 of a tensor's element type, shape and bytes."""
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return _digest(str(tensor.dtype), tuple(tensor.shape), data.numpy())


def _digest(dtype: str, shape: tuple[int, ...], data: Any) -> str:
    digest = hashlib.sha256(f"{dtype} {list(shape)}\n".encode())
    digest.update(np.ascontiguousarray(data).view(np.uint8).data)
    return digest.hexdigest()


def _headers(path: Path) -> Iterator[tuple[str, StoredTensor]]:
    with reading(path, AGAIN):
        if path.suffix == ".gguf":
            for tensor in GGUFReader(path).tensors:
                shape = _shape_of(tensor)
                yield tensor.name, StoredTensor(path, tensor.tensor_type.name, shape)
        elif path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118
                    part = opened.get_slice(name)
                    yield name, StoredTensor(path, part.get_dtype(), tuple(part.get_shape()))
        else:
            for name, value in _pickled(path, "meta").items():
                yield name, StoredTensor(path, str(value.dtype), tuple(value.shape))


def _shape_of(tensor: Any) -> tuple[int, ...]:
    """The shape of a GGUF tensor in torch's order."""
    return tuple(int(size) for size in reversed(tensor.shape))


def _pickled(path: Path, device: str = "cpu") -> dict[str, Tensor]:
    """Read the tensors of a pickled file without executing anything in it."""
    value = torch.load(path, map_location=device, weights_only=True)
    if not isinstance(value, dict):
        raise ValueError(f"it holds a {type(value).__name__}, not tensors by name")
    return {str(name): item for name, item in value.items() if isinstance(item, Tensor)}
