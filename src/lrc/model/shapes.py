"""The shape of a model and its number of parameters."""

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from lrc.model.families import FAMILIES
from lrc.model.families.base import LINEAR, ROUTER


@dataclass(frozen=True)
class Shape:
    """What determines a decoder's size."""

    row: dict[str, str | int]
    """Sizes by name, in print order."""

    parameters: int
    """Number of parameters, counting tied weights once."""

    def as_json(self) -> dict[str, str | int]:
        """The sizes by names such as `head_dim`, and the number of parameters as a number."""
        names = str.maketrans(" /", "__")
        row = {name.lower().translate(names): value for name, value in self.row.items()}
        return {**row, "parameters": self.parameters}


def parameters_of(model: PreTrainedModel) -> int:
    """Number of parameters, counting tied weights once."""
    return sum(value.numel() for value in model.parameters())


def shape_of(model: PreTrainedModel) -> Shape:
    """Read the shape of a causal language model."""
    config = model.config
    parameters = parameters_of(model)
    return Shape(
        {
            "class": type(model).__name__,
            "parameters": f"{parameters:,}",
            "hidden size": config.hidden_size,
            "layers": config.num_hidden_layers,
            "heads": config.num_attention_heads,
            "key/value heads": getattr(config, "num_key_value_heads", config.num_attention_heads),
            "head dim": head_dim_of(config),
            **_widths(config),
            "vocabulary": config.vocab_size,
            "tied embedding": "yes" if config.tie_word_embeddings else "no",
        },
        parameters,
    )


def _widths(config: Any) -> dict[str, str | int]:
    """The widths of dense FFNs and of experts, and the number of experts."""
    family = FAMILIES.get(config.model_type)
    dense = family.neurons if family else "intermediate_size"
    width = getattr(config, dense, None) if dense else None
    if not (count := expert_count(config)):
        return {"FFN width": width or "unknown"}
    own = expert_width_setting(config)
    if own == dense:  # every FFN is a mixture
        width = None
    return {
        **({"FFN width": width} if width else {}),
        "experts": count,
        "experts of a token": config.num_experts_per_tok,
        "expert width": getattr(config, own, "unknown"),
    }


def expert_width_setting(config: Any) -> str:
    """The setting that holds the width of a routed expert: that of FFNs, if every FFN is one."""
    own = "moe_intermediate_size"
    return own if getattr(config, own, None) else "intermediate_size"


def expert_setting(config: Any) -> str | None:
    """The setting that holds the number of routed experts; None: there are none."""
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    return next((name for name in names if getattr(config, name, None)), None)


def expert_count(config: Any) -> int:
    """The number of routed experts of a layer; 0 if no layer has any, whatever the setting says."""
    setting, family = expert_setting(config), FAMILIES.get(config.model_type)
    if setting is None:
        return 0
    layers = range(config.num_hidden_layers)
    branches = family and [one for layer in layers for one in family.branches(config, layer)]
    if branches and not any(ROUTER in branch.readers for branch in branches):
        return 0
    return int(getattr(config, setting))


def attention_layers(config: Any) -> list[int]:
    """The layers with attention. Others of a hybrid have Mamba, a delta net or no mixer at all."""
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    return [index for index, kind in enumerate(kinds) if kind not in (LINEAR, "mlp", "moe")]


def layers_differ(config: Any) -> bool:
    """Whether settings such as head_dim differ between the layers of a model."""
    return bool(getattr(config, "is_heterogeneous", False))


def head_dim_of(config: Any) -> int:
    """Width of an attention head in a model's configuration, explicit or derived.

    The widest one if the layers differ.
    """
    if layers_differ(config):
        return max(int(layer.head_dim) for layer in config.per_layer_config)
    explicit = getattr(config, "head_dim", None)
    return int(explicit or config.hidden_size // config.num_attention_heads)
