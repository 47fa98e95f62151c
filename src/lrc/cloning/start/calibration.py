"""Layer-by-layer runs of teacher and student over the calibration tokens.

transformers' own code runs the teacher's decoder layers in full, and the student's up to the
requested tensor, so attention and FFN are not reimplemented here. One layer of each model is in
memory, in float32 (float64 if the teacher is), whatever the dtype and location of the teacher's
weights. The residual streams of all tokens are in memory, or in files if they are large.
"""

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lrc.cloning.start.streams import ActivationStore
from lrc.model.student import head_dim
from lrc.model.teacher import Teacher

BATCH_TOKENS = 2048
"""Tokens that run at a time, in whole sequences."""

IN_MEMORY = 2**30
"""Bytes of all streams that may be in memory. Beyond this limit, files cost little: a token's
stream is written and read about ten times per layer, some 100 kB, for hundreds of millions of
operations."""

HELD_OUT = 1 / 8
"""Share of the sequences that no solve uses; they measure how far to follow each solve."""


@dataclass(frozen=True)
class TeacherLayer:
    """A decoder layer of the teacher, and its residual stream around it."""

    index: int
    module: nn.Module
    """The layer, in the calibration's dtype."""
    before: ActivationStore
    """The stream before the layer, [sequences, length, d_T]. It may be overwritten."""
    middle: ActivationStore
    """The stream between its attention and its FFN."""
    after: ActivationStore
    """The stream after the layer."""


class Calibration:
    """A teacher, the calibration tokens, and a student that is built layer by layer.

    Use it as a context manager, which closes the streams.

    Args:
        teacher: the teacher.
        ids: calibration tokens, int64 [sequences, length]; at least two sequences.
        hidden_size: d_S.
        restart: number of tokens at the end of each sequence that do not see the tokens before
            them; the first of these is one more first token.
    """

    def __init__(self, teacher: Teacher, ids: Tensor, hidden_size: int, restart: int = 0) -> None:
        self.teacher, self.family, self.ids = teacher, teacher.family, ids
        self.hidden_size = hidden_size
        self.dtype = torch.promote_types(teacher.model.dtype, torch.float32)
        self.arguments = layer_arguments(teacher, ids.shape[1], self.dtype, ids.device, restart)
        self.solved_on = len(ids) - max(1, round(len(ids) * HELD_OUT))
        """Number of sequences that the solves use, from the first; the others measure."""
        self.forward_seconds = 0.0
        """Seconds that the teacher's layers alone take to run once over all tokens."""
        self._batch = max(1, BATCH_TOKENS // ids.shape[1])
        widths = 3 * teacher.hidden_size + 2 * hidden_size
        self._on_disk = ids.numel() * widths * self.dtype.itemsize > IN_MEMORY
        self._opened = ExitStack()
        self._teacher_streams: list[ActivationStore] = []
        self._eps = float(teacher.config.rms_norm_eps)
        self._config = copy.deepcopy(teacher.config)
        self._config.head_dim = head_dim(teacher)
        self._config.hidden_size = hidden_size

    def __enter__(self) -> "Calibration":
        return self

    def __exit__(self, *_error: object) -> None:
        self._opened.close()

    def weight(self, path: str) -> Tensor:
        """The teacher's weight at a module path."""
        return self.teacher.parameter(f"{path}.weight").to(self.dtype)

    def gain(self, path: str) -> Tensor:
        """Gain [d_T] of the teacher's norm at a module path."""
        return self.teacher.gain(path, self.dtype)

    def rms(self, rows: Tensor) -> Tensor:
        """Root mean square of rows [tokens, d], as [tokens, 1]."""
        return (rows.pow(2).mean(-1, keepdim=True) + self._eps).sqrt()

    def weights(self, teacher: Tensor, student: Tensor) -> Tensor:
        """Weights of errors in the student's stream, [..., 1].

        A weight is 1 / max(RMS of the teacher's [..., d_T], norm of the student's [..., d_S] /
        sqrt(d_T)). Massive activations thus dominate no solve, whether they are the teacher's or
        the student's own.
        """
        ours = student.norm(dim=-1, keepdim=True) * teacher.shape[-1] ** -0.5
        return 1 / self.rms(teacher).maximum(ours)

    def normalize(self, stream: Tensor) -> Tensor:
        """Rows [tokens, d] that an RMSNorm with gain 1 makes of a residual stream [..., d]."""
        rows = stream.reshape(-1, stream.shape[-1])
        return rows / self.rms(rows)

    def batches(self, start: int = 0, stop: int | None = None) -> Iterator[slice]:
        """Batches of sequences, by default of all."""
        stop = len(self.ids) if stop is None else stop
        for first in range(start, stop, self._batch):
            yield slice(first, min(first + self._batch, stop))

    def stream(self, width: int) -> ActivationStore:
        """A new stream [sequences, length, width], not yet written."""
        sequences, length = self.ids.shape
        stream = ActivationStore(
            (sequences, length, width), self.dtype, self.ids.device, self._on_disk
        )
        self._opened.callback(stream.close)
        return stream

    def teacher_layers(self, stop: int | None = None) -> Iterator[TeacherLayer]:
        """One pass of the teacher, layer by layer, over all sequences or those before `stop`.

        The next layer and the next pass reuse the streams.
        """
        if not self._teacher_streams:
            self._teacher_streams = [self.stream(self.teacher.hidden_size) for _ in range(3)]
        before, middle, after = self._teacher_streams
        parts = list(self.batches(0, stop))
        for part in parts:
            before[part] = self._embedded(part)
        self.forward_seconds = 0.0
        for index in range(self.teacher.num_layers):
            layer = self.layer(index)
            norm = layer.get_submodule(self.family.ffn_norm)
            for part in parts:
                kept: list[Tensor] = []
                hook = norm.register_forward_pre_hook(
                    lambda _, inputs, kept=kept: kept.append(inputs[0])
                )
                states = before[part]
                started = self._now()
                result = self.run(layer, index, states)
                self.forward_seconds += self._now() - started
                hook.remove()
                after[part] = result
                middle[part] = kept[0]
            yield TeacherLayer(index, layer, before, middle, after)
            before, after = after, before

    def teacher_states(self, part: slice) -> Iterator[Tensor]:
        """The teacher's residual stream [b, length, d_T] of a few sequences, before every layer and
        after the last one."""
        states = self._embedded(part)
        for index in range(self.teacher.num_layers):
            yield states
            states = self.run(self.layer(index), index, states)
        yield states

    def run(self, layer: nn.Module, index: int, states: Tensor) -> Tensor:
        """Run a decoder layer of teacher or student on a residual stream [b, length, d]."""
        result = layer(states, **self.arguments[index])
        states = result[0] if isinstance(result, tuple) else result
        return states

    def student_layer(self, index: int, teacher: nn.Module) -> nn.Module:
        """A decoder layer of the student with gains of 1. Biases of q, k, v and norms inside the
        attention are the teacher's. The projected weights are not filled yet."""
        layer = type(teacher)(self._config, index)
        theirs = dict(teacher.named_parameters())
        layer = layer.to(next(iter(theirs.values()))).eval().requires_grad_(False)
        for name, own in layer.named_parameters():
            if name.removesuffix(".weight") in self.family.norms:
                own.fill_(1 - self.family.gain_offset)
            elif own.shape == theirs[name].shape:
                own.copy_(theirs[name])
        return layer

    def folded_reader(self, index: int, module: nn.Module, name: str) -> Tensor:
        """W_T diag(gain) [out, d_T] of a reader of the teacher's layer, `module`."""
        gain = self.gain(self.family.norm_read_by(index, name))
        return module.get_parameter(f"{self.family.linears[name]}.weight") * gain

    def fill_reader(
        self, student: nn.Module, teacher: TeacherLayer, name: str, projection: Tensor
    ) -> None:
        """Write the reader W_T diag(gain) P into a linear map of a student's layer."""
        weight = student.get_parameter(f"{self.family.linears[name]}.weight")
        weight.copy_(self.folded_reader(teacher.index, teacher.module, name) @ projection)

    def layer(self, index: int) -> nn.Module:
        """The teacher's layer itself if it is in memory in the calibration's dtype, otherwise a
        copy."""
        path = f"{self.family.layers}.{index}"
        own = self.teacher.model.get_submodule(path)
        parameters = dict(own.named_parameters())
        if all(not p.is_meta and p.dtype == self.dtype for p in parameters.values()):
            return own
        with torch.device("meta"):
            layer = type(own)(self.teacher.config, index)
        weights = {
            name: self.teacher.parameter(f"{path}.{name}").to(self.dtype) for name in parameters
        }
        layer.load_state_dict(weights, assign=True)
        return layer.eval().requires_grad_(False)

    def _embedded(self, part: slice) -> Tensor:
        """The teacher's residual stream [b, length, d_T] before its first layer."""
        embedding = self.teacher.parameter(f"{self.family.embedding}.weight")
        return functional.embedding(self.ids[part], embedding).to(self.dtype)

    def _now(self) -> float:
        """Time in seconds, after the device has finished its queued work."""
        if self.ids.is_cuda:
            torch.cuda.synchronize(self.ids.device)
        return time.perf_counter()


class _Passed(nn.Module):
    """Stand-in for a decoder layer that records its arguments other than the stream."""

    arguments: dict[str, Any]

    def forward(self, hidden_states: Tensor, **arguments: Any) -> Tensor:
        self.arguments = arguments
        return hidden_states


def layer_arguments(
    teacher: Teacher, length: int, dtype: torch.dtype, device: torch.device, restart: int = 0
) -> list[dict[str, Any]]:
    """The arguments that the model passes to each decoder layer besides the stream (rotary
    embedding, mask), for one sequence of this length. Its last `restart` tokens restart at position
    0. The arguments broadcast over a batch of sequences of equal length. No layer runs."""
    parent, _, name = teacher.family.layers.rpartition(".")
    base = teacher.model.get_submodule(parent)
    layers = base.get_submodule(name)
    stand_ins = [_Passed() for _ in range(teacher.num_layers)]
    states = torch.zeros(1, length, teacher.hidden_size, dtype=dtype, device=device)
    pieces = [torch.arange(size, device=device) for size in (length - restart, restart)]
    positions = torch.cat(pieces)[None]  # transformers lets no token attend across a restart
    setattr(base, name, nn.ModuleList(stand_ins))
    try:
        base(inputs_embeds=states, use_cache=False, position_ids=positions)
    finally:
        setattr(base, name, layers)
    return [layer.arguments for layer in stand_ins]


class _Reached(Exception):
    """Ends a module's forward pass once the requested tensor is available."""


def input_of(inner: nn.Module, outer: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
    """Run `outer` until it calls `inner`, and return the input of `inner`."""
    got: list[Tensor] = []

    def stop(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        got.append(inputs[0])
        raise _Reached

    hook = inner.register_forward_pre_hook(stop)
    with suppress(_Reached):
        outer(*args, **kwargs)
    hook.remove()
    return got[0]
