"""Adam over the calibration tokens, evaluated on tokens that no solve sees."""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from lrc.cloning.start.calibration import Calibration

BETAS = 0.9, 0.99

WARM_UP = 3
"""Number of warm-up steps; after them the rate falls linearly to 0."""


def descend(
    calibration: Calibration,
    values: Iterable[Tensor],
    rate: float,
    step_tokens: int,
    epochs: int,
    differentiate: Callable[[slice, int], None],
    now: Callable[[], Mapping[str, Tensor]],
    judge: Callable[[Mapping[str, Tensor]], float],
    start: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """The best of the start and the values reached after each epoch.

    Args:
        calibration: the tokens; each epoch passes over those for solving, in their order.
        values: the tensors to optimize.
        rate: the largest learning rate of Adam.
        step_tokens: tokens per step, in whole sequences.
        epochs: passes over the tokens.
        differentiate: function that gets sequences and the epoch, and adds gradients of their loss
            to `values`.
        now: function that returns what the current values represent, in separate memory.
        judge: function that measures how bad that is on the tokens that no solve sees.
        start: what the initial values represent.
    """
    solved_on = calibration.solved_on
    size = max(1, step_tokens // calibration.ids.shape[1])
    steps = [slice(i, min(i + size, solved_on)) for i in range(0, solved_on, size)]
    total = epochs * len(steps)
    optimizer = torch.optim.Adam(values, lr=rate, betas=BETAS)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda done: min(1, (done + 1) / WARM_UP) * (1 - done / total)
    )
    with torch.no_grad():
        least, best = judge(start), dict(start)
    for epoch in range(epochs):
        for part in steps:
            optimizer.zero_grad()
            with torch.enable_grad():
                differentiate(part, epoch)
            optimizer.step()
            schedule.step()
        with torch.no_grad():
            reached = dict(now())
            found = judge(reached)
        if found < least:
            least, best = found, reached
    return best
