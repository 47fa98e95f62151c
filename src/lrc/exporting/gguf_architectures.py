"""What llama.cpp's architectures compute and which settings they read.

Facts are from llama.cpp's src/models and its converter, read in the version of llama-cpp-python
0.3.36; tests/exporting/test_llama_cpp.py runs every one.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from gguf import ExpertGatingFuncType, GGUFWriter
from transformers import PreTrainedModel

from lrc.model.families import family_of
from lrc.model.families.base import LINEAR
from lrc.model.pruned_shape import expert_groups
from lrc.model.shapes import (
    attention_layers,
    expert_count,
    expert_width_setting,
    head_dim_of,
    layers_differ,
)
from lrc.system.errors import UserError

QKV = frozenset({"attn_q", "attn_k", "attn_v"})
ATTENTION = QKV | {"attn_output"}
ALL = ATTENTION | {"ffn_gate", "ffn_up", "ffn_down"}
"""Tensors of linear maps that may have a bias."""

RECURRENT = ("granitehybrid", "nemotron_h")
"""What runs families whose layers without heads of keys and values have Mamba or an FFN."""

XIELU = ("alpha_n", "alpha_p", "beta", "eps")
"""The numbers of Apertus' activation, one of each in a layer."""


def nothing(_writer: GGUFWriter, _model: PreTrainedModel) -> None:
    """No settings beyond the shape."""


@dataclass(frozen=True)
class Architecture:
    """What llama.cpp computes under one name, where it is not Llama's."""

    activation: str = "silu"
    """The only activation that it computes, by transformers' name."""

    neighbors: bool = False
    """Whether rows of q and k must be reordered: llama.cpp rotates neighboring rows together,
    transformers row i of a head with row i + half the width."""

    partial_rope: bool = False
    """Whether it may rotate only the first rows of each head."""

    rope_factors: bool = False
    """Whether it reads a divisor for each rotary frequency."""

    yarn_betas: bool = False
    """Whether it reads the limits of YaRN's ramp."""

    latent: bool = False
    """Whether its attention is multi-head latent attention."""

    biases: frozenset[str] = frozenset()
    """The tensors that may have a bias."""

    head: str = "optional"
    """`optional`: the embedding is the LM head if there is no other; `required`: it is never;
    `tied`: it always is."""

    window: int | None = None
    """n if every n-th layer has no sliding window, unless the file says which; 0: the file always
    says; None: it has no windows."""

    names: str | None = None
    """The architecture whose tensor names it uses; None: its own."""

    settings: Callable[[GGUFWriter, PreTrainedModel], None] = nothing
    """Writes what it reads beyond the shape."""

    refuses: Callable[[Any], str | None] = lambda _config: None
    """What it cannot compute, as the end of "models with ..."; None: nothing."""


def check_runs(config: Any) -> tuple[str, Architecture]:
    """The architecture that runs a model, and its name.

    Raises:
        UserError: if none does.
    """
    family = family_of(config.model_type)
    if family.gguf is None:
        raise UserError(
            f"No GGUF file can be written of {family.model_type} models (docs/families.md says "
            "why): export to a folder, for transformers or for vLLM with --model-impl transformers."
        )
    name = VARIANTS[family.gguf](config) if family.gguf in VARIANTS else family.gguf
    architecture = ARCHITECTURES[name]
    reason = architecture.refuses(config)
    activation = next(
        found
        for setting in ("hidden_activation", "mlp_hidden_act", "hidden_act")
        if (found := getattr(config, setting, None))
    )
    if activation != architecture.activation:
        reason = f"the activation {activation}, only with {architecture.activation}"
    if architecture.head == "tied" and not config.tie_word_embeddings:
        reason = "an LM head of their own (training with student.tie_projections: true avoids it)"
    if architecture.window is not None and not any(sliding_layers(config)):
        reason = "no sliding window"
    if reason is not None:
        raise UserError(f"llama.cpp's {name} does not run models with {reason}; use safetensors.")
    return name, architecture


def add_shape(writer: GGUFWriter, model: PreTrainedModel, architecture: Architecture) -> None:
    """Write a model's shape, with explicit head widths, since they are not hidden_size / heads."""
    config = model.config
    head_dim = head_dim_of(config)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(ffn_width(config))
    writer.add_head_count(config.num_attention_heads)
    writer.add_layer_norm_rms_eps(getattr(config, family_of(config.model_type).norm_eps))
    if not architecture.latent:
        writer.add_head_count_kv(kv_heads(config))
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    _add_window(writer, config, architecture)
    _add_experts(writer, config)
    architecture.settings(writer, model)


def ffn_width(config: Any) -> int | list[int]:
    """The width of the dense FFN, or of an expert if there is none; of each layer if a layer is a
    single branch."""
    if config.model_type == "nemotron_h":
        widths = {"mlp": config.intermediate_size, "moe": config.moe_intermediate_size}
        return [widths.get(kind, 0) for kind in config.layer_types]
    names = [str(family_of(config.model_type).neurons), "moe_intermediate_size"]
    if expert_count(config):
        names.insert(0, "intermediate_size")  # Granite's, whose FFN is a shared expert
    return next(int(width) for name in names if (width := getattr(config, name, None)))


def expert_width(config: Any) -> int:
    """The width of an expert."""
    return int(getattr(config, expert_width_setting(config)))


def kv_heads(config: Any) -> int | list[int]:
    """The number of heads of keys and values; of each layer if layers differ."""
    if layers_differ(config):
        return [int(layer.num_key_value_heads) for layer in config.per_layer_config]
    heads = int(config.num_key_value_heads)
    if family_of(config.model_type).gguf not in RECURRENT:
        return heads
    attention = attention_layers(config)
    return [heads if layer in attention else 0 for layer in range(config.num_hidden_layers)]


def sliding_layers(config: Any) -> list[bool]:
    """Which layers have a sliding window."""
    layers = config.num_hidden_layers
    if getattr(config, "sliding_window", None) is None:
        return [False] * layers
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * layers
    return [kind == "sliding_attention" for kind in kinds]


def _add_window(writer: GGUFWriter, config: Any, architecture: Architecture) -> None:
    slides = sliding_layers(config)
    if architecture.window is None:
        return
    writer.add_sliding_window(config.sliding_window)
    period = architecture.window
    if period == 0 or slides != [(layer + 1) % period != 0 for layer in range(len(slides))]:
        writer.add_sliding_window_pattern(slides)


def _add_experts(writer: GGUFWriter, config: Any) -> None:
    if not (count := expert_count(config)):
        return
    writer.add_expert_count(count)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_feed_forward_length(expert_width(config))
    if shared := getattr(config, "shared_expert_intermediate_size", None):
        writer.add_expert_shared_feed_forward_length(shared)


# ---------------------------------------------------------------- settings of one architecture


def gemma2_settings(writer: GGUFWriter, model: PreTrainedModel) -> None:
    config = model.config
    writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    writer.add_final_logit_softcapping(config.final_logit_softcapping)


def gemma3_settings(writer: GGUFWriter, model: PreTrainedModel) -> None:
    config = model.config
    if config.final_logit_softcapping:
        writer.add_final_logit_softcapping(config.final_logit_softcapping)


def gemma4_settings(writer: GGUFWriter, model: PreTrainedModel) -> None:
    config = model.config
    gemma3_settings(writer, model)
    narrow = min(layer.head_dim for layer in config.per_layer_config)
    writer.add_key_length_swa(narrow)
    writer.add_value_length_swa(narrow)
    writer.add_rope_dimension_count_swa(narrow)
    writer.add_embedding_length_per_layer_input(0)
    writer.add_shared_kv_layers(0)


def apertus_settings(writer: GGUFWriter, model: PreTrainedModel) -> None:
    """The numbers of the activation, of each layer."""
    layers = model.model.layers
    for name in XIELU:
        values = [float(getattr(layer.mlp.act_fn, name)) for layer in layers]
        getattr(writer, f"add_xielu_{name}")(values)


def granite_settings(writer: GGUFWriter, model: PreTrainedModel) -> None:
    config = model.config
    writer.add_attention_scale(config.attention_multiplier)
    writer.add_embedding_scale(config.embedding_multiplier)
    writer.add_residual_scale(config.residual_multiplier)
    writer.add_logit_scale(config.logits_scaling)
    writer.add_rope_scaling_finetuned(rotates(config))


def rotates(config: Any) -> bool:
    """Whether a Granite model has a rotary embedding."""
    return bool(getattr(config, "position_embedding_type", "rope") == "rope")


def granite_swa_settings(writer: GGUFWriter, model: PreTrainedModel) -> None:
    config = model.config
    granite_settings(writer, model)
    pattern = [theta != 0 for theta in config.layer_rope_theta]
    writer.add_array(f"{writer.arch}.attention.rope_pattern", pattern)


def mistral3_settings(writer: GGUFWriter, model: PreTrainedModel) -> None:
    config = model.config
    if scale := config.rope_parameters.get("llama_4_scaling_beta"):
        writer.add_attn_temperature_scale(scale)


def routed_experts(
    writer: GGUFWriter, model: PreTrainedModel, gating: ExpertGatingFuncType | None = None
) -> None:
    """DeepSeek V3's router, some dense layers before, and a shared expert. Others have other names
    for its settings. Weights of another gating are not divided by their sum."""
    config = model.config

    def first(default: Any, *names: str) -> Any:
        return next((getattr(config, name) for name in names if hasattr(config, name)), default)

    shared = first(0, "n_shared_experts", "num_shared_experts")
    writer.add_leading_dense_block_count(experts_of_layers(config).index(True))
    writer.add_expert_shared_count(shared)
    width = first(shared * expert_width(config), "moe_shared_expert_intermediate_size")
    writer.add_expert_shared_feed_forward_length(width)
    writer.add_expert_weights_scale(first(1.0, "routed_scaling_factor", "route_scale"))
    writer.add_expert_weights_norm(gating is None and bool(first(True, "norm_topk_prob")))
    writer.add_expert_gating_func(gating or ExpertGatingFuncType.SIGMOID)
    if (groups := expert_groups(config)) > 1:
        writer.add_expert_group_count(groups)
        writer.add_expert_group_used_count(config.topk_group)


def experts_of_layers(config: Any) -> list[bool]:
    """Which layers have experts."""
    branches = family_of(config.model_type).branches
    return [
        any(branch.has_experts for branch in branches(config, layer))
        for layer in range(config.num_hidden_layers)
    ]


def ernie_experts(writer: GGUFWriter, model: PreTrainedModel) -> None:
    config = model.config
    writer.add_interleave_moe_layer_step(1)
    writer.add_leading_dense_block_count(experts_of_layers(config).index(True))
    writer.add_expert_shared_count(config.moe_num_shared_experts)
    width = config.moe_num_shared_experts * config.moe_intermediate_size
    writer.add_expert_shared_feed_forward_length(width)


def hunyuan_experts(writer: GGUFWriter, model: PreTrainedModel) -> None:
    writer.add_expert_shared_feed_forward_length(model.config.intermediate_size)


def granite_experts(writer: GGUFWriter, model: PreTrainedModel) -> None:
    granite_settings(writer, model)
    if shared := getattr(model.config, "shared_intermediate_size", None):
        writer.add_expert_shared_feed_forward_length(shared)


def latent_settings(writer: GGUFWriter, model: PreTrainedModel) -> None:
    """llama.cpp attends in the space of the latent keys, with one head of keys and values."""
    config = model.config
    writer.add_head_count_kv(1)
    writer.add_key_length(config.kv_lora_rank + config.qk_rope_head_dim)
    writer.add_value_length(config.kv_lora_rank)
    writer.add_key_length_mla(config.qk_nope_head_dim + config.qk_rope_head_dim)
    writer.add_value_length_mla(config.v_head_dim)
    writer.add_kv_lora_rank(config.kv_lora_rank)
    if config.q_lora_rank is not None:
        writer.add_q_lora_rank(config.q_lora_rank)
    if hasattr(config, "n_routed_experts"):
        softmax = config.model_type == "deepseek_v2"
        routed_experts(writer, model, ExpertGatingFuncType.SOFTMAX if softmax else None)
        return
    writer.add_leading_dense_block_count(config.num_hidden_layers)
    writer.add_expert_feed_forward_length(config.intermediate_size)
    writer.add_expert_shared_count(0)


def attention_interval(config: Any) -> int:
    """n if the first layer with attention is the n-th; one more than layers if there is none."""
    return int([*config.layer_types, "full_attention"].index("full_attention")) + 1


def delta_net_settings(writer: GGUFWriter, model: PreTrainedModel) -> None:
    config = model.config
    writer.add_ssm_conv_kernel(config.linear_conv_kernel_dim)
    writer.add_ssm_state_size(config.linear_key_head_dim)
    writer.add_ssm_group_count(config.linear_num_key_heads)
    writer.add_ssm_time_step_rank(config.linear_num_value_heads)
    writer.add_ssm_inner_size(config.linear_value_head_dim * config.linear_num_value_heads)
    writer.add_full_attention_interval(attention_interval(config))


def qwen35_settings(writer: GGUFWriter, model: PreTrainedModel) -> None:
    config = model.config
    delta_net_settings(writer, model)
    sections = config.rope_parameters.get("mrope_section", [11, 11, 10])
    writer.add_rope_dimension_sections([*sections, 0])


def mamba_settings(writer: GGUFWriter, model: PreTrainedModel) -> None:
    """The sizes of the Mamba layers, which are all alike."""
    block: Any = next(module for module in model.modules() if hasattr(module, "ssm_state_size"))
    writer.add_ssm_conv_kernel(block.conv_kernel_size)
    writer.add_ssm_inner_size(block.out_proj.in_features)
    writer.add_ssm_state_size(block.ssm_state_size)
    writer.add_ssm_time_step_rank(block.num_heads)
    writer.add_ssm_group_count(block.n_groups)


def granite_hybrid_settings(writer: GGUFWriter, model: PreTrainedModel) -> None:
    granite_experts(writer, model)
    mamba_settings(writer, model)


def nemotron_settings(writer: GGUFWriter, model: PreTrainedModel) -> None:
    config = model.config
    mamba_settings(writer, model)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
    if any(experts_of_layers(config)):
        routed_experts(writer, model)


# ---------------------------------------------------------------- refusals of one architecture


def unsummed_experts(config: Any) -> str | None:
    """llama.cpp always divides the weights of the chosen experts by their sum."""
    return None if config.norm_topk_prob else "norm_topk_prob: false"


def dense_layers(config: Any) -> str | None:
    """llama.cpp takes experts in every layer."""
    if config.mlp_only_layers or config.decoder_sparse_step != 1:
        return "dense layers between their experts"
    return unsummed_experts(config)


def odd_delta_net(config: Any) -> str | None:
    """llama.cpp takes attention in every n-th layer, and one width for keys and values."""
    interval = attention_interval(config)
    kinds = ["linear_attention", "full_attention"]
    regular = [kinds[(layer + 1) % interval == 0] for layer in range(config.num_hidden_layers)]
    if config.layer_types != regular:
        return "an irregular order of attention and delta net layers"
    if config.linear_key_head_dim != config.linear_value_head_dim:
        return "delta nets whose keys and values differ in width"
    return dense_layers(config) if hasattr(config, "mlp_only_layers") else None


def scattered_experts(config: Any) -> str | None:
    """llama.cpp takes experts in all layers after the first ones."""
    found = experts_of_layers(config)
    if True not in found:
        return "no experts in any layer"
    return "dense layers between their experts" if found != sorted(found) else None


def fewer_keys(config: Any) -> str | None:
    if config.num_key_value_heads != config.num_attention_heads:
        return "fewer heads of keys and values than of queries"
    return scattered_experts(config)


def odd_trinity(config: Any) -> str | None:
    fourth = [(layer + 1) % 4 != 0 for layer in range(config.num_hidden_layers)]
    if sliding_layers(config) != fourth:
        return "windows in other layers than all but every fourth"
    return scattered_experts(config) if config.mup_enabled else "embeddings without a scale"


def odd_mamba(config: Any) -> str | None:
    """llama.cpp bounds no time step from above, and normalizes after the gate."""
    if config.time_step_limit[1] != float("inf"):
        return "time steps that are bounded"
    if getattr(config, "mamba_rms_norm", False) and config.mamba_norm_before_gate:
        return "a norm before the gate of Mamba layers"
    return None


def odd_granite_hybrid(config: Any) -> str | None:
    """llama.cpp takes Mamba layers twice as wide as the hidden size."""
    if config.mamba_expand != 2:
        return "Mamba layers of another width than twice the hidden size"
    return odd_mamba(config)


def unrotated(config: Any) -> str | None:
    return None if rotates(config) else "no rotary embedding"


def two_ffns(config: Any) -> str | None:
    if {"mlp", "moe"} <= set(config.layer_types):
        return "dense layers beside those with experts"
    if "moe" in config.layer_types and config.moe_latent_size is not None:
        return "experts that read a latent"
    if LINEAR not in config.layer_types:
        return "no Mamba layer"
    return odd_mamba(config)


def odd_latent(config: Any) -> str | None:
    if getattr(config, "topk_method", "greedy") != "greedy":
        return "experts chosen by groups of the best one"
    if hasattr(config, "n_routed_experts") and (scattered := scattered_experts(config)):
        return scattered
    if not getattr(config, "rope_interleave", True):
        return "latent attention that rotates halves (rope_interleave: false)"
    if (config.q_lora_rank is None) != (config.num_hidden_layers in (26, 27)):
        return "q_lora_rank in 26 or 27 layers, or without it in another number of layers"
    return None


def rotates_odd_layers(config: Any) -> str | None:
    """llama.cpp leaves out the rotary embedding of every fourth layer."""
    fourth = [int((layer + 1) % 4 != 0) for layer in range(config.num_hidden_layers)]
    return None if config.no_rope_layers == fourth else "rotary embedding in unusual layers"


def several_bases(config: Any) -> str | None:
    thetas = {theta for theta in config.layer_rope_theta if theta}
    if thetas != {config.rope_parameters["rope_theta"]}:
        return "several bases of the rotary embedding"
    return None


def no_softcap(config: Any) -> str | None:
    if config.attn_logit_softcapping and config.final_logit_softcapping:
        return None
    return "logits that are not capped"


LLAMA = Architecture(neighbors=True, rope_factors=True, biases=ALL)
GRANITE = replace(LLAMA, settings=granite_settings)
GEMMA = Architecture(activation="gelu_pytorch_tanh", head="tied")
QWEN3_NEXT = Architecture(partial_rope=True, settings=delta_net_settings, refuses=odd_delta_net)
QWEN3_5 = replace(QWEN3_NEXT, settings=qwen35_settings)
NEMOTRON_H = Architecture(
    activation="relu2", biases=ALL, settings=nemotron_settings, refuses=two_ffns
)

ARCHITECTURES = {
    "llama": LLAMA,
    "mistral3": replace(LLAMA, yarn_betas=True, settings=mistral3_settings),
    "smollm3": Architecture(neighbors=True, biases=ALL, refuses=rotates_odd_layers),
    "granite": GRANITE,
    "granite_swa": replace(
        GRANITE,
        names="granite",
        window=0,
        settings=granite_swa_settings,
        refuses=several_bases,
    ),
    "arcee": Architecture(activation="relu2", neighbors=True, rope_factors=True),
    "apertus": Architecture(
        activation="xielu",
        rope_factors=True,
        biases=ATTENTION,
        head="required",
        settings=apertus_settings,
    ),
    "granitemoe": replace(GRANITE, settings=granite_experts, refuses=unrotated),
    "granitehybrid": replace(GRANITE, settings=granite_hybrid_settings, refuses=odd_granite_hybrid),
    "falcon-h1": Architecture(
        rope_factors=True, head="required", settings=mamba_settings, refuses=odd_mamba
    ),
    "nemotron_h": NEMOTRON_H,
    "nemotron_h_moe": NEMOTRON_H,
    "ernie4_5": Architecture(),
    "ernie4_5-moe": Architecture(settings=ernie_experts, refuses=scattered_experts),
    "seed_oss": Architecture(biases=QKV),
    "hunyuan-dense": Architecture(),
    "hunyuan-moe": Architecture(settings=hunyuan_experts),
    "qwen3": Architecture(),
    "qwen3moe": Architecture(refuses=dense_layers),
    "qwen3next": QWEN3_NEXT,
    "qwen35": QWEN3_5,
    "qwen35moe": QWEN3_5,
    "gemma": GEMMA,
    "gemma2": replace(GEMMA, window=2, settings=gemma2_settings, refuses=no_softcap),
    "gemma3": replace(GEMMA, head="optional", window=6, settings=gemma3_settings),
    "gemma4": replace(
        GEMMA, head="optional", window=0, rope_factors=True, settings=gemma4_settings
    ),
    "gpt-oss": Architecture(
        biases=ATTENTION
        | {f"ffn_{part}" for part in ("gate_inp", "gate_exps", "up_exps", "down_exps")},
        head="required",
        window=2,
    ),
    "glm4": Architecture(partial_rope=True, biases=QKV),
    "glm4moe": Architecture(
        partial_rope=True, biases=QKV, settings=routed_experts, refuses=scattered_experts
    ),
    "dots1": Architecture(head="required", settings=routed_experts, refuses=fewer_keys),
    "exaone-moe": Architecture(
        head="required",
        rope_factors=True,
        window=4,
        settings=routed_experts,
        refuses=scattered_experts,
    ),
    "minimax-m2": Architecture(head="required", partial_rope=True, settings=routed_experts),
    "afmoe": Architecture(window=4, settings=routed_experts, refuses=odd_trinity),
    "deepseek2": Architecture(latent=True, settings=latent_settings, refuses=odd_latent),
}
"""llama.cpp's architectures by name; `Family.gguf` says which one runs a family."""


def granite_of_layers(config: Any) -> str:
    """llama.cpp's hybrid needs a Mamba layer."""
    if LINEAR in config.layer_types:
        return "granitehybrid"
    return "granitemoe" if config.num_local_experts else "granite"


def nemotron_of_layers(config: Any) -> str:
    return "nemotron_h_moe" if any(experts_of_layers(config)) else "nemotron_h"


VARIANTS = {"granitehybrid": granite_of_layers, "nemotron_h": nemotron_of_layers}
"""What an architecture of `Family.gguf` is called for a configuration."""
