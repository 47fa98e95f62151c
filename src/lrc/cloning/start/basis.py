"""The basis of the student's residual stream: which part of the teacher's stream it keeps.

`principal_basis` keeps the largest directions. `predictive_basis` keeps what the teacher's
predictions need. It weighs the part of the stream that is not predictable from the kept part by
what the predictions lose with it:

    tr F (C - C B (B^T C B)^-1 B^T C).

C [d_T, d_T] is the second moment of the normalized stream h, F is the Fisher information that the
predictions hold about it, and the bracket is the second moment of h - E[h | B^T h] by least
squares. There is one such term for the mean C and F over the norms of the layers, and one for the
final norm. If F is the identity, the principal directions are optimal. A tied head can only read
what it also embeds, so it has a different term (`_lost_by_a_tied_head`).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from lrc.cloning.start.calibration import Calibration, TeacherLayer
from lrc.cloning.start.closed_form.head import CHUNK, folded_head
from lrc.cloning.start.closed_form.least_squares import second_moment

FISHER_SHARE = 0.7
"""Share of the Fisher information in F. The rest is the identity, since a gradient does not see
parts that only matter once they are completely removed."""

MOMENT_TOKENS = 16_384
"""Tokens for the second moments, in whole sequences."""

GRADIENT_TOKENS = 2048
"""Tokens for the Fisher information, in whole sequences."""

LARGEST_TOKEN_WEIGHT = 10.0
"""Limit on a token's squared gradient, in units of the median: massive activations have gradients
of their own."""

SEED = 0
"""Seed of the tokens drawn from the teacher's predictions."""

FINAL_SHARE = 1 / 4
"""Share of the final norm with a tied head."""

STEPS, LEARNING_RATE = 20, 0.12
"""Steps and rate of Adam, which starts from the best basis for the means over all norms. The rate
is in units of d_T^-1/2, the size of the basis's entries."""

SMALLEST = 1e-7
"""Added to second moments before they are inverted, in units of their mean eigenvalue."""


@dataclass(frozen=True)
class StreamStatistics:
    """Statistics of the teacher's stream: means over the norms of the layers, and at the final
    norm."""

    moments: Tensor
    """E[h h^T] / tr E[h h^T], [2, d_T, d_T]."""
    fisher: Tensor
    """F, with trace d_T, [2, d_T, d_T]."""
    norms: int
    """Number of the norms in the layers."""

    def fisher_after_layers(self, basis: Tensor, layers: int) -> list[Tensor]:
        """B^T F B [d_S, d_S] at the norm that follows each layer, for B [d_T, d_S]."""
        inside, final = (basis.T @ fisher @ basis for fisher in self.fisher)
        return [*[inside] * (layers - 1), final]


@torch.no_grad()
def principal_basis(
    calibration: Calibration, progress: Callable[[int, int], None] | None = None
) -> Tensor:
    """The leading eigenvectors [d_T, d_S] of the mean of E[h h^T] over all norms of the teacher's
    stream, from one pass of the teacher.

    Args:
        calibration: the calibration.
        progress: function that gets the number of completed layers and the total.
    """
    total: Tensor = torch.zeros(())
    for layer in calibration.teacher_layers():
        for site in _read(calibration, layer, len(calibration.ids)):
            total = total + site
        if progress:
            progress(layer.index + 1, calibration.teacher.num_layers)
    return _leading(total, calibration.hidden_size).to(calibration.dtype).contiguous()


@torch.no_grad()
def stream_statistics(calibration: Calibration) -> StreamStatistics:
    """Collect statistics from a forward pass of the teacher over `MOMENT_TOKENS`, and a forward and
    backward pass over `GRADIENT_TOKENS`."""
    stop = min(len(calibration.ids), max(1, MOMENT_TOKENS // calibration.ids.shape[1]))
    norms = sum(map(len, calibration.branches))
    width, device = calibration.teacher.hidden_size, calibration.ids.device
    moments, fisher = torch.zeros(2, 2, width, width, dtype=calibration.dtype, device=device)
    layers = calibration.teacher_layers(stop)
    forward = (site for layer in layers for site in _read(calibration, layer, stop))
    for site, moment in enumerate(forward):
        share = moment / moment.trace().clamp_min(1e-30)
        moments[int(site == norms)] += share.to(calibration.dtype)
    for site, rows in zip(range(norms, -1, -1), gradients(calibration), strict=True):
        energy = rows.square().sum(-1, keepdim=True)
        cap = (LARGEST_TOKEN_WEIGHT * energy.median() / energy.clamp_min(1e-30)).clamp_max(1)
        moment = second_moment(rows * cap.sqrt())
        share = FISHER_SHARE * width / moment.trace().clamp_min(1e-30) * moment
        fisher[int(site == norms)] += share.to(calibration.dtype)
    moments[0] /= norms
    fisher[0] /= norms
    fisher += (1 - FISHER_SHARE) * torch.eye(width, dtype=calibration.dtype, device=device)
    return StreamStatistics(moments, fisher, norms)


@torch.no_grad()
def predictive_basis(
    statistics: StreamStatistics, hidden_size: int, tied_gain: Tensor | None = None
) -> Tensor:
    """The orthonormal basis B [d_T, d_S] of what the teacher's predictions need.

    Args:
        statistics: statistics of the teacher's stream.
        hidden_size: d_S.
        tied_gain: the gain [d_T] of the teacher's final norm if the student's head is tied to its
            embedding; None if the head is its own.
    """
    (moment, final_moment), (fisher, final_fisher) = statistics.moments, statistics.fisher
    final_weight = 1.0
    if tied_gain is not None:
        final_weight = statistics.norms * FINAL_SHARE / (1 - FINAL_SHARE)

    def lost(basis: Tensor) -> Iterator[Tensor]:
        yield statistics.norms * _lost(basis, moment, fisher)
        if tied_gain is None:
            yield final_weight * _lost(basis, final_moment, final_fisher)
        else:
            yield final_weight * _lost_by_a_tied_head(basis, final_moment, final_fisher, tied_gain)

    weights = statistics.norms, final_weight
    raw = _best_for_the_mean(statistics, weights, hidden_size)
    raw = raw.to(statistics.moments.dtype).contiguous()
    with torch.enable_grad():
        raw.requires_grad_()
        optimizer = torch.optim.Adam([raw], lr=LEARNING_RATE * len(raw) ** -0.5)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 1 / STEPS, STEPS)
        for _ in range(STEPS):
            basis = torch.linalg.qr(raw).Q
            leaf = basis.detach().requires_grad_()
            for loss in lost(leaf):
                loss.backward()  # type: ignore[no-untyped-call]
            optimizer.zero_grad()
            basis.backward(leaf.grad)
            optimizer.step()
            schedule.step()
    return torch.linalg.qr(raw.detach()).Q.contiguous()


def gradients(calibration: Calibration) -> Iterator[Tensor]:
    """Gradients of the log probability of tokens drawn from the teacher's predictions, with respect
    to h at every norm of the stream, from the final norm back to the first.

    They cover the first sequences, [tokens, d_T]. Autograd differentiates with respect to x; rms(x)
    times that gradient stands for the gradient with respect to h.
    """
    ids = calibration.ids
    sequences = slice(0, min(len(ids), max(1, GRADIENT_TOKENS // ids.shape[1])))
    states = list(calibration.teacher_states(sequences))

    def scaled(x: Tensor, gradient: Tensor) -> Tensor:
        return (calibration.rms(x) * gradient).flatten(0, 1)

    final = states.pop()
    gradient = _gradient_of_predictions(calibration, final.flatten(0, 1)).view_as(final)
    yield scaled(final, gradient)
    for index, before in reversed(list(enumerate(states))):
        layer = calibration.layer(index)
        with torch.enable_grad(), calibration.branch_inputs(layer, index) as inputs:
            after = calibration.run(layer, index, before.detach().requires_grad_())
            found = torch.autograd.grad(after, inputs, gradient)
        for x, of_input in reversed(list(zip(inputs, found, strict=True))):
            yield scaled(x.detach(), of_input)
        gradient = found[0]


def _gradient_of_predictions(calibration: Calibration, final: Tensor) -> Tensor:
    """The gradient with respect to the last residual stream, both [tokens, d_T]."""
    head = folded_head(calibration)
    generator = torch.Generator(final.device).manual_seed(SEED)
    gradient = torch.empty_like(final)
    for start in range(0, len(final), CHUNK):
        part = slice(start, start + CHUNK)
        with torch.enable_grad():
            x = final[part].detach().requires_grad_()
            logits = calibration.cap(calibration.normalize(x) @ head.T)
            drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
            loss = functional.cross_entropy(logits, drawn, reduction="sum")
        (gradient[part],) = torch.autograd.grad(loss, x)
    return gradient


def _read(calibration: Calibration, layer: TeacherLayer, stop: int) -> Iterator[Tensor]:
    """sum h h^T [d_T, d_T] in float64 at the norms of a layer, and after the last at the final
    norm.

    The sum is over the sequences before `stop`.
    """
    last = layer.index == calibration.teacher.num_layers - 1
    for stream in layer.streams if last else layer.streams[:-1]:
        total: Tensor = torch.zeros(())
        for part in calibration.batches(0, stop):
            total = total + second_moment(calibration.normalize(stream[part]))
        yield total


def _best_for_the_mean(
    statistics: StreamStatistics, weights: tuple[float, float], hidden_size: int
) -> Tensor:
    """The basis [d_T, d_S] that would be optimal if C and F at every norm were their means, in
    float64.

    It is F^1/2 U, with U the leading eigenvectors of F^1/2 C F^1/2.
    """
    moment, fisher = (
        sum(weight * value.double() for weight, value in zip(weights, values, strict=True))
        for values in (statistics.moments, statistics.fisher)
    )
    values, vectors = torch.linalg.eigh(fisher)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    span: Tensor = torch.linalg.qr(root @ _leading(root @ moment @ root, hidden_size)).Q
    return span


def _lost(basis: Tensor, moment: Tensor, fisher: Tensor) -> Tensor:
    """tr F (C - C B (B^T C B)^-1 B^T C)."""
    kept = moment @ basis
    solved = torch.linalg.solve(_raised(basis.T @ kept), kept.T)
    return (fisher * moment).sum() - (solved.T * (fisher @ kept)).sum()


def _lost_by_a_tied_head(basis: Tensor, moment: Tensor, fisher: Tensor, gain: Tensor) -> Tensor:
    """The same at the final norm if the logits are H_T B S z, with any S [d_S, d_S].

    With u = diag(gain) h, and F and C those of u, it is the minimum of E|u - B S B^T h|^2_F over S.
    """
    inverse = torch.where(gain.abs() > 1e-6, 1 / gain, 0.0)
    metric = inverse[:, None] * fisher * inverse
    cross = gain[:, None] * moment  # E[u h^T]
    weighed = metric @ basis
    left = torch.linalg.solve(_raised(basis.T @ weighed), weighed.T @ cross @ basis)
    right = torch.linalg.solve(_raised(basis.T @ moment @ basis), (weighed.T @ cross @ basis).T)
    return (metric * (cross * gain)).sum() - (left * right.T).sum()


def _raised(moment: Tensor) -> Tensor:
    """A second moment [d, d] plus a small multiple of the identity, which makes it invertible."""
    identity = torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
    return moment + SMALLEST * moment.diagonal().mean() * identity


def _leading(moment: Tensor, count: int) -> Tensor:
    """The leading eigenvectors [d, count] of a second moment [d, d]."""
    return torch.linalg.eigh(moment).eigenvectors.flip(1)[:, :count]
