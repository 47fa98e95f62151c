"""Where the parts of one model are: its family's description applied to its configuration."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from transformers import PreTrainedModel

from lrc.model.families import Family, family_of
from lrc.model.families.base import ATTENTION, FFN


class LinearSite(NamedTuple):
    """A linear map of a decoder layer."""

    layer: int
    name: str
    """Its name among the readers and writers of the layer's branches."""


@dataclass(frozen=True)
class ProjectedParameter:
    """A parameter of a linear map with an axis as long as the hidden size."""

    name: str
    """Its name in the model."""

    site: LinearSite

    axis: int
    """The axis of the hidden size: -1 in a reader's weight [out, d], -2 in a writer's [d, in] and
    its bias [d]."""

    norm: str | None
    """Module path of the norm whose output a reader reads."""


class Layout:
    """The paths of a model's parts.

    Args:
        family: the model's family.
        config: the model's configuration.
    """

    def __init__(self, family: Family, config: Any) -> None:
        self.family = family
        self.num_layers = int(config.num_hidden_layers)
        self.branches = [family.branches(config, layer) for layer in range(self.num_layers)]
        """The branches of each layer."""

    def layer(self, layer: int) -> str:
        """Module path of a layer."""
        return f"{self.family.layers}.{layer}"

    def sites(self) -> list[LinearSite]:
        """All linear maps of the layers, in the order in which the model uses them."""
        return [
            LinearSite(layer, name)
            for layer, branches in enumerate(self.branches)
            for branch in branches
            for name in (*branch.readers, *branch.writers)
        ]

    def names(self) -> list[str]:
        """The names of the linear maps, in the order of their first use."""
        return list(dict.fromkeys(site.name for site in self.sites()))

    def linear(self, site: LinearSite) -> str:
        """Module path of a linear map.

        Raises:
            KeyError: if the layer has no linear map of this name.
        """
        for branch in self.branches[site.layer]:
            for maps in (branch.readers, branch.writers):
                if site.name in maps:
                    return f"{self.layer(site.layer)}.{maps[site.name]}"
        raise KeyError(f"layer {site.layer} has no linear map '{site.name}'")

    def writes(self, site: LinearSite) -> bool:
        """Whether a linear map writes to the residual stream."""
        return any(site.name in branch.writers for branch in self.branches[site.layer])

    def attention(self, layer: int) -> str:
        """Module path of the attention block of a layer."""
        return f"{self.layer(layer)}.{self.branches[layer][0].block}"

    def stream_norms(self) -> Iterator[str]:
        """Module paths of all norms that are as wide as the hidden size, the final one last."""
        for layer, branches in enumerate(self.branches):
            for branch in branches:
                yield f"{self.layer(layer)}.{branch.norm}"
        yield self.family.final_norm

    def projected(self, model: PreTrainedModel) -> Iterator[ProjectedParameter]:
        """The projected parameters of the layers of a model."""
        for layer, branches in enumerate(self.branches):
            prefix = self.layer(layer)
            for branch in branches:
                norm = f"{prefix}.{branch.norm}"
                for name, path in branch.readers.items():
                    weight = f"{prefix}.{path}.weight"
                    yield ProjectedParameter(weight, LinearSite(layer, name), -1, norm)
                for name, path in branch.writers.items():
                    own = model.get_submodule(f"{prefix}.{path}")
                    for kind, _ in own.named_parameters(recurse=False):
                        parameter = f"{prefix}.{path}.{kind}"
                        yield ProjectedParameter(parameter, LinearSite(layer, name), -2, None)

    @property
    def is_llamas(self) -> bool:
        """Whether every layer has Llama's attention and FFN, which pruning by heads and neurons
        takes for granted."""
        names = [{*b.readers, *b.writers} for b in (ATTENTION, FFN)]
        return all(
            [{*b.readers, *b.writers} for b in branches] == names for branches in self.branches
        )


def layout_of(model: PreTrainedModel) -> Layout:
    """The layout of a model.

    Raises:
        UserError: if its family is unknown.
    """
    return Layout(family_of(model.config.model_type), model.config)
