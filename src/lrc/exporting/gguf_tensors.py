"""Which numbers of a model go into which tensors of a GGUF file.

The gguf package names the tensors. Where llama.cpp stores other matrices than transformers, a rule
says what becomes of a parameter.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import gguf
import torch
from torch import Tensor
from transformers import PreTrainedModel

from lrc.exporting.gguf_architectures import XIELU, Architecture, check_runs
from lrc.exporting.gguf_rope import rotary_width
from lrc.model.layout import Layout, layout_of
from lrc.model.shapes import head_dim_of
from lrc.system.errors import UserError

Change = Callable[[Tensor], Tensor]
"""A part of a parameter, or its numbers in another order."""

Rules = dict[str, dict[str, Change]]
"""The end of a parameter's path -> the ends that gguf's names are for -> what they take of it."""


class GgufTensor(NamedTuple):
    """A tensor of the file."""

    name: str
    """Its name in the file."""
    path: str
    """Path of the parameter that it is from."""
    tensor: Tensor
    """That parameter."""
    change: Change
    """What the tensor takes of it."""


def tensors_of(model: PreTrainedModel) -> Iterator[GgufTensor]:
    """The tensors of a model, tied ones once.

    Raises:
        UserError: if llama.cpp does not run the model, or has no place for a parameter.
    """
    layout = layout_of(model)
    name, architecture = check_runs(model.config)
    known = {text: number for number, text in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(known[architecture.names or name], layout.num_layers)
    rules = rules_of(name, model.config)
    for path, tensor in stored_tensors(model):
        for renamed, change in apply(rules, path).items():
            found = names.get_name(renamed, try_suffixes=(".weight", ".bias"))
            if found is None:  # Nemotron-H, by the names of its first code
                first = renamed.replace("model.", "backbone.", 1)
                found = names.get_name(first, try_suffixes=(".weight", ".bias"))
            if found is None and renamed.endswith("self_attn.sinks.weight"):  # unnamed in some
                found = f"blk.{renamed.split('.')[2]}.attn_sinks.weight"
            if found is None or not _may_be_bias(found, architecture.biases):
                raise UserError(f"llama.cpp's {name} has no place for the parameter '{path}'.")
            yield GgufTensor(
                found, path, tensor, _finish(found, path, change, layout, architecture)
            )
    if architecture.head == "required" and model.config.tie_word_embeddings:
        embedding = f"{layout.family.embedding}.weight"
        (change,) = apply(rules, f"{layout.family.head}.weight").values()
        yield GgufTensor("output.weight", embedding, model.get_parameter(embedding), change)


def stored_tensors(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """The parameters and buffers that a checkpoint has, tied ones once."""
    yield from model.named_parameters()
    stored = model.state_dict()
    yield from ((path, buffer) for path, buffer in model.named_buffers() if path in stored)


def apply(rules: Rules, path: str) -> dict[str, Change]:
    """What becomes of the parameter of a path, by the paths that gguf has names for."""
    for end, parts in rules.items():
        if f".{path}".endswith(f".{end}"):
            return {path.removesuffix(end) + part: change for part, change in parts.items()}
    return {path: same}


BIASES_OF_OTHERS = ("exp_probs_b.bias", "ssm_dt.bias", "ssm_conv1d.bias")
"""Tensors that are called biases, and belong to no linear map."""


def _may_be_bias(name: str, biases: frozenset[str]) -> bool:
    if not name.endswith(".bias") or name.endswith(BIASES_OF_OTHERS):
        return True
    return name.split(".")[-2] in biases


def _finish(
    name: str, path: str, change: Change, layout: Layout, architecture: Architecture
) -> Change:
    """A change, and then what does not depend on where a parameter was stored."""
    config, family = layout.config, layout.family
    part = name.split(".")[-2]
    if family.gain_offset and path.endswith("norm.weight") and "linear_attn" not in path:
        change = then(change, lambda gain: gain + family.gain_offset)
    if architecture.neighbors and part in ("attn_q", "attn_k"):
        heads = config.num_attention_heads if part == "attn_q" else config.num_key_value_heads
        change = then(change, lambda rows: neighbors_from_halves(rows, heads, rotary_width(config)))
    # llama.cpp scales queries by 1 / sqrt(head_dim).
    if part == {"gemma2": "attn_q", "gemma3": "attn_q_norm"}.get(str(family.gguf)):
        change = then(change, lambda queries: queries * query_scale(config))
    return change


def query_scale(config: Any) -> float:
    """Factor of Gemma's queries to give transformers' attention after llama.cpp's own scale.

    llama.cpp takes 46 layers for Gemma 2 27B, 62 for Gemma 3 27B, and hidden_size / heads for the
    squared inverse of their scale.
    """
    theirs = head_dim_of(config)
    if config.num_hidden_layers == {"gemma2": 46, "gemma3_text": 62}[config.model_type]:
        theirs = config.hidden_size // config.num_attention_heads
    return float((theirs / config.query_pre_attn_scalar) ** 0.5)


def same(tensor: Tensor) -> Tensor:
    """All of a parameter, as it is."""
    return tensor


def then(first: Change, second: Change) -> Change:
    """One change after another."""
    return second if first is same else lambda tensor: second(first(tensor))


def half(index: int, axis: int) -> Change:
    """The first or second half along an axis."""
    return lambda tensor: tensor.chunk(2, axis)[index]


def neighbors_from_halves(weight: Tensor, heads: int, rotated: int) -> Tensor:
    """Reorder the rows of q or k, or its bias, for rotary embedding of neighboring rows.

    Args:
        weight: [heads * head_dim, width] or [heads * head_dim]; row i of a head is rotated with row
            i + rotated / 2.
        heads: number of heads.
        rotated: rows of a head that are rotated; the others stay where they are.

    Returns:
        The same rows, with each rotated pair side by side.
    """
    rows = torch.unflatten(weight, 0, (heads, -1))
    pairs = torch.unflatten(rows[:, :rotated], 1, (2, -1)).transpose(1, 2).flatten(1, 2)
    return torch.cat([pairs, rows[:, rotated:]], 1).flatten(0, 1)


def rules_of(architecture: str, config: Any) -> Rules:
    """What becomes of the parameters that llama.cpp stores in another form."""
    rules: Rules = {
        "experts.gate_up_proj": {
            "experts.gate_proj.weight": half(0, -2),
            "experts.up_proj.weight": half(1, -2),
        },
        "experts.down_proj": {"experts.down_proj.weight": same},
        "moe_statics.e_score_correction_bias": {"e_score_correction.bias": torch.squeeze},
        "e_score_correction_bias": {"e_score_correction.bias": same},
        "expert_bias": {"expert_bias.bias": same},
        "layer_scalar": {"layer_scalar.weight": same},
        "self_attn.sinks": {"self_attn.sinks.weight": same},
        **{f"act_fn.{name}": {} for name in XIELU},  # settings
    }
    more = {
        "llama": fused_rules,
        "granite": granite_rules,
        "granitemoe": granite_rules,
        "granitehybrid": granite_hybrid_rules,
        "falcon-h1": falcon_rules,
        "nemotron_h": nemotron_rules,
        "nemotron_h_moe": nemotron_rules,
        "gpt-oss": transposed_rules,
        "deepseek2": latent_rules,
        "qwen3next": qwen3_next_rules,
        "qwen35": qwen35_rules,
        "qwen35moe": qwen35_rules,
    }
    own = more.get(architecture, lambda _config: {})(config)
    return own | {end: parts for end, parts in rules.items() if end not in own}


def fused_rules(config: Any) -> Rules:
    """Phi-3's fused matrices."""
    queries = config.num_attention_heads * head_dim_of(config)
    keys = config.num_key_value_heads * head_dim_of(config)
    sizes = [queries, keys, keys]
    return {
        "qkv_proj.weight": {
            "q_proj.weight": lambda rows: rows.split(sizes)[0],
            "k_proj.weight": lambda rows: rows.split(sizes)[1],
            "v_proj.weight": lambda rows: rows.split(sizes)[2],
        },
        "gate_up_proj.weight": {"gate_proj.weight": half(0, 0), "up_proj.weight": half(1, 0)},
    }


def granite_rules(config: Any) -> Rules:
    """Granite's experts, and the shared one with gate and up in one matrix, which may be all."""
    block = "block_sparse_moe"
    dense = "mlp.shared_expert" if getattr(config, "num_local_experts", 0) else "mlp"
    return {
        f"{block}.router.weight": {f"{block}.router.layer.weight": same},
        f"{block}.experts.gate_up_proj": {
            f"{block}.experts.gate.weight": half(0, -2),
            f"{block}.experts.up.weight": half(1, -2),
        },
        f"{block}.experts.down_proj": {f"{block}.experts.down.weight": same},
        "shared_mlp.input_linear.weight": {
            f"{dense}.gate_proj.weight": half(0, 0),
            f"{dense}.up_proj.weight": half(1, 0),
        },
        "shared_mlp.output_linear.weight": {f"{dense}.down_proj.weight": same},
    }


def mamba_rules(block: str, groups: int) -> Rules:
    """The parameters of Mamba layers that are no linear maps."""
    changes: dict[str, tuple[str, Change]] = {
        "conv1d.weight": ("conv1d.weight", lambda w: w.squeeze(1)),
        "A_log": ("A_log", lambda a: -a.exp()[:, None]),
        "D": ("D", lambda d: d[:, None]),
        "dt_bias": ("dt_proj.bias", same),
        "norm.weight": ("norm.weight", lambda gain: torch.unflatten(gain, 0, (groups, -1))),
    }
    return {f"{block}.{end}": {f"{block}.{new}": c} for end, (new, c) in changes.items()}


def granite_hybrid_rules(config: Any) -> Rules:
    """Granite's FFNs and Mamba layers."""
    return granite_rules(config) | mamba_rules("mamba", config.mamba_n_groups)


def nemotron_rules(config: Any) -> Rules:
    """Its experts have no gate."""
    return {
        "mixer.experts.up_proj": {"mlp.experts.up_proj.weight": same},
        "mixer.experts.down_proj": {"mlp.experts.down_proj.weight": same},
        **mamba_rules("mixer", config.n_groups),
    }


def falcon_rules(config: Any) -> Rules:
    """Falcon-H1's scales, which llama.cpp does not know, become part of the weights."""
    read, wrote = config.attention_in_multiplier, config.attention_out_multiplier
    gate, down = config.mlp_multipliers
    states = config.mamba_n_groups * config.mamba_d_state
    inner = config.mamba_d_ssm or int(config.mamba_expand * config.hidden_size)
    sizes = (inner, inner, states, states, config.mamba_n_heads)
    rows = config.ssm_in_multiplier * torch.cat(
        [torch.full((size, 1), by) for size, by in zip(sizes, config.ssm_multipliers, strict=True)]
    )
    factors: dict[str, float | Tensor] = {
        "embed_tokens.weight": config.embedding_multiplier,
        "lm_head.weight": config.lm_head_multiplier,
        "self_attn.q_proj.weight": read,
        "self_attn.k_proj.weight": read * config.key_multiplier,
        "self_attn.v_proj.weight": read,
        "self_attn.o_proj.weight": wrote,
        "mamba.in_proj.weight": rows,
        "mamba.out_proj.weight": config.ssm_out_multiplier,
        "feed_forward.gate_proj.weight": gate,
        "feed_forward.down_proj.weight": down,
    }
    rules = {end: {end: times(factor)} for end, factor in factors.items()}
    return rules | mamba_rules("mamba", config.mamba_n_groups)


def times(factor: float | Tensor) -> Change:
    """A parameter times a factor."""
    return lambda tensor: tensor * torch.as_tensor(factor, device=tensor.device)


def transposed_rules(_config: Any) -> Rules:
    """gpt-oss' experts, [experts, in, out], with rows of gate and up in turns."""
    return {
        "experts.gate_up_proj": {
            "experts.gate_proj.weight": lambda w: w[..., ::2].mT,
            "experts.up_proj.weight": lambda w: w[..., 1::2].mT,
        },
        "experts.gate_up_proj_bias": {
            "experts.gate_proj.bias": lambda b: b[..., ::2],
            "experts.up_proj.bias": lambda b: b[..., 1::2],
        },
        "experts.down_proj": {"experts.down_proj.weight": lambda w: w.mT},
        "experts.down_proj_bias": {"experts.down_proj.bias": same},
    }


def latent_rules(config: Any) -> Rules:
    """The matrix from latent to keys, transposed, and that to values, by head."""
    heads, width = config.num_attention_heads, config.qk_nope_head_dim
    return {
        "kv_b_proj.weight": {
            "k_b_proj.weight": lambda rows: torch.unflatten(rows, 0, (heads, -1))[:, :width].mT,
            "v_b_proj.weight": lambda rows: torch.unflatten(rows, 0, (heads, -1))[:, width:],
        }
    }


def qwen3_next_rules(config: Any) -> Rules:
    """The delta net's rows of q, k, v and z, which are stored by head of the keys."""
    keys, key = config.linear_num_key_heads, config.linear_key_head_dim
    values = config.linear_num_value_heads // keys * config.linear_value_head_dim

    def parts(rows: Tensor, first: int, last: int) -> Tensor:
        found = torch.split(torch.unflatten(rows, 0, (keys, -1)), [key, key, values, values], 1)
        return torch.cat([part.flatten(0, 1) for part in found[first:last]])

    return {
        "linear_attn.in_proj_qkvz.weight": {
            "linear_attn.in_proj_qkv.weight": lambda rows: parts(rows, 0, 3),
            "linear_attn.in_proj_z.weight": lambda rows: parts(rows, 3, 4),
        },
        "linear_attn.conv1d.weight": {"linear_attn.conv1d.weight": lambda w: w.squeeze(1)},
        "linear_attn.A_log": {"linear_attn.A_log": lambda a: -a.exp()},
        "linear_attn.dt_bias": {"linear_attn.dt_proj.bias": same},
    }


def qwen35_rules(config: Any) -> Rules:
    """The delta net's heads of values: transformers has those of a key side by side, llama.cpp
    those that are alike in their keys."""
    keys = config.linear_num_key_heads
    width = config.linear_value_head_dim
    first = 2 * keys * config.linear_key_head_dim
    """Rows of q and k before those of v."""

    def tiled(tensor: Tensor, width: int, axis: int = 0) -> Tensor:
        heads = torch.unflatten(tensor, axis, (keys, -1, width))
        return heads.transpose(axis, axis + 1).flatten(axis, axis + 2)

    def tail(tensor: Tensor) -> Tensor:
        return torch.cat([tensor[:first], tiled(tensor[first:], width)])

    changes: dict[str, Change] = {
        "in_proj_qkv.weight": tail,
        "in_proj_z.weight": lambda rows: tiled(rows, width),
        "in_proj_a.weight": lambda rows: tiled(rows, 1),
        "in_proj_b.weight": lambda rows: tiled(rows, 1),
        "conv1d.weight": lambda w: tail(w.squeeze(1)),
        "A_log": lambda a: -tiled(a, 1).exp(),
        "out_proj.weight": lambda columns: tiled(columns, width, 1),
    }
    rules: Rules = {f"linear_attn.{n}": {f"linear_attn.{n}": c} for n, c in changes.items()}
    rules["linear_attn.dt_bias"] = {"linear_attn.dt_proj.bias": lambda b: tiled(b, 1)}
    return rules
