"""Muon, the optimizer of `train.optimizer: muon`.

A matrix moves along its momentum with all singular values set to one (K. Jordan et al., 2024,
https://kellerjordan.github.io/posts/muon), scaled to the size of AdamW's updates (J. Liu et al.,
arXiv 2502.16982, section 2.2), so that both share one learning rate. Everything else is AdamW's.

`torch.optim.Muon` computes the same, but in bfloat16 on every device, one matrix after the other,
and for matrices alone.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lrc.cloning.method import Method

MOMENTUM = 0.95
"""Share of the momentum that a step keeps."""

COEFFICIENTS = 3.4445, -4.775, 2.0315
"""Of x, x^3 and x^5: five such steps move singular values to between 0.7 and 1.2."""

STEPS = 5
"""Newton-Schulz steps."""

SCALE = 0.2
"""Root mean square of AdamW's updates, as arXiv 2502.16982 measured it."""

TOGETHER = 2**26
"""Elements of the matrices that are orthogonalized at once, on GPUs."""


class Muon(torch.optim.AdamW):
    """AdamW whose groups with `orthogonal: True` are updated by Muon instead.

    Parameters of these groups are matrices [rows, columns] or stacks of matrices
    [..., rows, columns], all in one type. They have no gradient after a step.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if group.get("orthogonal"):
                self._update(group)
        super().step()
        return loss

    def _update(self, group: dict[str, Any]) -> None:
        values = [value for value in group["params"] if value.grad is not None]
        if not values:
            return
        for value in values:
            if not self.state[value]:  # AdamW loads no state without the number of steps
                count = torch.zeros((), dtype=torch.float32, device=value.device)
                self.state[value] = {"step": count, "momentum": torch.zeros_like(value)}
        torch._foreach_add_([self.state[value]["step"] for value in values], 1)
        gradients = [value.grad for value in values]
        momentum = [self.state[value]["momentum"] for value in values]
        torch._foreach_lerp_(momentum, gradients, 1 - MOMENTUM)
        torch._foreach_lerp_(gradients, momentum, MOMENTUM)  # Nesterov's momentum
        if group["weight_decay"]:
            torch._foreach_mul_(values, 1 - group["lr"] * group["weight_decay"])
        for places in _alike(values):
            rows, columns = values[places[0]].shape[-2:]
            stacks = [gradients[place].reshape(-1, rows, columns) for place in places]
            moves = orthogonalize(torch.cat(stacks))
            moves *= group["lr"] * SCALE * max(rows, columns) ** 0.5
            alike = [values[place] for place in places]
            parts = torch.split(moves, [len(stack) for stack in stacks])
            each = [part.view_as(value) for part, value in zip(parts, alike, strict=True)]
            torch._foreach_sub_(alike, each)  # few launches on a GPU
        for value in values:
            value.grad = None


def orthogonalize(matrices: Tensor) -> Tensor:
    """The matrices with all singular values near one, by Newton-Schulz steps: in bfloat16 on GPUs.

    Args:
        matrices: [n, rows, columns].

    Returns:
        [n, rows, columns], in the same type.
    """
    first, third, fifth = COEFFICIENTS
    low = torch.bfloat16 if matrices.is_cuda else matrices.dtype
    wide = matrices.shape[1] <= matrices.shape[2]
    x = (matrices if wide else matrices.mT).to(low)
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=1e-7)
    for _ in range(STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(
            x, torch.baddbmm(gram, gram, gram, beta=third, alpha=fifth), x, beta=first
        )
    return (x if wide else x.mT).to(matrices.dtype)


def orthogonal_parameters(method: Method) -> dict[str, nn.Parameter]:
    """A method's parameters that Muon updates, by name: matrices with weight decay but for the
    student's embedding and head, whose rows are tokens."""
    tokens = {id(value) for value in vocabulary_matrices(method.model)}
    named, decayed = method.parameters(), method.decayed()
    return {n: value for n, value in named.items() if n in decayed and id(value) not in tokens}


def vocabulary_matrices(model: PreTrainedModel) -> list[nn.Parameter]:
    """The embedding and the head, which may be the same."""
    return [m.weight for m in (model.get_input_embeddings(), model.get_output_embeddings())]


def orthogonal_flops(matrices: Iterable[Tensor]) -> float:
    """Floating-point operations of Muon's matrix products in a step.

    Args:
        matrices: what it updates, [..., rows, columns] each.
    """
    total = 0.0
    for value in matrices:
        short, long = sorted(value.shape[-2:])
        total += STEPS * value.numel() * (4 * short + 2 * short**2 / long)
    return total


def _alike(values: list[nn.Parameter]) -> Iterator[list[int]]:
    """Places of parameters whose matrices have one shape, as many at once as the device likes."""
    groups: dict[torch.Size, list[int]] = {}
    for place, value in enumerate(values):
        groups.setdefault(value.shape[-2:], []).append(place)
    for places in groups.values():
        number = 1
        if values[0].is_cuda:
            number = max(1, TOGETHER // max(values[place].numel() for place in places))
        for begin in range(0, len(places), number):
            yield places[begin : begin + number]
