"""A real trained model through the real command line: what it learns, and how it resumes.

The text is sampled from the teacher itself, so that nothing but the model is needed.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from command_line import Command
from lrc.run import Run
from lrc.stories260k import tell, write_stories
from tiny_runs import assert_same_run

STORY = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. "
    "One day, she saw a big, red ball. She wanted to play with it, but it was too high."
)
CALL = [sys.executable, "-c", "from lrc.cli import main; main()"]
SECONDS = 240
"""No command takes so long, even on a busy machine."""

SAMPLES, SAMPLE_TOKENS = 300, 96

LESSON = {
    "initialize": "random",
    "data.sequence_length": 64,
    "data.held_out_fraction": 0.1,
    "train.tokens": 200 * 4 * 64,
    "train.micro_batch": 4,
    "train.learning_rate": 0.02,
    "train.warmup_ratio": 0.05,
    "train.eval_every": 100,
    "train.eval_sequences": 16,
}
"""200 steps of 256 tokens."""

MARGIN = 2.0
"""Nats by which the lesson lowers the held-out loss, at least. Seen: 6.02 to 3.56, the teacher
being at 1.81."""

STEPS, CHECKPOINT_EVERY = 40, 6
SHORT = {
    "data.sequence_length": 32,
    "data.held_out_fraction": 0.1,
    "train.tokens": STEPS * 2 * 2 * 32,
    "train.micro_batch": 2,
    "train.accumulate": 2,
    "train.learning_rate": 0.01,
    "train.warmup_ratio": 0.1,
    "train.eval_every": 10,
    "train.eval_sequences": 4,
    "train.checkpoint_every": CHECKPOINT_EVERY,
    "train.keep_checkpoints": 2,
}
"""A run to stop and to resume."""


def test_tokens_of_the_story(stories_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(stories_folder)
    assert len(tokenizer) == 512
    assert tokenizer.encode("Once upon a time") == [403, 407, 261, 378]
    for text in (STORY, "Ödön's café — 3  spaces\n\nand a line", "<s> is no token here"):
        assert tokenizer.decode(tokenizer.encode(text, split_special_tokens=True)) == text


def test_greedy_story(stories_folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(stories_folder)
    tokenizer = AutoTokenizer.from_pretrained(stories_folder)
    start = torch.tensor([[tokenizer.bos_token_id]])
    output = model.generate(start, max_new_tokens=80, do_sample=False, pad_token_id=0)
    assert tokenizer.decode(output[0], skip_special_tokens=True).startswith(STORY)


@dataclass(frozen=True)
class Workshop:
    """Where commands run: with one thread, a cache of its own, and no network."""

    folder: Path
    teacher: Path
    text: Path

    def start(self, *arguments: str | Path) -> subprocess.Popen[str]:
        """Start a command; what it prints is kept."""
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "LRC_CACHE": str(self.folder / "cache"),
            "HF_HUB_OFFLINE": "1",
            "COLUMNS": "400",
        }
        return subprocess.Popen(
            [*CALL, *map(str, arguments)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def train(self, name: str, settings: dict[str, Any]) -> subprocess.Popen[str]:
        """Start a run of stories260K at half its hidden size."""
        options = [f"--set={key}={json.dumps(value)}" for key, value in settings.items()]
        shape = ["--teacher", self.teacher, "--hidden-size", "32", "--text", self.text]
        return self.start("train", *shape, "--out", self.folder / name, *options)

    def metrics(self, name: str) -> list[dict[str, Any]]:
        """The whole lines of a run's metrics."""
        path = self.folder / name / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]


def finish(command: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Exit code, output and errors of a command."""
    try:
        output, errors = command.communicate(timeout=SECONDS)
    finally:
        command.kill()
    return command.returncode, output, errors


def until(condition: Callable[[], bool], command: subprocess.Popen[str]) -> None:
    """Wait for something that a command is about to do."""
    end = time.monotonic() + SECONDS
    while not condition():
        assert command.poll() is None, "it ended too early: " + "\n".join(finish(command)[1:])
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.fixture(scope="module")
def workshop(stories_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """A folder with stories that the teacher has told."""
    folder = tmp_path_factory.mktemp("workshop")
    text = folder / "stories.jsonl"
    write_stories(text, tell(stories_folder, SAMPLES, SAMPLE_TOKENS, seed=0))
    return Workshop(folder, stories_folder, text)


def test_clone_learns(workshop: Workshop) -> None:
    code, output, errors = finish(workshop.train("lesson", LESSON))
    assert code == 0, errors
    measured = [line for line in workshop.metrics("lesson") if "held_out_lm" in line]
    assert [line["step"] for line in measured] == [0, 100, 200]
    before, _, after = (line["held_out_lm"] for line in measured)
    assert before - after > MARGIN
    assert after > measured[0]["teacher_held_out_lm"] > 1.0
    summary = json.loads((workshop.folder / "lesson" / "summary.json").read_text())
    assert summary["student_held_out_lm"] == pytest.approx(after, abs=1e-5)
    assert f"{after:.4f}" in output


@dataclass(frozen=True)
class Ending:
    """How the commands of one interrupted run ended."""

    code: int
    """Exit code of the run that was stopped."""
    told: str
    """What it printed."""
    steps: int
    """Steps it had logged."""
    resumed: tuple[int, str, str]
    """Exit code, output and errors of `lrc resume`."""


@pytest.fixture(scope="module")
def endings(workshop: Workshop) -> dict[str, Ending]:
    """One run in peace (`whole`); one stopped by SIGTERM (`stopped`) and one by SIGKILL
    (`killed`), both resumed; and a copy of the killed one with its newest checkpoint cut short
    (`damaged`), resumed too."""
    runs = {name: workshop.train(name, SHORT) for name in ("whole", "stopped", "killed")}
    signals = {"stopped": signal.SIGTERM, "killed": signal.SIGKILL}
    for name, number in signals.items():
        until(lambda name=name: reached(workshop, name, 2 * CHECKPOINT_EVERY + 1), runs[name])
        runs[name].send_signal(number)
    ended = {name: finish(run) for name, run in runs.items()}
    assert ended["whole"][0] == 0, ended["whole"][2]
    steps = {name: workshop.metrics(name)[-1]["step"] for name in runs}
    shutil.copytree(workshop.folder / "killed", workshop.folder / "damaged")
    ended["damaged"], steps["damaged"] = ended["killed"], steps["killed"]
    newest = max((workshop.folder / "damaged" / "checkpoints").glob("step-*"))
    tensors = newest / "state.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-1000])
    resumed = {
        name: workshop.start("resume", workshop.folder / name)
        for name in ("stopped", "killed", "damaged")
    }
    return {
        name: Ending(ended[name][0], ended[name][1], steps[name], finish(command))
        for name, command in resumed.items()
    }


def reached(workshop: Workshop, name: str, step: int) -> bool:
    metrics = workshop.metrics(name)
    return bool(metrics) and metrics[-1]["step"] >= step


@pytest.mark.parametrize("name", ["stopped", "killed", "damaged"])
def test_resumed_run_is_the_whole_run(
    workshop: Workshop, endings: dict[str, Ending], name: str
) -> None:
    ending = endings[name]
    assert 2 * CHECKPOINT_EVERY < ending.steps < STEPS
    assert ending.resumed[0] == 0, ending.resumed[2]
    whole, resumed = (Run.open(workshop.folder / run) for run in ("whole", name))
    losses = {line["step"]: line["loss"] for line in whole.metrics() if "loss" in line}
    assert list(losses) == list(range(1, STEPS + 1))
    assert len(set(losses.values())) == STEPS, "the loss does not change"
    assert_same_run(resumed, whole)


def test_sigterm_ends_after_the_step(workshop: Workshop, endings: dict[str, Ending]) -> None:
    ending = endings["stopped"]
    assert ending.code == 128 + signal.SIGTERM
    assert f"Stopped after step {ending.steps}; continue with `lrc resume" in ending.told


def test_sigkill_leaves_checkpoints_alone(endings: dict[str, Ending]) -> None:
    assert endings["killed"].code == -signal.SIGKILL


def test_damaged_checkpoint_is_told_in_a_sentence(endings: dict[str, Ending]) -> None:
    _, output, errors = endings["damaged"].resumed
    told = [line for line in output.splitlines() if "is damaged" in line]
    assert len(told) == 1
    assert "continue from the one before" in told[0]
    assert "Traceback" not in output + errors
    assert "is damaged" not in endings["killed"].resumed[1]


def test_foreign_checkpoint_is_refused(
    workshop: Workshop, endings: dict[str, Ending], lrc: Command
) -> None:
    assert endings["killed"].resumed[0] == 0
    folder = workshop.folder / "foreign"
    shutil.copytree(workshop.folder / "killed", folder)
    shutil.rmtree(folder / "student")
    recipe = folder / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("learning_rate: 0.01", "learning_rate: 0.02"))
    code, _, errors = lrc("resume", folder)
    assert code == 2
    assert errors.startswith("Error: ")
    assert "belongs to a run with another recipe" in errors
    assert not (folder / "student").exists()
    assert workshop.metrics("foreign") == workshop.metrics("killed")
