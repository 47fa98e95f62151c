"""A step waits for a GPU once, and a micro-batch never: on a GPU that does not exist."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from absent_gpu import ABSENT, Waits, an_absent_gpu
from lrc.cloning.low_rank_clone import LowRankClone
from lrc.data.batch import Batch
from lrc.model.families import FAMILIES
from lrc.run import Run
from lrc.system.progress import Task
from lrc.train.loop import Loop
from lrc.train.setup import Setup, new_state, set_up
from tiny import in_turn, tiny_batch, tiny_teacher
from tiny_runs import tiny_recipe

ONCE = ["_to_copy at train/loop.py"]
"""The transfer of everything that a step reports."""

BATCHES = {
    "plain": tiny_batch(),
    "padded": tiny_batch(lengths=[9, 5]),
    "documents": tiny_batch(documents=[[4, 5], [2, 7]]),
    "labels": replace(tiny_batch(), label_mask=tiny_batch().input_ids > 5),
    "sources": replace(tiny_batch(), source_ids=tiny_batch().input_ids % 2),
}


class Text:
    """A text of one batch."""

    training_sequences = 1000

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        self.sources = () if batch.source_ids is None else ("a", "b")

    def training_batch(self, _first: int, _rows: int) -> Batch:
        return self.batch

    def state(self) -> dict[str, Any]:
        return {}


def waits_of_a_step(
    folder: Path,
    changes: Mapping[str, Any],
    batch: Batch = BATCHES["plain"],
    family: str = "llama",
    kernels: str = "torch",
) -> list[str]:
    """The files in which a step waits, after another step. By default it has two micro-batches, and
    two chunks of different size in each."""
    train = {"train.kernels": "torch", "train.accumulate": 2, "objective.chunk_tokens": 13}
    recipe = tiny_recipe(train | changes)
    teacher = tiny_teacher(family, dtype=torch.float32)
    if any(branch.has_experts for layer in teacher.layout.branches for branch in layer):
        teacher.model.set_experts_implementation("batched_mm")  # the eager one waits
    with an_absent_gpu():
        teacher.model.to(ABSENT)
        method = LowRankClone.build(teacher, recipe)
        method.distill.triton = kernels == "triton"
        text: Any = Text(batch)
        setup = Setup(teacher, method, new_state(method, recipe), ABSENT, False)
        loop = Loop(Run.create(folder / "run", recipe), setup, text, reads_ahead=False)
        loop.batches = loop.open_batches()
        progress = Task("steps")
        with Waits() as waits:
            loop._change_stage(progress)
            loop._step(progress)
            waits.places.clear()
            loop._step(progress)
    return [place.rpartition(":")[0] for place in waits.places]


@pytest.mark.parametrize(("kernels", "batch"), in_turn(["torch", "triton"], ["released", *BATCHES]))
def test_a_step_waits_once(tmp_path: Path, kernels: str, batch: str) -> None:
    if kernels == "triton":
        pytest.importorskip("triton")
    changes = {"train.release_at": 0.0 if batch == "released" else 1.0}
    text = BATCHES.get(batch, BATCHES["plain"])
    assert waits_of_a_step(tmp_path, changes, text, kernels=kernels) == ONCE


@pytest.mark.parametrize(
    "changes",
    [
        {"objective.divergence": "jsd"},
        {"objective.divergence": "reverse_kl"},
        {"objective.alpha": 0},
        {"objective.kl_weight": 0},
        {"objective.clone_scale": "none"},
        {"objective.attn_out": "teacher"},
        {"objective.alignment": "explicit", "train.release_at": 1},
        {"train.gradient_checkpointing": True},
        {"train.token_grad_clip": 0, "train.grad_clip": 0},
        {"student.kv_heads": 1, "student.layers": 1, "train.release_at": 1},
        {"student.intermediate_size": 12, "train.release_at": 1},
        {"student.intermediate_size": 12, "train.release_at": 0},
    ],
    ids=str,
)
def test_a_step_waits_once_with_other_settings(tmp_path: Path, changes: dict[str, Any]) -> None:
    assert waits_of_a_step(tmp_path, changes) == ONCE


@pytest.mark.parametrize("family", in_turn(list(FAMILIES)))
def test_a_step_waits_once_with_every_family(tmp_path: Path, family: str) -> None:
    one = {"train.accumulate": 1, "objective.chunk_tokens": None}  # they do not matter to a family
    assert waits_of_a_step(tmp_path, one, family=family) == ONCE


@pytest.mark.parametrize("module", ["kl", "jsd"])
def test_a_question_to_the_gpu_is_noticed(
    tmp_path: Path, module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"lrc.cloning.objective.{module}.answers_at_once", lambda _: True)
    with pytest.raises(AssertionError) if module == "kl" else nullcontext():
        waits = waits_of_a_step(tmp_path, {"objective.divergence": module})
        assert f"_local_scalar_dense at cloning/objective/{module}.py" in waits


WAITING: dict[str, Callable[[Tensor], object]] = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool(x.any()),
    "list": lambda x: x.tolist(),
    "float": lambda x: float(x[0]),
    "cpu": lambda x: x.cpu(),
    "from a CPU": lambda x: torch.ones(3).to(x.device),
    "made from a list": lambda x: torch.tensor([1.0, 2.0], device=x.device),
    "copied into": lambda x: x.copy_(torch.ones(4)),
    "nonzero": lambda x: x.nonzero(),
    "masked": lambda x: x[x > 0],
    "written where masked": lambda x: x.index_put_((x > 0,), x.clone()),
    "median": lambda x: x.nanmedian(),
    "unique": lambda x: x.unique(),
}
ASYNCHRONOUS: dict[str, Callable[[Tensor], object]] = {
    "from pinned memory": lambda x: torch.ones(3).to(x.device, non_blocking=True),
    "set where masked": lambda x: x.index_put_((x > 0,), torch.zeros((), device=x.device)),
    "set by index": lambda x: x.__setitem__(0, 3.0),
    "median of a row": lambda x: x.nanmedian(0),
    "clipping": lambda x: torch.nn.utils.clip_grad_norm_([torch.nn.Parameter(x)], 1.0),
}


@pytest.mark.parametrize("name", [*WAITING, *ASYNCHRONOUS])
def test_what_waits(name: str) -> None:
    call = WAITING.get(name) or ASYNCHRONOUS[name]
    with an_absent_gpu(), Waits() as waits, suppress(AssertionError):
        call(torch.ones(4, device=ABSENT))
    assert bool(waits.places) == (name in WAITING)


def test_a_loaded_teacher_moves_to_the_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user's model comes from the CPU."""
    monkeypatch.setattr("lrc.train.setup.find_device", lambda _name: ABSENT)
    run = Run.create(tmp_path / "run", tiny_recipe({}))
    with an_absent_gpu():
        setup = set_up(run, tiny_teacher("llama", dtype=torch.float32))
        assert {value.device for value in setup.teacher.model.parameters()} == {ABSENT}
        assert {value.device for value in setup.method.model.parameters()} == {ABSENT}
