"""FFN neurons: their activity, the selection of neurons, and forward passes without them.

A neuron is one input of the FFN's down projection: the gate's activation times up. Neuron i of a
student's layer corresponds to neuron i of the teacher's layer, because the student keeps the
teacher's FFN width.

A set of neurons is a bool tensor [layers, FFN width].
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lrc.cloning.activations import last_hidden, observe
from lrc.data.batch import Batch
from lrc.model.layout import Layout, LinearSite
from lrc.system.errors import UserError

Positions = Literal["all", "last"]
"""Which tokens of a prompt count: all, or only the last one, which predicts the answer."""


@contextmanager
def masked(model: nn.Module, layout: Layout, neurons: Tensor) -> Iterator[None]:
    """Context in which the given neurons are zero.

    Args:
        model: a causal language model.
        layout: the model's layout.
        neurons: bool [layers, FFN width], true for neurons to mask.
    """
    handles = []
    try:
        for layer, chosen in enumerate(neurons):
            if chosen.any():
                down = model.get_submodule(layout.linear(LinearSite(layer, "down")))
                handles.append(down.register_forward_pre_hook(_zero(chosen)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _zero(chosen: Tensor) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    def hook(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (inputs[0].masked_fill(chosen.to(inputs[0].device), 0.0), *inputs[1:])

    return hook


@torch.no_grad()
def activity(
    model: PreTrainedModel, layout: Layout, batches: Iterable[Batch], positions: Positions = "all"
) -> Tensor:
    """Mean absolute value of every FFN neuron over tokens, float64 [layers, FFN width].

    Args:
        model: a causal language model.
        layout: the model's layout.
        batches: the prompts, padded on the right.
        positions: which tokens of a prompt count.
    """
    sums: dict[int, Tensor] = {}
    counted = torch.zeros(())
    tokens = 0

    def add(site: LinearSite, states: Tensor, output: Tensor) -> Tensor:
        total = states[counted].abs().double().sum(0)
        sums[site.layer] = sums.get(site.layer, torch.zeros_like(total)) + total
        return output

    layers = range(layout.num_layers)
    with observe(model, layout, [LinearSite(layer, "down") for layer in layers], add):
        for batch in batches:
            batch = batch.to(model.device)
            mask = batch.token_mask()
            counted = torch.ones_like(batch.input_ids).bool() if mask is None else mask
            if positions == "last":
                following = torch.zeros_like(counted)
                following[:, :-1] = counted[:, 1:]
                counted = counted & ~following
            tokens += int(counted.sum())
            last_hidden(model, batch)
    return torch.stack([sums[layer] for layer in layers]).cpu() / tokens


def most_active(values: Tensor, count: int, per_layer: bool = False) -> Tensor:
    """The most active neurons, bool [layers, FFN width].

    Args:
        values: the result of `activity`.
        count: number of neurons in the whole model.
        per_layer: whether to take `count` neurons from each layer instead.
    """
    rows = values if per_layer else values.reshape(1, -1)
    chosen = torch.zeros_like(rows, dtype=torch.bool)
    chosen.scatter_(1, rows.topk(count, dim=1).indices, True)
    return chosen.reshape(values.shape)


def draw_others(important: Tensor, generator: torch.Generator) -> Tensor:
    """Random neurons outside the important ones, with the same number in every layer.

    So a difference between the two sets cannot come from their layers.

    Args:
        important: bool [layers, FFN width].
        generator: the random generator.

    Raises:
        UserError: if a layer has too few other neurons.
    """
    drawn = torch.zeros_like(important)
    for layer, chosen in enumerate(important):
        others = (~chosen).nonzero().squeeze(1)
        count = int(chosen.sum())
        if count > len(others):
            raise UserError(
                f"{count:,} of the {len(chosen):,} neurons of layer {layer} would be masked, which "
                "leaves too few others to draw the same number: mask fewer."
            )
        drawn[layer, others[torch.randperm(len(others), generator=generator)[:count]]] = True
    return drawn
