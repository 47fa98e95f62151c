"""Load a model's weights exactly as its files hold them, or fail."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CompressedTensorsConfig,
    FineGrainedFP8Config,
    Mxfp4Config,
)
from transformers import PreTrainedModel as Model
from transformers.utils import logging as transformers_logging

from lrc.model import gguf
from lrc.model.families import FAMILIES, check_supported
from lrc.model.locate import ACCEPTED, ModelFiles
from lrc.model.settings import quantization_of, read_config
from lrc.model.stored import StoredTensor, stored_tensor, stored_tensors
from lrc.system.errors import UserError
from lrc.system.files import read_json, reading

_TORCH = ("float64", "float32", "float16", "bfloat16")

FLOATING = ("F64", "F32", "F16", "BF16", *(f"torch.{name}" for name in _TORCH))
"""Element types of weights that are plain numbers; others need scales."""

NAMED = 3
"""Tensors that a message names; it only counts the rest."""

NOISE = 0.1
"""Relative difference up to which two matrices count as one matrix rounded twice. Four bits per
weight give 0.07; a separately trained head differs by more than 1."""

BITSANDBYTES = "bitsandbytes"
"""The kind of quantized weights that transformers dequantizes only after it has loaded them."""

COMPARED_ROWS = 4096
"""Rows of two matrices to compare for that."""


@contextmanager
def without_bars() -> Iterator[None]:
    """Hide transformers' progress bars, and its warnings about weights, which we check ourselves,
    while the context is open."""
    shown = transformers_logging.is_progress_bar_enabled()
    level = transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if shown:
            transformers_logging.enable_progress_bar()


@dataclass(frozen=True)
class LoadedModel:
    """A model, with notes for the user about its files."""

    model: Model
    notes: list[str] = field(default_factory=list)


def load_config(files: ModelFiles, any_family: bool = False) -> Any:
    """Load the configuration of a model and check its sizes. That of a multimodal model is its text
    model's.

    Args:
        files: the model's files.
        any_family: whether to accept families that cannot be cloned.

    Raises:
        UserError: if it cannot be read, its family is not supported, or its weights are quantized.
    """
    settings = None
    if files.gguf_path is not None:
        settings, _ = gguf.read_header(files.gguf_path)
    else:
        read_config(files, any_family)
    with reading(f"The configuration of '{files.name}'", ACCEPTED):
        config = AutoConfig.from_pretrained(files.folder, **files.options())
    inner = getattr(config, "text_config", None)
    if inner is not None and inner.model_type in FAMILIES:
        inner.tie_word_embeddings |= getattr(config, "tie_word_embeddings", False)
        if described := getattr(config, "quantization_config", None):
            inner.quantization_config = described
        config = inner
    if not any_family:
        check_supported(config)
    if files.gguf_path is not None and settings is not None:
        gguf.complete(config, settings)
        gguf.check_settings(files.gguf_path, settings, config)
    return config


def load_skeleton_of(files: ModelFiles, check: bool = True) -> Model:
    """Build a model without weights (on the meta device) and check its files against it.

    Args:
        files: the model's files.
        check: whether to check the files; they must include the weights.

    Raises:
        UserError: if the files do not fill the model exactly.
    """
    config = load_config(files, any_family=True)
    with reading(f"The model '{files.name}'", ACCEPTED), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    if check:
        stored = stored_tensors(files)
        check_filled(files, model, stored)
        if config.tie_word_embeddings and _other_head(files, stored, model):
            untie(model)
    return model


def load_weights(files: ModelFiles, dtype: Any, tie: bool = False, **options: Any) -> LoadedModel:
    """Load a causal language model with exactly the weights that its files hold.

    Args:
        files: the model's files.
        dtype: element type, as for `from_pretrained`.
        tie: whether to use the embedding as the LM head, whatever the files hold.
        **options: further arguments of `from_pretrained`.

    Raises:
        UserError: if the files cannot be read, or a tensor is missing, has no place in the model,
            has another shape or a type that needs scales, or holds values that are not finite.
    """
    load_skeleton_of(files)  # checks the files
    # Pass our own configuration for a GGUF file: transformers does not read all of it.
    own = {"config": load_config(files, any_family=True)} if files.gguf else _text_options(files)
    own |= _dequantizing(files)
    with reading(f"The model '{files.name}'", ACCEPTED), without_bars():
        model = AutoModelForCausalLM.from_pretrained(
            files.folder, dtype=dtype, **own, **files.options(), **options
        )
        if quantization_kind(files) == BITSANDBYTES:  # it is read packed
            wanted = model.config.dtype if dtype == "auto" else dtype
            model = model.dequantize(wanted).to(wanted)
    model.eval()
    _forget_quantization(model)
    refuse_not_finite(files.name, model)
    notes = _settle_head(files, model, tie)
    return LoadedModel(model, notes)


def _forget_quantization(model: Model) -> None:
    """Remove what transformers notes of a file's quantization: the weights are plain numbers now,
    which can be trained and saved."""
    for name in ("hf_quantizer", "is_quantized", "quantization_method"):
        vars(model).pop(name, None)
    vars(model.config).pop("quantization_config", None)


def check_filled(files: ModelFiles, skeleton: Model, stored: dict[str, StoredTensor]) -> None:
    """Refuse files that do not fill a model exactly.

    A tied LM head may be missing. Tensors that transformers knows to be useless (rotary tables of
    old checkpoints) may be present.

    Raises:
        UserError: if a tensor is missing, unexpected, of another shape, or of a type that needs
            scales; the message names it.
    """
    if files.gguf_path is not None:
        missing, surplus, mismatched = gguf.check_tensors(files.gguf_path, stored, skeleton)
    else:
        missing, surplus, mismatched = _report(files)
        dequantizing = quantization_kind(files) is not None
        packed = [
            f"{name} ({tensor.dtype})"
            for name, tensor in stored.items()
            if tensor.dtype not in FLOATING and name not in surplus
            if not (dequantizing and _has_scales(name, stored))
        ]
        if packed:
            raise UserError(
                f"The weights of '{files.name}' are quantized ({_some(packed)}): give the original "
                "model, a copy that was dequantized and saved as bfloat16, or a GGUF file."
            )
    problems = []
    if missing:
        problems.append(f"{_some(missing)} missing")
    if surplus:
        problems.append(f"{_some(surplus)} without a place in the model")
    if mismatched:
        problems.append(f"{_some(mismatched)} of another shape")
    if problems:
        raise UserError(
            f"The files of '{files.name}' do not fill its model ({'; '.join(problems)}): give a "
            "complete model whose configuration fits its weights."
        )


def _report(files: ModelFiles) -> tuple[list[str], list[str], list[str]]:
    """List a folder's weights that are missing, unexpected, or of another shape."""
    with reading(f"The model '{files.name}'", ACCEPTED), without_bars():
        _, found = AutoModelForCausalLM.from_pretrained(
            files.folder,
            device_map={"": "cpu" if quantization_kind(files) == BITSANDBYTES else "meta"},
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **_text_options(files),
            **_dequantizing(files),
            **files.options(),
        )
    if prefix := text_prefix(files):  # the rest belongs to other parts of a multimodal model
        kept = ("model.layers.", prefix)
        found["unexpected_keys"] = {k for k in found["unexpected_keys"] if k.startswith(kept)}
    mismatched = [f"{name} {list(a)} for {list(b)}" for name, a, b in found["mismatched_keys"]]
    return sorted(found["missing_keys"]), sorted(found["unexpected_keys"]), sorted(mismatched)


def text_prefix(files: ModelFiles) -> str | None:
    """What the names of the text model's tensors start with in the files of a multimodal model,
    such as `model.language_model.`; None for other models."""
    if files.gguf or "text_config" not in _raw_config(files):
        return None
    end = "embed_tokens.weight"
    ends = f"language_model.{end}", f"language_model.model.{end}", f"text_model.{end}"
    names = [name for name in stored_tensors(files) if name.endswith(ends)]
    return names[0].removesuffix(end) if names else None


def _raw_config(files: ModelFiles) -> dict[str, Any]:
    """The configuration in a model's folder, as it is."""
    return read_json(files.folder / "config.json", "give a valid model")


def _text_options(files: ModelFiles) -> dict[str, Any]:
    """Further arguments of `from_pretrained` to read the text model of a multimodal model."""
    prefix = text_prefix(files)
    if prefix is None:
        return {}
    head = f"{prefix.removesuffix('model.')}lm_head."
    mapping = {f"^{re.escape(prefix)}": "model.", f"^{re.escape(head)}": "lm_head."}
    return {"config": load_config(files, any_family=True), "key_mapping": mapping}


def _has_scales(name: str, stored: dict[str, StoredTensor]) -> bool:
    """Whether a quantized tensor comes with its scales, or is a part of them."""
    weight = re.sub(r"_(scales|blocks)$", "", name)
    linear = re.sub(r"\.(weight.*|SCB)$", "", name)
    ends = ("weight_scale_inv", "weight_scale", "weight.absmax", "SCB")
    both = {f"{weight}_blocks", f"{weight}_scales"} <= stored.keys()
    return both or any(f"{linear}.{end}" in stored for end in ends)


def quantization_kind(files: ModelFiles) -> str | None:
    """The kind of a model's quantized weights; None if they are plain, or of a GGUF file."""
    if files.gguf:
        return None
    return quantization_of(_raw_config(files))


def _dequantizing(files: ModelFiles) -> dict[str, Any]:
    """Further arguments of `from_pretrained` to read quantized weights as plain numbers."""
    config = {
        "mxfp4": Mxfp4Config,
        "fp8": FineGrainedFP8Config,
        "compressed-tensors": CompressedTensorsConfig,
    }.get(quantization_kind(files) or "")
    return {"quantization_config": config(dequantize=True)} if config else {}


def _some(names: list[str]) -> str:
    """The first names, and the number of the rest."""
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more} more" if more > 0 else "")


def refuse_not_finite(model: str, module: nn.Module, path: str = "") -> None:
    """Refuse weights that are not finite.

    Args:
        model: the model's name.
        module: the part of it to check; what is on the meta device is not checked.
        path: its module path in the model.

    Raises:
        UserError: if there are some; the message names the parameter.
    """
    for name, value in module.named_parameters(path):
        if not value.is_meta and not bool(torch.isfinite(value).all()):
            raise UserError(
                f"The weights of '{model}' are not finite (in {name}): download the model again, "
                "or give another one."
            )


def untie(model: Model) -> None:
    """Record in a model's configuration that its LM head is a separate matrix."""
    model.config.tie_word_embeddings = False


def settle_tie(name: str, model: Model) -> list[str]:
    """Untie a model whose configuration ties an LM head and an embedding that differ: the tensors
    win.

    Returns:
        Notes for the user.
    """
    parts = _separate_head(model) if model.config.tie_word_embeddings else None
    if parts is None or torch.equal(*parts):
        return []
    untie(model)
    return [
        f"The configuration of '{name}' ties the LM head to the embedding, but it has two matrices "
        "that differ: both are used."
    ]


def _separate_head(model: Model) -> tuple[Tensor, Tensor] | None:
    """Embedding and LM head of a loaded model; None if they are one matrix, or one is missing or on
    the meta device."""
    parts = model.get_input_embeddings(), model.get_output_embeddings()
    if any(part is None for part in parts):
        return None
    embedding, head = (part.weight for part in parts)
    return None if embedding is head or embedding.is_meta or head.is_meta else (embedding, head)


def _other_head(files: ModelFiles, stored: dict[str, StoredTensor], skeleton: Model) -> bool:
    """Whether a folder holds an LM head and an embedding that differ.

    This is always false for a GGUF file, which itself says whether there are two matrices.
    """
    parts = skeleton.get_output_embeddings(), skeleton.get_input_embeddings()
    paths = {module: path for path, module in skeleton.named_modules()}
    names = [f"{paths.get(part)}.weight" for part in parts]
    if files.gguf_path is not None or not all(name in stored for name in names):
        return False
    return not torch.equal(*(stored_tensor(stored[name], name) for name in names))


def _settle_head(files: ModelFiles, model: Model, tie: bool) -> list[str]:
    """Make the configuration agree with the embedding and LM head: the tensors win.

    Returns:
        Notes for the user.
    """
    parts = _separate_head(model)
    if parts is None:
        return []
    embedding, head = parts
    if tie or torch.equal(embedding, head):
        if not (tie or model.config.tie_word_embeddings):
            return [_offer(files, embedding, 0.0)]
        model.config.tie_word_embeddings = True
        model.get_output_embeddings().weight = embedding
        return []
    if notes := settle_tie(files.name, model):
        return notes
    difference = _relative_difference(head, embedding)
    return [_offer(files, embedding, difference)] if difference < NOISE else []


def _offer(files: ModelFiles, embedding: Tensor, difference: float) -> str:
    return (
        f"The LM head of '{files.name}' equals its embedding up to rounding ({difference:.1%}): "
        "teacher.tie_head: true keeps one matrix of "
        f"{embedding.numel():,} parameters instead of two."
    )


def _relative_difference(head: Tensor, embedding: Tensor) -> float:
    """Norm of the difference of two matrices relative to the second, on a sample of rows."""
    step = max(1, len(head) // COMPARED_ROWS)
    ours, theirs = (matrix.detach()[::step].to(torch.float32) for matrix in (head, embedding))
    return float((ours - theirs).norm() / theirs.norm().clamp_min(1e-30))
