"""`train.evaluate` and `lrc eval --checkpoints`: accuracy along a run."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

pytest.importorskip("lm_eval")

from benchmarks_data import ROWS, save_byte_model
from command_line import Command
from data_helpers import write_rows
from lrc.evaluation.along import Benchmarks
from lrc.recipe.sections import EvaluateSection
from lrc.report.curves import loss_charts
from lrc.report.runs import read_runs
from lrc.run import Run
from prepared import EXACT, Prepared, places

STEP_TOKENS = 2 * 32


@pytest.fixture
def settings(tmp_path: Path) -> list[str]:
    """A run of ten steps of a tiny model that reads bytes, with benchmarks of a few rows."""
    save_byte_model(tmp_path / "teacher")
    (tmp_path / "rows").mkdir()
    for name in ("arc_easy", "piqa"):
        write_rows(tmp_path / "rows" / f"{name}.jsonl", ROWS[name](6))
    text = tmp_path / "text.jsonl"
    lines = [f"The cow number {n} eats {n * n} flowers and the bee {n + 2}." * 3 for n in range(60)]
    text.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    evaluate = {"tasks": ["arc_easy", "piqa"], "every_tokens": 200, "limit": 3}
    given = {
        "train.tokens": 10 * STEP_TOKENS,
        "train.micro_batch": 2,
        "train.eval_every": 100,
        "train.log_every": 100,
        "train.keep_checkpoints": 9,
        "train.checkpoint_every": 5,
        "train.checkpoint_minutes": 0,
        "train.learning_rate": 0.01,
        "train.evaluate": json.dumps(evaluate | {"data": str(tmp_path / "rows")}),
        "data.sequence_length": 32,
        "data.held_out_fraction": 0.1,
        "data.cache": str(tmp_path / "cache"),
        "initialize.calibration_tokens": 128,
    }
    sets = [part for key, value in given.items() for part in ("--set", f"{key}={value}")]
    base = ["--teacher", tmp_path / "teacher", "--hidden-size", "8", "--text", text]
    return [str(part) for part in (*base, *sets)]


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_accuracy_is_measured_along_the_run_and_changes_nothing_else(
    settings: list[str], tmp_path: Path, lrc: Command
) -> None:
    code, out, err = lrc("train", *settings, "--out", tmp_path / "run")
    assert code == 0, err
    plain = [*settings, "--set", "train.evaluate=null"]
    plain = [part for i, part in enumerate(plain) if not _is_evaluate(plain, i)]
    code, _, err = lrc("train", *plain, "--out", tmp_path / "plain")
    assert code == 0, err
    measured = [line for line in lines_of(tmp_path / "run") if "accuracy" in line]
    # 200, 400 and 600 tokens are passed by steps 4, 7 and 10.
    assert [line["step"] for line in measured] == [0, 4, 7, 10]
    names = {"arc_easy/acc", "arc_easy/acc_norm", "piqa/acc", "piqa/acc_norm"}
    assert all(line["accuracy"].keys() == names for line in measured)
    assert measured[0]["teacher_accuracy"].keys() == names
    assert "arc_easy/acc" in out
    section = EvaluateSection(
        tasks=["arc_easy", "piqa"], every_tokens=1, limit=3, data=str(tmp_path / "rows")
    )
    for folder, key, line in (
        ("run/student", "accuracy", measured[-1]),
        ("teacher", "teacher_accuracy", measured[0]),
    ):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / folder)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / folder)
        assert Benchmarks(section).accuracy(model, tokenizer) == line[key]
    weights = [
        AutoModelForCausalLM.from_pretrained(tmp_path / name / "student").state_dict()
        for name in ("run", "plain")
    ]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())

    charts = {chart.title: chart for chart in loss_charts(read_runs([Run.open(tmp_path / "run")]))}
    for name in names:
        (line,) = charts[name].lines
        assert list(line.x) == [row["tokens"] for row in measured]
        assert list(line.y) == [row["accuracy"][name] for row in measured]
        assert line.teacher == measured[0]["teacher_accuracy"][name]
    lrc.printed("report", tmp_path / "run")
    assert "piqa/acc" in (tmp_path / "run/report.html").read_text(encoding="utf-8")

    rows = ("--data", tmp_path / "rows", "--limit", 3, "--tasks", "arc_easy,piqa")
    code, out, err = lrc("eval", tmp_path / "run", "--checkpoints", *rows)
    assert code == 0, err
    assert "Limited to the first 3 rows of each task" in out
    found = json.loads((tmp_path / "run/accuracy.json").read_text())
    assert [row["step"] for row in found["checkpoints"]] == [0, 5, 10]
    by_step = {row["step"]: row["accuracy"] for row in found["checkpoints"]}
    assert by_step[0] == measured[0]["accuracy"]
    assert by_step[10] == measured[-1]["accuracy"]
    assert found["teacher_accuracy"] == measured[0]["teacher_accuracy"]
    code, _, err = lrc("eval", tmp_path / "run", "--checkpoints", *rows, "--compare", "teacher")
    assert code == 2
    assert "leave it out" in err


@pytest.mark.slow
def test_two_processes_share_the_tasks(
    settings: list[str], tmp_path: Path, prepared: Prepared
) -> None:
    command = ["train", *settings, "--set", "train.accumulate=2"]
    started = [prepared.start(*command, "--out", tmp_path / "one", environment=EXACT)]
    for place in places(2):
        out = ("--out", tmp_path / "two")
        started.append(prepared.start(*command, *out, code=COUNTED, environment=EXACT | place))
    outputs = []
    for process in started:
        code, out, err = process.wait()
        assert code == 0, err
        outputs.append(out)
    counted = [out.splitlines()[-1] for out in outputs[1:]]
    # Steps 0, 2, 4 and 5, and the teacher once.
    assert counted == ["{'arc_easy': 5}", "{'piqa': 5}"]
    one, two = (
        [(row["step"], row["accuracy"]) for row in lines_of(tmp_path / name) if "accuracy" in row]
        for name in ("one", "two")
    )
    assert len(one) == 4
    assert one == two
    first = [lines_of(tmp_path / name)[0]["teacher_accuracy"] for name in ("one", "two")]
    assert first[0] == first[1]


COUNTED = """
import atexit
from collections import Counter
from lrc.evaluation import along
real, counts = along.evaluate_task, Counter()

def evaluate_task(lm, manager, name, *rest):
    counts[name] += 1
    return real(lm, manager, name, *rest)

along.evaluate_task = evaluate_task
atexit.register(lambda: print(dict(counts)))
from lrc.cli import main; main()
"""
"""The command line, which prints how often it evaluated each task."""


def _is_evaluate(parts: list[str], i: int) -> bool:
    """Whether a part is the setting of the evaluation, or its flag."""
    return any("train.evaluate" in part for part in parts[i : i + 1 + (parts[i] == "--set")])


def test_unknown_tasks_are_refused_before_anything_is_loaded(
    settings: list[str], tmp_path: Path, lrc: Command
) -> None:
    wrong = [part.replace("arc_easy", "arc_easyy") for part in settings]
    code, _, err = lrc("train", *wrong, "--out", tmp_path / "run")
    assert code == 2
    assert "There is no task 'arc_easyy'" in err
    assert not (tmp_path / "run").exists()
