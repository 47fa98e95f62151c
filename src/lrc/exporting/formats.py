"""The formats and element types that a model can be written in."""

from enum import StrEnum


class Format(StrEnum):
    """What an export is for."""

    safetensors = "safetensors"
    gguf = "gguf"


class Dtype(StrEnum):
    """Element types of exported weights, by their names in torch and in llama.cpp."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"
    f32 = "f32"
    bf16 = "bf16"
    f16 = "f16"
    q8_0 = "q8_0"


TORCH_NAMES = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}
LLAMA_NAMES = {torch: llama for llama, torch in TORCH_NAMES.items()}
