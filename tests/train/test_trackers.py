"""Trackers of metrics, and resumed runs that continue the same log."""

import importlib.machinery
import importlib.util
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from lrc.run import Run
from lrc.system.errors import UserError
from lrc.train import train
from lrc.train.trackers import tracked_values
from tiny import LAYERS
from tiny_runs import diverge_at, go, new_run, tiny_recipe


def interrupted(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a run fail in step 9, with a checkpoint of step 6, and resume it."""
    with monkeypatch.context() as patch:
        diverge_at(9, patch)
        with pytest.raises(UserError, match="not finite"):
            go(run)
    go(Run.open(run.folder))


def test_nothing_is_sent_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("wandb", "trackio", "tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)
    run = new_run(tmp_path)
    assert run.recipe.train.report_to == []
    go(run)
    names = {path.name for path in run.folder.iterdir()}
    assert not names & {"tensorboard", "wandb", "trackers.json"}


def test_one_name_and_none_are_accepted() -> None:
    one = tiny_recipe({"train.report_to": "tensorboard"})
    assert one.train.report_to == ["tensorboard"]
    assert tiny_recipe({"train.report_to": "none"}).train.report_to == []
    with pytest.raises(UserError, match="report_to"):
        tiny_recipe({"train.report_to": ["mlflow"]})


def test_values() -> None:
    line = {
        "step": 4,
        "loss": 2.0,
        "held_out_lm": 3.0,
        "held_out_lm_by_source": {"web": 2.0, "code": 4.0},
        "clone_layers": {"q": [1.0, 2.0], "router": [None, 30.0]},
    }
    assert tracked_values(line) == {
        "train/loss": 2.0,
        "eval/held_out_lm": 3.0,
        "eval/held_out_lm_by_source/web": 2.0,
        "eval/held_out_lm_by_source/code": 4.0,
        "clone/q": 3.0,
        "clone/router": 30.0,
    }


def test_a_missing_library_is_reported_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "wandb" else find(name, *a)
    )
    run = new_run(tmp_path, "wandb")
    with pytest.raises(UserError, match=r"pip install 'low-rank-clone\[wandb\]'"):
        train(run)  # before the search for the teacher, which does not exist
    assert not run.metrics_file.exists()


def test_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = new_run(tmp_path, "tensorboard")
    interrupted(run, monkeypatch)
    events = EventAccumulator(str(run.folder / "tensorboard"))
    events.Reload()
    lines = {line["step"]: line for line in run.metrics()}
    losses = events.Scalars("train/loss")
    assert [event.step for event in losses] == list(range(1, 11))
    for event in losses:
        assert event.value == pytest.approx(lines[event.step]["loss"], rel=1e-6)
    assert [event.step for event in events.Scalars("eval/held_out_lm")] == [0, 4, 8, 10]
    assert [event.step for event in events.Scalars("eval/teacher_held_out_lm")] == [0]
    by_layer = lines[4]["clone_layers"]
    assert {len(values) for values in by_layer.values()} == {LAYERS}
    clone = {event.step: event.value for event in events.Scalars("clone/q")}
    assert clone[4] == pytest.approx(sum(by_layer["q"]), rel=1e-5)
    (text,) = events.Tensors("recipe/text_summary")
    assert b"hidden_size: 8" in text.tensor_proto.string_val[0]


class FakeRun:
    """What `wandb.init` and `trackio.init` return."""

    def __init__(self, **options: Any) -> None:
        self.options = options
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.finished = False

    def log(self, values: dict[str, float], step: int) -> None:
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished = True


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_services_continue_the_same_run(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[FakeRun] = []

    def init(**options: Any) -> FakeRun:
        opened.append(FakeRun(**options))
        return opened[-1]

    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    module.init = init
    module.errors = types.SimpleNamespace(Error=RuntimeError)
    monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setenv(f"{name.upper()}_PROJECT", "mine")
    run = new_run(tmp_path, name)
    interrupted(run, monkeypatch)
    first, second = opened
    assert first.finished
    assert second.finished
    identity = "id" if name == "wandb" else "name"
    assert first.options[identity] == second.options[identity]
    for options in (first.options, second.options):
        assert options["project"] == "mine"
        assert options["resume"] == "allow"
        assert options["config"]["student"]["hidden_size"] == 8
    assert [step for step, _ in first.logged] == list(range(9))
    assert [step for step, _ in second.logged] == [7, 8, 9, 10]
    assert second.logged[-1][1]["train/loss"] == run.metrics()[-1]["loss"]


def test_a_service_that_does_not_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**options: Any) -> None:
        raise RuntimeError("no key")

    module = types.ModuleType("wandb")
    module.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    module.init = init
    module.errors = types.SimpleNamespace(Error=RuntimeError)
    monkeypatch.setitem(sys.modules, "wandb", module)
    with pytest.raises(UserError, match=r"no key.*WANDB_MODE=offline"):
        go(new_run(tmp_path, "wandb"))


@pytest.mark.slow
def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = new_run(tmp_path, "wandb")
    interrupted(run, monkeypatch)
    files = sorted(run.folder.glob("wandb/offline-run-*/*.wandb"))
    identity = json.loads((run.folder / "trackers.json").read_text())["id"]
    assert len(files) >= 1
    assert all(identity in file.name for file in files)
    assert b"train/loss" in b"".join(file.read_bytes() for file in files)
