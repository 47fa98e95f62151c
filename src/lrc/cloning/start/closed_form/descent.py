"""Adam over the calibration tokens, judged on tokens that no solve sees."""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from lrc.cloning.start.calibration import Calibration

BETAS = 0.9, 0.99

WARM_UP = 3
"""Steps that warm up; then the rate falls to 0 in a line."""


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
    """The best of what is reached after each epoch, be it the start.

    Args:
        calibration: the tokens; those that are solved on are passed over in their order.
        values: what is moved.
        rate: Adam's largest.
        step_tokens: tokens of a step, in whole sequences.
        epochs: passes over the tokens.
        differentiate: given sequences and the epoch, adds gradients of their loss to `values`.
        now: what the values of now stand for, in memory of its own.
        judge: how bad that is on the tokens that no solve sees.
        start: what the values stand for at first.
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
