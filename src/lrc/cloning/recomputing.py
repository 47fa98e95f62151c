"""Recompute activations in the backward pass to save memory."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from lrc.model.layout import Layout, LinearSite


def recompute_layers(student: PreTrainedModel) -> None:
    """Make a student rerun its layers in the backward pass (`train.gradient_checkpointing`)."""
    student.activation_checkpointing_enable({"use_reentrant": False})
    for module in student.modules():
        # transformers recomputes layers that are in training mode. The modules inside them,
        # especially dropouts, stay in evaluation mode.
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True


class _Kept:
    """What an FFN keeps of a forward pass, and how it recomputes the rest."""

    def __init__(self, activation: nn.Module, gate: Tensor) -> None:
        self.activation, self.gate = activation, gate.detach()
        self.up: Tensor = torch.zeros(())
        self._activated: Tensor | None = None

    @torch.no_grad()
    def product(self) -> Tensor:
        self._activated = self.activation(self.gate)
        return self._activated * self.up

    @torch.no_grad()
    def activated(self) -> Tensor:
        """The activation. If the product is needed too, it is computed first."""
        activated, self._activated = self._activated, None
        return self.activation(self.gate) if activated is None else activated


def recompute_ffns(student: PreTrainedModel, layout: Layout) -> list[RemovableHandle]:
    """Make the gated FFNs of a student recompute their activations, where it has such FFNs.

    Returns:
        The hooks that do it.
    """
    hooks: list[RemovableHandle] = []
    for layer, branches in enumerate(layout.branches):
        names = list(branches[-1].linears)
        if names == ["gate", "up", "down"] and not branches[-1].has_experts:
            hooks += RecomputedFfn(student, layout, layer).hooks
    return hooks


class RecomputedFfn:
    """Make an FFN, down(activation(gate(x)) * up(x)), recompute the activation and the product in
    the backward pass. It keeps only the outputs of gate and up, which are two of six numbers per
    token and neuron. The cost is one more pass of the activation function and one more product.
    If a fused kernel has both (`lrc.cloning.kernels.liger`), only the product is recomputed here.

    Args:
        student: the model. It must not use `recompute_layers` too.
        layout: its layout.
        layer: the FFN's decoder layer.
    """

    def __init__(self, student: PreTrainedModel, layout: Layout, layer: int) -> None:
        gate, up, down = (layout.linear(LinearSite(layer, n)) for n in ("gate", "up", "down"))
        ffn = student.get_submodule(down.rpartition(".")[0])
        (self._activation,) = (
            child for child in ffn.children() if next(child.parameters(), None) is None
        )
        self.hooks = [
            ffn.register_forward_pre_hook(self._begin),
            student.get_submodule(gate).register_forward_hook(self._read_gate),
            self._activation.register_forward_hook(self._activate),
            student.get_submodule(up).register_forward_hook(self._read_up),
            student.get_submodule(down).register_forward_pre_hook(self._multiply),
            ffn.register_forward_hook(self._end, always_call=True),
        ]
        self._saving: saved_tensors_hooks | None = None
        self._kept: _Kept | None = None
        self._again: dict[tuple[int, int], Callable[[], Tensor]] = {}
        """Functions that recompute a tensor, by its place in memory."""
        self._alive: list[Tensor] = []
        """These tensors, kept so that no other tensor gets their place while the FFN runs."""

    def _begin(self, *_: Any) -> None:
        if not torch.is_grad_enabled():
            return
        self._saving = saved_tensors_hooks(self._pack, self._unpack)
        self._saving.__enter__()

    def _end(self, *_: Any) -> None:
        self._again, self._alive, self._kept = {}, [], None
        if self._saving is not None:
            self._saving.__exit__()
            self._saving = None

    def _read_gate(self, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
        if self._saving is not None:  # false in a backward pass, where the context is closed
            self._kept = _Kept(self._activation, output)

    def _activate(self, _module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        if self._kept is not None:
            self._kept.gate = inputs[0].detach()
            self._forget(output, self._kept.activated)

    def _read_up(self, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
        if self._kept is not None:
            self._kept.up = output.detach()

    def _multiply(self, _module: nn.Module, inputs: tuple[Tensor]) -> None:
        if self._kept is not None:
            self._forget(inputs[0], self._kept.product)

    def _forget(self, tensor: Tensor, again: Callable[[], Tensor]) -> None:
        self._again[_place(tensor)] = again
        self._alive.append(tensor.detach())

    def _pack(self, tensor: Tensor) -> Tensor | tuple[Callable[[], Tensor], torch.Size]:
        again = self._again.get(_place(tensor)) if tensor.is_contiguous() else None
        return tensor if again is None else (again, tensor.shape)

    @staticmethod
    def _unpack(saved: Tensor | tuple[Callable[[], Tensor], torch.Size]) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        again, shape = saved
        return again().view(shape)


def _place(tensor: Tensor) -> tuple[int, int]:
    """Where a tensor begins: its address, or, if it has no memory (`lrc.train.memory`), its storage
    and the offset there."""
    if isinstance(tensor, FakeTensor) or tensor.is_meta:
        return tensor.untyped_storage()._cdata, int(tensor.storage_offset())
    return tensor.data_ptr(), 0
