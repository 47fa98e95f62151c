"""A teacher whose decoder layers are divided among the processes of a run (`teacher.shard`).

torch's FSDP2 keeps a part of every weight in each process. When a layer runs, it collects the whole
layer and frees it afterwards, so all processes must run the teacher equally often. Hooks see whole
activations. Embedding, final norm and LM head stay whole in every process.

What needs single weights (projections, starts) gets them from the safetensors files. The owner of a
projection keeps the teacher's weights that it multiplies in every step: together, the processes
keep each of them once more. Collecting them would move the whole teacher twice more in every step.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.hooks import remove_hook_from_submodules
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from lrc.model.loading import refuse_not_finite
from lrc.model.teacher import Teacher, load_teacher
from lrc.recipe.sections import TeacherSection
from lrc.system.distributed import World


@dataclass(frozen=True, kw_only=True)
class ShardedTeacher(Teacher):
    """A teacher of which this process has a part of every layer."""

    stored: Mapping[str, Tensor]
    """The whole weights of the layers by name, each read from its file when it is asked for."""
    kept: dict[str, Tensor] = field(default_factory=dict)
    """Those that this process keeps whole."""

    @property
    def sharded(self) -> bool:
        return True

    def parameter(self, name: str) -> Tensor:
        if name in self.kept:
            return self.kept[name]
        if self._divided(name):
            return self.stored[name].to(self.model.device)
        return self.model.get_parameter(name)

    def keep(self, names: Iterable[str]) -> None:
        wanted = set(filter(self._divided, names))
        for name in self.kept.keys() - wanted:
            del self.kept[name]
        for name in sorted(wanted - self.kept.keys()):
            self.kept[name] = self.parameter(name)

    def _divided(self, name: str) -> bool:
        return name.startswith(f"{self.family.layers}.")


def load_sharded(section: TeacherSection, device: torch.device, world: World) -> ShardedTeacher:
    """Load a teacher and divide its decoder layers among the processes. All call this together.

    Every process reads one layer after another through the system's cache of files, all the same
    one at a time: a machine reads its disk once, and no process holds more than one whole layer.

    Args:
        section: a recipe's section.
        device: device of this process.
        world: the processes.

    Raises:
        UserError: as `load_teacher`, or if its files cannot be read by layers.
    """
    teacher = load_teacher(section.model_copy(update={"load": "layers"}), device)
    model, layers = teacher.model, teacher.family.layers
    stored = _stored(model)
    remove_hook_from_submodules(model)
    mesh = init_device_mesh(device.type, (world.size,))
    for index in range(teacher.num_layers):
        world.wait()
        path = f"{layers}.{index}"
        layer = model.get_submodule(path)
        for name, _ in list(layer.named_parameters()):
            parent, _, last = name.rpartition(".")
            value = nn.Parameter(stored[f"{path}.{name}"].to(device), requires_grad=False)
            setattr(layer.get_submodule(parent), last, value)
        refuse_not_finite(teacher.name, layer, path)
        fully_shard(layer, mesh=mesh)
    whole = {value for value in model.parameters() if not isinstance(value, DTensor)}
    fully_shard(model.base_model, mesh=mesh, ignored_params=whole)  # it collects layers in advance
    model.base_model.register_forward_hook(_forget_passes)
    with torch.no_grad():  # FSDP sets itself up in the first pass, and starts replace the layers
        model.base_model(torch.zeros(1, 1, dtype=torch.int64, device=device), use_cache=False)
    return ShardedTeacher(
        model,
        teacher.tokenizer,
        teacher.family,
        teacher.name,
        teacher.files,
        teacher.notes,
        stored=stored,
    )


def _stored(model: PreTrainedModel) -> Mapping[str, Tensor]:
    """accelerate's reader of the weights that stay in their files, by name."""
    hooks = (getattr(module, "_hf_hook", None) for module in model.modules())
    readers = (getattr(hook, "weights_map", None) for hook in hooks)
    found: Mapping[str, Tensor] = next(reader for reader in readers if reader is not None).dataset
    return found


def _forget_passes(base: nn.Module, *_: Any) -> None:
    """Let FSDP forget a pass. It would remember every one until a backward pass."""
    forget = getattr(base, "reset_iter_state", None)  # not in older versions of torch
    if callable(forget):
        forget()
