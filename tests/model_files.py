"""Model folders and GGUF files to damage."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, GGUFValueType, GGUFWriter
from safetensors.torch import load_file, save_file
from torch import Tensor

from gguf_helpers import PADDING_ROWS, byte_level_bpe
from lrc.api import clone
from lrc.run import Run
from tiny import tiny_teacher

WEIGHTS = "model.safetensors"

Weights = dict[str, Tensor]


def save_model(folder: Path, family: str = "llama", tied: bool = False, **changes: Any) -> Path:
    """A tiny model with a byte-level tokenizer, as transformers saves it."""
    tokenizer = byte_level_bpe()
    rows = len(tokenizer) + PADDING_ROWS
    teacher = tiny_teacher(family, tied, dtype=torch.float32, vocab_size=rows, **changes)
    teacher.model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def edit_weights(folder: Path, change: Callable[[Weights], Weights]) -> Path:
    """Change a folder's weights."""
    weights = change(load_file(folder / WEIGHTS))
    save_file(
        {name: value.contiguous() for name, value in weights.items()},
        folder / WEIGHTS,
        {"format": "pt"},
    )
    return folder


def edit_json(path: Path, **changes: Any) -> Path:
    """Change entries of a JSON file; `...` removes one."""
    values = json.loads(path.read_text()) | changes
    kept = {name: value for name, value in values.items() if value is not ...}
    path.write_text(json.dumps(kept))
    return path.parent


def rewrite_gguf(
    source: Path,
    path: Path,
    settings: Mapping[str, Any] = {},
    without: Sequence[str] = (),
    tensors: Mapping[str, Any] = {},
) -> Path:
    """A copy of a GGUF file with other settings and tensors.

    Args:
        source: the file to change.
        path: the copy.
        settings: settings to change or add.
        without: settings and tensors to leave out.
        tensors: tensors to add.
    """
    read = GGUFReader(source)
    writer = GGUFWriter(path, read.fields["general.architecture"].contents())
    kinds = {str: GGUFValueType.STRING, int: GGUFValueType.UINT32, float: GGUFValueType.FLOAT32}
    for name, field in read.fields.items():
        fixed = name.startswith("GGUF.") or name == "general.architecture"
        if fixed or name in without or name in settings:
            continue
        if field.types[0] == GGUFValueType.ARRAY:
            writer.add_array(name, field.contents())
        else:
            writer.add_key_value(name, field.contents(), field.types[0])
    for name, value in settings.items():
        if isinstance(value, list):
            writer.add_array(name, value)
        else:
            writer.add_key_value(name, value, kinds[type(value)])
    for tensor in read.tensors:
        if tensor.name not in without:
            writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    for name, value in tensors.items():
        writer.add_tensor(name, np.asarray(value, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


SHORT: dict[str, Any] = {
    "train.tokens": 32,
    "train.micro_batch": 1,
    "data.sequence_length": 16,
    "data.held_out_fraction": 0.2,
    "initialize.calibration_tokens": 64,
    "train.eval_sequences": 2,
}


def save_text(folder: Path) -> Path:
    """A text file that `byte_level_bpe` can encode."""
    path = folder / "text.txt"
    sentences = (f"Once upon a time, it's {n} o'clock. def f(x): return x" for n in range(200))
    path.write_text("\n\n".join(" ".join([s] * 30) for s in sentences))
    return path


def short_run(teacher: Path) -> Run:
    """A run of two steps in the folder beside a teacher."""
    folder = teacher.parent
    settings = SHORT | {"data.cache": str(folder / "cache")}
    text = save_text(folder)
    return clone(teacher, hidden_size=8, text=text, out=folder / "run", settings=settings)
