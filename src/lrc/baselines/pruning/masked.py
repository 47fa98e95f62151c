"""A model with masks on its layers, hidden dimensions, heads and FFN neurons.

The forward pass is transformers' own. The masks act through hooks:

* hidden: the mask multiplies everything that enters the residual stream (embedding, o, down), and
  every norm of the stream takes its mean over the open dimensions. The norm itself averages over
  all d dimensions, so its input is multiplied by sqrt(d / n) and its output by sqrt(n / d), where n
  is the sum of the squared masks: x' = x sqrt(d / n) has mean(x'^2) = sum(x^2) / n. Epsilon has the
  same weight as in a model of n dimensions.
* heads: the input of o, by groups of query heads that share a key-value head.
* neurons: the input of down.
* layers: the layer's output is z * output + (1 - z) * input.

With masks of 0 and 1 the output is exactly that of the model cut to the open units.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from lrc.model.layout import Layout, LinearSite, layout_of


@dataclass(frozen=True)
class MaskValues:
    """Values of the masks, in [0, 1]; None for an unmasked kind."""

    layers: Tensor | None = None
    """[layers]"""
    hidden: Tensor | None = None
    """[hidden size]"""
    groups: Tensor | None = None
    """One per key-value head with its query heads, [layers, key-value heads]."""
    neurons: Tensor | None = None
    """[layers, FFN neurons]"""


class MaskHooks:
    """The hooks that mask a model.

    `values` may change between forward passes. If the model recomputes its layers, `values` must
    not change until the backward pass ends.

    Args:
        model: the model.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.values = MaskValues()
        self._handles: list[RemovableHandle] = []
        layout = layout_of(model)
        stream = [layout.family.embedding]
        stream += [layout.linear(site) for site in layout.sites() if layout.writes(site)]
        for path in stream:
            self._after(model.get_submodule(path), self._mask_hidden)
        for path in layout.stream_norms():
            norm = model.get_submodule(path)
            self._before(norm, self._widen)
            self._after(norm, self._narrow)
        for layer in range(layout.num_layers):
            self._mask_layer(model, layout, layer)

    def remove(self) -> None:
        """Remove all hooks."""
        for handle in self._handles:
            handle.remove()

    def _mask_layer(self, model: PreTrainedModel, layout: Layout, layer: int) -> None:
        """Add the hooks of a layer's own masks."""

        def groups(inputs: Tensor) -> Tensor:
            values = self.values.groups
            if values is None:
                return inputs
            width = inputs.shape[-1] // values.shape[1]
            return inputs * values[layer].repeat_interleave(width)

        def neurons(inputs: Tensor) -> Tensor:
            values = self.values.neurons
            return inputs if values is None else inputs * values[layer]

        def whole(inputs: Tensor, output: Tensor) -> Tensor:
            values = self.values.layers
            return output if values is None else torch.lerp(inputs, output, values[layer])

        o, down = (layout.linear(LinearSite(layer, name)) for name in ("o", "down"))
        self._before(model.get_submodule(o), groups)
        self._before(model.get_submodule(down), neurons)
        self._after(model.get_submodule(layout.layer(layer)), whole)

    def _mask_hidden(self, _inputs: Tensor, output: Tensor) -> Tensor:
        values = self.values.hidden
        return output if values is None else output * values

    def _widen(self, inputs: Tensor) -> Tensor:
        values = self.values.hidden
        return inputs if values is None else inputs / _share_root(values)

    def _narrow(self, _inputs: Tensor, output: Tensor) -> Tensor:
        values = self.values.hidden
        return output if values is None else output * _share_root(values)

    def _before(self, module: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
        def hook(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            return change(inputs[0]), *inputs[1:]

        self._handles.append(module.register_forward_pre_hook(hook))

    def _after(self, module: nn.Module, change: Callable[[Tensor, Tensor], Tensor]) -> None:
        def hook(_module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
            return change(inputs[0], output)

        self._handles.append(module.register_forward_hook(hook, prepend=True))


def _share_root(hidden: Tensor) -> Tensor:
    """sqrt(n / d) of masks [d], where n is the sum of their squares."""
    return hidden.square().mean().clamp_min(1e-6).sqrt()
