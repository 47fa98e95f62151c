"""The shape of a pruned decoder, and its configuration."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from huggingface_hub.errors import StrictDataclassError

from lrc.model.families import family_of
from lrc.model.shapes import expert_count, expert_setting, head_dim_of, layers_differ
from lrc.system.errors import UserError


@dataclass(frozen=True)
class PrunedShape:
    """The parts of a decoder's shape that pruning changes. Query heads are removed with their
    key/value head, and head_dim never changes."""

    layers: int
    hidden: int
    kv_heads: int
    neurons: int
    """Width of the dense FFNs; 0 if the family has none."""
    experts: int = 0
    """Routed experts of a layer; 0 if the family has none."""


class Configured(Protocol):
    """What has a configuration: a model or a teacher."""

    @property
    def config(self) -> Any:
        """transformers' configuration."""


def shape_of_config(config: Any) -> PrunedShape:
    """The shape of a model, from its configuration; its widest layer's, if the layers differ."""
    layers = config.per_layer_config if layers_differ(config) else [config]
    neurons = family_of(config.model_type).neurons
    return PrunedShape(
        int(config.num_hidden_layers),
        int(config.hidden_size),
        max(int(one.num_key_value_heads or one.num_attention_heads) for one in layers),
        max(int(getattr(one, neurons, None) or 0) for one in layers) if neurons else 0,
        expert_count(config),
    )


def expert_groups(config: Any) -> int:
    """The number of groups, of equal size, that a router first chooses among."""
    return int(getattr(config, "n_group", None) or 1)


def by_layer(config: Any) -> dict[str, list[Any]]:
    """The settings of a configuration that are lists with one value per layer."""
    return {
        name: values
        for name, values in vars(config).items()
        if isinstance(values, list)
        and len(values) == config.num_hidden_layers
        and "layer" in name
        and name != "mlp_only_layers"  # indices of layers
    }


def group_size(config: Any) -> int:
    """Query heads that share a key/value head."""
    return int(config.num_attention_heads) // shape_of_config(config).kv_heads


def pruned_config(
    model: Configured,
    shape: PrunedShape,
    layers: Sequence[int] | None = None,
    tied: bool | None = None,
) -> Any:
    """The configuration of a pruned model: the original one in a new shape, with an explicit
    head_dim.

    Args:
        model: the model to prune.
        shape: the shape to prune to.
        layers: indices of the kept layers; None for the first ones, which is equivalent if all
            layers are of one kind.
        tied: whether the LM head is the embedding; None for the model's own setting.
    """
    source = model.config
    whole = shape_of_config(source)
    config = copy.deepcopy(source)
    if not layers_differ(config):
        config.head_dim = head_dim_of(source)
    kept = range(shape.layers) if layers is None else layers
    for name, values in by_layer(source).items():
        setattr(config, name, [values[layer] for layer in kept])
    config.num_hidden_layers = shape.layers
    if len(kept) < whole.layers:
        move_dense_layers(config, source, kept)
    if shape.kv_heads != whole.kv_heads:
        config.num_attention_heads = shape.kv_heads * group_size(source)
        config.num_key_value_heads = shape.kv_heads
    family = family_of(config.model_type)
    family.set_hidden_size(config, shape.hidden)
    if family.neurons and shape.neurons != whole.neurons:
        setattr(config, family.neurons, shape.neurons)
    if shape.experts and (setting := expert_setting(source)):
        setattr(config, setting, shape.experts)
    config.tie_word_embeddings = source.tie_word_embeddings if tied is None else tied
    forget_origin(config)
    return config


def move_dense_layers(config: Any, source: Any, kept: Sequence[int]) -> None:
    """Let the kept layers of a model with experts have those that they had, where its configuration
    names the layers without by their place.

    Args:
        config: the configuration of the kept layers.
        source: the model's.
        kept: indices of the kept layers.
    """
    for name in ("first_k_dense_replace", "num_dense_layers"):
        if isinstance(first := getattr(source, name, None), int):
            setattr(config, name, sum(layer < first for layer in kept))
    if getattr(source, "moe_layer_interval", None) == 1:
        first, last = source.moe_layer_start_index, source.moe_layer_end_index
        config.moe_layer_start_index = sum(layer < first for layer in kept)
        config.moe_layer_end_index = sum(layer <= last for layer in kept) - 1
    if (step := getattr(source, "decoder_sparse_step", None)) is not None:
        dense = {layer for layer in kept if (layer + 1) % step or layer in source.mlp_only_layers}
        config.decoder_sparse_step = 1
        config.mlp_only_layers = [place for place, layer in enumerate(kept) if layer in dense]


def check_config(config: Any) -> None:
    """Refuse a derived configuration that its own class refuses, which no other program could load.

    Raises:
        UserError: if so, with the reason of the class.
    """
    try:
        config.validate()
    except StrictDataclassError as error:
        reason = str(error.__cause__ or error).strip().rstrip(".")
        raise UserError(
            f"{config.model_type} models cannot have this shape: {reason}. Choose another one."
        ) from None


def forget_origin(config: Any) -> None:
    """Remove from a copied configuration what is true only of the original model."""
    origin = "_name_or_path", "_model_name_or_path", "auto_map", "custom_pipelines"
    for left_over in ("quantization_config", *origin):
        if hasattr(config, left_over):
            delattr(config, left_over)
