"""Layer-by-layer runs of teacher and student over the calibration tokens.

transformers' own code runs the teacher's decoder layers, and their blocks alone for the student, so
attention and FFN are not reimplemented here. One layer is in memory, in float32 (float64 if the
teacher is), whatever the dtype and location of the teacher's weights. The residual streams of all
tokens are in memory, or in files if they are large.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from lrc.cloning.start.streams import ActivationStore
from lrc.model.families import Branch
from lrc.model.student import copy_buffers, derive_config
from lrc.model.teacher import Teacher
from lrc.recipe.sections import StudentSection

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
    """A decoder layer of the teacher, and its residual stream around its branches."""

    index: int
    """Its index in the teacher, or in the student if it is one of `student_layers`."""
    module: nn.Module
    """The layer, in the calibration's dtype."""
    streams: list[ActivationStore]
    """The stream before each branch and after the last, [sequences, length, d_T]. Those before a
    branch may be overwritten."""

    @property
    def after(self) -> ActivationStore:
        """The stream after the layer."""
        return self.streams[-1]


class Calibration:
    """A teacher, the calibration tokens, and a student that is built layer by layer.

    Use it as a context manager, which closes the streams.

    Args:
        teacher: the teacher whose weights are projected. If it is a pruned one, the whole one gives
            the streams.
        ids: calibration tokens, int64 [sequences, length]; at least two sequences.
        hidden_size: d_S.
        restart: number of tokens at the end of each sequence that do not see the tokens before
            them; the first of these is one more first token.
    """

    def __init__(self, teacher: Teacher, ids: Tensor, hidden_size: int, restart: int = 0) -> None:
        self.source, self.family, self.ids = teacher, teacher.family, ids
        """The teacher whose weights are projected, with as many layers as the student."""
        self.teacher = teacher = teacher.whole
        self.branches = teacher.layout.branches
        """The branches of each layer of the whole teacher."""
        self.hidden_size = hidden_size
        self.dtype = torch.promote_types(teacher.model.dtype, torch.float32)
        config, self.student_config = (
            teacher.config,
            derive_config(self.source, StudentSection(hidden_size=hidden_size)),
        )
        self.residual_scale = self.family.residual_scale(config)
        """Factor of what a branch adds to the stream."""
        self.logit_scale = self.family.logit_scale(config)
        """Factor of the logits, before the softcap."""
        scales = map(self.family.embedding_scale, (config, self.student_config))
        self.embedding_ratio = next(scales) / next(scales)
        """The teacher's factor of the embedding in units of the student's."""
        self.arguments = layer_arguments(teacher, ids.shape[1], self.dtype, ids.device, restart)
        self.solved_on = len(ids) - max(1, round(len(ids) * HELD_OUT))
        """Number of sequences that the solves use, from the first; the others measure."""
        self.forward_seconds = 0.0
        """Seconds that the teacher's layers alone take to run once over all tokens."""
        self._batch = max(1, BATCH_TOKENS // ids.shape[1])
        self._streams_of_layer = 1 + max(map(len, self.branches))
        widths = self._streams_of_layer * teacher.hidden_size + 2 * hidden_size
        self._on_disk = ids.numel() * widths * self.dtype.itemsize > IN_MEMORY
        self._opened = ExitStack()
        self._teacher_streams: list[ActivationStore] = []
        self._eps = float(getattr(teacher.config, self.family.norm_eps))

    def __enter__(self) -> "Calibration":
        return self

    def __exit__(self, *_error: object) -> None:
        self._opened.close()

    def weight(self, path: str) -> Tensor:
        """The weight at a module path of the teacher that is projected."""
        return self.source.parameter(f"{path}.weight").to(self.dtype)

    def gain(self, path: str) -> Tensor:
        """Gain [d_T] of the norm at a module path of the teacher that is projected."""
        return self.source.gain(path, self.dtype)

    def cap(self, logits: Tensor) -> Tensor:
        """The model's logits, from products of states and rows of the head."""
        softcap = self.teacher.logit_softcap
        return logits if softcap is None else softcap * (logits / softcap).tanh()

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

    def layer_scale(self, layer: nn.Module) -> float:
        """Factor of the stream at the end of a layer of the teacher."""
        name = self.family.layer_scale
        return 1.0 if name is None else float(layer.get_buffer(name))

    def normalize(self, stream: Tensor) -> Tensor:
        """Rows [tokens, d] that an RMSNorm with gain 1 makes of a residual stream [..., d]."""
        rows = stream.reshape(-1, stream.shape[-1])
        return rows / self.rms(rows)

    def block_input(self, stream: Tensor, branch: Branch) -> Tensor:
        """What a block reads of a residual stream [b, length, d], before the norm's gain."""
        return stream if branch.norm is None else stream / self.rms(stream)

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
        return self._layers(range(self.teacher.num_layers), stop)

    def student_layers(self) -> Iterator[TeacherLayer]:
        """The same over all sequences, by layers of the student. The stream after a layer is that
        before the next kept layer. `module` is the layer of the teacher that is projected."""
        for layer in self._layers(self.source.kept_layers):
            module = self.layer(layer.index, self.source)
            yield TeacherLayer(layer.index, module, layer.streams)

    def _layers(self, kept: Sequence[int], stop: int | None = None) -> Iterator[TeacherLayer]:
        """The pass over all layers, of which only some are yielded, numbered from 0."""
        if not self._teacher_streams:
            width = self.teacher.hidden_size
            self._teacher_streams = [self.stream(width) for _ in range(self._streams_of_layer)]
        streams = self._teacher_streams
        parts = list(self.batches(0, stop))
        for part in parts:
            streams[0][part] = self.embedded(part)
        self.forward_seconds = 0.0
        ends = *kept[1:], self.teacher.num_layers
        for number, (index, end) in enumerate(zip(kept, ends, strict=True)):
            layer, count = self.layer(index), len(self.branches[index])
            for part in parts:
                states = streams[0][part]
                with self.branch_inputs(layer, index) as inputs:
                    started = self._now()
                    result = self.run(layer, index, states)
                    self.forward_seconds += self._now() - started
                for stream, found in zip(streams[1:count], inputs[1:], strict=True):
                    stream[part] = found
                streams[count][part] = result
            for removed in range(index + 1, end):
                module = self.layer(removed)
                for part in parts:
                    streams[count][part] = self.run(module, removed, streams[count][part])
            yield TeacherLayer(number, layer, streams[: count + 1])
            streams = [streams[count], *streams[:count], *streams[count + 1 :]]

    def teacher_states(self, part: slice) -> Iterator[Tensor]:
        """The teacher's residual stream [b, length, d_T] of a few sequences, before every layer and
        after the last one."""
        states = self.embedded(part)
        for index in range(self.teacher.num_layers):
            yield states
            states = self.run(self.layer(index), index, states)
        yield states

    def run_student(self, layer: nn.Module, index: int, states: Tensor) -> Tensor:
        """Run a decoder layer of the student, or of the teacher that is projected."""
        return self.run(layer, self.source.kept_layers[index], states)

    def run(self, layer: nn.Module, index: int, states: Tensor) -> Tensor:
        """Run a decoder layer on a residual stream [b, length, d], given the index that it has in
        the whole teacher."""
        others, arguments = self.arguments[index]
        result = layer(states, *others, **arguments)
        states = result[0] if isinstance(result, tuple) else result
        return states

    @contextmanager
    def branch_inputs(self, layer: nn.Module, index: int) -> Iterator[list[Tensor]]:
        """Collect what each branch of a layer reads before its norm, [b, length, d_T], while the
        layer runs in the context."""
        found: list[Tensor] = []

        def keep(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found.append(args[0] if args else kwargs["hidden_states"])

        hooks = [
            layer.get_submodule(branch.norm or branch.block).register_forward_pre_hook(
                keep, with_kwargs=True
            )
            for branch in self.branches[index]
        ]
        try:
            yield found
        finally:
            for hook in hooks:
                hook.remove()

    def block(self, layer: nn.Module, index: int, branch: Branch) -> "Block":
        """A block of a layer of the teacher that is projected, as the layer calls it on a
        calibration sequence."""
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        module = layer.get_submodule(branch.block)
        hook = module.register_forward_pre_hook(
            lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
        )
        width = self.teacher.hidden_size
        states = torch.zeros(1, self.ids.shape[1], width, dtype=self.dtype, device=self.ids.device)
        self.run_student(layer, index, states)
        hook.remove()
        other = None if branch.other is None else self.block(layer, index, branch.other)
        return Block(module, *calls[0], branch.input_scale, branch.output_scale, other)

    def student_layer(self, index: int) -> nn.Module:
        """A decoder layer of the student with gains of 1. What is not projected is the teacher's.
        The projected weights are not filled yet."""
        teacher = self.layer(index, self.source)
        prefix = self.source.layout.layer(index)
        theirs = dict(teacher.named_parameters())
        layer = type(teacher)(self.student_config, index)
        layer = layer.to(next(iter(theirs.values()))).eval().requires_grad_(False)
        layout = self.source.layout
        gains = {f"{norm}.weight" for norm in layout.stream_norms()}
        for name, own in layer.named_parameters():
            if f"{prefix}.{name}" in gains:
                own.fill_(1 - self.family.gain_offset)
            elif own.shape == theirs[name].shape:
                own.copy_(theirs[name])
        copy_buffers(teacher, layer)
        return layer

    def folded_weight(self, index: int, branch: Branch, name: str) -> Tensor:
        """W_T diag(gain) [out, d_T] of a reader of the teacher."""
        prefix = self.source.layout.layer(index)
        weight = self.weight(f"{prefix}.{branch.readers[name]}")
        return weight if branch.norm is None else weight * self.gain(f"{prefix}.{branch.norm}")

    def layer(self, index: int, teacher: Teacher | None = None) -> nn.Module:
        """A layer of a teacher, by default of the whole one: itself if it is in memory in the
        calibration's dtype, otherwise a copy."""
        teacher = teacher or self.teacher
        path = f"{self.family.layers}.{index}"
        own = teacher.model.get_submodule(path)
        parameters = dict(own.named_parameters())
        in_memory = all(not p.is_meta and p.dtype == self.dtype for p in parameters.values())
        if in_memory and not teacher.sharded:
            return own
        with torch.device("meta"):
            layer = type(own)(teacher.config, index)
        weights = {name: teacher.parameter(f"{path}.{name}").to(self.dtype) for name in parameters}
        layer.load_state_dict(weights, strict=False, assign=True)
        for name, buffer in own.named_buffers():
            path, _, attribute = name.rpartition(".")
            setattr(layer.get_submodule(path), attribute, buffer)
        return layer.eval().requires_grad_(False)

    def embedded(self, part: slice) -> Tensor:
        """The teacher's residual stream [b, length, d_T] before its first layer."""
        embedding = self.teacher.parameter(f"{self.family.embedding}.weight")
        embedded = functional.embedding(self.ids[part], embedding).to(self.dtype)
        return embedded * self.family.embedding_scale(self.teacher.config)

    def _now(self) -> float:
        """Time in seconds, after the device has finished its queued work."""
        if self.ids.is_cuda:
            torch.cuda.synchronize(self.ids.device)
        return time.perf_counter()


class _Passed(nn.Module):
    """Stand-in for a decoder layer that records its arguments other than the stream, and returns
    a given stream."""

    others: tuple[Any, ...]
    arguments: dict[str, Any]

    def __init__(self, layer: nn.Module, stream: Tensor) -> None:
        super().__init__()
        self._layer = (layer,)  # not its child
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        """What the model asks of a layer, such as its kind."""
        return getattr(self.__dict__["_layer"][0], name)

    def forward(self, _hidden_states: Tensor, *others: Any, **arguments: Any) -> Tensor:
        # Models whose layers return a tuple pass on its first part: here, of the stream itself.
        self.others, self.arguments = others, arguments
        return self._stream


def layer_arguments(
    teacher: Teacher, length: int, dtype: torch.dtype, device: torch.device, restart: int = 0
) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """The positional and named arguments that the model passes to each decoder layer besides the
    stream (rotary embedding, mask), for one sequence of this length. Its last `restart` tokens
    restart at position 0. The arguments broadcast over a batch of sequences of equal length. No
    layer runs."""
    parent, _, name = teacher.family.layers.rpartition(".")
    base = teacher.model.get_submodule(parent)
    layers = base.get_submodule(name)
    states = torch.zeros(1, length, teacher.hidden_size, dtype=dtype, device=device)
    stand_ins = [_Passed(layer, states) for layer in layers]
    pieces = [torch.arange(size, device=device) for size in (length - restart, restart)]
    positions = torch.cat(pieces)[None]  # transformers lets no token attend across a restart
    setattr(base, name, nn.ModuleList(stand_ins))
    try:
        base(inputs_embeds=states, use_cache=False, position_ids=positions)
    finally:
        setattr(base, name, layers)
    return [(layer.others, layer.arguments) for layer in stand_ins]


@dataclass(frozen=True)
class Block:
    """A block of a layer of the teacher with the arguments that the layer passes to it. These do
    not depend on the residual stream."""

    module: nn.Module
    args: tuple[Any, ...]
    """The positional arguments. If there are any, the first is the residual stream."""
    kwargs: dict[str, Any]
    """The others."""
    input_scale: float = 1.0
    """Factor of what it reads."""
    output_scale: float = 1.0
    """Factor of what it writes."""
    other: "Block | None" = None
    """A second one, whose output is added."""

    def __call__(self, states: Tensor, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """What the block writes, [b, length, d].

        Args:
            states: what it reads, [b, length, d].
            weights: values for some parameters, by their names in the block.
        """
        read = states if self.input_scale == 1 else states * self.input_scale
        if self.args:
            args, kwargs = (read, *self.args[1:]), self.kwargs
        else:
            args, kwargs = (), {**self.kwargs, "hidden_states": read}
        output = functional_call(self.module, dict(weights or {}), args, kwargs)
        written: Tensor = output[0] if isinstance(output, tuple) else output
        if self.output_scale != 1:
            written = written * self.output_scale
        return written if self.other is None else written + self.other(states)
