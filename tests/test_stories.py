"""A trained teacher through the real command line: the clone learns, and runs resume.

The text is sampled from the teacher itself, so only the model is needed.
"""

import json
import shutil
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import lrc as package
from command_line import Command
from lrc.run import Run
from lrc.stories260k import tell, write_stories
from prepared import Prepared, Started
from tiny_runs import assert_same_run

STORY = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. "
    "One day, she saw a big, red ball. She wanted to play with it, but it was too high."
)
SECONDS = 240
"""A limit for the first steps, even on a busy machine."""

SAMPLES, SAMPLE_TOKENS = 300, 96

LESSON = {
    "initialize": "random",
    "data.sequence_length": 64,
    "data.held_out_fraction": 0.1,
    "train.tokens": 100 * 2 * 64,
    "train.micro_batch": 2,
    "train.learning_rate": 0.02,
    "train.warmup_ratio": 0.05,
    "train.eval_every": 50,
    "train.eval_sequences": 16,
}
"""100 steps of 128 tokens."""

MARGIN = 2.0
"""The lesson lowers the held-out loss by at least so many nats. It was seen to fall from 6.02 to
3.43; the teacher's is 1.81."""

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
    """Where runs of stories260K at half its hidden size are made."""

    folder: Path
    teacher: Path
    text: Path
    prepared: Prepared

    def train(self, name: str, settings: dict[str, Any]) -> Started:
        """Start `lrc train` in another process."""
        options = [f"--set={key}={json.dumps(value)}" for key, value in settings.items()]
        shape = ["--teacher", self.teacher, "--hidden-size", 32, "--text", self.text]
        return self.prepared.start("train", *shape, "--out", self.folder / name, *options)

    def metrics(self, name: str) -> list[dict[str, Any]]:
        """The whole lines of a run's metrics."""
        path = self.folder / name / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]


@pytest.fixture(scope="module")
def workshop(
    stories_folder: Path, tmp_path_factory: pytest.TempPathFactory, prepared: Prepared
) -> Workshop:
    """A folder with text that was sampled from the teacher."""
    folder = tmp_path_factory.mktemp("workshop")
    text = folder / "stories.jsonl"
    write_stories(text, tell(stories_folder, SAMPLES, SAMPLE_TOKENS, seed=0))
    return Workshop(folder, stories_folder, text, prepared)


def test_clone_learns(workshop: Workshop) -> None:
    code, output, errors = workshop.train("lesson", LESSON).wait()
    assert code == 0, errors
    measured = [line for line in workshop.metrics("lesson") if "held_out_lm" in line]
    assert [line["step"] for line in measured] == [0, 50, 100]
    before, _, after = (line["held_out_lm"] for line in measured)
    assert before - after > MARGIN
    assert after > measured[0]["teacher_held_out_lm"] > 1.0
    summary = json.loads((workshop.folder / "lesson" / "summary.json").read_text())
    assert summary["student_held_out_lm"] == pytest.approx(after, abs=1e-5)
    assert f"{after:.4f}" in output


@pytest.fixture(scope="module")
def whole(workshop: Workshop) -> Run:
    """A run without interruption."""
    return package.clone(
        workshop.teacher,
        hidden_size=32,
        text=workshop.text,
        out=workshop.folder / "whole",
        settings=SHORT,
    )


@dataclass(frozen=True)
class Stopped:
    """A run that was stopped by SIGTERM."""

    folder: Path
    code: int
    output: str
    steps: int
    """Steps that it had logged."""


@pytest.fixture(scope="module")
def stopped(workshop: Workshop) -> Stopped:
    command = workshop.train("stopped", SHORT)
    end = time.monotonic() + SECONDS
    while not any(line["step"] > 2 * CHECKPOINT_EVERY for line in workshop.metrics("stopped")):
        assert command.poll() is None, command.errors.read_text()
        assert time.monotonic() < end
        time.sleep(0.005)
    command.send_signal(signal.SIGTERM)
    code, output, _ = command.wait()
    steps = workshop.metrics("stopped")[-1]["step"]
    return Stopped(workshop.folder / "stopped", code, output, steps)


def test_sigterm_ends_after_the_step(stopped: Stopped) -> None:
    assert stopped.code == 128 + signal.SIGTERM
    assert 2 * CHECKPOINT_EVERY < stopped.steps < STEPS
    assert f"Stopped after step {stopped.steps}; continue with `lrc resume" in stopped.output


@pytest.mark.parametrize("damaged", [False, True])
def test_a_resumed_run_is_the_whole_run(
    whole: Run, stopped: Stopped, tmp_path: Path, lrc: Command, damaged: bool
) -> None:
    """Bit for bit, also from the checkpoint before the newest if that is damaged."""
    losses = {line["step"]: line["loss"] for line in whole.metrics() if "loss" in line}
    assert list(losses) == list(range(1, STEPS + 1))
    assert len(set(losses.values())) == STEPS, "the loss does not change"
    folder = Path(shutil.copytree(stopped.folder, tmp_path / "run"))
    if damaged:
        tensors = max((folder / "checkpoints").glob("step-*")) / "state.safetensors"
        tensors.write_bytes(tensors.read_bytes()[:-1000])
    notes = [line for line in lrc.printed("resume", folder).splitlines() if "is damaged" in line]
    assert len(notes) == damaged
    assert all("continue from the one before" in note for note in notes)
    assert_same_run(Run.open(folder), whole)


def test_the_checkpoint_of_another_recipe_is_refused(
    stopped: Stopped, tmp_path: Path, lrc: Command
) -> None:
    folder = Path(shutil.copytree(stopped.folder, tmp_path / "run"))
    recipe = folder / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("learning_rate: 0.01", "learning_rate: 0.02"))
    assert "belongs to a run with another recipe" in lrc.refusal("resume", folder)
    assert not (folder / "student").exists()
    assert Run.open(folder).metrics() == Run.open(stopped.folder).metrics()
