"""`train.learning_rate: auto`."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from lrc.recipe import make_recipe
from lrc.recipe.learning_rate import OTHERS, SMALLEST_SHARE, learning_rate, share_of_rate
from lrc.run import Run
from lrc.train import train
from lrc.train.session import initialize_only
from tiny import FFN
from tiny_runs import copy_until, file_settings, save_teacher, tiny_recipe


def test_more_steps_and_fewer_parameters_take_a_higher_rate() -> None:
    """By hand: 1.26 * N^-0.6 * steps^(1/3)."""
    tokens = {"train.tokens": 8 * 256 * 1000, "train.optimizer": "adamw"}
    assert learning_rate(tiny_recipe(tokens), 10**5) == pytest.approx(1.26 * 1e-3 * 10)
    assert learning_rate(tiny_recipe(tokens), 10**10) == pytest.approx(1.26 * 1e-6 * 10)
    larger = tokens | {"train.micro_batch": 64}
    assert learning_rate(tiny_recipe(larger), 10**5) == pytest.approx(1.26 * 1e-3 * 5)


@pytest.mark.parametrize("steps", [10, 1000])
def test_muons_rate_does_not_depend_on_the_steps(steps: int) -> None:
    """By hand: 7.5 * N^-0.55."""
    recipe = tiny_recipe({"train.tokens": 8 * 256 * steps})
    assert learning_rate(recipe, 10**20) == pytest.approx(7.5e-11)
    assert learning_rate(recipe, 10**5) == pytest.approx(7.5 * 10**-2.75)
    assert learning_rate(recipe, 10**3) == 0.02


@pytest.mark.parametrize("changes", [{"method": "scratch"}, {"initialize": "random"}])
def test_no_rule_without_a_start_from_text(changes: dict[str, Any]) -> None:
    assert learning_rate(tiny_recipe(changes), 10**5) == OTHERS
    given = changes | {"train.learning_rate": 1e-3}
    assert learning_rate(tiny_recipe(given), 10**5) == 1e-3


@pytest.mark.parametrize(
    ("gap", "share"),
    [(2.0, 1.0), (1.0, 1.0), (0.0625, 0.125), (0.0, SMALLEST_SHARE), (-1.0, SMALLEST_SHARE)],
)
def test_a_student_near_its_teacher_takes_less(gap: float, share: float) -> None:
    start = {"held_out_lm": 3.0 + gap, "teacher_held_out_lm": 3.0}
    assert share_of_rate(tiny_recipe({}), start) == pytest.approx(share)
    assert share_of_rate(tiny_recipe({}), {"step": 1}) == 1.0
    for changes in ({"method": "scratch"}, {"initialize": "random"}, {"train.learning_rate": 1e-3}):
        assert share_of_rate(tiny_recipe(changes), start) == 1.0


@pytest.mark.parametrize("release", [0, 0.5, 1])
def test_the_share_lasts_to_the_end_and_through_a_kill(tmp_path: Path, release: float) -> None:
    """A student with all but one of the neurons starts near its teacher."""
    save_teacher(tmp_path / "teacher")
    settings = file_settings(tmp_path, initialize={"calibration_tokens": 128})
    changes = {
        "student.hidden_size": None,
        "student.intermediate_size": FFN - 1,
        "train.tokens": 8 * 2 * 16,
        "train.micro_batch": 2,
        "train.schedule": "constant",
        "train.release_at": release,
        "train.checkpoint_every": 1,
        "train.keep_checkpoints": 20,
    }
    run = Run.create(tmp_path / "run", make_recipe(settings, changes))
    train(run)
    student = AutoModelForCausalLM.from_pretrained(run.student_folder)
    whole = learning_rate(run.recipe, sum(value.numel() for value in student.parameters()))
    share = share_of_rate(run.recipe, run.metrics()[0])
    assert SMALLEST_SHARE <= share < 0.9
    rates = [line["learning_rate"] for line in run.metrics() if "learning_rate" in line]
    assert max(rates) == pytest.approx(share * whole)
    assert rates[-1] == pytest.approx(share * whole)
    expected = (run.student_folder / "model.safetensors").read_bytes()
    again = copy_until(run, tmp_path / "again", 3)
    train(again)
    assert (again.student_folder / "model.safetensors").read_bytes() == expected
    compressed = Run.create(tmp_path / "compressed", run.recipe)
    initialize_only(compressed)
    train(Run.open(compressed.folder))
    assert (compressed.student_folder / "model.safetensors").read_bytes() == expected


@pytest.mark.parametrize(
    ("tied", "changes"),
    [
        (False, {"train.release_at": 0}),
        (False, {"train.optimizer": "adamw"}),
        (True, {"train.release_at": 1}),
        (True, {"train.release_at": 0.5}),
        (False, {"student.kv_heads": 1, "student.intermediate_size": 8}),
    ],
)
def test_a_run_takes_it_from_its_own_student(
    tmp_path: Path, tied: bool, changes: dict[str, Any]
) -> None:
    """In every stage, the peak of the metrics is the rule's, given the exported student."""
    save_teacher(tmp_path / "teacher", tied=tied)
    settings = file_settings(tmp_path, initialize={"calibration_tokens": 128})
    steps = {"train.tokens": 8 * 2 * 16, "train.micro_batch": 2, "train.schedule": "constant"}
    run = Run.create(tmp_path / "run", make_recipe(settings, steps | changes))
    train(run)
    student = AutoModelForCausalLM.from_pretrained(run.student_folder)
    expected = learning_rate(run.recipe, sum(value.numel() for value in student.parameters()))
    lines = [json.loads(line) for line in run.metrics_file.read_text().splitlines()]
    rates = [line["learning_rate"] for line in lines if "learning_rate" in line]
    expected *= share_of_rate(run.recipe, lines[0])
    assert max(rates) == pytest.approx(expected, rel=1e-9)
    assert rates[-1] == pytest.approx(expected, rel=1e-9)
