"""The memory that a recipe takes on every GPU, counted without a GPU and without any weights.

The real code runs one step on tensors that have shapes but no memory (torch's FakeTensorMode),
and a dispatch mode counts what is alive. One such step tells the memory of every micro-batch: it
has `SEQUENCES` sequences, a prime number, and what is a multiple of it grows with the micro-batch.
The losses over the vocabulary and the Triton kernels are imitated by what they allocate. What an
owner keeps and what processes exchange follows from the real assignment of the owners. Only the
start is a formula (docs/initialize.md).

Not counted: fragmentation, workspaces of matrix products, and buffers of NCCL. Norms and rotary
embedding are counted as torch computes them; liger-kernel's need less.
"""

import math
import resource
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lrc.cloning.distill_pass import chunk_tokens
from lrc.cloning.low_rank_clone import LowRankClone
from lrc.cloning.method import Counts, StepLosses
from lrc.cloning.start.calibration import BATCH_TOKENS, IN_MEMORY
from lrc.data.batch import Batch
from lrc.model.precision import forward_dtype, product_dtype, upcast_dtype
from lrc.model.teacher import element_type
from lrc.recipe import Recipe
from lrc.system.distributed import Wait, World
from lrc.train.muon import orthogonal_parameters
from lrc.train.sizes import need_clone, planned_teacher, target_device

ADAM, MUON = 2, 1
"""Values that the optimizers keep for each trained one."""

CUDA_CONTEXT = 2**29
"""Bytes that CUDA and its libraries take on a GPU, roughly."""

SEQUENCES, ROWS = 1_000_003, 1_000_033
"""Sequences of the micro-batch, and rows of logits at once, of the step that is counted: primes
that are larger than any size of a model."""

Array = np.ndarray[Any, Any]

KEPT_FREE = 0.14
"""What the C library keeps of freed blocks on a CPU, as a share of all tensors: the measurement in
docs/cost.md."""


@dataclass(frozen=True)
class Memory:
    """What the fullest process of a run holds when it holds most, in bytes."""

    parts: dict[str, int]
    """By part; their sum is the peak of a step."""
    start: int
    """The peak in the first process while it solves the start."""
    moved: int
    """Bytes of the gradients and weights that the process exchanges with the others in a step."""
    sequence: float
    """What another sequence in the micro-batch adds."""

    @property
    def peak(self) -> int:
        """The largest of both."""
        return max(sum(self.parts.values()), self.start)


def memory_of(recipe: Recipe, processes: int) -> Memory:
    """The memory of a run of the method `lrc`, in the stage that takes more.

    Args:
        recipe: the recipe.
        processes: number of processes, each with its own GPU.

    Raises:
        UserError: as `lrc.train.sizes.planned_models`.
    """
    need_clone(recipe)
    release, found = recipe.train.release_at, []
    for released in (False, True):
        if (release < 1) if released else (release > 0):
            stage = _Stage(recipe, processes, released)
            found.append(stage.memory(recipe.train.micro_batch))
    return max(found, key=lambda memory: memory.peak)


def largest_micro_batch(recipe: Recipe, memory: Memory, card: float) -> int:
    """The largest micro-batch whose peak fits in the memory of a card; 0 if none does.

    Args:
        recipe: the recipe.
        memory: its memory.
        card: memory of the card, in bytes.
    """
    if memory.start > card:
        return 0
    left = card - sum(memory.parts.values())
    return max(0, recipe.train.micro_batch + int(left // memory.sequence))


def _terms(size: int) -> Array:
    """A number of bytes as [fixed, for each sequence, for each row of logits]."""
    if size % SEQUENCES == 0:
        return np.array([0, size // SEQUENCES, 0])
    return np.array([0, 0, size // ROWS] if size % ROWS == 0 else [size, 0, 0])


class _Alive(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of all tensors that are made in its context and still exist, in `_terms`."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = np.zeros(3, dtype=np.int64)
        self.peaks: list[Array] = []
        """What existed whenever a tensor was made."""
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # half of all calls
        grouped = func is torch.ops.aten._grouped_mm.default
        result = (_grouped_product if grouped else func)(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._see(tensor.untyped_storage())
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        self._known.add(storage)
        size = _terms(storage.nbytes())
        self.now = self.now + size
        self.peaks.append(self.now)
        weakref.finalize(storage, self._release, size)

    def _release(self, size: Array) -> None:
        self.now = self.now - size


@dataclass(frozen=True)
class _Others(World):
    """Processes that do not exist. It counts what would be exchanged with them."""

    moved: list[int] = field(default_factory=list)

    def send(self, tensor: Tensor, owner: int) -> Wait:
        self.moved.append(tensor.nbytes)
        return lambda: None


@dataclass(frozen=True)
class _Counted:
    """A step: bytes, and `_terms` where the micro-batch matters."""

    teacher: int
    student: int
    projections: int
    gradients: int
    moved: int
    activations: Array
    peaks: Array
    """What existed at any time after the student's weights were made, [tensors made, 3]."""


class _Stage:
    """A stage of a run in the process that owns most."""

    def __init__(self, recipe: Recipe, processes: int, released: bool) -> None:
        self.recipe, self.released = recipe, released
        self.device = target_device(recipe)
        self.passes = min(2, max(1, recipe.train.accumulate // processes))
        """Number of passes to count: gradients exist from the second on."""
        self.teacher = planned_teacher(recipe.teacher)
        self.teacher.model.to(element_type(recipe.teacher.dtype, self.device))
        torch_kernels = recipe.train.model_copy(update={"kernels": "torch"})
        with torch.device("meta"):
            plain = recipe.model_copy(update={"train": torch_kernels})
            self.method = LowRankClone.build(self.teacher, plain)
        held = self.method.projections.values, self.method.source.writers
        self.projections = sum(value.nbytes for values in held for value in values.values())
        self.low = forward_dtype(recipe.train.precision, self.device)
        if self.device.type == "cuda":
            self.method.weight_dtype = self.low
        self.fused = self.device.type == "cuda" and recipe.train.kernels != "torch"
        self.world = self._fullest(processes)
        self.sharded = recipe.teacher.shard and processes > 1
        self.chunk = recipe.objective.chunk_tokens or chunk_tokens(self.device)
        self.program = CUDA_CONTEXT
        if self.device.type == "cpu":
            self.program = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def memory(self, micro_batch: int) -> Memory:
        """Its memory with a number of sequences."""
        counted = self._count()
        one, two = (self._memory(counted, number) for number in (micro_batch, 2 * micro_batch))
        more = sum(two.parts.values()) - sum(one.parts.values())
        return replace(one, sequence=max(1.0, more / micro_batch))

    def _fullest(self, processes: int) -> _Others:
        """The process with the largest state of the optimizer."""
        method = self.method
        if self.released:
            method._release()
        method.share_work(_Others(0, processes))
        state = [0] * processes
        muon = orthogonal_parameters(method) if self.recipe.train.optimizer == "muon" else {}
        for name, value in method.parameters().items():
            state[method.owners[name]] += (MUON if name in muon else ADAM) * value.nbytes
        world = _Others(state.index(max(state)), processes)
        method.share_work(world)
        self.state = max(state)
        return world

    def _count(self) -> _Counted:
        """Run a step."""
        method, alive = self.method, _Alive()
        with FakeTensorMode(allow_non_fake_inputs=True), alive:
            made: dict[int, Tensor] = {}
            teacher = _unfilled(self.teacher.model, made)
            student = _unfilled(method.model, made)
            projections = 0
            for values in (method.projections.values, method.source.writers):
                for key, value in values.items():
                    values[key] = nn.Parameter(
                        torch.empty(value.shape, dtype=value.dtype), value.requires_grad
                    )
                    projections += value.nbytes
            if not self.released and method.weight_dtype:
                method.projections.store_as(method.model, method.weight_dtype)
                student = sum(value.nbytes for value in method.model.parameters())
            first = method.stage_ends()[0] if self.released and method.stage_ends() else 0
            method.begin_step(first)
            alive.peaks = [alive.now]
            activations = self._pass(alive) - _terms(teacher + student + projections)
            gradients = sum(value.nbytes for value in self._gradients())
            grads = (leaf.value.grad for leaf in method.leaves().values())
            self.world.moved.extend(grad.nbytes for grad in grads if grad is not None)
            method.end_step()
            if not self.released:
                gradients = sum(value.nbytes for value in self._gradients())
        moved = sum(self.world.moved) + self._exchanged()
        peaks = np.stack(alive.peaks)
        return _Counted(teacher, student, projections, gradients, moved, activations, peaks)

    def _memory(self, counted: _Counted, micro_batch: int) -> Memory:
        """The memory of a step with a number of sequences."""
        rows = min(self.chunk, micro_batch * self.recipe.data.sequence_length)
        terms = np.array([1, micro_batch, rows])
        elsewhere = self._elsewhere() if self.sharded else 0
        teacher = counted.teacher - elsewhere
        fixed = teacher + counted.student + counted.projections
        others = fixed + counted.gradients + self.state
        peak = int((counted.peaks @ terms).max()) + self.state - elsewhere
        activations = min(int(counted.activations @ terms), peak - others)
        parts = {
            "program": self.program,
            "teacher": teacher,
            "student": counted.student,
            "projections": counted.projections,
            "gradients": counted.gradients,
            "optimizer": self.state,
            "activations": activations,
            "buffers": peak - others - activations,
        }
        if self.device.type == "cpu":
            parts["kept free"] = int(KEPT_FREE * peak)
        moved = counted.moved if self.world.size > 1 else 0
        solved = fixed - counted.projections + self.projections
        start = parts["program"] + solved + self._start(activations / micro_batch)
        return Memory(parts, start, moved, 0.0)

    def _pass(self, alive: _Alive) -> Array:
        """Run the micro-batches of a step; return what exists between the forward passes of the
        models and the losses over the vocabulary, without gradients."""
        method, kept = self.method, alive.now

        def vocabulary(_teacher: Tensor, hidden: Tensor, *_: Any) -> StepLosses:
            nonlocal kept
            kept = alive.now - _terms(sum(value.nbytes for value in self._gradients()))
            heads = method.model, self.teacher.model
            weights = (model.get_output_embeddings().weight for model in heads)
            loss = _VocabularyMemory.apply(hidden.flatten(0, 1), *weights, self.fused)  # type: ignore[no-untyped-call]
            return StepLosses(loss, {})

        method.distill.kl_and_lm_losses = vocabulary  # type: ignore[assignment,method-assign]
        if self.fused:
            method.distill.compare = _clone
        length = self.recipe.data.sequence_length
        for value in (*method.model.parameters(), *method.projections.values.values()):
            if self.released:
                value.grad = None
        for _ in range(self.passes):
            batch = Batch(torch.zeros(SEQUENCES, length, dtype=torch.int64))
            tokens = batch.input_ids.numel()
            with torch.autocast("cpu", torch.bfloat16, enabled=self.low is torch.bfloat16):
                losses = method.losses(batch, Counts(tokens, tokens))
            losses.loss.backward()  # type: ignore[no-untyped-call]
            del losses
        return kept

    def _gradients(self) -> Iterator[Tensor]:
        """All gradients that exist."""
        method = self.method
        trained = {id(v): v for v in (*method.model.parameters(), *method.parameters().values())}
        for value in trained.values():
            if value.grad is not None:
                yield value.grad

    def _exchanged(self) -> int:
        """Bytes of the parameters that the loop sends after the update, and of the layers of a
        divided teacher in every pass."""
        method = self.method
        projected = method.projected()
        passes = max(1, self.recipe.train.accumulate // self.world.size) if self.sharded else 0
        layers = sum(value.nbytes for layer in self._layers() for value in layer.values())
        own = sum(v.nbytes for n, v in method.parameters().items() if n not in projected)
        return own + passes * layers

    def _layers(self) -> list[dict[str, Tensor]]:
        """The parameters of the teacher's layers, by their names in the teacher."""
        teacher = self.teacher
        paths = [teacher.layout.layer(index) for index in range(teacher.num_layers)]
        return [dict(teacher.model.get_submodule(path).named_parameters(path)) for path in paths]

    def _elsewhere(self) -> int:
        """Bytes of a divided teacher that this process does not have when it has most: FSDP gives
        it an equal part of the rows, and holds two whole layers when one follows another."""
        layers, here = self._layers(), 0
        for layer in layers:
            for name, value in layer.items():
                rows = math.ceil(len(value) / self.world.size)
                here += rows * value.nbytes // len(value)
                here += value.nbytes if name in self.teacher.kept else 0
        sizes = [sum(value.nbytes for value in layer.values()) for layer in layers]
        return sum(sizes) - here - 2 * max(sizes)

    def _start(self, by_sequence: float) -> int:
        """What a start from text needs besides the weights (docs/initialize.md), which include all
        projections.

        Args:
            by_sequence: bytes of a sequence's activations in training.
        """
        tokens, length = self.method.calibration_tokens(), self.recipe.data.sequence_length
        if not tokens:
            return 0
        wide, narrow = self.teacher.hidden_size, self.method.projections.hidden_size
        size = torch.float32.itemsize
        layer = max(sum(value.numel() for value in layer.values()) for layer in self._layers())
        found = min(IN_MEMORY, size * tokens * (3 * wide + 2 * narrow))
        found += 2 * size * (16 * wide**2 + layer)
        if self.recipe.initialize.method == "closed-form" and self.recipe.initialize.refine_epochs:
            found += 3 * self.projections // 2 + int(by_sequence * BATCH_TOKENS / length) // 2
        return found


def _unfilled(model: nn.Module, made: dict[int, Tensor]) -> int:
    """Give a model parameters and buffers without memory; return their bytes.

    Args:
        model: the model.
        made: the tensors made so far, by the identity of what they replace.
    """
    total = 0
    for module in model.modules():
        for kind in (module._parameters, module._buffers):
            for name, value in kind.items():
                if value is None:
                    continue
                if id(value) not in made:
                    new = torch.empty(value.shape, dtype=value.dtype)
                    if isinstance(value, nn.Parameter):
                        new = nn.Parameter(new, requires_grad=value.requires_grad)
                    made[id(value)] = new
                    total += new.nbytes
                kind[name] = made[id(value)]  # type: ignore[assignment]
    return total


def _grouped_product(left: Tensor, right: Tensor, ends: Tensor, *_: Any, **__: Any) -> Tensor:
    """The shape of a product with the weights of all experts, or of its gradient for them. Torch
    knows it for aligned bfloat16 alone."""
    experts = [len(ends)] if right.ndim == 2 else []
    return left.new_empty(*experts, left.shape[-2], right.shape[-1])


class _VocabularyMemory(torch.autograd.Function):
    """What `lrc.cloning.objective.vocabulary` allocates."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, teacher_head: Tensor, fused: bool
    ) -> Tensor:
        dtype = product_dtype(hidden)
        casts = [value.to(dtype) for value in (head, teacher_head)]
        ctx.save_for_backward(
            torch.empty_like(hidden), torch.empty_like(head, dtype=upcast_dtype(head))
        )
        # Both models' logits. Torch also needs three buffers, but on a CPU few rows of them.
        exact = dtype if fused else torch.promote_types(dtype, torch.float32)
        buffers = 2 if fused or head.device.type == "cpu" else 5
        made = [torch.empty(ROWS, len(head), dtype=exact) for _ in range(buffers)]
        del casts, made
        return hidden.new_zeros(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        of_hidden, of_head = ctx.saved_tensors
        return grad * of_hidden, grad * of_head, None, None


class _CloneMemory(torch.autograd.Function):
    """What `lrc.cloning.kernels.clone` allocates."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, target: Tensor, source: Tensor | None, projection: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(student.dtype, target.dtype)
        unit = None
        if projection is not None and ctx.needs_input_grad[3]:
            unit = torch.empty_like(projection)
        ctx.save_for_backward(torch.empty_like(student, dtype=dtype), unit)
        return student.view_as(student), student.new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        _difference, unit = ctx.saved_tensors
        return torch.empty_like(grad), None, None, unit


def _clone(
    student: Tensor, target: Tensor, *_: Any, factors: tuple[Any, Any] | None = None, **__: Any
) -> tuple[Tensor, Tensor]:
    """`compare_activations` by `_CloneMemory`."""
    found: tuple[Tensor, Tensor] = _CloneMemory.apply(student, target, *(factors or (None, None)))  # type: ignore[no-untyped-call]
    return found
