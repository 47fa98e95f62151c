"""The rotary embedding of a model, as llama.cpp reads it."""

import math
from typing import Any

import torch
from gguf import GGUFWriter, RopeScalingType
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from lrc.exporting.gguf_architectures import Architecture
from lrc.model.shapes import head_dim_of
from lrc.system.errors import UserError

UNROTATED = 1e30
"""Divisor of the frequency of rows that are not rotated."""


def add_rope(writer: GGUFWriter, config: Any, architecture: Architecture) -> Tensor | None:
    """Write base, width and scaling of the rotary embedding.

    Returns:
        The divisor of each rotary frequency, [width / 2], if the model needs one.

    Raises:
        UserError: if llama.cpp cannot compute this embedding.
    """
    rope, width = rope_of(config), head_dim_of(config)
    if not rope:
        return None
    kind, base = rope.get("rope_type", "default"), rope["rope_theta"]
    if kind == "dynamic" and rope.get("alpha"):  # Hunyuan: a larger base
        kind, base = "default", base * rope["alpha"] ** (width / (width - 2))
    if kind == "dynamic":  # within the model's context, transformers scales nothing
        kind = "default"
    rotated = rotary_width(config)
    writer.add_rope_freq_base(base)
    writer.add_rope_dimension_count(rotated if architecture.partial_rope else width)
    if window := config.rope_parameters.get("sliding_attention"):
        if window.get("rope_type", "default") != "default":
            raise UserError(
                "Scaled rotary frequencies in layers with a sliding window cannot be written as "
                "GGUF; use safetensors."
            )
        writer.add_rope_freq_base_swa(window["rope_theta"])
    whole = rotated == width or architecture.partial_rope
    if kind == "linear" and whole:
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
        return None
    if kind == "yarn" and whole:
        _add_yarn(writer, config, architecture)
        return None
    if kind == "default" and whole:
        return None
    if kind in ("default", "llama3", "proportional") and architecture.rope_factors:
        return _divisors(config, rope, width, rotated)
    raise UserError(
        f"llama.cpp's {writer.arch} has no rotary embedding of type '{kind}'"
        f"{'' if whole else ' for a part of a head'}; use safetensors."
    )


def rope_of(config: Any) -> dict[str, Any]:
    """The settings of the rotary embedding; of the layers without a window, if layers differ. Empty
    if there is none."""
    rope: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    return rope.get("full_attention", rope)


def rotary_width(config: Any) -> int:
    """How many rows of a head are rotated."""
    rope = rope_of(config)
    # "proportional" keeps the frequencies of whole heads, and stops some of them.
    share = 1.0 if rope.get("rope_type") == "proportional" else rope.get("partial_rotary_factor", 1)
    return int(head_dim_of(config) * share)


def _divisors(config: Any, rope: dict[str, Any], width: int, rotated: int) -> Tensor:
    """llama.cpp's frequencies, base^(-2i / width), divided by those of transformers."""
    kind, base = rope.get("rope_type", "default"), rope["rope_theta"]
    theirs = base ** -(torch.arange(0, width, 2) / width)
    if kind == "default":
        wanted = base ** -(torch.arange(0, rotated, 2) / rotated)
    elif kind == "proportional":
        wanted = theirs[: int(rope["partial_rotary_factor"] * width // 2)] / rope.get("factor", 1)
    else:
        wanted, _ = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    divisors = torch.full((width // 2,), UNROTATED)
    divisors[: len(wanted)] = theirs[: len(wanted)] / wanted
    return divisors


def _add_yarn(writer: GGUFWriter, config: Any, architecture: Architecture) -> None:
    rope = rope_of(config)
    betas = rope.get("beta_fast") or 32, rope.get("beta_slow") or 1
    if betas != (32, 1) and not architecture.yarn_betas:
        raise UserError(
            f"llama.cpp's {writer.arch} has YaRN only with beta_fast 32 and beta_slow 1; use "
            "safetensors."
        )
    _, factor = ROPE_INIT_FUNCTIONS["yarn"](config, torch.device("cpu"))
    scale = rope["factor"] or (
        config.max_position_embeddings / rope["original_max_position_embeddings"]
    )
    writer.add_rope_scaling_type(RopeScalingType.YARN)
    writer.add_rope_scaling_factor(scale)
    writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    writer.add_rope_scaling_yarn_beta_fast(betas[0])
    writer.add_rope_scaling_yarn_beta_slow(betas[1])
    if architecture.latent:
        # llama.cpp scales the attention by it, as transformers does.
        spread = rope.get("mscale_all_dim")
        if not spread or rope.get("mscale") != spread or rope.get("attention_factor"):
            raise UserError(
                "llama.cpp has YaRN in latent attention only with mscale = mscale_all_dim; use "
                "safetensors."
            )
        writer.add_rope_scaling_yarn_log_mul(0.1 * spread)
        return
    writer.add_rope_scaling_attn_factors(factor / (0.1 * math.log(scale) + 1))
