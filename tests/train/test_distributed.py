"""Several processes with gloo train the run that one process trains."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from lrc.recipe import make_recipe
from lrc.run import Run
from lrc.system.distributed import ALONE, World, assign, backend_for
from lrc.system.errors import UserError
from lrc.train.checkpoint import list_checkpoints
from lrc.train.session import check_division
from prepared import EXACT, Prepared, places
from short_closing import SHORT_CLOSING
from tiny_runs import (
    copy_until,
    file_settings,
    save_teacher,
    tiny_documents,
    without_times,
    write_jsonl,
)

TRAINING = {"micro_batch": 2, "accumulate": 2, "eval_every": 2, "checkpoint_every": 2}
TRAINING |= {"tokens": 6 * 2 * 2 * 16, "device": "cpu"}
PROGRAM = SHORT_CLOSING + Path(__file__).with_name("launched.py").read_text()
"""What each process runs."""

CASES: dict[str, list[str]] = {
    "released from step 0": [],
    "never released": ["--set", "train.release_at=1"],
    "random, released": [
        "--set", "train.release_at=0.5", "--set", "initialize.method=random",
        "--set", "objective.alpha_zero_at=1", "--set", "objective.alpha_schedule=linear",
    ],
    "a smaller shape": [
        "--set", "train.release_at=0.5", "--set", "student.layers=1",
        "--set", "student.intermediate_size=9",
    ],
    "a divided teacher": [
        "--set", "train.release_at=0.5", "--set", "teacher.shard=true",
        "--set", "objective.attn_out=teacher",
    ],
    "a divided teacher, a smaller shape": [
        "--set", "train.release_at=1", "--set", "teacher.shard=true", "--set", "student.layers=1",
        "--set", "student.intermediate_size=9",
    ],
    "a divided teacher, tinybert": ["--method", "tinybert", "--set", "teacher.shard=true"],
    "adamw": ["--set", "train.release_at=0.5", "--set", "train.optimizer=adamw"],
    "pca": ["--set", "train.release_at=1", "--set", "initialize.method=pca"],
    "scratch": ["--method", "scratch"],
    "slicegpt": ["--method", "slicegpt"],
    "tinybert": ["--method", "tinybert"],
    "llm-pruner, adapters": [
        "--set", "method={name: llm-pruner, ratio: 0.3, recovery: lora, lora_rank: 2}",
        "--set", "student.hidden_size=16",
    ],
    "sheared-llama": ["--method", "sheared-llama"],
    "a stream": [
        "--method", "slicegpt", "--set", "data.text=[]", "--set", "data.stream.dataset=json",
        "--set", "data.stream.data_files=[FOLDER/part-*.jsonl]",
    ],
}  # fmt: skip

PAIRS = [case for case in CASES if case not in ("pca", "scratch")]
"""The cases that run by default. A start is computed by one process, whatever it is, and slicegpt
trains as scratch does."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("launches")
    save_teacher(folder / "teacher", tied=False)
    write_recipe(folder / "recipe.yaml", TRAINING)
    write_recipe(folder / "many.yaml", TRAINING | {"accumulate": 6, "tokens": 6 * 2 * 6 * 16})
    for part in range(6):  # as many as micro-batches
        write_jsonl(folder / f"part-{part}.jsonl", tiny_documents()[part::6])
    return folder


def write_recipe(path: Path, train: dict[str, Any]) -> None:
    settings = file_settings(path.parent, train=train, objective={"alpha_schedule": "constant"})
    settings["initialize"] = {"calibration_tokens": 512}
    path.write_text(yaml.safe_dump(settings))


def launch(
    processes: int,
    *commands: Sequence[Any],
    fault: dict[str, Any] | None = None,
    restarts: int = 0,
    limit: int = 300,
) -> subprocess.CompletedProcess[str]:
    """Run commands in several processes, as torchrun starts them."""
    arguments = json.dumps([commands, fault, False])
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--no-python"]
    options = ["--nproc-per-node", str(processes), "--max-restarts", str(restarts)]
    return subprocess.run(
        [*start, *options, sys.executable, "-c", PROGRAM, arguments],
        env=os.environ | EXACT,
        capture_output=True,
        text=True,
        timeout=limit,
    )


def alone(*commands: Sequence[str]) -> None:
    """Run commands in one process."""
    arguments = json.dumps([commands, None, False])
    subprocess.run([sys.executable, "-c", PROGRAM, arguments], env=os.environ | EXACT, check=True)


def train(folder: Path, recipe: str, case: str, out: str) -> list[str]:
    settings = [setting.replace("FOLDER", str(folder)) for setting in CASES[case]]
    return ["train", str(folder / recipe), *settings, "--out", str(folder / out)]


def student(run: Run) -> dict[str, torch.Tensor]:
    return load_file(run.student_folder / "model.safetensors")


def assert_equal(ours: Run, theirs: Run) -> None:
    """The same metrics, but for times, and bit by bit the same student."""
    assert without_times(ours.metrics()) == without_times(theirs.metrics())
    weights = student(theirs)
    for name, value in student(ours).items():
        assert torch.equal(value, weights[name]), name


def assert_near(ours: Run, theirs: Run, tolerance: float) -> None:
    for mine, other in zip(ours.metrics(), theirs.metrics(), strict=True):
        assert mine.keys() == other.keys()
        for name in {"loss", "kl", "lm", "clone", "held_out_lm"} & mine.keys():
            assert mine[name] == pytest.approx(other[name], rel=tolerance), (mine["step"], name)
    weights = student(theirs)
    for name, value in student(ours).items():
        error = (value - weights[name]).abs().max() / weights[name].abs().max()
        assert error < tolerance, name


@pytest.fixture(scope="module")
def pairs(folder: Path, prepared: Prepared) -> None:
    """Every case on two processes and on one, two micro-batches a step each. The two get what
    torchrun sets, and use nothing before they wait for it; the slow tests start torchrun itself."""
    started = []
    two = [("two", place) for place in places(2)]
    for out, place in [*two, ("one", {})]:
        commands = [train(folder, "recipe.yaml", case, f"{out}/{case}") for case in PAIRS]
        arguments = json.dumps([commands, None, True])
        started.append(prepared.start(arguments, code=PROGRAM, environment=EXACT | place))
    for process in started:
        code, _, errors = process.wait()
        assert code == 0, errors[-3000:]


@pytest.mark.parametrize("case", PAIRS)
def test_two_processes_train_the_run_of_one(pairs: None, folder: Path, case: str) -> None:
    two, one = (Run.open(folder / number / case) for number in ("two", "one"))
    assert len(list((two.checkpoints / "step-00000006").glob("state-*-of-2.safetensors"))) == 2
    assert_equal(two, one)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["never released", "a divided teacher", "a stream"])
def test_the_number_of_processes_may_change(folder: Path, case: str) -> None:
    """Two processes, then one, then two, then three, as near one process as rounding allows."""
    alone(train(folder, "many.yaml", case, f"alone {case}"))
    assert launch(2, train(folder, "many.yaml", case, f"first {case}")).returncode == 0
    run = Run.open(folder / f"first {case}")
    assert_near(run, Run.open(folder / f"alone {case}"), 1e-4)
    for number, (processes, step) in enumerate([(1, 2), (2, 4), (3, 4)]):
        run = copy_until(run, folder / f"changed-{number} {case}", step)
        resume = ["resume", str(run.folder)]
        if processes == 1:
            alone(resume)
        else:
            done = launch(processes, resume)
            assert done.returncode == 0, done.stderr[-3000:]
    assert_near(run, Run.open(folder / f"alone {case}"), 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("float64", 1e-11)])
def test_more_micro_batches_differ_by_rounding(folder: Path, dtype: str, tolerance: float) -> None:
    command = train(folder, "many.yaml", "random, released", f"three-{dtype}")
    other = train(folder, "many.yaml", "random, released", f"single-{dtype}")
    extra = ["--set", f"teacher.dtype={dtype}"]
    assert launch(3, [*command, *extra]).returncode == 0
    alone([*other, *extra])
    assert_near(
        Run.open(folder / f"three-{dtype}"), Run.open(folder / f"single-{dtype}"), tolerance
    )


# On a GPU

ON_GPU = {"train.device": "cuda", "train.precision": "float32", "train.tf32": "false"}
ON_GPU |= {"train.kernels": "torch", "teacher.dtype": "float32"}


@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("case", ["random, released", "a smaller shape", "tinybert"])
def test_processes_on_one_gpu(folder: Path, case: str, processes: int) -> None:
    """One under torchrun trains as without, and two share the card over gloo."""
    numbers = str(processes), "without"
    settings = [part for key, value in ON_GPU.items() for part in ("--set", f"{key}={value}")]
    commands = [train(folder, "recipe.yaml", case, f"gpu {n} {case}") + settings for n in numbers]
    done = launch(processes, commands[0])
    assert done.returncode == 0, done.stderr[-3000:]
    alone(commands[1])
    ours, theirs = (Run.open(folder / f"gpu {n} {case}") for n in numbers)
    assert_near(ours, theirs, 1e-3)


@pytest.mark.parametrize(
    ("processes", "cards", "backend"),
    [(2, 0, "gloo"), (2, 1, "gloo"), (2, 2, "cpu:gloo,cuda:nccl"), (1, 8, "cpu:gloo,cuda:nccl")],
)
def test_processes_that_share_a_gpu_use_gloo(processes: int, cards: int, backend: str) -> None:
    assert backend_for(processes, cards) == backend


# Faults


def broken(
    folder: Path, kind: str, rank: int, case: str = "scratch", **options: Any
) -> tuple[Run, str]:
    """A run that breaks in the step after the third, and what was printed."""
    out = f"broken-{kind}-{rank} {case}"
    command = train(folder, "recipe.yaml", case, out)
    began = time.monotonic()
    fault = {"kind": kind, "rank": rank, "step": 3}
    done = launch(2, command, fault=fault, **options)
    assert done.returncode != 0
    assert time.monotonic() - began < 120
    return Run.open(folder / out), done.stderr


def errors(printed: str) -> list[str]:
    return re.findall(r"^(?:\[rank\d\]:)?Error: .*$", printed, flags=re.MULTILINE)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["scratch", "a divided teacher"])
def test_a_killed_process_ends_all_and_the_run_goes_on(folder: Path, case: str) -> None:
    run, printed = broken(folder, "kill", rank=1, case=case)
    assert "lrc/train/" not in printed  # a traceback of ours
    assert len(errors(printed)) <= 1  # none if the launcher is faster
    assert list_checkpoints(run.checkpoints)[0].name == "step-00000002"
    assert not list(run.checkpoints.glob("*tmp*"))
    alone(["resume", str(run.folder)], train(folder, "recipe.yaml", case, f"unbroken {case}"))
    assert_equal(Run.open(run.folder), Run.open(folder / f"unbroken {case}"))


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all(folder: Path) -> None:
    run, printed = broken(folder, "terminate", rank=1)
    assert errors(printed) == []
    assert list_checkpoints(run.checkpoints)[0].name == "step-00000004"


@pytest.mark.slow
def test_a_launcher_that_restarts_processes_completes_the_run(folder: Path) -> None:
    commands = [train(folder, "recipe.yaml", "scratch", name) for name in ("restarted", "whole")]
    fault = {"kind": "kill", "rank": 1, "step": 3}
    done = launch(2, commands[0], fault=fault, restarts=1)
    assert done.returncode == 0, done.stderr[-3000:]
    alone(commands[1])
    assert_equal(Run.open(folder / "restarted"), Run.open(folder / "whole"))
    without_folder = ["train", str(folder / "recipe.yaml")]
    refused = launch(2, without_folder, restarts=1)
    assert "needs --out" in refused.stderr


@pytest.mark.slow
def test_nan_in_one_process_stops_all(folder: Path) -> None:
    run, printed = broken(folder, "nan", rank=1)
    assert any("not finite at step 4" in error for error in errors(printed))
    assert list_checkpoints(run.checkpoints)[0].name == "step-00000002"


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_full_disk_in_one_process_keeps_the_checkpoint_before(folder: Path, rank: int) -> None:
    run, printed = broken(folder, "full disk", rank)
    assert any("disk is full" in error or "No space" in error for error in errors(printed)), printed
    assert list_checkpoints(run.checkpoints)[0].name == "step-00000002"


@pytest.mark.slow
def test_processes_of_different_recipes_are_refused(folder: Path) -> None:
    commands = [train(folder, "recipe.yaml", case, "disagreeing") for case in ("scratch", "pca")]
    done = launch(2, commands)
    assert done.returncode != 0
    assert "Processes 0 and 1 differ in the recipe" in done.stderr
    assert not (folder / "disagreeing" / "recipe.yaml").exists()


@given(st.dictionaries(st.text(), st.floats(0, 1e6), max_size=30), st.integers(1, 8))
def test_work_is_shared_evenly(costs: dict[str, float], size: int) -> None:
    owners = assign(costs, size)
    assert owners.keys() == costs.keys()
    loads = [sum(costs[name] for name in costs if owners[name] == rank) for rank in range(size)]
    largest = max(costs.values(), default=0)
    assert max(loads) <= sum(costs.values()) / size + largest + 1e-3


@pytest.mark.parametrize(("accumulate", "size", "nearest"), [(3, 2, 4), (1, 8, 8), (20, 8, 16)])
def test_steps_that_cannot_be_divided_are_refused(accumulate: int, size: int, nearest: int) -> None:
    settings = {
        "teacher": {"model": "x"}, "student": {"hidden_size": 8}, "data": {"text": ["x"]},
        "train": {"accumulate": accumulate},
    }  # fmt: skip
    recipe = make_recipe(settings)
    check_division(recipe, ALONE)
    with pytest.raises(UserError, match=f"cannot divide: set it to {nearest}"):
        check_division(recipe, World(0, size))
