"""The page of a comparison: its contents, and its look in a real browser."""

import html
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from data_helpers import write_jsonl
from lrc.cli import main
from lrc.comparison import compare, load_comparison
from lrc.comparison.curves import curve_charts, draw_comparison
from lrc.comparison.page import write_comparison_page
from lrc.comparison.results import EntryResult, Point, Results, RunResult
from lrc.comparison.table import header, notes, rate_grid, rows
from lrc.report import charts
from lrc.system.errors import UserError
from pages import Look, Tables, add_probe, probe
from tiny_runs import save_teacher, tiny_documents

MANY = 11
"""Entries of the page that has more lines than there are colors."""


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Results]:
    """A comparison that has ended, of two systems that search a rate and one that takes it."""
    folder = tmp_path_factory.mktemp("comparison")
    save_teacher(folder / "some-teacher", "llama", tied=False)
    text = write_jsonl(folder / "text.jsonl", tiny_documents(30))
    plan = {
        "recipe": {
            "teacher": {"model": str(folder / "some-teacher")},
            "student": {"hidden_size": 8},
            "initialize": {"calibration_tokens": 32},
            "data": {
                "text": [str(text)],
                "held_out_fraction": 0.2,
                "sequence_length": 16,
                "cache": str(folder / "cache"),
            },
            "train": {"micro_batch": 2, "eval_every": 2, "eval_sequences": 8},
        },
        "tokens": 192,
        "seeds": [0, 3],
        "grid": {"learning_rates": [1e-3, 1e30], "tokens": 96},
        "thresholds": [100.0],
        "entries": [
            {"name": "lrc"},
            {"name": "scratch", "set": {"method": "scratch"}, "learning_rates": [0.01]},
            {"name": "no-kl", "set": {"objective.kl_weight": 0}, "rate_of": "lrc"},
        ],
    }
    file = folder / "comparison.yaml"
    file.write_text(yaml.safe_dump(plan))
    out = folder / "compared"
    return out, compare(load_comparison(file), out)


@pytest.fixture(scope="module")
def page(compared: tuple[Path, Results], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "page.html"
    write_comparison_page(compared[0], path)
    return path


def test_the_page_has_the_table_the_notes_and_the_grid(
    page: Path, compared: tuple[Path, Results]
) -> None:
    text, (_, results) = page.read_text(), compared
    nbsp = "\N{NO-BREAK SPACE}"
    tables = Tables(text)
    found = tables.section("results")
    assert found[""] == header(results)[1:]
    assert found == {row[0]: row[1:] for row in [header(results), *rows(results)]}
    assert list(found) == ["", "teacher", "lrc", "scratch", "no-kl"]
    assert found["teacher"][1] == f"{results.teacher_held_out_lm:.4f}"
    assert found["teacher"][4] == f"{results.teacher_parameters:,}"
    for note in notes(results):
        assert f"<li>{html.escape(note)}</li>".replace("&#x27;", "&#39;") in text
    rates = tables.section("rates")
    chosen = results.entries[0].tries[1e-3]
    assert rates == {"": ["0.001", "1e+30"], "lrc": [f"{chosen:.4f}", "not finite"]}
    assert f"<strong>{chosen:.4f}</strong>" in text
    entries = tables.section("entries")
    assert entries["no-kl"] == [
        "lrc",
        "objective.kl_weight: 0",
        "runs/no-kl-seed0\nruns/no-kl-seed3",
    ]
    assert entries["scratch"][:2] == ["scratch", "method: scratch"]
    assert tables.section("recipe")["train.micro_batch"] == ["2"]
    title = f"some-teacher → {charts.short(results.entries[0].parameters, nbsp, 3)} (hidden{nbsp}8)"
    assert f"<h1>{title}</h1>" in text
    best = min(results.entries, key=lambda entry: entry.mean("held_out_lm"))
    assert re.search(f"Lowest held-out loss: <span [^>]*>{best.name}<", text)
    perplexities = (results.teacher_held_out_lm, best.mean("held_out_lm"))
    assert f"<dd>{' → '.join(f'{math.exp(loss):.2f}' for loss in perplexities)}</dd>" in text
    assert "3 entries on 192 training tokens each, with some-teacher as the teacher" in text


def test_the_page_needs_no_other_files(page: Path) -> None:
    text = page.read_text()
    assert "<script" not in text
    assert not re.findall(r"url\((?!#)", text)
    assert all(link.startswith("#") for link in Tables(text).links)
    assert Tables(text).pictures == 2


def test_curves_are_means_over_seeds_with_their_range(compared: tuple[Path, Results]) -> None:
    for entry in compared[1].entries:
        curve = entry.curve()
        assert curve is not None
        for number, points in enumerate(zip(*(run.curve for run in entry.runs), strict=True)):
            losses = [point.loss for point in points]
            assert curve.loss[number] == pytest.approx(sum(losses) / 2)
            assert (curve.low[number], curve.high[number]) == (min(losses), max(losses))
            assert curve.seconds[number] == pytest.approx(sum(p.seconds for p in points) / 2)
            assert curve.tokens[number] == points[0].tokens
        assert curve.high != curve.low


def entry_of(name: str, *curves: list[float]) -> EntryResult:
    """An entry of runs with such held-out losses."""
    runs = [
        RunResult(
            seed, name, [Point(9 * i, 1.0 * i, x) for i, x in enumerate(losses)], 3.0, 0, 0, []
        )
        for seed, losses in enumerate(curves)
    ]
    return EntryResult(name, "lrc", {}, 1e-4, {}, False, 10, 200, 0, runs)


def test_a_loss_that_rises_during_training_is_reported() -> None:
    entries = [
        entry_of("falls", [5.0, 4.0, 4.04, 3.0]),
        entry_of("rises", [5.0, 4.0, 3.9], [5.0, 4.5, 4.9, 4.6, 3.0]),
    ]
    told = "\n".join(notes(Results([], 10, "falls", 1.0, 20, entries)))
    assert "rises: the held-out loss rose up to 0.40 above its best" in told
    assert "falls:" not in told


def test_the_charts_show_the_loss_itself_with_the_teacher() -> None:
    """On a logarithmic scale, so that a bad start flattens nothing."""
    entries = [entry_of("good", [5.0, 3.2, 3.0]), entry_of("bad", [30.0, 99.0, 3.1])]
    for chart in curve_charts(Results([], 10, "good", 2.5, 20, entries)):
        assert chart.logarithmic
        assert [line.y for line in chart.lines] == [[5.0, 3.2, 3.0], [30.0, 99.0, 3.1]]
        assert [line.teacher for line in chart.lines] == [2.5, 2.5]
        assert chart.top == 1.05 * 30.0
    assert curve_charts(Results([], 10, "good", None, None, [entry_of("none")])) == []


def test_the_picture(
    compared: tuple[Path, Results], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = []
    monkeypatch.setattr(charts, "save_picture", lambda figure, _: saved.append(figure))
    comparison = load_comparison(compared[0] / "comparison.yaml")
    draw_comparison(comparison, compared[1], tmp_path / "curves.png")
    (figure,) = saved
    assert figure.get_suptitle().startswith("some-teacher → ")
    assert [text.get_text() for text in figure.legends[0].texts] == ["lrc", "scratch", "no-kl"]
    assert [axes.get_xlabel() for axes in figure.axes] == [
        "training and calibration tokens",
        "seconds",
    ]
    for axes in figure.axes:
        assert axes.get_yscale() == "log"
        assert [text.get_text() for text in axes.texts] == ["teacher"]
        assert len(axes.lines) == 4  # with the teacher's


def test_a_comparison_under_way(compared: tuple[Path, Results], tmp_path: Path) -> None:
    folder = tmp_path / "begun"
    shutil.copytree(compared[0], folder)
    for seed in (0, 3):
        shutil.rmtree(folder / "runs" / f"no-kl-seed{seed}")
    write_comparison_page(folder, tmp_path / "page.html")
    found = Tables((tmp_path / "page.html").read_text()).section("results")
    assert found["no-kl"][1] == "-"
    assert found["lrc"][1] != "-"
    shutil.rmtree(folder / "runs")
    with pytest.raises(UserError, match="No run of"):
        write_comparison_page(folder, tmp_path / "page.html")


def test_command_line(
    compared: tuple[Path, Results], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def call(*arguments: Any) -> int:
        monkeypatch.setattr("sys.argv", ["lrc", "report", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        return int(end.value.code or 0)

    folder = compared[0]
    assert call(folder) == 0
    assert "lrc comparison" in (folder / "report.html").read_text()
    assert call(folder, "--out", tmp_path / "page.html") == 0
    assert call(folder, folder / "runs" / "lrc-seed0") == 2
    assert call(folder, "--prompt", "w3") == 2
    (tmp_path / "notes.html").write_text("precious")
    assert call(folder, "--out", tmp_path / "notes.html") == 2
    assert (tmp_path / "notes.html").read_text() == "precious"


# --------------------------------------------------------------------------------- browser


@pytest.fixture
def crowded(compared: tuple[Path, Results], tmp_path: Path) -> Path:
    """The page of a comparison with more entries than there are colors."""
    folder = tmp_path / "crowded"
    shutil.copytree(compared[0], folder)
    plan = yaml.safe_load((folder / "comparison.yaml").read_text())
    for number in range(MANY - len(plan["entries"])):
        name = f"copy{number}"
        plan["entries"].append({"name": name, "set": {}, "rate_of": "lrc"})
        for seed in (0, 3):
            copy = folder / "runs" / f"{name}-seed{seed}"
            shutil.copytree(folder / "runs" / f"lrc-seed{seed}", copy)
            lines = [json.loads(line) for line in (copy / "metrics.jsonl").read_text().splitlines()]
            for line in lines:
                if "held_out_lm" in line:
                    line["held_out_lm"] -= 0.05 * (number + 1)
            (copy / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    (folder / "comparison.yaml").write_text(yaml.safe_dump(plan))
    write_comparison_page(folder, tmp_path / "crowded.html")
    return tmp_path / "crowded.html"


def test_a_browser_shows_every_line(crowded: Path, tmp_path: Path, browser: Look) -> None:
    size = "--window-size=1200,3000"
    probed = add_probe(crowded, tmp_path / "probed.html")
    seen = probe(browser, probed, size)
    assert not seen["wide"]
    assert [chart["shown"] for chart in seen["charts"]] == [True, False]
    by_time = probe(browser, probed, size, axis="by-time")["charts"]
    assert [chart["shown"] for chart in by_time] == [False, True]
    shot = tmp_path / "page.png"
    browser(f"--screenshot={shot}", size, f"file://{crowded}")
    pixels = np.asarray(Image.open(shot).convert("RGB")).astype(int)
    style = crowded.read_text().split("prefers-color-scheme: dark")[0]
    colors = [
        [int(value[i : i + 2], 16) for i in (0, 2, 4)]
        for value in re.findall(r"--run-\d: #(\w{6})", style)
    ]
    assert len(colors) == 8
    left, top, right, bottom = map(math.floor, seen["charts"][0]["box"])
    assert right - left > 400
    assert seen["charts"][0]["lines"] >= MANY
    part = pixels[top:bottom, left:right].reshape(-1, 3)
    for color in colors:
        assert (abs(part - np.array(color)).sum(1) < 60).sum() > 20, color


def test_it_fits_a_phone(page: Path, tmp_path: Path, browser: Look) -> None:
    add_probe(page, tmp_path / "probed.html")
    report = 'onload="document.body.innerHTML = this.contentDocument.body.innerHTML"'
    outer = tmp_path / "outer.html"
    outer.write_text(f'<body><iframe src="probed.html" width="380" height="900" {report}></iframe>')
    seen = probe(browser, outer, "--allow-file-access-from-files")
    assert not seen["wide"]
    assert 250 < seen["charts"][0]["box"][2] <= 380


def test_rates_that_were_not_tried_are_left_empty() -> None:
    def entry(name: str, tries: dict[float, float | None], rate: float | None) -> EntryResult:
        run = RunResult(0, "", [Point(0, 0.0, 5.0)], None, None, None, [])
        return EntryResult(name, "lrc", {}, rate, tries, False, None, 1, 0, [run])

    entries = [
        entry("a", {0.1: 3.0, 0.2: None}, 0.1),
        entry("b", {0.3: 2.0}, 0.3),
        entry("c", {}, 1),
    ]
    results = Results([], 10, "a", None, None, entries)
    rates, found = rate_grid(results)
    assert rates == ["0.1", "0.2", "0.3"]
    none = "-"
    assert found == [
        ("a", [("3.0000", True), ("not finite", False), (none, False)]),
        ("b", [(none, False), (none, False), ("2.0000", True)]),
    ]
