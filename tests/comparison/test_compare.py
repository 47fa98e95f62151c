"""Comparisons: what they run, skip and report."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from command_line import Command
from data_helpers import write_jsonl
from lrc.cli import main
from lrc.comparison import compare, load_comparison, side_by_side
from lrc.comparison import runner as runner_module
from lrc.comparison.curves import comparison_title
from lrc.comparison.folders import Folders, held_out_of
from lrc.comparison.page import write_comparison_page
from lrc.comparison.preflight import need_inputs
from lrc.comparison.results import Point, RunResult, collect, curve_of, tokens_to_reach
from lrc.comparison.runner import differences
from lrc.comparison.table import about_seeds, header, loss_by_tokens, notes, rows
from lrc.recipe import make_recipe
from lrc.recipe.learning_rate import learning_rate, share_of_rate
from lrc.recipe.shipped import shipped
from lrc.run import Run
from lrc.system.errors import UserError
from lrc.train import loop as training_loop
from lrc.train import session as session_module
from lrc.train import starts as starts_module
from lrc.train.session import Interrupted, train
from lrc.train.starts import Starts
from prepared import Prepared
from tiny_runs import save_teacher, tiny_documents

Settings = dict[str, Any]


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("teacher"), "llama")


@pytest.fixture
def plan(tmp_path: Path, teacher_folder: Path) -> Settings:
    """A comparison of a clone with a student from scratch; a rate of 1e30 cannot stay finite."""
    text = write_jsonl(tmp_path / "text.jsonl", tiny_documents(30))
    return {
        "recipe": {
            "teacher": {"model": str(teacher_folder)},
            "student": {"hidden_size": 8},
            "data": {
                "text": [str(text)],
                "held_out_fraction": 0.2,
                "sequence_length": 16,
                "cache": str(tmp_path / "cache"),
            },
            "train": {"micro_batch": 2, "eval_every": 2, "eval_sequences": 8},
        },
        "tokens": 192,
        "seeds": [0, 3],
        "grid": {"learning_rates": [1e-3, 1e-2, 1e30], "tokens": 96},
        "thresholds": [100.0, 0.0],
        "entries": [
            {
                "name": "lrc",
                "set": {
                    "initialize": {"method": "closed-form", "calibration_tokens": 64},
                    "student.fold_gains": True,
                },
            },
            {"name": "scratch", "set": {"method": "scratch"}},
            {
                "name": "no-kl",
                "set": {"method": "scratch", "objective.kl_weight": 0},
                "rate_of": "scratch",
            },
        ],
    }


def write(plan: Settings, folder: Path) -> Path:
    path = folder / "comparison.yaml"
    path.write_text(yaml.safe_dump(plan))
    return path


def test_whole_comparison_and_its_second_start(
    plan: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    comparison = load_comparison(write(plan, tmp_path))
    results = compare(comparison, out)
    names = [entry.name for entry in results.entries]
    assert names == ["lrc", "scratch", "no-kl"]
    tried = sorted(folder.name for folder in (out / "grid").iterdir())
    assert tried == sorted(
        f"{name}-lr{rate}" for name in ("lrc", "scratch") for rate in ("0.001", "0.01", "1e+30")
    )
    for entry in results.entries[:2]:
        assert entry.tries[1e30] is None
        finite = {rate: loss for rate, loss in entry.tries.items() if loss is not None}
        assert set(finite) == {1e-3, 1e-2}
        assert finite[entry.learning_rate] == min(finite.values())
    assert results.entries[2].learning_rate == results.entries[1].learning_rate
    assert results.entries[2].tries == {}
    for entry in results.entries:
        assert [run.seed for run in entry.runs] == [0, 3]
        for run in entry.runs:
            summary = Run.open(out / run.folder).summary()
            assert run.held_out_lm == summary["student_held_out_lm"]
            assert summary["tokens"] == entry.tokens == 192
            assert len(run.curve) == 4  # at 0, 2, 4 and 6 steps
            assert run.curve[0].tokens == (entry.calibration_tokens or 0)
            assert run.curve[-1].loss == pytest.approx(run.held_out_lm, rel=1e-5)
            assert run.tokens_to_reach == [run.curve[0].tokens, None]
        first, second = (run.held_out_lm for run in entry.runs)
        assert first != second, "the seeds have no effect"
        assert entry.mean("held_out_lm") == pytest.approx((first + second) / 2)
        assert entry.spread("held_out_lm") == pytest.approx(abs(first - second) / 2**0.5)
    assert results.entries[0].calibration_tokens == 64
    assert results.entries[1].calibration_tokens == 0

    written = (out / "comparison.md").read_text()
    assert "not finite at the rate 1e+30" in written
    assert "192 + 64" in written
    curve = results.entries[1].curve()
    assert curve is not None
    losses = [line for line in written.splitlines() if line.startswith("| scratch |")][1]
    assert losses.strip("| ").split(" | ")[1:] == [f"{loss:.3f}" for loss in curve.loss]
    data = json.loads((out / "comparison.json").read_text())
    assert data["entries"][1]["tries"]["1e+30"] is None
    assert (out / "curves.png").stat().st_size > 10_000

    monkeypatch.setattr(runner_module, "train", lambda *_, **__: pytest.fail("it ran again"))
    again = compare(comparison, out)
    assert again == results


@pytest.mark.parametrize("name", ["lrc", "minitron", "llm-pruner"])
def test_runs_share_their_start(
    name: str, plan: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tries of several rates solve their start once, and train as if each had solved it."""
    solved: list[str] = []
    solve = session_module.start

    def counted(setup: Any, recipe: Any, *rest: Any) -> tuple[float, float]:
        solved.append(recipe.method.name)
        return solve(setup, recipe, *rest)

    monkeypatch.setattr(session_module, "start", counted)
    settings = {"method": name, "initialize.calibration_tokens": 64}
    plan |= {
        "entries": [{"name": name, "set": settings}],
        "seeds": [0],
        "grid": {"learning_rates": [1e-3, 1e-2], "tokens": 96},
    }
    out, comparison = tmp_path / "out", load_comparison(write(plan, tmp_path))
    results = compare(comparison, out)
    assert solved == [name]
    entry = comparison.entries[0]
    [run] = results.entries[0].runs
    alone = Run.create(tmp_path / "alone", Run.open(out / run.folder).recipe)
    train(alone)
    assert solved == [name] * 2
    mine, shared = (r.metrics() for r in (alone, Run.open(out / run.folder)))
    for figure in ("held_out_lm", "loss", "grad_norm", "learning_rate", "calibration_tokens"):
        assert [line.get(figure) for line in mine] == [line.get(figure) for line in shared]
    seconds = [
        Run.open(folder).metrics()[0]["calibration_seconds"]
        for folder in (*(out / "grid").iterdir(), out / run.folder)
    ]
    assert len(set(seconds)) == 1  # counted for each of them
    assert seconds[0] > 0

    # A damaged start is computed again. Another seed gives another start.
    [kept] = (out / "starts").glob("*/step-00000000/state.safetensors")
    kept.write_bytes(kept.read_bytes()[:-8])
    for seed, folder in ((0, "damaged"), (1, "seed")):
        other = Run.create(tmp_path / folder, comparison.run_recipe(entry, 1e-3, seed))
        train(other, starts=Starts(out / "starts"))
    assert solved == [name] * 4

    # So does other code.
    monkeypatch.setattr(starts_module, "source_sha256", lambda: "other")
    other = Run.create(tmp_path / "code", comparison.run_recipe(entry, 1e-3, 0))
    train(other, starts=Starts(out / "starts"))
    assert solved == [name] * 5


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"entries": []}, "at least 1"),
        ({"tokns": 1}, r"unknown key 'tokns' \(nearest: 'tokens'\)"),
        ({"grid": None}, "without a grid, entry 'lrc' needs a single rate in learning_rates"),
        ({"reference": "none"}, "the reference 'none' is not an entry"),
        ({"seeds": [1, 1]}, "a seed appears twice"),
        ({"entries": [{"name": "a"}, {"name": "a"}]}, "two entries are named 'a'"),
        ({"entries": [{"name": "a/b"}]}, "pattern"),
        ({"entries": [{"name": "a", "rate_of": "b"}]}, "takes the rate of 'b'"),
        ({"entries": [{"name": "a", "set": {"train.seed": 1}}]}, "the comparison's `seeds`"),
        ({"entries": [{"name": "a", "set": {"train.learning_rate": 1}}]}, "`learning_rates`"),
        (
            {
                "entries": [
                    {
                        "name": "a",
                        "tries": "release_learning_rate",
                        "set": {"train.release_learning_rate": 1},
                    }
                ]
            },
            "'train.release_learning_rate', which comes from the entry's `learning_rates`",
        ),
        ({"entries": [{"name": "a", "tries": "learning-rate"}]}, "'release_learning_rate'"),
        (
            {
                "entries": [
                    {
                        "name": "a",
                        "tries": "release_learning_rate",
                        "set": {"train.release_at": 1},
                    }
                ]
            },
            "entry 'a' tries rates for the time after a release, but has no release",
        ),
        (
            {"entries": [{"name": "a", "set": {"method": "scratch", "train.release_at": 0.1}}]},
            "'train.release_at', which has no effect with method scratch",
        ),
        (
            {"entries": [{"name": "a", "set": {"method": "scratch", "objective": {"alpha": 1}}}]},
            "'objective.alpha', which has no effect with method scratch",
        ),
        (
            {"entries": [{"name": "a", "set": {"studnt.x": 1}}, {"name": "b", "set": {"x": 1}}]},
            "'studnt'.*entry 'b'",
        ),
        (
            {
                "entries": [
                    {"name": "a"},
                    {"name": "b", "set": {"data": {"held_out": ["b"], "sequence_length": 32}}},
                ]
            },
            r"entry 'b' has another data\.held_out and data\.sequence_length than the first",
        ),
        (
            {
                "entries": [
                    {"name": name, "set": {"train.evaluate": tasks}}
                    for name, tasks in (
                        ("a", None),
                        ("b", {"tasks": ["x"], "every_tokens": 1}),
                        ("c", {"tasks": ["x"], "every_tokens": 2, "limit": 3}),
                    )
                ]
            },
            r"mistakes: entry 'c' has another train\.evaluate\.limit than the first",
        ),
        (
            {"entries": [{"name": "a", "set": {"data.also_held_out": {"held-out": ["b.txt"]}}}]},
            r"^The comparison has mistakes: data\.also_held_out names a text 'held-out'",
        ),
        (
            {"entries": [{"name": "a"}, {"name": "b", "set": {"data.text": ["b.txt"]}}]},
            r"entry 'b' has another data\.text than",
        ),
        (
            {"entries": [{"name": "a"}, {"name": "b", "set": {"data.document_mask": True}}]},
            r"entry 'b' has another data\.document_mask than the first",
        ),
        (
            {"entries": [{"name": "a"}, {"name": "b", "set": {"teacher.model": "other"}}]},
            r"entry 'b' has another teacher\.model than the first",
        ),
    ],
)
def test_bad_comparisons_are_refused(
    plan: Settings, tmp_path: Path, change: Settings, words: str
) -> None:
    with pytest.raises(UserError, match=words):
        load_comparison(write({**plan, **change}, tmp_path))


def test_students_that_do_not_fit_are_refused_before_the_first_run(
    plan: Settings, tmp_path: Path
) -> None:
    plan["entries"] += [
        {"name": "heads", "set": {"student.kv_heads": 8}},
        {"name": "heads-kl", "set": {"student.kv_heads": 8, "objective.lm_weight": 0}},
        {"name": "deep", "set": {"method": {"name": "minitron", "layers": 9}}},
    ]
    path, out = write(plan, tmp_path), tmp_path / "out"
    with pytest.raises(UserError) as refused:
        compare(load_comparison(path), out)
    text = str(refused.value)
    assert "entry 'heads', 'heads-kl': student.kv_heads is 8" in text
    assert "entry 'deep': method.layers" in text
    assert "scratch" not in text
    assert not out.exists()
    with pytest.raises(UserError, match=r"entry 'heads': student\.kv_heads"):
        compare(load_comparison(path), out, ["scratch", "heads"])


def test_single_rates_need_no_grid(plan: Settings, tmp_path: Path) -> None:
    scratch, ablation = plan["entries"][1:]
    plan |= {"entries": [{**scratch, "learning_rates": [1e-2]}, ablation], "seeds": [0]}
    del plan["grid"]
    out = tmp_path / "out"
    results = compare(load_comparison(write(plan, tmp_path)), out)
    assert [(e.learning_rate, e.tries, len(e.runs)) for e in results.entries] == [(1e-2, {}, 1)] * 2
    assert not (out / "grid").exists()
    assert "grid" not in (out / "comparison.md").read_text()
    write_comparison_page(out, tmp_path / "page.html")
    assert "0.01" in (tmp_path / "page.html").read_text()


def test_a_try_on_the_whole_budget_is_not_run_again(
    plan: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[str] = []
    train = runner_module.train

    def counted(run: Run, *rest: Any, **more: Any) -> Any:
        trained.append(run.folder.name)
        return train(run, *rest, **more)

    monkeypatch.setattr(runner_module, "train", counted)
    plan["grid"] |= {"learning_rates": [1e-3, 1e-2], "tokens": 192}
    plan["entries"] = plan["entries"][1:2]
    out = tmp_path / "out"
    (entry,) = compare(load_comparison(write(plan, tmp_path)), out).entries
    assert trained == ["scratch-lr0.001", "scratch-lr0.01", "scratch-seed3"]
    assert [run.seed for run in entry.runs] == [0, 3]
    assert entry.learning_rate is not None
    assert entry.runs[0].held_out_lm == entry.tries[entry.learning_rate]
    assert (out / "runs/scratch-seed0/student").is_dir()


def test_rates_after_the_release_are_tried_too(plan: Settings, tmp_path: Path) -> None:
    released = {"train.release_at": 0.5, "train.learning_rate": 1e-3}
    plan["entries"] = [
        {"name": "never", "set": {"train.release_at": 1}},
        {"name": "released", "tries": "release_learning_rate", "set": released},
        {
            "name": "ablation",
            "tries": "release_learning_rate",
            "rate_of": "released",
            "set": {**released, "objective.alpha": 0},
        },
    ]
    plan["seeds"] = [0]
    out = tmp_path / "out"
    results = compare(load_comparison(write(plan, tmp_path)), out)
    [chosen] = [entry.learning_rate for entry in results.entries if entry.name == "released"]
    recipes = {
        run.name: Run.open(run).recipe.train
        for run in (*(out / "grid").iterdir(), *(out / "runs").iterdir())
    }
    assert recipes["released-lr0.01"].release_learning_rate == 1e-2
    assert recipes["released-lr0.01"].learning_rate == 1e-3
    for name in ("released", "ablation"):
        assert recipes[f"{name}-seed0"].learning_rate == 1e-3
        assert recipes[f"{name}-seed0"].release_learning_rate == chosen
    assert recipes["never-seed0"].release_learning_rate is None
    assert recipes["never-lr0.01"].learning_rate == 1e-2


def test_other_settings_are_not_mixed_in(plan: Settings, tmp_path: Path) -> None:
    plan = {
        **plan,
        "entries": plan["entries"][1:2],
        "grid": {"learning_rates": [1e-2], "tokens": 1},
    }
    path = write({**plan, "seeds": [0]}, tmp_path)
    compare(load_comparison(path), tmp_path / "out")
    other = load_comparison(path, {"train.weight_decay": 0.1})
    with pytest.raises(UserError, match=r"other settings \(train.weight_decay\)"):
        compare(other, tmp_path / "out")
    tasks = {"tasks": ["x"], "every_tokens": 9, "limit": 3}
    recipe = load_comparison(path).run_recipe(load_comparison(path).entries[0], 1e-2, 0)
    for before, after, differing in (
        (None, tasks, []),
        (tasks, None, []),
        (tasks, tasks | {"every_tokens": 1, "batch_size": 2}, []),
        (tasks, tasks | {"limit": 4, "data": "folder"}, ["limit", "data"]),
        (tasks, tasks | {"tasks": ["y"]}, ["tasks"]),
    ):
        both = (
            make_recipe(recipe.model_dump(), {"train.evaluate": evaluate})
            for evaluate in (before, after)
        )
        assert differences(*both) == [f"train.evaluate.{name}" for name in differing]
    more = load_comparison(write(plan, tmp_path))  # another seed may be added
    results = compare(more, tmp_path / "out")
    assert len(results.entries[0].runs) == 2


def test_the_hint_how_to_make_files_is_for_the_comparisons_own(
    plan: Settings, tmp_path: Path
) -> None:
    """A teacher or text of the user may be a hub id or a pattern."""
    made = {**plan, "preparation": "make it"}
    missing = {**made, "recipe": {**plan["recipe"], "data": {"text": ["not/there.txt"]}}}
    with pytest.raises(UserError, match=r"'not/there\.txt' does not exist: make it with `make it`"):
        need_inputs(load_comparison(write(missing, tmp_path)))
    (tmp_path / "a.txt").write_text("words\n\n" * 50)
    need_inputs(load_comparison(write(missing, tmp_path), {"data.text": [f"{tmp_path}/*.txt"]}))
    with pytest.raises(UserError, match="There is no file or folder 'gone"):
        need_inputs(load_comparison(write(missing, tmp_path), {"data.text": ["gone/*.txt"]}))
    need_inputs(load_comparison(write(made, tmp_path), {"teacher.model": "org/name"}))


def test_a_title_has_the_shape_of_the_reference(plan: Settings, tmp_path: Path) -> None:
    entries = [
        {"name": "a", "set": {"student.hidden_size": 10}},
        {"name": "b", "set": {"student": {"hidden_size": None, "layers": 1}}},
    ]
    recipe = {name: value for name, value in plan["recipe"].items() if name != "student"}
    for reference, ending in (("a", "hidden\N{NO-BREAK SPACE}10"), ("b", "student")):
        changed = {**plan, "recipe": recipe, "entries": entries, "reference": reference}
        comparison = load_comparison(write(changed, tmp_path))
        results = collect(Folders(comparison, tmp_path / "out"))
        assert comparison_title(comparison, results).endswith(ending)


def test_a_run_that_diverged_does_not_end_the_curve_of_the_others(
    plan: Settings, tmp_path: Path
) -> None:
    empty = collect(Folders(load_comparison(write(plan, tmp_path)), tmp_path / "out"))
    points = [[Point(0, 0.0, 6.0)], [Point(0, 0.0, 5.0), Point(9, 1.0, 4.0)]]
    runs = [RunResult(0, "", curve, None, None, None, []) for curve in points]
    mean = replace(empty.entries[0], runs=runs).curve()
    assert mean is not None
    assert (mean.tokens, mean.loss) == ([0, 9], [5.5, 4.0])


def test_an_entry_whose_runs_all_diverged_keeps_its_calibration_tokens(
    plan: Settings, tmp_path: Path
) -> None:
    plan |= {"seeds": [0], "grid": None, "entries": plan["entries"][:1]}
    plan["entries"][0]["learning_rates"] = [1e30]
    results = compare(load_comparison(write(plan, tmp_path)), tmp_path / "out")
    [entry] = results.entries
    assert entry.runs[0].held_out_lm is None
    columns, [losses] = loss_by_tokens(results)
    assert columns[0] == "0"
    assert losses == ["lrc", f"{entry.runs[0].curve[0].loss:.3f}", *losses[2:]]
    assert "192 + 64" in rows(results)[0]


def test_a_folder_with_something_else_is_left_alone(plan: Settings, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("data")
    with pytest.raises(UserError, match="is not a comparison's folder"):
        compare(load_comparison(write(plan, tmp_path)), tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["precious"]


def test_command_line_overrides(
    plan: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    one = {**plan, "seeds": [0], "entries": [plan["entries"][1]]}
    path = write({**one, "grid": {"learning_rates": [1e-2], "tokens": 1}}, tmp_path)
    arguments = ["compare", str(path), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["lrc", *arguments, "--set", "train.eval_every=3"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0
    run = Run.open(tmp_path / "out" / "runs" / "scratch-seed0")
    assert run.recipe.train.eval_every == 3
    monkeypatch.setattr(sys, "argv", ["lrc", *arguments, "--set", "train.tokens=3"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    assert "comes from the comparison's `tokens`" in capsys.readouterr().err


def test_overrides_of_the_comparison(plan: Settings, tmp_path: Path) -> None:
    """Its own settings change like those of its recipe; a mistake in all entries is told once."""
    path = write(plan, tmp_path)
    changes = {"seeds": [5], "tokens": 32, "grid.learning_rates": [1e-4], "train.eval_every": 3}
    comparison = load_comparison(path, changes)
    assert (comparison.seeds, comparison.tokens) == ([5], 32)
    assert comparison.grid is not None
    assert comparison.grid.learning_rates == [1e-4]
    assert comparison.grid.tokens == plan["grid"]["tokens"]
    assert comparison.grid_recipe(comparison.entries[0], 1e-4).train.eval_every == 3
    with pytest.raises(UserError, match=r"^The comparison has mistakes: 'tokens' is -1: "):
        load_comparison(path, {"tokens": -1})
    assert len(comparison.entries) > 1
    with pytest.raises(UserError, match=r"all entries: .*'seed'") as refused:
        load_comparison(path, {"seed": 1})
    assert str(refused.value).count("'seed'") == 1


def test_other_text_is_not_mixed_in(plan: Settings, tmp_path: Path) -> None:
    """Not in new runs of a comparison, nor by the starts that old ones left."""
    plan |= {"seeds": [0], "grid": None, "entries": plan["entries"][:1]}
    plan["entries"][0]["learning_rates"] = [1e-3]
    out = tmp_path / "out"
    [before] = compare(load_comparison(write(plan, tmp_path)), out).entries[0].runs
    text = tmp_path / "text.jsonl"
    kept = text.read_text()
    write_jsonl(text, tiny_documents(40)[10:])
    more = load_comparison(write(plan | {"seeds": [0, 1]}, tmp_path))
    with pytest.raises(UserError, match=r"lrc-seed0 began with other inputs \(the text\), so .*1"):
        compare(more, out)
    shutil.rmtree(out / "runs")
    [after, _] = compare(more, out).entries[0].runs
    assert after.curve[0].loss != before.curve[0].loss
    assert len(list((out / "starts").iterdir())) == 3
    shutil.rmtree(out / "runs")
    text.write_text(kept)
    [again, _] = compare(more, out).entries[0].runs
    assert [point.loss for point in again.curve] == [point.loss for point in before.curve]


def test_other_held_out_text_is_told(plan: Settings, tmp_path: Path) -> None:
    """Entries with different texts are compared on one held-out file, which changes in between."""
    held_out = write_jsonl(tmp_path / "held-out.jsonl", tiny_documents(12))
    other = write_jsonl(tmp_path / "other.jsonl", tiny_documents(40))
    plan["recipe"]["data"]["held_out"] = [str(held_out)]
    plan |= {"seeds": [0], "grid": None, "tokens": 32}
    scratch = {"method": "scratch"}
    plan["entries"] = [
        {"name": "a", "learning_rates": [1e-3], "set": scratch},
        {"name": "b", "learning_rates": [1e-3], "set": {**scratch, "data.text": [str(other)]}},
    ]
    comparison, out = load_comparison(write(plan, tmp_path)), tmp_path / "out"
    results = compare(comparison, out)
    assert "NOT COMPARABLE" not in "".join(notes(results))
    assert "the same held-out tokens for all" in about_seeds(results)
    shutil.rmtree(out / "runs" / "b-seed0")
    write_jsonl(held_out, [f"{text} w3 w3 w3" for text in tiny_documents(24)[12:]])
    results = compare(comparison, out)
    first, *_ = notes(results)
    assert "NOT COMPARABLE: the teacher's held-out LM loss is" in first
    for entry in results.entries:
        assert f"{entry.runs[0].teacher_held_out_lm:.4f} in {entry.runs[0].folder}" in first
    assert "the same" not in about_seeds(results)


def test_runs_of_other_code_and_other_machines_are_told(plan: Settings, tmp_path: Path) -> None:
    plan |= {"seeds": [0, 1, 2], "grid": None, "tokens": 32}
    plan["entries"] = [{"name": "a", "learning_rates": [1e-3], "set": {"method": "scratch"}}]
    comparison, out = load_comparison(write(plan, tmp_path)), tmp_path / "out"
    assert "Not all runs" not in "".join(notes(compare(comparison, out)))
    summary, environment = (
        out / "runs" / "a-seed1" / f"{n}.json" for n in ("summary", "environment")
    )
    table = json.loads(summary.read_text())
    summary.write_text(json.dumps(table | {"computed_on": "Some GPU, in bfloat16"}))
    table = json.loads(environment.read_text())
    environment.write_text(json.dumps(table | {"source_sha256": "0123456789abcdef"}))
    told = notes(collect(Folders(comparison, out)))
    code, machine = (note for note in told if note.startswith("Not all runs"))
    assert re.search(
        r"version of the code, .*: lrc \S+, source 0123456789ab \(a-seed1\); lrc", code
    )
    assert "Some GPU, in bfloat16 (a-seed1); the CPU with 1 thread, in float32 (the" in machine
    del table["source_sha256"]  # as in runs of older versions
    environment.write_text(json.dumps(table | {"git_commit": "abc-dirty"}))
    told = "".join(notes(collect(Folders(comparison, out))))
    assert re.search(r"lrc \S+, commit abc-dirty \(a-seed1\); lrc", told)


def test_some_entries_alone(plan: Settings, tmp_path: Path) -> None:
    """Entries can be run apart, by processes side by side; the ablation brings its rate's entry."""
    plan |= {"seeds": [0], "grid": {"learning_rates": [1e-3, 1e-2], "tokens": 96}}
    comparison, out = load_comparison(write(plan, tmp_path)), tmp_path / "out"
    results = compare(comparison, out, only=["no-kl"])
    assert sorted(f.name for f in (out / "grid").iterdir()) == ["scratch-lr0.001", "scratch-lr0.01"]
    assert [f.name for f in (out / "runs").iterdir()] == ["no-kl-seed0"]
    assert [len(entry.runs) for entry in results.entries] == [0, 0, 1]
    results = compare(comparison, out)
    assert [len(entry.runs) for entry in results.entries] == [1, 1, 1]
    with pytest.raises(UserError, match=r"no entry 'nokl'.*lrc, scratch, no-kl"):
        compare(comparison, out, only=["nokl"])


def signaled(monkeypatch: pytest.MonkeyPatch, number: int, run: str, step: int) -> list[str]:
    """Send this process a signal at a step of a run. Returns the names of the runs begun so far."""
    begun: list[str] = []
    take = training_loop.Loop._step

    def step_then_signal(self: training_loop.Loop, progress: Any) -> dict[str, Any]:
        line = take(self, progress)
        begun.append(self.run.folder.name)
        if self.run.folder.name == run and self.setup.state.step == step:
            os.kill(os.getpid(), number)
        return line

    monkeypatch.setattr(training_loop.Loop, "_step", step_then_signal)
    return begun


def test_a_stopped_comparison_continues(
    plan: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    one = {**plan, "grid": {"learning_rates": [1e-2], "tokens": 1}, "entries": plan["entries"][1:2]}
    path = write(one, tmp_path)
    monkeypatch.setattr(sys, "argv", ["lrc", "compare", str(path), "--out", str(tmp_path / "out")])
    with monkeypatch.context() as patch:
        begun = signaled(patch, signal.SIGTERM, "scratch-seed3", 2)
        with pytest.raises(SystemExit) as end:
            main()
    assert end.value.code == 128 + signal.SIGTERM
    assert begun == ["scratch-seed0"] * 6 + ["scratch-seed3"] * 2
    output = capsys.readouterr().out
    assert "the same command continues from there" in output
    assert re.search(r"run 2 of 2, about 0:0\d:\d\d left", output)
    with monkeypatch.context() as patch:
        begun = signaled(patch, signal.SIGTERM, "none", 0)
        with pytest.raises(SystemExit) as end:
            main()
    assert end.value.code == 0
    assert begun == ["scratch-seed3"] * 4
    assert not json.loads((tmp_path / "out" / "comparison.json").read_text())["entries"][0]["tries"]


@pytest.mark.parametrize("results_only", [False, True])
def test_a_comparison_stopped_in_the_last_step_of_a_run_ends_after_it(
    plan: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, results_only: bool
) -> None:
    one = {**plan, "grid": {"learning_rates": [1e-2], "tokens": 1}, "entries": plan["entries"][1:2]}
    comparison, out = load_comparison(write(one, tmp_path)), tmp_path / "out"
    with monkeypatch.context() as patch:
        begun = signaled(patch, signal.SIGTERM, "scratch-seed0", 6)
        with pytest.raises(Interrupted, match="scratch-seed0; the same command"):
            compare(comparison, out, results_only=results_only)
    assert begun == ["scratch-seed0"] * 6
    run = Run.open(out / "runs" / "scratch-seed0")
    assert run.summary()["tokens"] == 192
    assert run.student_folder.exists() != results_only
    assert run.checkpoints.exists() != results_only
    run.student_folder.mkdir(exist_ok=True)  # what an earlier command has left
    [entry] = compare(comparison, out, results_only=True).entries
    assert [run.seed for run in entry.runs] == [0, 3]
    assert not list(out.glob("runs/*/student"))
    assert not list(out.glob("runs/*/checkpoints"))


def test_a_killed_comparison_continues(plan: Settings, tmp_path: Path, prepared: Prepared) -> None:
    """SIGKILL in the second run: the first does not change, the second continues."""
    plan["recipe"]["train"] |= {"checkpoint_every": 5, "eval_every": 1000}
    one = {**plan, "tokens": 32 * 200, "entries": plan["entries"][1:2]}
    path = write({**one, "grid": {"learning_rates": [1e-2], "tokens": 1}}, tmp_path)
    out = tmp_path / "out"
    started = prepared.start("compare", path, "--out", out)
    second = out / "runs" / "scratch-seed3"
    end = time.monotonic() + 300
    while len(list((second / "checkpoints").glob("step-*"))) < 2:
        assert started.poll() is None, "it ended too early"
        assert time.monotonic() < end
        time.sleep(0.005)
    started.send_signal(signal.SIGKILL)
    assert started.wait()[0] == -signal.SIGKILL
    assert not (second / "summary.json").exists()
    first = out / "runs" / "scratch-seed0" / "summary.json"
    before = first.stat().st_mtime_ns
    logged = Run.open(second).metrics()[:6]
    results = compare(load_comparison(path), out)
    assert first.stat().st_mtime_ns == before
    metrics = Run.open(second).metrics()
    assert [line["step"] for line in metrics] == list(range(201))
    assert metrics[:6] == logged, "it started over"  # the clock tells
    assert [run.seed for run in results.entries[0].runs] == [0, 3]


def curve(*points: tuple[int, float]) -> list[Point]:
    return [Point(tokens, 0.0, loss) for tokens, loss in points]


def test_a_loss_that_ends_as_nan_counts_as_failed(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text('{"student_held_out_lm": NaN}')
    assert held_out_of(tmp_path) is None
    start = {"step": 0, "tokens": 0, "calibration_tokens": 8, "calibration_seconds": 2.0}
    lines = [{**start, "held_out_lm": 5.0}, {"tokens": 9, "loss": 1.0}]
    lines.append({"tokens": 16, "step_seconds": 3.0, "held_out_lm": math.nan})
    assert curve_of(lines) == [Point(8, 2.0, 5.0)]
    lines[-1]["held_out_lm"] = 4.0
    assert curve_of(lines) == [Point(8, 2.0, 5.0), Point(24, 5.0, 4.0)]


@pytest.mark.parametrize(
    ("seeds", "note"),
    [
        ({"a": [4], "b": [4]}, "One seed (4), the same held-out tokens for all."),
        ({"a": [0, 3], "b": [0, 3]}, "deviation over seeds 0, 3, on the same"),
        (
            {"a": [0, 3], "b": [0], "c": [0]},
            "deviation over each entry's seeds (seeds 0, 3 for a; seed 0 for the others), on",
        ),
    ],
)
def test_the_note_says_how_many_seeds(
    plan: Settings, tmp_path: Path, seeds: dict[str, list[int]], note: str
) -> None:
    entries = [{"name": name, "seeds": own} for name, own in seeds.items()]
    comparison = load_comparison(str(write({**plan, "seeds": [0], "entries": entries}, tmp_path)))
    results = collect(Folders(comparison, tmp_path / "out"))
    assert note in about_seeds(results)


def test_tokens_to_reach() -> None:
    falling = curve((100, 6.0), (200, 5.0), (300, 5.5), (400, 3.0))
    assert tokens_to_reach(falling, 7.0) == 100
    assert tokens_to_reach(falling, 6.0) == 100
    assert tokens_to_reach(falling, 5.25) == 175
    assert tokens_to_reach(falling, 5.0) == 200
    assert tokens_to_reach(falling, 4.25) == 350
    assert tokens_to_reach(falling, 2.9) is None
    assert tokens_to_reach([], 2.9) is None


@pytest.mark.parametrize(
    ("measured", "columns"),
    [
        (range(0, 101), ["0", "5", "15", "25", "50", "75", "100"]),
        ([0, 33, 66, 100], ["0", "33", "66", "100"]),
    ],
)
def test_losses_are_shown_where_they_were_measured(
    plan: Settings, tmp_path: Path, measured: Sequence[int], columns: list[str]
) -> None:
    """Calibration tokens do not count. An entry without a measurement nearby has a gap."""
    comparison = load_comparison(write({**plan, "tokens": 100}, tmp_path))
    empty = collect(Folders(comparison, tmp_path / "out"))
    whole = [(7 + tokens, 9 - tokens / 100) for tokens in measured]
    runs = [
        RunResult(0, "", [Point(t, 0.0, loss) for t, loss in points], 4.0, None, None, [])
        for points in (whole, [(0, 5.0), (100, 4.0)])
    ]
    entries = [
        replace(entry, runs=[run], tokens=100, calibration_tokens=calibration)
        for entry, run, calibration in zip(empty.entries, runs, [7, None], strict=False)
    ]
    names, rows = loss_by_tokens(replace(empty, entries=entries))
    assert names == columns
    assert rows[0][1:] == [f"{9 - float(name) / 100:.3f}" for name in columns]
    assert rows[1][1:] == ["5.000", *["-"] * (len(columns) - 2), "4.000"]


@pytest.mark.parametrize("name", shipped("comparison"))
def test_shipped_comparisons_parse(name: str) -> None:
    comparison = load_comparison(name)
    for entry in comparison.entries:
        assert make_recipe(comparison.run_recipe(entry, 1e-4, 0).model_dump()).steps() > 0


@pytest.mark.parametrize("name", ["claims", "claims-cpu"])
def test_ablations_of_the_paper_have_its_seeds(name: str) -> None:
    comparison = load_comparison(name)
    assert {tuple(comparison.seeds_of(entry)) for entry in comparison.entries} == {
        tuple(comparison.seeds)
    }


def test_equal_thresholds_count_once(plan: Settings, tmp_path: Path) -> None:
    assert load_comparison(write(plan | {"thresholds": [6, 6.0, 5]}, tmp_path)).thresholds == [6, 5]


STAND_IN = """#!/bin/sh
while [ "$1" != --out ]; do shift; done
mkdir -p "$2/runs/a/student"
printf 'student\\n*.log\\n' > "$2/.gitignore"
touch "$2/worker-1.log" "$2/runs/a/summary.json" "$2/runs/a/student/weights"
exit $STATUS
"""


@pytest.mark.skipif(not (shutil.which("make") and shutil.which("tar")), reason="needs make and tar")
@pytest.mark.parametrize("status", [0, 3])
def test_the_archive_of_a_comparison_comes_home_if_it_fails(tmp_path: Path, status: int) -> None:
    makefile = Path(__file__).parents[2] / "Makefile"
    stand_in = tmp_path / "lrc"
    stand_in.write_text(STAND_IN)
    stand_in.chmod(0o755)
    command = ["make", "-C", tmp_path, "-f", makefile, "gpu-proof"]
    options = [f"LRC={stand_in}", f"OUT={tmp_path}", "COMPARISON=some"]
    environment = os.environ | {"STATUS": str(status)}
    ended = subprocess.run(
        [*command, *options], env=environment, capture_output=True, text=True, check=False
    )
    assert (f"Error {status}" in ended.stderr) == (ended.returncode != 0) == (status != 0)
    with tarfile.open(tmp_path / "some.tar.gz") as archive:
        names = [Path(name).name for name in archive.getnames()]
    assert {"worker-1.log", "summary.json"} <= {*names}
    assert "weights" not in names


@pytest.mark.slow
def test_processes_fill_a_folder_side_by_side(plan: Settings, tmp_path: Path, lrc: Command) -> None:
    """Two processes share the runs. Only results stay, which another checkout continues from."""
    plan |= {"seeds": [0, 3], "grid": {"learning_rates": [1e-3, 1e-2], "tokens": 96}}
    path, out = write(plan, tmp_path), tmp_path / "out"
    command = ["compare", path, "--out", out, "--parallel", 2, "--results-only"]
    printed = lrc.printed(*command)
    logs = [log.read_text() for log in sorted(out.glob("worker-*.log"))]
    worked = [log.count("Training on the CPU") for log in logs]
    assert len(worked) == 2
    assert min(worked) > 0, "one process did everything"
    assert sum(worked) == 4 + 6, "a run was made twice"
    comparison = load_comparison(path)
    alone = compare(comparison, tmp_path / "alone")
    together = json.loads((out / "comparison.json").read_text())
    for entry, other in zip(alone.entries, together["entries"], strict=True):
        assert [run.held_out_lm for run in entry.runs] == [
            pytest.approx(run["held_out_lm"]) for run in other["runs"]
        ]
        assert [len(run.curve) for run in entry.runs] == [len(r["curve"]) for r in other["runs"]]
        assert f"{entry.mean('held_out_lm'):.4f}" in printed
    ignored = (out / ".gitignore").read_text().split()
    committed = tmp_path / "committed"
    shutil.copytree(out, committed, ignore=shutil.ignore_patterns(*ignored))
    sizes = {file.name: file.stat().st_size for file in committed.rglob("*") if file.is_file()}
    assert "model.safetensors" not in sizes
    assert sizes["metrics.jsonl"] < 4_000
    results = compare(comparison, committed)
    assert not (committed / "claims").exists(), "something ran again"
    assert [len(entry.runs) for entry in results.entries] == [2, 2, 2]


@pytest.mark.slow
def test_a_time_limit_leaves_checkpoints(plan: Settings, tmp_path: Path, lrc: Command) -> None:
    plan["recipe"]["train"] |= {"checkpoint_every": 10**6, "eval_every": 10**6}
    long = {**plan, "tokens": 32 * 10**6, "seeds": [0], "entries": plan["entries"][1:2]}
    path = write({**long, "grid": {"learning_rates": [1e-3], "tokens": 1}}, tmp_path)
    command = ["compare", path, "--out", tmp_path / "out", "--minutes", 0.3]
    begun = time.monotonic()
    lrc.printed(*command)
    assert time.monotonic() - begun < 60
    run = Run.open(tmp_path / "out" / "runs" / "scratch-seed0")
    reached = [int(path.name.removeprefix("step-")) for path in run.checkpoints.glob("step-*")]
    assert max(reached) > 0
    assert not run.summary_file.exists()
    lrc.printed(*command)
    assert run.metrics()[1]["step"] == 1, "it started over"
    assert max(int(p.name.removeprefix("step-")) for p in run.checkpoints.glob("step-*")) > max(
        reached
    )


LONG_STEP = """
import signal, sys, time, pathlib
asked = []
signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
while not asked:
    time.sleep(0.05)
time.sleep(2)
pathlib.Path(sys.argv[1]).touch()
"""


def test_a_step_that_is_longer_than_the_time_that_is_left_ends(
    plan: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, real = tmp_path / "checkpoint", side_by_side.start
    command = [sys.executable, "-c", LONG_STEP, str(checkpoint)]
    monkeypatch.setattr(side_by_side, "start", lambda _command, *rest: real(command, *rest))
    folders = Folders(load_comparison(write(plan, tmp_path)), tmp_path)
    limited = side_by_side.SideBySide(minutes=0.05)
    side_by_side.run_side_by_side(folders, [], True, limited)
    assert checkpoint.exists()


def test_a_run_that_cannot_be_finished_does_not_stop_the_others(
    plan: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    plan |= {"seeds": [0], "grid": {"learning_rates": [1e-3, 1e-2], "tokens": 96}}
    real = runner_module.train

    def failing(run: Run, *rest: Any, **named: Any) -> Any:
        if run.folder.name == "scratch-lr0.001":
            raise UserError("the disk is full.")
        return real(run, *rest, **named)

    monkeypatch.setattr(runner_module, "train", failing)
    with pytest.raises(UserError, match=r"scratch, rate 0.001: the disk is full"):
        compare(load_comparison(write(plan, tmp_path)), tmp_path / "out")
    assert caplog.text.count("scratch, rate 0.001: the disk") == 1
    assert caplog.text.count("scratch, rate 0.001: ") == 1
    # `no-kl` takes the rate of `scratch`, so neither can be run.
    assert [folder.name for folder in (tmp_path / "out" / "runs").iterdir()] == ["lrc-seed0"]


def test_a_grid_can_get_more_rates(plan: Settings, tmp_path: Path) -> None:
    """A run with a rate that is no longer the best is not told as one with the best."""
    plan |= {"seeds": [0], "grid": {"learning_rates": [1e-7, 1e-6], "tokens": 96}}
    plan["entries"][0]["learning_rates"] = [1e-3]
    out, run = tmp_path / "out", tmp_path / "out" / "runs"
    first = compare(load_comparison(write(plan, tmp_path)), out)
    plan["grid"]["learning_rates"] += [1e-2]
    for _ in range(2):
        with pytest.raises(UserError, match=r"other learning rates .*scratch-seed0, .*no-kl-seed0"):
            compare(load_comparison(write(plan, tmp_path)), out)
        results = collect(Folders(load_comparison(tmp_path / "comparison.yaml"), out))
        assert [entry.learning_rate for entry in results.entries] == [1e-3, 1e-2, 1e-2]
        assert results.entries[0] == first.entries[0]
        assert not results.entries[1].runs
        assert "| scratch | 0.01* | - |" in (out / "comparison.md").read_text()
    shutil.rmtree(run / "no-kl-seed0")
    with pytest.raises(UserError, match=r"leaves them out: \S*scratch-seed0\. Remove"):
        compare(load_comparison(write(plan, tmp_path)), out)
    shutil.rmtree(run / "scratch-seed0")
    again = compare(load_comparison(write(plan, tmp_path)), out)
    for entry in again.entries[1:]:
        [done] = entry.runs
        assert Run.open(out / done.folder).recipe.train.learning_rate == 1e-2


def test_auto_is_a_rate_like_others(plan: Settings, tmp_path: Path) -> None:
    plan |= {"seeds": [0], "grid": {"learning_rates": [1e-7, "auto"], "tokens": 96}}
    plan["entries"] = plan["entries"][:1]
    out = tmp_path / "out"
    entry = compare(load_comparison(write(plan, tmp_path)), out).entries[0]
    assert list(entry.tries) == [1e-7, "auto"]
    assert entry.learning_rate == "auto"
    assert not entry.at_the_edge
    run = Run.open(out / "runs" / "lrc-seed0")
    assert run.recipe.train.learning_rate == "auto"
    settings = run.recipe.model_dump()
    del settings["train"]["learning_rate"]
    default = Run.create(tmp_path / "default", make_recipe(settings))
    train(default)
    assert default.summary()["student_held_out_lm"] == entry.runs[0].held_out_lm
    whole = learning_rate(run.recipe, run.summary()["student_parameters"])
    rate = whole * share_of_rate(run.recipe, run.metrics()[0])
    trained = max(line["learning_rate"] for line in run.metrics()[1:])
    assert trained == pytest.approx(rate)
    assert f"| lrc | auto ({rate:.3g}) |" in (out / "comparison.md").read_text()
    assert "| 1e-07 | auto |" in (out / "comparison.md").read_text()
    plan["entries"][0] |= {
        "tries": "release_learning_rate",
        "set": {"train.release_at": 0.5, "train.learning_rate": 1e-3},
    }
    with pytest.raises(UserError, match=r"entry 'lrc' tries the rate 'auto' for the time after a"):
        load_comparison(write(plan, tmp_path))


@pytest.mark.parametrize("settings", [{"method": "llm-pruner"}, {"initialize": "random"}])
def test_auto_is_refused_where_it_is_no_rule(
    plan: Settings, tmp_path: Path, settings: Settings
) -> None:
    plan["entries"] = [{"name": "a", "learning_rates": ["auto"]}, {"name": "b", "set": settings}]
    load_comparison(write(plan, tmp_path))
    for rates in ({"learning_rates": ["auto"]}, {"rate_of": "a"}):
        plan["entries"][1] = {"name": "b", "set": settings, **rates}
        with pytest.raises(UserError, match=r"entry 'b' tries the rate 'auto', which is no rule"):
            load_comparison(write(plan, tmp_path))


def test_a_comparison_changes_another(plan: Settings, tmp_path: Path) -> None:
    write(plan, tmp_path)
    changes = {
        "base": "comparison.yaml",
        "recipe": {"train": {"eval_every": 3}},
        "tokens": 96,
        "keep": ["scratch", "lrc"],
        "entries": [
            {"name": "lrc", "seeds": [7], "set": {"student.fold_gains": False}},
            {"name": "new", "set": {"method": "minitron"}, "learning_rates": [1e-2]},
        ],
    }
    path = tmp_path / "changed.yaml"
    path.write_text(yaml.safe_dump(changes))
    base, changed = load_comparison(tmp_path / "comparison.yaml"), load_comparison(path)
    assert [entry.name for entry in changed.entries] == ["scratch", "lrc", "new"]
    assert changed.tokens == 96
    assert changed.grid == base.grid
    assert changed.recipe["train"] == {**base.recipe["train"], "eval_every": 3}
    assert changed.entries[0] == base.entries[1]
    assert changed.entries[1].settings == {
        **base.entries[0].settings,
        "student.fold_gains": False,
    }
    assert [changed.seeds_of(entry) for entry in changed.entries] == [[0, 3], [7], [0, 3]]
    for keep, order in ((["new", "lrc"], ["new", "lrc"]), (["scratch"], ["scratch", "lrc", "new"])):
        path.write_text(yaml.safe_dump({**changes, "keep": keep}))
        reordered = load_comparison(path).entries
        assert [entry.name for entry in reordered] == order
        assert next(e for e in reordered if e.name == "lrc") == changed.entries[1]
    path.write_text(yaml.safe_dump({**changes, "keep": ["scrtch"]}))
    with pytest.raises(UserError, match=r"keeps the entry 'scrtch', which comparison.yaml"):
        load_comparison(path)
    for keep in (5, None, "lrc", [["lrc"]]):
        path.write_text(yaml.safe_dump({**changes, "keep": keep}))
        with pytest.raises(UserError, match=r"'keep' must be a list of names of entries"):
            load_comparison(path)
    for entry in ({"seeds": [7]}, {"name": ["a"]}):
        path.write_text(yaml.safe_dump({**changes, "entries": [entry]}))
        with pytest.raises(UserError, match=r"'entries' must be a list of entries with a name"):
            load_comparison(path)


def test_more_held_out_text_is_a_column(plan: Settings, tmp_path: Path) -> None:
    """The loss on another text is that of a run whose main held-out text it is."""
    texts = {
        n: [" ".join(f"w{3 + (d * i) % n}" for i in range(60)) for d in range(1, 7)]
        for n in (7, 11)
    }
    main_text, other = (write_jsonl(tmp_path / f"{n}.jsonl", text) for n, text in texts.items())
    plan["recipe"]["data"] |= {"held_out": [str(main_text)]}
    plan |= {"seeds": [0], "grid": {"learning_rates": [1e-2], "tokens": 1}}
    plan["entries"] = plan["entries"][1:2]
    results = []
    for held_out, also in ((main_text, other), (other, main_text)):
        plan["recipe"]["data"] |= {"held_out": [str(held_out)], "also_held_out": {"x": [str(also)]}}
        comparison = load_comparison(write(plan, tmp_path))
        results.append(compare(comparison, tmp_path / held_out.stem))
    for one, another in (results, results[::-1]):
        [ours], [theirs] = one.entries[0].runs, another.entries[0].runs
        assert ours.others == {"x LM loss": pytest.approx(theirs.held_out_lm, rel=1e-6)}
        assert one.teacher_others == {
            "x LM loss": pytest.approx(another.teacher_held_out_lm, rel=1e-6)
        }
    several = replace(one, thresholds=[6, 6.0000001])  # they have the same name
    assert [len(row) for row in rows(several)] == [len(header(several))] * 2
    assert rows(several)[0][-1] == f"{one.teacher_others['x LM loss']:.4f}"
    table = (tmp_path / "7" / "comparison.md").read_text()
    assert "x LM loss" in table
    assert f"{results[1].teacher_held_out_lm:.4f}" in table
