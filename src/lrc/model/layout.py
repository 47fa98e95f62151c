"""Where the parts of one model are: its family's description applied to its configuration."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from transformers import PreTrainedModel

from lrc.model.families import Family, family_of
from lrc.model.families.base import ATTENTION, FFN, Branch, Experts, module_of


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
    its bias [d]. Experts, [experts, ., .], may have it otherwise."""

    norm: str | None
    """Module path of the norm whose output a reader reads, if there is one."""


class Layout:
    """The paths of a model's parts.

    Args:
        family: the model's family.
        config: the model's configuration.
    """

    def __init__(self, family: Family, config: Any) -> None:
        self.family = family
        self.config = config
        self.num_layers = int(config.num_hidden_layers)
        self.branches = [family.branches(config, layer) for layer in range(self.num_layers)]
        """The branches of each layer."""

    def layer(self, layer: int) -> str:
        """Module path of a layer."""
        return f"{self.family.layers}.{layer}"

    def branch(self, site: LinearSite) -> Branch:
        """The branch of a linear map.

        Raises:
            KeyError: if the layer has no linear map of this name.
        """
        for branch in self.branches[site.layer]:
            if site.name in branch.linears:
                return branch
        raise KeyError(f"layer {site.layer} has no linear map '{site.name}'")

    def sites(self) -> list[LinearSite]:
        """All linear maps of the layers, in the order in which the model uses them."""
        return [
            LinearSite(layer, name)
            for layer, branches in enumerate(self.branches)
            for branch in branches
            for name in branch.linears
        ]

    def names(self) -> list[str]:
        """The names of the linear maps, in the order of their first use."""
        return list(dict.fromkeys(site.name for site in self.sites()))

    def observable(self) -> list[LinearSite]:
        """The linear maps whose outputs belong to tokens: all but the readers of experts, which see
        only the tokens that are routed to them."""
        return [site for site in self.sites() if self.writes(site) or not self.is_stack(site)]

    def is_stack(self, site: LinearSite) -> bool:
        """Whether a linear map is that of stacked experts."""
        return isinstance(self.branch(site).linears[site.name], Experts)

    def linear(self, site: LinearSite) -> str:
        """Module path of a linear map. That of experts is the module that adds up their outputs.

        Raises:
            KeyError: if the layer has no linear map of this name.
        """
        path = module_of(self.branch(site).linears[site.name])
        return f"{self.layer(site.layer)}.{path}"

    def writes(self, site: LinearSite) -> bool:
        """Whether a linear map writes to the residual stream."""
        return site.name in self.branch(site).writers

    def attention(self, layer: int) -> str:
        """Module path of the attention block of a layer."""
        return f"{self.layer(layer)}.{self.branches[layer][0].block}"

    def stream_norms(self) -> Iterator[str]:
        """Module paths of all norms that are as wide as the hidden size, the final one last."""
        for layer, branches in enumerate(self.branches):
            for branch in branches:
                for norm in (branch.norm, branch.after):
                    if norm is not None:
                        yield f"{self.layer(layer)}.{norm}"
        yield self.family.final_norm

    def after_norms(self, first: int = 0) -> list[str]:
        """Module paths of the norms after blocks, from a layer on."""
        return [
            f"{self.layer(layer)}.{branch.after}"
            for layer, branches in enumerate(self.branches)
            for branch in branches
            if branch.after is not None and layer >= first
        ]

    def projected(self, model: PreTrainedModel) -> Iterator[ProjectedParameter]:
        """The projected parameters of the layers of a model."""
        for site in self.sites():
            branch, prefix = self.branch(site), self.layer(site.layer)
            linear, writes = branch.linears[site.name], self.writes(site)
            norm = None if writes or branch.norm is None else f"{prefix}.{branch.norm}"
            if isinstance(linear, Experts):
                yield ProjectedParameter(f"{prefix}.{linear.path}", site, linear.axis, norm)
                if linear.bias is not None:
                    yield ProjectedParameter(f"{prefix}.{linear.bias}", site, -1, None)
                continue
            path = f"{prefix}.{linear}"
            for kind, _ in model.get_submodule(path).named_parameters(recurse=False):
                if kind == "weight" or writes:
                    axis = -2 if writes else -1
                    yield ProjectedParameter(f"{path}.{kind}", site, axis, norm)

    @property
    def has_experts(self) -> bool:
        """Whether some layers have stacked experts."""
        return any(branch.has_experts for branches in self.branches for branch in branches)

    @property
    def is_llamas(self) -> bool:
        """Whether every layer has Llama's attention and FFN, which pruning by heads and neurons
        takes for granted."""
        standard = [list(branch.linears) for branch in (ATTENTION, FFN)]
        return all(
            [list(branch.linears) for branch in branches] == standard
            and not any(branch.has_experts or branch.after for branch in branches)
            for branches in self.branches
        )


def layout_of(model: PreTrainedModel) -> Layout:
    """The layout of a model.

    Raises:
        UserError: if its family is unknown.
    """
    return Layout(family_of(model.config.model_type), model.config)
