"""Running teacher and student layer by layer over the calibration tokens.

The teacher's decoder layers run whole, by transformers' own code, and so do the student's, up to
the tensor that is asked for: attention and FFN are not written here again. One layer of each is
held in float32 (float64 where the teacher is), whatever the dtype of the teacher's weights and
wherever they are; the residual streams of all tokens are in memory, or in files where they are
large.
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
"""Bytes of all streams that may be in memory. Beyond, files cost little: a token's stream is
written and read about ten times a layer, some 100 kB, for hundreds of millions of operations."""

HELD_OUT = 1 / 8
"""Share of the sequences that enter no solve and tell how far each may be followed."""


@dataclass(frozen=True)
class TeacherLayer:
    """A decoder layer of the teacher, and its residual stream around it."""

    index: int
    module: nn.Module
    """The layer, in the calibration's dtype."""
    before: ActivationStore
    """The stream before the layer, [sequences, length, d_T]. It may be overwritten."""
    middle: ActivationStore
    """Between its attention and its FFN."""
    after: ActivationStore
    """After it."""


class Calibration:
    """A teacher, the calibration tokens, and a student that is built layer by layer.

    To be used as a context, which ends the streams.

    Args:
        teacher: the teacher.
        ids: calibration tokens, int64 [sequences, length]; at least two sequences.
        hidden_size: d_S.
        restart: tokens at the end of each sequence that see none before them; the first of them is
            a first token, too.
    """

    def __init__(self, teacher: Teacher, ids: Tensor, hidden_size: int, restart: int = 0) -> None:
        self.teacher, self.family, self.ids = teacher, teacher.family, ids
        self.hidden_size = hidden_size
        self.dtype = torch.promote_types(teacher.model.dtype, torch.float32)
        self.arguments = layer_arguments(teacher, ids.shape[1], self.dtype, ids.device, restart)
        self.solved_on = len(ids) - max(1, round(len(ids) * HELD_OUT))
        """Sequences before this one are solved on; the others measure."""
        self.forward_seconds = 0.0
        """Seconds in which the teacher's layers alone ran over all tokens, once."""
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
        """What an error in the student's stream counts, [..., 1]: the inverse of the RMS of the
        teacher's [..., d_T] or, where it is larger, of the student's [..., d_S] over as many
        numbers. Massive activations rule no solve, be they the teacher's or the student's own."""
        ours = student.norm(dim=-1, keepdim=True) * teacher.shape[-1] ** -0.5
        return 1 / self.rms(teacher).maximum(ours)

    def normalize(self, stream: Tensor) -> Tensor:
        """A residual stream [..., d] as rows [tokens, d] that an RMSNorm of gain 1 gives."""
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

        The streams are used again at the next layer and in the next pass.
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
        after the last."""
        states = self._embedded(part)
        for index in range(self.teacher.num_layers):
            yield states
            states = self.run(self.layer(index), index, states)
        yield states

    def run(self, layer: nn.Module, index: int, states: Tensor) -> Tensor:
        """A decoder layer of teacher or student on a residual stream [b, length, d]."""
        result = layer(states, **self.arguments[index])
        states = result[0] if isinstance(result, tuple) else result
        return states

    def student_layer(self, index: int, teacher: nn.Module) -> nn.Module:
        """A decoder layer of the student with gains of 1; biases of q, k, v and norms inside the
        attention are the teacher's, and the projected weights are still to be filled."""
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
        """Give a student's layer the reader W_T diag(gain) P in place of a linear map."""
        weight = student.get_parameter(f"{self.family.linears[name]}.weight")
        weight.copy_(self.folded_reader(teacher.index, teacher.module, name) @ projection)

    def layer(self, index: int) -> nn.Module:
        """The teacher's layer where it is in memory in the calibration's dtype; else a copy."""
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
        """Seconds of a clock, once the device has done what it was given."""
        if self.ids.is_cuda:
            torch.cuda.synchronize(self.ids.device)
        return time.perf_counter()


class _Passed(nn.Module):
    """Stands for a decoder layer, and keeps what it is given besides the stream."""

    arguments: dict[str, Any]

    def forward(self, hidden_states: Tensor, **arguments: Any) -> Tensor:
        self.arguments = arguments
        return hidden_states


def layer_arguments(
    teacher: Teacher, length: int, dtype: torch.dtype, device: torch.device, restart: int = 0
) -> list[dict[str, Any]]:
    """What the model gives each decoder layer besides the stream (rotary embedding, mask), for one
    sequence of a length, the last `restart` tokens of which begin anew; it broadcasts over a batch
    of equally long ones. No layer runs."""
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
    """Ends a module's forward pass once the tensor that was asked for is there."""


def input_of(inner: nn.Module, outer: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
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
