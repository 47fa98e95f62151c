"""The teacher with fewer layers, heads, neurons and experts, of which a student has the low-rank
weights.

Its readers are rows of the teacher's, taken when they are asked for. Only the writers of pruned
branches have values of their own, W_T C [d_T, kept]. C [all, kept] is not stored: it has
all / d_T times as many numbers, and reaches no other students.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import ceil

import torch
from torch import Tensor, nn

from lrc.model.families.base import ROUTER, Branch, Experts, module_of
from lrc.model.kept_units import KeptUnits, unit_slices
from lrc.model.layout import LinearSite
from lrc.model.pruned_shape import (
    PrunedShape,
    check_config,
    expert_groups,
    group_size,
    pruned_config,
    shape_of_config,
)
from lrc.model.shapes import attention_layers, head_dim_of, layers_differ
from lrc.model.student import kept_layers, student_shape
from lrc.model.teacher import Teacher
from lrc.recipe.sections import Keep, StudentSection, Units
from lrc.system.errors import UserError


@dataclass(frozen=True, kw_only=True)
class PrunedTeacher(Teacher):
    """A pruned teacher. Its layers and parameters have the names of the student's.

    `model` has the modules of the pruned shape; the weights of its layers are on the meta device.
    """

    original: Teacher
    """The whole teacher."""
    kept: KeptUnits
    """What is kept of it."""
    solved: dict[str, nn.Parameter]
    """The writers W_T C [d_T, kept] by name: zero until `prune` solves them."""

    @property
    def whole(self) -> Teacher:
        return self.original

    @property
    def kept_layers(self) -> Sequence[int]:
        return self.kept.layers

    @property
    def writers(self) -> dict[str, nn.Parameter]:
        return self.solved

    def whole_site(self, site: LinearSite) -> LinearSite:
        return LinearSite(self.kept.layers[site.layer], site.name)

    def kept_outputs(self, site: LinearSite) -> Tensor | None:
        device = self.model.get_input_embeddings().weight.device
        return None if self.layout.writes(site) else self.slices(site, device)[0]

    @property
    def sharded(self) -> bool:
        return self.original.sharded

    def keep(self, names: Iterable[str]) -> None:
        self.original.keep(self._place(name)[1] for name in names if name not in self.solved)

    def parameter(self, name: str) -> Tensor:
        if name in self.solved:
            return self.solved[name].detach()
        layer, theirs, inside = self._place(name)
        value = self.original.parameter(theirs)
        if layer is None:
            return value
        return self._kept_of(layer, inside, value)

    def _place(self, name: str) -> tuple[int | None, str, str]:
        """The layer of a parameter, None if it is in none, its name in the whole teacher, and the
        part of it inside the layer."""
        prefix = f"{self.family.layers}."
        if not name.startswith(prefix):
            return None, name, name
        number, _, inside = name.removeprefix(prefix).partition(".")
        theirs = self.original.layout.layer(self.kept.layers[int(number)])
        return int(number), f"{theirs}.{inside}", inside

    def units(self, layer: int, branch: Branch) -> tuple[Tensor, int] | None:
        """The kept units of a branch, int64, and how many inputs of its writer each has; None if
        nothing is removed from it."""
        whole, own = shape_of_config(self.original.config), shape_of_config(self.config)
        if has_heads(branch) and own.kv_heads < whole.kv_heads:
            config = self.original.config
            return self.kept.groups[layer], group_size(config) * head_dim_of(config)
        if has_neurons(branch) and own.neurons < whole.neurons:
            return self.kept.neurons[layer], 1
        return None

    @cached_property
    def _known(self) -> dict[tuple[LinearSite, torch.device], tuple[Tensor | None, Tensor | None]]:
        """The slices, by device: a step must not send them there."""
        return {}

    def slices(
        self, site: LinearSite, device: torch.device | None = None
    ) -> tuple[Tensor | None, Tensor | None]:
        """The kept rows and columns of the teacher's linear map at a site, int64; None: all. Those
        of experts have an expert in every row.

        Args:
            site: the linear map.
            device: where to have them; None: on the CPU.
        """
        device = device or torch.device("cpu")
        if (site, device) not in self._known:
            rows, columns = self._slices(site)
            self._known[site, device] = (
                None if rows is None else rows.to(device),
                None if columns is None else columns.to(device),
            )
        return self._known[site, device]

    def _slices(self, site: LinearSite) -> tuple[Tensor | None, Tensor | None]:
        layer, branch = site.layer, self.layout.branch(site)
        if self.kept.experts is not None and branch.has_experts:
            routed = site.name == ROUTER or isinstance(branch.linears[site.name], Experts)
            return self.kept.experts[layer] if routed else None, None
        if self.units(layer, branch) is None:
            return None, None
        groups, neurons = self.kept.groups[layer], self.kept.neurons[layer]
        return unit_slices(self.original.config, site.name, groups, neurons)

    def _kept_of(self, layer: int, name: str, value: Tensor) -> Tensor:
        """The kept part of a parameter or buffer of a layer of the whole teacher, by the name that
        it has inside the layer."""
        rows, columns = self._slices_of(layer, name, value)
        if rows is not None:
            value = value[rows]
        if columns is not None and value.ndim > 1:
            value = value[:, columns]
        return value

    def _slices_of(
        self, layer: int, name: str, value: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        """The kept rows and columns of a parameter or buffer of the whole teacher, on its device;
        None: all."""
        path = name.rpartition(".")[0]
        for branch in self.layout.branches[layer]:
            for linear, place in branch.linears.items():
                if module_of(place) == path:
                    return self.slices(LinearSite(layer, linear), value.device)
            if branch.has_experts and name.startswith(f"{branch.block}."):
                experts = self.slices(LinearSite(layer, ROUTER), value.device)[0]
                own = _tensor(self.model, f"{self.layout.layer(layer)}.{name}")
                differs = [a != b for a, b in zip(own.shape, value.shape, strict=True)]
                if any(differs):  # a bias of the router, in a shape and place of the family
                    return (experts, None) if differs[0] else (None, experts)
        return None, None


def _tensor(model: nn.Module, name: str) -> Tensor:
    """A parameter or buffer of a model."""
    path, _, attribute = name.rpartition(".")
    found: Tensor = getattr(model.get_submodule(path), attribute)
    return found


def has_heads(branch: Branch) -> bool:
    """Whether a branch is attention, with query heads that share key/value heads."""
    return set(branch.writers) == {"o"} and branch.readers.keys() <= {"q", "k", "v", "z", "qkv"}


def has_neurons(branch: Branch) -> bool:
    """Whether a branch is a dense FFN."""
    return list(branch.writers) == ["down"] and not branch.has_experts


def prunes(teacher: Teacher, student: StudentSection) -> bool:
    """Whether a student has fewer layers, heads, neurons or experts than a teacher."""
    whole, own = shape_of_config(teacher.config), student_shape(teacher, student)
    return replace(own, hidden=whole.hidden) != whole


def first_units(teacher: Teacher, student: StudentSection) -> KeptUnits:
    """The units that a recipe names. Where it gives only their number, evenly spaced layers and the
    first heads, neurons and experts, until `prune` chooses."""
    whole, layers = shape_of_config(teacher.config), kept_layers(teacher, student)
    groups = _first(student.kv_heads, whole.kv_heads)
    neurons = _first(student.intermediate_size, whole.neurons)
    every, experts = torch.arange(whole.hidden), None
    if student.experts is not None:
        experts = [_first(student.experts, whole.experts) for _ in layers]
    return KeptUnits(layers, every, [groups for _ in layers], [neurons for _ in layers], experts)


def _first(asked: Units, total: int) -> Tensor:
    if isinstance(asked, Keep):
        return torch.tensor(asked.keep)
    return torch.arange(asked or total)


@torch.no_grad()
def pruned_teacher(teacher: Teacher, kept: KeptUnits) -> PrunedTeacher:
    """A teacher with some units only. Its writers are not solved yet.

    Raises:
        UserError: if its family does not allow it.
    """
    original, source = teacher.whole, teacher.whole.model
    if layers_differ(original.config):
        raise UserError(
            f"The layers of this {original.family.model_type} model have different widths, so none "
            "can be pruned: leave student.layers, student.kv_heads, student.intermediate_size and "
            "student.experts empty."
        )
    config = pruned_config(original, kept.shape, kept.layers)
    with torch.device("meta"):
        model = type(source)(config)
    model.generation_config = source.generation_config
    config._attn_implementation = source.config._attn_implementation
    family = original.family
    for path in (family.embedding, family.final_norm, family.head):
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, source.get_submodule(path))
    found = PrunedTeacher(
        model,
        original.tokenizer,
        family,
        original.name,
        original.files,
        original.notes,
        original=original,
        kept=kept,
        solved={},
    )
    check_pruned(found)
    for layer in range(len(kept.layers)):
        set_buffers(found, layer)
    dtype = torch.promote_types(source.dtype, torch.float32)
    solved = {
        name: nn.Parameter(
            torch.zeros(model.get_parameter(name).shape, dtype=dtype, device=source.device)
        )
        for name in solved_writers(found)
    }
    object.__setattr__(found, "solved", solved)
    return found


def set_buffers(pruned: PrunedTeacher, layer: int) -> None:
    """Give a layer the buffers of the whole teacher's, of the kept units."""
    original, own = pruned.original, pruned.model.get_submodule(pruned.layout.layer(layer))
    theirs = original.model.get_submodule(original.layout.layer(pruned.kept.layers[layer]))
    for name, buffer in theirs.named_buffers():
        path, _, attribute = name.rpartition(".")
        setattr(own.get_submodule(path), attribute, pruned._kept_of(layer, name, buffer))


def solved_writers(pruned: PrunedTeacher) -> list[str]:
    """Names of the writers that take over what others wrote: of pruned branches, and those before
    removed layers."""
    names = []
    for layer, branches in enumerate(pruned.layout.branches):
        for branch in branches:
            before_gap = branch is branches[-1] and group_end(pruned, layer) > 1
            linears = list(branch.writers.values())
            plain = len(linears) == 1 and isinstance(linears[0], str)
            if pruned.units(layer, branch) or (plain and before_gap):
                names.append(f"{pruned.layout.layer(layer)}.{linears[0]}.weight")
    return names


def group_end(pruned: Teacher, layer: int) -> int:
    """How many layers of the whole teacher a kept layer stands for: itself and the removed ones
    after it."""
    ends = [*pruned.kept_layers[1:], pruned.whole.num_layers]
    return ends[layer] - pruned.kept_layers[layer]


def check_pruned(pruned: PrunedTeacher) -> None:
    """Refuse a pruned teacher whose layers are not those of the whole one with fewer units.

    Raises:
        UserError: if a layer is of another kind, or a parameter has another shape than its slice.
    """
    whole, family = pruned.original, pruned.family.model_type
    before, after = shape_of_config(whole.config), shape_of_config(pruned.config)
    branches = [branch for every in pruned.layout.branches for branch in every]
    if after.neurons != before.neurons and not any(map(has_neurons, branches)):
        raise UserError(
            f"No layer of this {family} model has a dense FFN: leave student.intermediate_size "
            "empty."
        )
    if after.experts < before.experts and not whole.layout.has_experts:
        raise UserError(
            f"The experts of this {family} model do not read the hidden states themselves, so none "
            "can be removed: leave student.experts empty."
        )
    attention = attention_layers(whole.config)
    if attention and not set(attention) & set(pruned.kept.layers):
        raise UserError(
            f"None of these layers of a {family} model has attention, but transformers' cache "
            f"needs one: let student.layers keep one that has, such as {attention[0]}."
        )
    check_config(pruned.config)
    for layer, index in enumerate(pruned.kept.layers):
        if pruned.layout.branches[layer] != whole.layout.branches[index]:
            raise UserError(
                f"student.layers cannot remove these layers of a {family} model: its layers are of "
                "several kinds, at fixed places. Keep all layers, or others."
            )
        prefix = pruned.layout.layer(layer)
        own = pruned.model.get_submodule(prefix)
        theirs = whole.model.get_submodule(whole.layout.layer(index))
        if (differing := _differing(theirs, own)) is not None:
            raise UserError(
                f"student.layers cannot remove these layers of a {family} model: layer {layer} of "
                f"the student would have another {differing} than layer {index} of the teacher."
            )
        for name, parameter in own.named_parameters():
            stored = theirs.get_parameter(name)
            rows, columns = pruned._slices_of(layer, name, stored)
            shape = list(stored.shape)
            if rows is not None:
                shape[0] = len(rows)
            if columns is not None and len(shape) > 1:
                shape[1] = len(columns)
            if list(parameter.shape) != shape:
                raise UserError(
                    f"The {name.rpartition('.')[0]} of {family} layers does not consist of heads "
                    "or neurons that can be removed one by one: leave student.kv_heads and "
                    "student.intermediate_size empty."
                )


def _differing(one: nn.Module, other: nn.Module) -> str | None:
    """The name of a setting in which two layers of one class differ apart from sizes; None:
    nothing."""
    for theirs, own in zip(one.modules(), other.modules(), strict=True):
        for name, value in vars(theirs).items():
            simple = isinstance(value, (str, bool, type(None))) or name == "sliding_window"
            public = not name.startswith("_") and name != "training"
            if simple and public and getattr(own, name, None) != value:
                return name
    return None


def asked_shape(teacher: Teacher, student: StudentSection) -> PrunedShape:
    """The shape of a recipe's student.

    Raises:
        UserError: if a size is larger than the teacher's, or a named unit does not exist.
    """
    whole, own = shape_of_config(teacher.config), student_shape(teacher, student)
    for name, asked, ours, theirs in (
        ("intermediate_size", student.intermediate_size, own.neurons, whole.neurons),
        ("kv_heads", student.kv_heads, own.kv_heads, whole.kv_heads),
        ("layers", student.layers, own.layers, whole.layers),
        ("experts", student.experts, own.experts, whole.experts),
    ):
        if asked is not None and not theirs:
            lacking = "experts" if name == "experts" else "dense FFN"
            raise UserError(
                f"{teacher.family.model_type} models have no {lacking}: leave student.{name} empty."
            )
        if ours > theirs:
            raise UserError(
                f"student.{name} is {ours}, but the teacher's is {theirs}: choose at most {theirs}."
            )
        if isinstance(asked, Keep) and asked.keep[-1] >= theirs:
            raise UserError(
                f"student.{name} keeps {asked.keep[-1]}, but the teacher's last is {theirs - 1}."
            )
    if isinstance(student.layers, Keep) and student.layers.keep[0] != 0:
        raise UserError("student.layers must keep layer 0, which reads the embedding.")
    if student.experts is not None:
        _check_experts(teacher, student.experts, own.experts)
    return own


def _check_experts(teacher: Teacher, asked: Units, number: int) -> None:
    """Refuse a number of experts that the router cannot choose from.

    Raises:
        UserError: as it says.
    """
    used, groups = int(teacher.config.num_experts_per_tok), expert_groups(teacher.config)
    if number < used:
        raise UserError(
            f"student.experts is {number}, but each token uses {used}: keep at least {used}."
        )
    if groups == 1:
        return
    chosen = int(teacher.config.topk_group)
    least = groups * max(2, ceil(used / chosen))  # the scores of groups are those of their best two
    if number % groups or number < least:
        raise UserError(
            f"student.experts is {number}, but this router chooses {used} experts from {chosen} of "
            f"{groups} groups of equal size: give a multiple of {groups}, at least {least}."
        )
    if isinstance(asked, Keep):
        size = shape_of_config(teacher.config).experts // groups
        counts = Counter(index // size for index in asked.keep)
        if len(counts) < groups or len(set(counts.values())) > 1:
            raise UserError(
                f"student.experts must keep as many of each of the router's {groups} groups of "
                f"{size}."
            )
