"""Gradient checkpointing, of whole layers or of cheap operations alone."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from lrc.model.families import Family
from lrc.recipe.sections import Checkpointing

_aten = torch.ops.aten
_PRODUCTS = {
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
}


def recompute(student: PreTrainedModel, how: Checkpointing) -> None:
    """Let a student compute activations again in the backward pass, as the recipe says."""
    if not how:
        return
    options: dict[str, Any] = {"use_reentrant": False}
    if how == "elementwise":
        options["context_fn"] = keep_products
    student.activation_checkpointing_enable(options)
    for module in student.modules():
        # transformers recomputes layers that are in training mode; what is in them, dropouts above
        # all, stays in evaluation mode.
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True


def keep_products() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Contexts of torch's checkpointing that keep what matrix products and attention gave.

    Norms, activation functions, rotary embeddings and the differences of the clone terms are
    computed again in the backward pass: a few percent of the time of a step, for about half of
    what a Llama's layer keeps.
    """
    return create_selective_checkpoint_contexts(_policy)  # type: ignore[no-untyped-call]


def _policy(_context: Any, operation: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    if operation in _PRODUCTS:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


@contextmanager
def recompute_inside_ffns(student: PreTrainedModel, family: Family) -> Iterator[None]:
    """While the context is open, let every FFN of a student keep what gate and up give, and neither
    the activation nor the product, which the backward pass forms again from them: two numbers of
    six a token and neuron, for one pass of the activation function and one product.

    Args:
        student: runs forward in the context. Not to be used with `recompute`.
        family: where its parts live.
    """
    hooked = []
    for layer in range(student.config.num_hidden_layers):
        up, down = (family.linear(layer, name) for name in ("up", "down"))
        ffn = student.get_submodule(down.rpartition(".")[0])
        (activation,) = (
            child for child in ffn.children() if next(child.parameters(), None) is None
        )
        hooked.append(
            _Inside(ffn, activation, student.get_submodule(up), student.get_submodule(down))
        )
    try:
        yield
    finally:
        for inside in hooked:
            inside.remove()


class _Kept:
    """What an FFN keeps of a forward pass, and what it forms again."""

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
        """Asked for after the product, where that is asked for at all."""
        activated, self._activated = self._activated, None
        return self.activation(self.gate) if activated is None else activated


class _Inside:
    """Hooks on an FFN, down(activation(gate(x)) * up(x)), that keep autograd from saving what comes
    between its linear maps."""

    def __init__(
        self, ffn: nn.Module, activation: nn.Module, up: nn.Module, down: nn.Module
    ) -> None:
        self._hooks = (
            ffn.register_forward_pre_hook(self._begin),
            activation.register_forward_hook(self._activate),
            up.register_forward_hook(self._read_up),
            down.register_forward_pre_hook(self._multiply),
            ffn.register_forward_hook(self._end, always_call=True),
        )
        self._saving: saved_tensors_hooks | None = None
        self._kept: _Kept | None = None
        self._again: dict[int, Callable[[], Tensor]] = {}
        """How to form a tensor again, by its address."""
        self._alive: list[Tensor] = []
        """These tensors, so that no other gets the address of one while the FFN runs."""

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _begin(self, *_: Any) -> None:
        self._saving = saved_tensors_hooks(self._pack, self._unpack)
        self._saving.__enter__()

    def _end(self, *_: Any) -> None:
        self._again, self._alive, self._kept = {}, [], None
        if self._saving is not None:
            self._saving.__exit__()
            self._saving = None

    def _activate(self, module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        if self._saving is not None:  # not in a backward pass while the context is open
            self._kept = _Kept(module, inputs[0])
            self._forget(output, self._kept.activated)

    def _read_up(self, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
        if self._kept is not None:
            self._kept.up = output.detach()

    def _multiply(self, _module: nn.Module, inputs: tuple[Tensor]) -> None:
        if self._kept is not None:
            self._forget(inputs[0], self._kept.product)

    def _forget(self, tensor: Tensor, again: Callable[[], Tensor]) -> None:
        self._again[tensor.data_ptr()] = again
        self._alive.append(tensor.detach())

    def _pack(self, tensor: Tensor) -> Tensor | tuple[Callable[[], Tensor], torch.Size]:
        again = self._again.get(tensor.data_ptr()) if tensor.is_contiguous() else None
        return tensor if again is None else (again, tensor.shape)

    @staticmethod
    def _unpack(saved: Tensor | tuple[Callable[[], Tensor], torch.Size]) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        again, shape = saved
        return again().view(shape)
