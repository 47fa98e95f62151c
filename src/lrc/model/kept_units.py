"""A plain model that consists of selected parts of another one."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lrc.model.layout import layout_of
from lrc.model.pruned_shape import PrunedShape, group_size, pruned_config, shape_of_config
from lrc.model.shapes import head_dim_of
from lrc.model.student import empty_student


@dataclass(frozen=True)
class KeptUnits:
    """The parts of a model to keep: int64 indices into the model, in their order in the new model.

    Raises:
        ValueError: if the layers' widths differ, so that no plain model can hold them.
    """

    layers: list[int]
    """Kept layers, ascending."""

    hidden: Tensor
    """Kept channels of the residual stream, [d_S]."""

    groups: list[Tensor]
    """Kept key/value heads of each kept layer, each with all its query heads."""

    neurons: list[Tensor]
    """Kept FFN neurons of each kept layer."""

    experts: list[Tensor] | None = None
    """Kept routed experts of each kept layer; None: all, or there are none."""

    def __post_init__(self) -> None:
        for parts in (self.groups, self.neurons, self.experts or self.neurons):
            if len(parts) != len(self.layers) or len({len(part) for part in parts}) != 1:
                raise ValueError("all kept layers must have the same number of heads and neurons")

    @classmethod
    def from_lists(cls, lists: dict[str, Any], hidden: int) -> "KeptUnits":
        """The inverse of `lists`, with all channels of the residual stream."""
        units = {
            key: [torch.tensor(part) for part in lists[key]]
            for key in ("groups", "neurons", "experts")
            if key in lists
        }
        return cls(lists["layers"], torch.arange(hidden), **units)

    def lists(self) -> dict[str, Any]:
        """Layers, heads, neurons and, if some are removed, experts as JSON values."""
        units = {"groups": self.groups, "neurons": self.neurons}
        if self.experts is not None:
            units["experts"] = self.experts
        lists = {key: [part.tolist() for part in parts] for key, parts in units.items()}
        return {"layers": list(self.layers), **lists}

    @property
    def shape(self) -> PrunedShape:
        """The shape of the kept parts."""
        return PrunedShape(
            len(self.layers),
            len(self.hidden),
            len(self.groups[0]),
            len(self.neurons[0]),
            len(self.experts[0]) if self.experts else 0,
        )


def keep_all(model: PreTrainedModel) -> KeptUnits:
    """All parts of a model, as a default for a partial selection."""
    config = model.config
    layers = list(range(config.num_hidden_layers))
    return KeptUnits(
        layers,
        torch.arange(config.hidden_size),
        [torch.arange(config.num_key_value_heads) for _ in layers],
        [torch.arange(shape_of_config(config).neurons) for _ in layers],
    )


def cut(model: PreTrainedModel, kept: KeptUnits, tied: bool | None = None) -> PreTrainedModel:
    """A model of the same class whose weights are the kept slices, in float32 at least.

    Args:
        model: the model to prune; it does not change.
        kept: the parts to keep.
        tied: whether the LM head is the embedding; None for the model's own setting.
    """
    config = pruned_config(model, kept.shape, kept.layers, tied)
    with torch.random.fork_rng(devices=[]):  # transformers draws weights that are not needed
        smaller = empty_student(model, config)
    write_kept(smaller, model, kept)
    return smaller


@torch.no_grad()
def write_kept(smaller: PreTrainedModel, model: PreTrainedModel, kept: KeptUnits) -> None:
    """Write the kept slices of a model into a smaller model of the shape of `kept`, in place."""
    slices = kept_slices(model, kept)
    for name, parameter in smaller.named_parameters():
        source, rows, columns = slices[name]
        value = model.get_parameter(source)
        if rows is not None:
            value = value[rows.to(value.device)]
        if columns is not None:
            value = value[:, columns.to(value.device)]
        parameter.copy_(value)


Slice = tuple[str, Tensor | None, Tensor | None]
"""Name of a parameter of the original model, and its kept rows and columns; None for all."""


def kept_slices(model: PreTrainedModel, kept: KeptUnits) -> dict[str, Slice]:
    """The source of every parameter of a pruned model, by its name in the pruned model."""
    layout = layout_of(model)
    family = layout.family
    found: dict[str, Slice] = {}

    def take(
        path: str, rows: Tensor | None, columns: Tensor | None = None, source: str | None = None
    ) -> None:
        source = source or path
        for name, _ in model.get_submodule(source).named_parameters(recurse=False):
            side = columns if name == "weight" else None  # a bias goes with the rows
            found[f"{path}.{name}"] = f"{source}.{name}", rows, side

    take(family.embedding, None, kept.hidden)
    take(family.head, None, kept.hidden)
    take(family.final_norm, kept.hidden)
    for layer, number in enumerate(kept.layers):
        groups, neurons, hidden = kept.groups[layer], kept.neurons[layer], kept.hidden
        prefix, theirs = layout.layer(layer), layout.layer(number)
        for path, _ in model.get_submodule(theirs).named_modules():  # includes the norms of a head
            if path:
                take(f"{prefix}.{path}", None, None, f"{theirs}.{path}")
        for branch in layout.branches[number]:
            take(f"{prefix}.{branch.norm}", hidden, None, f"{theirs}.{branch.norm}")
            for name, path in (*branch.readers.items(), *branch.writers.items()):
                rows, columns = unit_slices(model.config, name, groups, neurons)
                rows, columns = (hidden if side is None else side for side in (rows, columns))
                take(f"{prefix}.{path}", rows, columns, f"{theirs}.{path}")
    return found


def unit_slices(
    config: Any, name: str, groups: Tensor, neurons: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """The rows and columns of a linear map of attention or FFN that belong to some units, int64;
    None: all.

    Args:
        config: the model's configuration.
        name: the linear map, as in `Branch`.
        groups: key/value heads, each with all its query heads.
        neurons: FFN neurons.
    """
    head_dim = head_dim_of(config)
    width = group_size(config) * head_dim
    if name in ("q", "z"):  # z gates what o reads
        return spread(groups, width), None
    if name in ("k", "v"):
        return spread(groups, head_dim), None
    if name == "o":
        return None, spread(groups, width)
    if name == "down":
        return None, neurons
    if name == "qkv":
        first = int(config.num_attention_heads) * head_dim
        second = first + shape_of_config(config).kv_heads * head_dim
        keys = spread(groups, head_dim)
        return torch.cat((spread(groups, width), keys + first, keys + second)), None
    if name == "gate_up":
        return torch.cat((neurons, neurons + shape_of_config(config).neurons)), None
    return (neurons if name in ("gate", "up") else None), None


def spread(parts: Tensor, width: int) -> Tensor:
    """Indices of the rows of parts that have `width` rows each."""
    return (parts[:, None] * width + torch.arange(width, device=parts.device)).flatten()
