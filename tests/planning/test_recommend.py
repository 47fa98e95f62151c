"""Students by their number of parameters, through the command line and from Python."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoModelForCausalLM

import lrc
from command_line import Command
from lrc.model.shapes import parameters_of
from lrc.run import Run
from lrc.system.errors import UserError
from tiny import WIDE, in_turn, tiny_teacher
from tiny_runs import file_settings

QUICK = {
    "data.sequence_length": 16,
    "data.held_out_fraction": 0.2,
    "initialize.calibration_tokens": 64,
    "initialize.refine_epochs": 0,
    "train.micro_batch": 2,
    "train.tokens": 64,
    "train.eval_sequences": 2,
}
AXES = ("hidden_size", "intermediate_size", "kv_heads", "layers", "experts")


def first_of(plan: dict[str, Any]) -> dict[str, Any]:
    """The shape of a plan's first candidate."""
    return {k: v for k, v in plan["candidates"][0]["student"].items() if k in AXES}


def options_of(folder: Path) -> list[str]:
    settings = {"data.cache": folder / "cache", **QUICK}
    return [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]


@pytest.mark.parametrize("size", in_turn([("--params", "12K"), ("--ratio", 0.4)]))
def test_the_shape_is_the_plans_first(
    size: tuple[Any, ...], folder: Path, tmp_path: Path, lrc: Command
) -> None:
    plan = json.loads(lrc.printed("plan", folder / "teacher", *size, "--json"))
    options = ("--teacher", folder / "teacher", "--text", folder / "text.jsonl")
    run = tmp_path / "run"
    printed = lrc.printed("compress", *size, *options, *options_of(folder), "--out", run)
    student = Run.open(run).recipe.student.model_dump(include=set(AXES), exclude_none=True)
    assert student == first_of(plan)
    assert len(student) == 2
    expected = plan["candidates"][0]["parameters"]
    assert parameters_of(AutoModelForCausalLM.from_pretrained(run / "student")) == expected
    flat = " ".join(printed.split())
    assert f"Shape: hidden_size {student['hidden_size']}" in flat
    assert f"{expected:,} parameters. By a rule" in flat


def test_the_shape_of_a_recipe_is_replaced(folder: Path, tmp_path: Path, lrc: Command) -> None:
    """The recipe's other settings of the student stay."""
    plan = json.loads(lrc.printed("plan", folder / "teacher", "--params", "12K", "--json"))
    settings = file_settings(tmp_path)
    settings["teacher"] = {"model": str(folder / "teacher")}
    settings["student"] = {"layers": 2, "experts": 3, "fold_gains": False}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(settings))
    run = tmp_path / "run"
    options = ("--params", "12K", *options_of(tmp_path), "--out", run)
    lrc.printed("train", tmp_path / "mine.yaml", *options)
    student = Run.open(run).recipe.student
    assert student.model_dump(include=set(AXES), exclude_none=True) == first_of(plan)
    assert not student.fold_gains


def test_a_loaded_model_in_python(folder: Path, tmp_path: Path) -> None:
    settings = {"data.cache": str(tmp_path / "cache"), **QUICK}
    text, out = folder / "text.jsonl", tmp_path / "run"
    teacher = tiny_teacher("llama", True, **WIDE)
    run = lrc.compress(teacher, parameters=12e3, text=text, out=out, settings=settings)
    plan = lrc.plan(folder / "teacher", parameters=12e3).as_json()
    assert run.recipe.student.model_dump(include=set(AXES), exclude_none=True) == first_of(plan)
    assert parameters_of(run.student()) == plan["candidates"][0]["parameters"]
    with pytest.raises(UserError, match=r"decide the shape: leave out student.hidden_size"):
        lrc.clone(teacher, parameters=12e3, hidden_size=16, text=text, out=tmp_path / "other")
    with pytest.raises(UserError, match="would have -1 parameters: give a larger number"):
        lrc.clone(teacher, parameters=-1, text=text, out=tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--params", "12K", "--ratio", 0.5), "Give one of --params and --ratio"),
        (("--params", "12K", "--hidden-size", 16), "leave out student.hidden_size"),
        (("--ratio", 0.5, "--set", "student.layers=2"), "leave out student.layers"),
        (("--ratio", 1.5), "between 0 and 1"),
        (("--params", "9B"), "no larger than this: choose a smaller --params"),
        (("--params", "12X"), "one of the units K, M, B"),
        (("--ratio", 0.001), "No shape of this teacher fits"),
        (("--ratio", 0.5, "--method", "minitron"), "give minitron a --hidden-size"),
        (("--ratio", 0.5, "--set", "student.tie_projections=false"), "leave student.tie_proj"),
        (("--ratio", 0.5, "--set", "train.tokens=many"), "train.tokens"),
    ],
)
def test_mistakes_are_one_sentence(
    options: tuple[Any, ...], expected: str, folder: Path, tmp_path: Path, lrc: Command
) -> None:
    out = tmp_path / "run"
    command = (
        "train",
        "--teacher",
        folder / "teacher",
        "--text",
        folder / "text.jsonl",
        "--out",
        out,
    )
    assert expected in " ".join(lrc.refusal(*command, *options).split())
    assert not out.exists()
