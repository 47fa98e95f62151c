"""A plain model that holds chosen parts of another one."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lrc.baselines.pruning.shape import PrunedShape, group_size, pruned_config
from lrc.model.families import Family
from lrc.model.shapes import head_dim_of
from lrc.model.student import empty_student


@dataclass(frozen=True)
class KeptUnits:
    """The parts of a model that stay, by the model's own numbers, each int64 and in the order that
    they are to have.

    Raises:
        ValueError: the layers' widths differ, so that no plain model can hold them.
    """

    layers: list[int]
    """KeptUnits layers, ascending."""

    hidden: Tensor
    """KeptUnits channels of the residual stream, [d_S]."""

    groups: list[Tensor]
    """KeptUnits key/value heads of each kept layer; every one brings all its query heads."""

    neurons: list[Tensor]
    """KeptUnits FFN neurons of each kept layer."""

    def __post_init__(self) -> None:
        for parts in (self.groups, self.neurons):
            if len(parts) != len(self.layers) or len({len(part) for part in parts}) != 1:
                raise ValueError("every kept layer needs as many heads and neurons as the others")

    @property
    def shape(self) -> PrunedShape:
        """The shape of what is kept."""
        layers, hidden = len(self.layers), len(self.hidden)
        return PrunedShape(layers, hidden, len(self.groups[0]), len(self.neurons[0]))


def keep_all(model: PreTrainedModel) -> KeptUnits:
    """All parts of a model, to replace some of them."""
    config = model.config
    layers = list(range(config.num_hidden_layers))
    return KeptUnits(
        layers,
        torch.arange(config.hidden_size),
        [torch.arange(config.num_key_value_heads) for _ in layers],
        [torch.arange(config.intermediate_size) for _ in layers],
    )


def cut(
    model: PreTrainedModel, family: Family, kept: KeptUnits, tied: bool | None = None
) -> PreTrainedModel:
    """A model of the same class whose weights are the kept slices, in float32 at least.

    Args:
        model: the model to prune; it stays as it is.
        family: its family.
        kept: what stays.
        tied: whether the LM head is the embedding; None: as in the model.
    """
    config = pruned_config(model, kept.shape, kept.layers, tied)
    with torch.random.fork_rng(devices=[]):  # transformers draws weights that are not needed
        smaller = empty_student(model, config)
    write_kept(smaller, model, family, kept)
    return smaller


@torch.no_grad()
def write_kept(
    smaller: PreTrainedModel, model: PreTrainedModel, family: Family, kept: KeptUnits
) -> None:
    """Give a model of the shape of `kept` the kept slices of another model, in place."""
    slices = kept_slices(model, family, kept)
    for name, parameter in smaller.named_parameters():
        source, rows, columns = slices[name]
        value = model.get_parameter(source)
        if rows is not None:
            value = value[rows.to(value.device)]
        if columns is not None:
            value = value[:, columns.to(value.device)]
        parameter.copy_(value)


Slice = tuple[str, Tensor | None, Tensor | None]
"""Name of a parameter of the model that is pruned, its kept rows and columns; None: all."""


def kept_slices(model: PreTrainedModel, family: Family, kept: KeptUnits) -> dict[str, Slice]:
    """Where every parameter of a pruned model comes from, by its name there."""
    head_dim, size = head_dim_of(model.config), group_size(model.config)
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
        keys = _spread(kept.groups[layer], head_dim)
        queries = _spread(kept.groups[layer], size * head_dim)
        neurons, hidden = kept.neurons[layer], kept.hidden
        linears = {
            "q": (queries, hidden),
            "k": (keys, hidden),
            "v": (keys, hidden),
            "o": (hidden, queries),
            "gate": (neurons, hidden),
            "up": (neurons, hidden),
            "down": (hidden, neurons),
        }
        prefix, theirs = f"{family.layers}.{layer}", f"{family.layers}.{number}"
        for path, _ in model.get_submodule(theirs).named_modules():  # norms as wide as a head too
            if path:
                take(f"{prefix}.{path}", None, None, f"{theirs}.{path}")
        for norm in family.norms:
            take(f"{prefix}.{norm}", hidden, None, f"{theirs}.{norm}")
        for name, (rows, columns) in linears.items():
            take(family.linear(layer, name), rows, columns, family.linear(number, name))
    return found


def _spread(parts: Tensor, width: int) -> Tensor:
    """Numbers of the rows of parts that are `width` rows each."""
    return (parts[:, None] * width + torch.arange(width, device=parts.device)).flatten()
