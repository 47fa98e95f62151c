"""`train.cuda_graph` without a GPU: the operations of a micro-batch are recorded on a tape, which
replays what a CUDA graph would: the same operations, memory and numbers of Python."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lrc.cloning import activations
from lrc.cloning.method import StepLosses
from lrc.data.batch import Batch
from lrc.methods import METHODS
from lrc.run import Run
from lrc.system.distributed import World
from lrc.system.errors import UserError
from lrc.train import cuda_graph
from lrc.train.batches import count
from lrc.train.cuda_graph import WARM_UP, Passes, uses_graph
from tiny import tiny_batch, tiny_method, tiny_teacher
from tiny_runs import assert_same_run, go, new_run, tiny_recipe

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


class Tape(TorchDispatchMode):
    """Records operations below autograd, and undoes what they change."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, Any]] = []
        self.made: set[int] = set()
        self.before: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        assert func.overloadpacket.__name__ != "_local_scalar_dense", "a graph reads no value"
        named = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
        for argument in func._schema.arguments:
            if argument.alias_info is not None and argument.alias_info.is_write:
                for tensor in tree_leaves(named.get(argument.name)):
                    self._keep(tensor)
        found = func(*args, **kwargs)
        self.operations.append((func, args, kwargs, found))
        for made in self._new(func, found):
            self.made.add(made.untyped_storage()._cdata)
        return found

    def _keep(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()._cdata
        if storage not in self.made and storage not in self.before:
            self.before[storage] = tensor, tensor.detach().clone()

    @staticmethod
    def _new(func: Any, found: Any) -> list[Tensor]:
        results = found if isinstance(found, (tuple, list)) else (found,)
        returns = func._schema.returns
        new = [
            tree_leaves(result)
            for result, described in zip(results, returns, strict=len(returns) > 1)
            if described.alias_info is None
        ]
        return [tensor for tensors in new for tensor in tensors if isinstance(tensor, Tensor)]

    def undo(self) -> None:
        for tensor, before in self.before.values():
            tensor.detach().copy_(before)

    def replay(self) -> None:
        with torch.no_grad():
            for func, args, kwargs, found in self.operations:
                again = self._new(func, func(*args, **kwargs))
                if not func.overloadpacket.__name__.startswith(("empty", "new_empty")):
                    for place, value in zip(self._new(func, found), again, strict=True):
                        place.detach().copy_(value)


class Taped:
    """In the place of a CUDA graph; counts what it does."""

    def __init__(self, _device: torch.device) -> None:
        self.warmed = 0
        self.recorded, self.replayed = Counter[str](), Counter[str]()
        RECORDERS.append(self)

    def warm(self, work: Callable[[], StepLosses]) -> StepLosses:
        self.warmed += 1
        return work()

    def record(self, work: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        with Tape() as tape:
            found = work()
        tape.undo()
        kind = "losses" if isinstance(found, StepLosses) else "projections"
        self.recorded[kind] += 1

        def replay() -> None:
            self.replayed[kind] += 1
            tape.replay()

        return replay, found


RECORDERS: list[Taped] = []


@pytest.fixture
def taped(monkeypatch: pytest.MonkeyPatch) -> list[Taped]:
    """The tapes of a test, where no obstacle is seen. As on a GPU, nothing asks for values."""
    RECORDERS.clear()
    monkeypatch.setattr(cuda_graph, "CudaRecorder", Taped)
    monkeypatch.setattr(cuda_graph, "obstacle", lambda *_: None)
    monkeypatch.setattr("lrc.cloning.objective.kl.answers_at_once", lambda _: False)
    monkeypatch.setattr(activations, "nullcontext", lambda: activations.known_padding(tiny_batch()))
    return RECORDERS


def finished(folder: Path, name: str, **changes: Any) -> Run:
    """A run of ten steps of two micro-batches, with another alpha in each, at last zero."""
    alpha = {"objective.alpha_schedule": "linear", "objective.alpha_zero_at": 0.7}
    settings = {"accumulate": 2, "tokens": 640, "cuda_graph": False, **alpha, **changes}
    run = new_run(folder, name=name, **settings)
    go(run)
    return run


@pytest.mark.parametrize(("release", "stages"), [(0.0, 2), (0.5, 3), (1.0, 2)])
def test_a_recorded_run_is_the_same(
    tmp_path: Path, release: float, stages: int, taped: list[Taped]
) -> None:
    """The release, and alpha at zero, start over."""
    eager = finished(tmp_path, "eager", release_at=release)
    assert not taped
    recorded = finished(tmp_path, "recorded", cuda_graph=True, release_at=release)
    assert_same_run(recorded, eager)
    (tape,) = taped
    assert tape.recorded["losses"] == stages
    assert tape.warmed == stages * WARM_UP
    assert tape.warmed + tape.replayed["losses"] == 20
    assert bool(release) == bool(tape.replayed["projections"])


@pytest.mark.parametrize("method", ["scratch", "slicegpt", "minitron", "activation-clone"])
def test_other_methods_are_recorded(tmp_path: Path, method: str, taped: list[Taped]) -> None:
    named = {"method.name": method}
    eager = finished(tmp_path, "eager", **named)
    recorded = finished(tmp_path, "recorded", cuda_graph=True, **named)
    assert_same_run(recorded, eager)
    assert taped[0].replayed["losses"] >= 20 - 2 * WARM_UP


@pytest.mark.parametrize("switch", ["auto", True])
@pytest.mark.parametrize("last", [0, 1, 2])
def test_a_run_that_cannot_be_recorded(
    tmp_path: Path,
    switch: str | bool,
    last: int,
    taped: list[Taped],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whether it is the passes or what comes before or after them, the run goes on where nobody
    asked for a graph, with the gradients that it had."""
    record = Taped.record

    def refuse(self: Taped, work: Callable[[], Any]) -> Any:
        if self.recorded.total() < last:
            return record(self, work)
        with Tape() as tape:
            work()  # the gradients are where only a graph would write them
        tape.undo()
        raise UserError("A CUDA graph cannot record this.")

    monkeypatch.setattr(Taped, "record", refuse)
    if switch is True:
        with pytest.raises(UserError, match="cannot record this"):
            finished(tmp_path, "refused", cuda_graph=True, release_at=1.0)
        return
    eager = finished(tmp_path, "eager", release_at=1.0)
    assert_same_run(finished(tmp_path, "auto", cuda_graph=switch, release_at=1.0), eager)


def step(passes: Passes, batches: list[Batch]) -> dict[str, Tensor]:
    """The gradients of a step; they are forgotten as in the loop."""
    method: Any = passes.method
    counts = count(batches)
    method.begin_step(0)
    total = sum(passes.run(batch, counts).loss.clone() for batch in batches)
    method.end_step()
    found = {"loss": torch.as_tensor(total)}
    for name, parameter in method.parameters().items():
        found[name] = parameter.grad.clone()
        parameter.grad = None
    return found


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_micro_batch_of_another_shape_runs_alone(taped: list[Taped], place: int) -> None:
    """Before, between or after recorded ones, and nothing is recorded again."""
    recipe = tiny_recipe({"train.cuda_graph": True})
    teacher = tiny_teacher("llama")
    method = tiny_method(teacher)
    passes = Passes(method, recipe, teacher, CPU)
    whole = [tiny_batch(seed=seed) for seed in range(2)]
    mixed = list(whole)
    mixed.insert(place, tiny_batch(rows=1))
    short = [*whole[:1], tiny_batch(rows=1), tiny_batch(rows=1), *whole[1:]]
    assert count(mixed) != count(whole)
    for _ in range(3):
        step(passes, mixed)
    (tape,) = taped
    warmed, replayed = tape.warmed, tape.replayed["losses"]
    expected = step(Passes(tiny_method(teacher), tiny_recipe(), teacher, CPU), mixed)
    for name, value in step(passes, mixed).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-13, atol=1e-13)
    recorded, again = tape.recorded["losses"], tape.replayed["losses"]
    assert (recorded, tape.warmed, again) == (1, warmed + 1, replayed + 2)
    step(passes, short)  # other counts
    assert (tape.recorded["losses"], tape.replayed["losses"]) == (1, replayed + 2)


def test_weights_in_other_memory_are_recorded_again(taped: list[Taped]) -> None:
    teacher = tiny_teacher("llama")
    method = tiny_method(teacher)
    passes = Passes(method, tiny_recipe({"train.cuda_graph": True}), teacher, CPU)
    batches = [tiny_batch(), tiny_batch(seed=1)]
    for _ in range(3):
        step(passes, batches)
    norm = method.model.model.norm.weight
    norm.data = 2 * norm.data
    again = [step(passes, batches) for _ in range(3)]
    assert taped[0].recorded["losses"] == 2
    for name, value in again[0].items():
        torch.testing.assert_close(value, again[2][name], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(
    ("settings", "family", "device", "processes", "why"),
    [
        ({}, "llama", CPU, 1, "the device is cpu"),
        ({}, "llama", CUDA, 2, "several processes"),
        ({"train.gradient_checkpointing": True}, "llama", CUDA, 1, "gradient_checkpointing"),
        ({"data.document_mask": True}, "llama", CUDA, 1, "number of labels"),
        ({"method": "sheared-llama"}, "llama", CUDA, 1, "method sheared-llama"),
        ({}, "qwen3_moe", CUDA, 1, "qwen3_moe models choose experts"),
    ],
)
def test_what_cannot_be_recorded_is_refused(
    settings: dict[str, Any], family: str, device: torch.device, processes: int, why: str
) -> None:
    teacher = tiny_teacher(family, dtype=torch.float32)
    recipe = tiny_recipe(settings)
    method = METHODS[recipe.method.name].build(teacher, recipe)
    others = teacher, device, World(0, processes)
    assert not uses_graph(method, recipe, *others)
    assert not uses_graph(method, tiny_recipe(settings | {"train.cuda_graph": "auto"}), *others)
    with pytest.raises(UserError, match=f"train.cuda_graph is true, but .*{why}.* to false"):
        uses_graph(method, tiny_recipe(settings | {"train.cuda_graph": True}), *others)


def test_auto_records_small_models(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = tiny_teacher("llama")
    method = tiny_method(teacher)
    recipe = tiny_recipe({"train.cuda_graph": "auto"})
    assert uses_graph(method, recipe, teacher, CUDA)
    monkeypatch.setattr(cuda_graph, "SMALL", 100)
    assert not uses_graph(method, recipe, teacher, CUDA)
    assert uses_graph(method, tiny_recipe({"train.cuda_graph": True}), teacher, CUDA)


def test_the_loop_refuses_before_the_start(tmp_path: Path) -> None:
    run = new_run(tmp_path, cuda_graph=True)
    with pytest.raises(UserError, match="only CUDA has graphs"):
        go(run)
    assert not run.folder.exists()
