"""`train.cuda_graph`: replay a micro-batch's launches instead of making them one by one.

A small model's step is limited by the CPU, which launches some hundred kernels a layer. A CUDA
graph records the forward passes, the losses and the backward pass once, and replays all of them
with a single launch. What a step computes around its micro-batches has graphs of its own. What a
graph replays is fixed: the operations, the memory they read and write, and every number that Python
had at hand. So

* tokens are copied into the batch that was recorded, and the gradients always have the same memory;
* alpha is a value in device memory, and the counts to average over must be the same;
* the first micro-batches run one by one, on the stream that records later. They are ordinary
  training, and they compile and allocate what recording must not;
* a new stage of the method, or alpha at zero, starts over. A micro-batch of another shape runs
  alone.

Random numbers are not used. The memory of one micro-batch's activations stays reserved. If `auto`
chose a graph and recording fails, training goes on without it.
"""

import logging
from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from lrc.cloning.method import Capturable, Counts, Method, StepLosses
from lrc.data.batch import Batch
from lrc.model.families.base import ROUTER
from lrc.model.layout import layout_of
from lrc.model.teacher import Teacher
from lrc.recipe import Recipe
from lrc.system.distributed import ALONE, World
from lrc.system.errors import UserError, reason
from lrc.train.setup import autocast

logger = logging.getLogger(__name__)

Found = TypeVar("Found")

WARM_UP = 3
"""Micro-batches of a shape that run one by one before it is recorded, as torch advises."""

SMALL = 500_000_000
"""Parameters of the largest teacher whose micro-batches `auto` records. On an H200, a step of
SmolLM2-135M gains a factor of 1.3 to 14, and launches are hidden behind Llama-3.2-3B's kernels
(`benchmarks/README.md`)."""


class Recorder(Protocol):
    """What records and replays."""

    def warm(self, work: Callable[[], StepLosses]) -> StepLosses:
        """Do some work where it will be recorded."""

    def record(self, work: Callable[[], Found]) -> tuple[Callable[[], object], Found]:
        """Record some work without doing it.

        Returns:
            A function that does it, and the tensors to which it writes the result.

        Raises:
            UserError: if it cannot be recorded.
        """


class CudaRecorder:
    """A CUDA graph, recorded on a stream of its own."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def warm(self, work: Callable[[], StepLosses]) -> StepLosses:
        present = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(present)
        with torch.cuda.stream(self._stream):
            found = work()
        present.wait_stream(self._stream)
        return found

    def record(self, work: Callable[[], Found]) -> tuple[Callable[[], object], Found]:
        graph = torch.cuda.CUDAGraph()
        # Another thread may be reading the next batches into pinned memory.
        mode = "thread_local"
        try:
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode=mode):
                found = work()
        except RuntimeError as error:
            raise UserError(
                f"A CUDA graph cannot record this run's passes ({reason(error)}): set "
                "train.cuda_graph to false."
            ) from error
        return graph.replay, found


class Passes:
    """Runs the forward and backward passes of micro-batches, from a graph where the recipe asks for
    one.

    Args:
        method: the method.
        recipe: its recipe.
        teacher: the teacher.
        device: where it is trained.
        world: the processes that train it together.

    Raises:
        UserError: if the recipe asks for a graph that cannot be.
    """

    def __init__(
        self,
        method: Method,
        recipe: Recipe,
        teacher: Teacher,
        device: torch.device,
        world: World = ALONE,
    ) -> None:
        self.method, self.train, self.device = method, recipe.train, device
        self._recorder: Recorder | None = None
        if uses_graph(method, recipe, teacher, device, world):
            self._recorder = CudaRecorder(device)
        self._structure: Hashable = None
        self._seen: Counter[Hashable] = Counter()
        self._gradients: dict[nn.Parameter, Tensor] = {}
        self._recorded: _Recorded | None = None
        self._parts: dict[str, _Part] = {}

    def run(self, batch: Batch, counts: Counts) -> StepLosses:
        """Run a micro-batch and add up its gradients. The losses have none, and are valid until the
        next call."""
        if self._recorder is None:
            return self._run(batch, counts)
        structure = self._present_structure()
        if structure != self._structure:
            self._structure, self._recorded = structure, None
            self._seen.clear()
            self._parts.clear()
        shape = batch.shapes(), counts
        if self._recorded is None and self._seen[shape] >= WARM_UP:
            gradients = self._present_gradients()
            try:
                self._recorded = self._record(self._recorder, shape, batch, counts)
            except UserError as error:
                self._give_up(error, gradients)
                return self._run(batch, counts)
        if self._recorded is not None and self._recorded.shape == shape:
            with self.method.clock.part("student"):
                self._keep_gradients()
                return self._recorded.replay(batch)
        self._seen[shape] += 1
        losses = self._recorder.warm(lambda: self._run(batch, counts))
        if self._recorded is None:
            leaves = self._leaves()
            self._gradients = {leaf: leaf.grad for leaf in leaves if leaf.grad is not None}
        return losses

    def replay(self, name: str, work: Callable[[], object]) -> None:
        """Do some work of a step before or after its micro-batches, from a graph if they have one.

        Args:
            name: its name.
            work: reads and writes the same memory in every step, and may add gradients.
        """
        if self._recorder is None or self._recorded is None:
            work()
            return
        before = self._present_gradients()
        if name not in self._parts:
            try:
                replay, _ = self._recorder.record(work)
            except UserError as error:
                self._give_up(error, before)
                work()
                return
            self._parts[name] = _Part(before, self._present_gradients(), replay)
        part = self._parts[name]
        if any(part.before[leaf] is not gradient for leaf, gradient in before.items()):
            work()  # a micro-batch that ran alone left its gradients elsewhere
            return
        part.replay()
        _restore(part.after)

    def _give_up(self, error: UserError, gradients: dict[nn.Parameter, Tensor | None]) -> None:
        """Go on without graphs from here, if nobody asked for them."""
        if self.train.cuda_graph != "auto":
            raise error
        logger.warning("Training goes on without train.cuda_graph. %s", error)
        self._recorder = self._recorded = None
        self._parts.clear()
        _restore(gradients)

    def _run(self, batch: Batch, counts: Counts) -> StepLosses:
        with autocast(self.train, self.device):
            losses = self.method.losses(batch, counts)
        with self.method.clock.part("student"):
            losses.loss.backward()  # type: ignore[no-untyped-call]
        # Nothing may keep the backward pass's nodes: they belong to the stream of this pass.
        return replace(losses, loss=losses.loss.detach())

    def _record(
        self, recorder: Recorder, shape: Hashable, batch: Batch, counts: Counts
    ) -> "_Recorded":
        assert isinstance(self.method, Capturable)
        self.method.prepare_capture(self.replay)
        self._keep_gradients()
        inputs = batch.copy()
        replay, losses = recorder.record(lambda: self._run(inputs, counts))
        for leaf in self._leaves():
            assert leaf.grad is self._gradients.get(leaf), "a gradient has other memory"
        return _Recorded(shape, inputs, replay, losses)

    def _keep_gradients(self) -> None:
        """Let the gradients have the recorded memory. It holds zero at the start of a step."""
        new = [leaf for leaf in self._gradients if leaf.grad is None]
        if new:
            torch._foreach_zero_([self._gradients[leaf] for leaf in new])
        for leaf, kept in self._gradients.items():
            if leaf.grad is not None and leaf.grad is not kept:  # of a micro-batch that ran alone
                kept.copy_(leaf.grad)
            leaf.grad = kept

    def _present_structure(self) -> Hashable:
        """What must stay for a recording to stay valid."""
        assert isinstance(self.method, Capturable)
        return self.method.capture_key(), tuple(leaf.data_ptr() for leaf in self._leaves())

    def _present_gradients(self) -> dict[nn.Parameter, Tensor | None]:
        return {leaf: leaf.grad for leaf in self._leaves()}

    def _leaves(self) -> list[nn.Parameter]:
        """Everything that is trained."""
        trained = (*self.method.model.parameters(), *self.method.parameters().values())
        return list(dict.fromkeys(trained))


@dataclass(frozen=True)
class _Part:
    """What was recorded of a step besides its micro-batches."""

    before: dict[nn.Parameter, Tensor | None]
    """The memory of the gradients before it."""

    after: dict[nn.Parameter, Tensor | None]
    """And after it."""

    replay: Callable[[], object]


def _restore(gradients: dict[nn.Parameter, Tensor | None]) -> None:
    for leaf, gradient in gradients.items():
        leaf.grad = gradient


class _Recorded:
    """A recorded micro-batch."""

    def __init__(
        self, shape: Hashable, inputs: Batch, replay: Callable[[], object], losses: StepLosses
    ) -> None:
        self.shape, self._inputs, self._replay, self._losses = shape, inputs, replay, losses

    def replay(self, batch: Batch) -> StepLosses:
        """Do what was recorded with another batch."""
        self._inputs.fill(batch)
        self._replay()
        return self._losses


def uses_graph(
    method: Method, recipe: Recipe, teacher: Teacher, device: torch.device, world: World = ALONE
) -> bool:
    """Whether a recipe's `train.cuda_graph` means to record its micro-batches.

    Raises:
        UserError: if it is true and they cannot be recorded.
    """
    asked = recipe.train.cuda_graph
    if asked is False:
        return False
    why = obstacle(method, recipe, teacher, device, world)
    if asked == "auto":
        return why is None and teacher.model.num_parameters() <= SMALL
    if why is not None:
        raise UserError(f"train.cuda_graph is true, but {why}: set it to false.")
    return True


def obstacle(
    method: Method, recipe: Recipe, teacher: Teacher, device: torch.device, world: World
) -> str | None:
    """Why micro-batches cannot be recorded; None if they can."""
    if device.type != "cuda":
        return f"the device is {device.type}, and only CUDA has graphs"
    if world.size > 1:
        return "several processes train the run, whose exchanges cannot be recorded"
    if not isinstance(method, Capturable):
        return f"method {recipe.method.name} changes what a micro-batch does from step to step"
    if teacher.on_disk:
        return "the teacher's layers are on disk"
    if recipe.train.gradient_checkpointing:
        return "gradient_checkpointing reads the state of the random generator in every layer"
    if recipe.data.document_mask:
        return "with data.document_mask every step has another number of labels"
    branches = layout_of(teacher.model).branches
    if any(ROUTER in branch.readers for layer in branches for branch in layer):
        return f"{teacher.family.model_type} models choose experts by values"
    return None
