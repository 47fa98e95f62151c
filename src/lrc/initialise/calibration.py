"""Running teacher and student layer by layer over the calibration tokens.

The teacher's decoder layers run whole, by transformers' own code, and so do the student's, up to
the tensor that is asked for: attention and FFN are not written here again.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lrc.activations import Place
from lrc.errors import UserError
from lrc.student import head_dim
from lrc.teacher import Teacher

BATCH = 8
"""Sequences that run at a time."""

HELD_OUT = 1 / 8
"""Share of the sequences that enter no solve and choose the ridges."""


class Calibration:
    """A teacher, the calibration tokens, and a student that is built layer by layer.

    Args:
        teacher: the teacher.
        ids: calibration tokens, int64 [sequences, length]; at least two sequences.
        hidden_size: d_S.
    """

    def __init__(self, teacher: Teacher, ids: Tensor, hidden_size: int) -> None:
        self.teacher, self.family, self.ids = teacher, teacher.family, ids
        self.hidden_size = hidden_size
        self.layers = teacher.model.get_submodule(teacher.family.layers)
        self.arguments = layer_arguments(teacher.model, self.layers, ids[:1])
        self.solved_on = len(ids) - max(1, round(len(ids) * HELD_OUT))
        """Sequences before this one are solved on; the others choose the ridges."""
        self._eps = float(teacher.config.rms_norm_eps)
        self._config = copy.deepcopy(teacher.config)
        self._config.head_dim = head_dim(teacher)
        self._config.hidden_size = hidden_size

    def weight(self, path: str) -> Tensor:
        """The teacher's weight at a module path."""
        return self.teacher.model.get_submodule(path).get_parameter("weight")

    def gain(self, path: str) -> Tensor:
        """Gain [d_T] of the teacher's norm at a module path."""
        return self.weight(path) + self.family.gain_offset

    def rms(self, rows: Tensor) -> Tensor:
        """Root mean square of rows [tokens, d], as [tokens, 1]."""
        return (rows.pow(2).mean(-1, keepdim=True) + self._eps).sqrt()

    def normalise(self, stream: Tensor) -> Tensor:
        """A residual stream [..., d] as rows [tokens, d] that an RMSNorm of gain 1 gives."""
        rows = stream.reshape(-1, stream.shape[-1])
        return rows / self.rms(rows)

    def batches(self, start: int = 0, stop: int | None = None) -> Iterator[slice]:
        """Batches of sequences, by default of all."""
        stop = len(self.ids) if stop is None else stop
        for first in range(start, stop, BATCH):
            yield slice(first, min(first + BATCH, stop))

    def teacher_streams(self) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
        """The teacher's residual stream at every layer.

        Yields:
            The layer, and the stream before it, between its attention and its FFN, and after it,
            each [sequences, length, d_T]. The buffers are used again at the next layer.
        """
        before = functional.embedding(self.ids, self.weight(self.family.embedding))
        middle, after = torch.empty_like(before), torch.empty_like(before)
        for index, layer in enumerate(self.layers.children()):
            norm = layer.get_submodule(self.family.ffn_norm)
            for part in self.batches():
                kept: list[Tensor] = []
                hook = norm.register_forward_pre_hook(
                    lambda _, inputs, kept=kept: kept.append(inputs[0])
                )
                result = layer(before[part], **self.arguments[index])
                hook.remove()
                after[part] = result[0] if isinstance(result, tuple) else result
                middle[part] = kept[0]
            yield index, before, middle, after
            before, after = after, before

    def student_layer(self, index: int) -> nn.Module:
        """A decoder layer of the student with gains of 1; biases of q, k, v and norms inside the
        attention are the teacher's, and the projected weights are still to be filled."""
        teacher = self.layers.get_submodule(str(index))
        layer = type(teacher)(self._config, index)
        theirs = dict(teacher.named_parameters())
        layer = layer.to(next(iter(theirs.values()))).eval()
        for name, own in layer.named_parameters():
            if name.removesuffix(".weight") in self.family.norms:
                own.fill_(1 - self.family.gain_offset)
            elif own.shape == theirs[name].shape:
                own.copy_(theirs[name])
        return layer

    def fill_reader(self, layer: nn.Module, place: Place, projection: Tensor) -> None:
        """Give a student's layer the reader W_T diag(gain) P at a place."""
        index, name = place
        gain = self.gain(self.family.norm_read_by(index, name))
        weight = self.weight(self.family.linear(index, name)) * gain
        own = layer.get_submodule(self.family.linears[name]).get_parameter("weight")
        own.copy_(weight @ projection)

    def written(self, place: Place, states: Tensor) -> Tensor:
        """The teacher's writer at a place, applied to the student's heads or FFN activations
        [..., d_m]: [..., d_T]."""
        return self.teacher.model.get_submodule(self.family.linear(*place))(states)


def need_float32(teacher: Teacher, what: str) -> None:
    """Refuse a teacher whose weights are too coarse to solve with.

    Raises:
        UserError: they are of lower precision than float32.
    """
    if torch.finfo(teacher.model.dtype).bits < 32:
        raise UserError(
            f"{what} solves in float32 at least, but the teacher is in "
            f"{str(teacher.model.dtype).removeprefix('torch.')}: set teacher.dtype to float32."
        )


@torch.no_grad()
def principal_basis(
    calibration: Calibration, progress: Callable[[int, int], None] | None = None
) -> tuple[Tensor, Tensor]:
    """The basis B [d_T, d_S], leading eigenvectors of the mean of E[h h^T] over all norms of the
    teacher's stream, and its last stream [sequences, length, d_T], from one pass of the teacher."""
    total: Tensor = torch.zeros(())
    layers = len(calibration.arguments)
    for index, before, middle, after in calibration.teacher_streams():
        for stream in (before, middle, *([after] if index == layers - 1 else [])):
            for part in calibration.batches():
                h = calibration.normalise(stream[part])
                total = total + (h.T @ h).double()
        if progress:
            progress(index + 1, layers)
    leading = torch.linalg.eigh(total).eigenvectors.flip(1)[:, : calibration.hidden_size]
    return leading.to(after.dtype).contiguous(), after


def layer_arguments(model: nn.Module, layers: nn.Module, ids: Tensor) -> list[dict[str, Any]]:
    """What the model gives each decoder layer besides the stream (rotary embedding, mask), for one
    sequence [1, length]; it broadcasts over a batch of equally long ones."""
    seen: list[dict[str, Any]] = []

    def keep(_module: nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append({key: value for key, value in kwargs.items() if key != "hidden_states"})

    hooks = [layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in layers.children()]
    model(input_ids=ids, use_cache=False, logits_to_keep=1)
    for hook in hooks:
        hook.remove()
    return seen


class _Reached(Exception):
    """Ends a module's forward pass once the tensor that was asked for is there."""


def input_of(inner: nn.Module, outer: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    """Run `outer` until it calls `inner`, and return what it gives to it."""
    got: list[Tensor] = []

    def stop(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        got.append(inputs[0])
        raise _Reached

    hook = inner.register_forward_pre_hook(stop)
    with suppress(_Reached):
        outer(*args, **kwargs)
    hook.remove()
    return got[0]
