"""How large a GGUF file of a model would be, from its shape alone."""

import math
from collections.abc import Iterator

import gguf
import torch
from gguf import GGMLQuantizationType as Kind
from transformers import PreTrainedModel

from lrc.exporting.gguf_file import stored_kind
from lrc.exporting.gguf_tensors import tensors_of

QUANTIZATIONS = ("bf16", "q8_0", "q4_k_m")
"""Types of files whose size is known."""

FALLBACKS = {Kind.Q4_K: Kind.Q5_0, Kind.Q5_K: Kind.Q5_1, Kind.Q6_K: Kind.Q8_0}
"""What llama-quantize takes for rows that are no multiple of 256."""


def file_types(model: PreTrainedModel, quantization: str) -> Iterator[tuple[torch.Size, Kind]]:
    """Shape and element type of every tensor of the file that llama.cpp runs.

    `q4_k_m` follows llama-quantize's choice by tensor (llama.cpp, src/llama-quant.cpp) for dense
    models: Q4_K for most, Q6_K for the head and half of the value and down maps.

    Args:
        model: a model; its weights are not read.
        quantization: one of `QUANTIZATIONS`.

    Raises:
        UserError: if llama.cpp cannot run the model.
    """
    tensors = list(tensors_of(model))
    own_head = any(found.name == "output.weight" for found in tensors)
    head = "output.weight" if own_head else "token_embd.weight"
    for found in tensors:
        shape = found.change(torch.empty_like(found.tensor, device="meta")).shape
        base = {"bf16": Kind.BF16, "q8_0": Kind.Q8_0, "q4_k_m": Kind.F16}[quantization]
        kind = stored_kind(found.name, shape, base)
        if quantization == "q4_k_m" and kind is not Kind.F32:
            kind = _q4_k_m(found.name, shape[-1], head, model.config.num_hidden_layers)
        yield shape, kind


def _q4_k_m(name: str, row: int, head: str, layers: int) -> Kind:
    kind = Kind.Q4_K
    if name == head:
        kind = Kind.Q6_K
    elif name.endswith("attn_qkv.weight"):
        kind = Kind.Q5_K
    elif name.endswith(("attn_v.weight", "ffn_down.weight")):
        layer = int(name.split(".")[1])
        first, last = layers // 8, 7 * layers // 8
        if layer < first or layer >= last or (layer - first) % 3 == 2:
            kind = Kind.Q6_K
    if row % gguf.GGML_QUANT_SIZES[kind][0]:
        kind = FALLBACKS[kind]
    return Kind.F16 if row % gguf.GGML_QUANT_SIZES[kind][0] else kind


def file_bytes(model: PreTrainedModel, quantization: str) -> int:
    """Bytes of all tensors of the file; header and vocabulary, a few MB, come on top. Arguments and
    errors are those of `file_types`."""
    total = 0
    for shape, kind in file_types(model, quantization):
        block, size = gguf.GGML_QUANT_SIZES[kind]
        total += math.prod(shape) // block * size
    return total
