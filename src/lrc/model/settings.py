"""Check a model's configuration before anything is built from it.

This module reads only the raw JSON and imports nothing heavy. A wrong name or size is reported at
once, and no number in a file can make this process run or allocate without end.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

from lrc.model.families import FAMILIES, family_of
from lrc.model.locate import QUANTIZATION_FILES, ModelFiles, refuse_pointer
from lrc.system.errors import UserError
from lrc.system.files import read_json, reading
from lrc.system.installed import is_installed
from lrc.system.limits import check_size

LIMITS = {
    "hidden_size": 1 << 17,
    "num_hidden_layers": 2_000,
    "num_attention_heads": 1 << 12,
    "num_key_value_heads": 1 << 12,
    "intermediate_size": 1 << 20,
    "vocab_size": 1 << 24,
    "head_dim": 1 << 14,
    "max_position_embeddings": 1 << 40,
}
"""Largest plausible value of each size in a configuration. Real models stay far below."""

NEEDED = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "vocab_size",
)
"""Required sizes. If one is missing, transformers uses another model's value."""

POSITIVE = ("rms_norm_eps", "layer_norm_epsilon", "rope_theta", "initializer_range")
"""Numbers that must be finite and positive if they are given."""

KINDS_OF_LAYERS = "layers_block_type"
"""Key of a list whose length is the number of layers, in configurations that do not give it."""

QUANTIZED = ("quantization_config", "compression_config", "quantization")
"""Keys of a configuration that describe quantized weights."""

DEQUANTIZED = {
    "mxfp4": None,
    "fp8": None,
    "compressed-tensors": "compressed_tensors",
    "bitsandbytes": "bitsandbytes",
}
"""Kinds of quantized weights that transformers turns back into plain numbers, and the package that
it needs for that."""


def read_config(files: ModelFiles, any_family: bool = False) -> dict[str, Any]:
    """Read the raw configuration of a transformers folder and check its sizes. That of a multimodal
    model is its text model's.

    Args:
        files: the model's files.
        any_family: whether to accept families that cannot be cloned.

    Raises:
        UserError: if it cannot be read, its family is not supported, a size is impossible, or it
            belongs to quantized weights or an adapter.
    """
    path = files.folder / "config.json"
    refuse_pointer(path)
    with reading(path, "give a model folder with a valid configuration"):
        check_size(path, "configuration")
    config = read_json(path, "give a model folder with a valid configuration")
    inner, multimodal = config.get("text_config"), False
    if isinstance(inner, dict) and inner.get("model_type") in FAMILIES:
        config, multimodal = {**config, **inner}, True  # sizes may be left to the class's defaults
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise UserError(f"{path} names no model_type: give the folder of a transformers model.")
    needed: Sequence[str] = () if any_family or multimodal else NEEDED
    if not any_family and family_of(model_type).neurons is None:
        needed = [name for name in needed if name != "intermediate_size"]
    if isinstance(kinds := config.get(KINDS_OF_LAYERS), list):
        config.setdefault("num_hidden_layers", len(kinds))
    problems = list(size_problems(config, needed))
    if problems:
        raise UserError(f"{path} is not valid ({'; '.join(problems)}): give another model.")
    _refuse_quantized(files, config)
    if (files.folder / "adapter_config.json").is_file():
        raise UserError(
            f"'{files.name}' holds a LoRA adapter (adapter_config.json), which would be ignored: "
            "merge it first (peft's merge_and_unload), or remove it."
        )
    return config


def size_problems(config: dict[str, Any], needed: Sequence[str] = NEEDED) -> Iterator[str]:
    """Yield what is impossible about the sizes in a configuration, one clause each.

    Args:
        config: the raw configuration.
        needed: sizes that must be present.
    """
    for name, largest in LIMITS.items():
        value = config.get(name)
        if value is None:
            if name in needed:
                yield f"{name} is missing"
        elif isinstance(value, bool) or not isinstance(value, int):
            yield f"{name} is {_shown(value)}, not a whole number"
        elif not 0 < value <= largest:
            yield f"{name} is {_shown(value)}"
    for name in POSITIVE:
        value = config.get(name)
        if value is not None and not _is_positive(value):
            yield f"{name} is {_shown(value)}"
    heads, pairs = config.get("num_attention_heads"), config.get("num_key_value_heads")
    if isinstance(heads, int) and isinstance(pairs, int) and pairs > 0 and heads % pairs:
        yield f"{heads} attention heads cannot share {pairs} key/value heads"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


def _is_positive(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value) and value > 0


def quantization_of(config: dict[str, Any]) -> str | None:
    """The kind of quantized weights that a raw configuration describes for transformers."""
    described = config.get("quantization_config")
    return str(described.get("quant_method")) if isinstance(described, dict) else None


def _refuse_quantized(files: ModelFiles, config: dict[str, Any]) -> None:
    """Refuse quantized weights: they need scales, which transformers may not apply.

    Raises:
        UserError: if the configuration or a file beside it says that the weights are quantized.
    """
    described: dict[str, Any] = {}
    kind = quantization_of(config)
    if kind in DEQUANTIZED:
        package = DEQUANTIZED[kind]
        if package and not is_installed(package):
            raise UserError(
                f"The weights of '{files.name}' are quantized ({kind}): run `pip install {kind}` "
                "to read them, or give the original model."
            )
        return
    for name in QUANTIZED:
        if config.get(name):
            described = {"quant_method": "of an unknown kind"}
            if isinstance(config[name], dict):
                described |= config[name]
    beside = [name for name in QUANTIZATION_FILES if (files.folder / name).is_file()]
    if described or beside:
        how = described.get("quant_method") if described else f"see {beside[0]}"
        raise UserError(
            f"The weights of '{files.name}' are quantized ({how}): give the original model, a copy "
            "that was dequantized and saved as bfloat16, or a GGUF file."
        )
