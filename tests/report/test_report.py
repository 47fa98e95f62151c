"""The report: contents of the page, and its look in a real browser."""

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lrc.cli import main
from lrc.report import charts, contents, evaluations, page
from lrc.report.charts import Chart, Line, Series, short, spans
from lrc.report.curves import CHARTS, draw_curves, loss_charts
from lrc.report.evaluations import read_evaluations
from lrc.report.page import write_report
from lrc.report.runs import read_runs, title
from lrc.run import Run
from lrc.system.errors import UserError
from pages import Look, Tables, add_probe, probe
from tiny import LAYERS
from tiny_runs import go, new_run

TERMS = ("q", "k", "v", "o", "gate", "up", "down")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    """Two finished runs that differ in their learning rate."""
    folder = tmp_path_factory.mktemp("runs")
    runs = [new_run(folder, name="first"), new_run(folder, name="second", learning_rate=0.1)]
    for run in runs:
        go(run)
    return runs


@pytest.fixture(scope="module")
def overlaid(finished: list[Run], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of both runs."""
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(finished, path)
    return path


def test_the_page_needs_no_other_files(overlaid: Path) -> None:
    text = overlaid.read_text()
    assert "<script" not in text
    assert "@import" not in text
    assert not re.findall(r"url\((?!#)", text)
    for link in Tables(text).links:
        assert link.startswith(("#", "data:image/png;base64,")), link
    assert len(text) < 1_500_000


def test_results_are_the_closing_tables(overlaid: Path, finished: list[Run]) -> None:
    rows = Tables(overlaid.read_text()).section("results")
    assert rows[""] == ["tiny", "first", "second"]
    summaries = [run.summary() for run in finished]
    teacher = summaries[0]["teacher_held_out_lm"]
    assert rows["held-out LM loss"] == [
        f"{loss:.4f}" for loss in (teacher, *(s["student_held_out_lm"] for s in summaries))
    ]
    assert rows["held-out perplexity"][0] == f"{math.exp(teacher):.2f}"
    assert rows["parameters"][0] == f"{summaries[0]['teacher_parameters']:,}"
    assert rows["same top-1 prediction"] == [
        "",
        *(f"{s['top1_agreement']:.1%}" for s in summaries),
    ]
    assert rows["training tokens"] == ["", "320", "320"]
    assert rows["status"] == ["", "ended, 10 steps", "ended, 10 steps"]


def test_the_page_opens_with_the_figures_of_the_best_run(
    overlaid: Path, finished: list[Run]
) -> None:
    text = overlaid.read_text().replace("\N{NO-BREAK SPACE}", " ")
    best = min(finished, key=lambda run: run.summary()["student_held_out_lm"])
    summary = best.summary()
    sizes = [short(summary[f"{who}_parameters"], " ", 3) for who in ("teacher", "student")]
    shown = f"tiny → {sizes[1]} (hidden 8)"
    assert f"<title>{shown} · lrc report</title>" in text
    opening = text[text.index("<h1>") : text.index('id="results"')]
    assert f"<h1>{shown}</h1>" in opening
    assert "torch" in opening
    assert re.search(f"Lowest held-out loss: <span [^>]*>{best.folder.name}<", opening)
    found = re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", opening)
    perplexities = [math.exp(summary[f"{who}_held_out_lm"]) for who in ("teacher", "student")]
    assert found == [
        ("parameters", " → ".join(sizes)),
        ("held-out perplexity", " → ".join(f"{value:.2f}" for value in perplexities)),
        ("same top-1 prediction", f"{summary['top1_agreement']:.1%}"),
        ("training tokens", "320"),
    ]
    assert ">teacher</text>" in opening


def test_shapes_and_recipes(overlaid: Path, finished: list[Run]) -> None:
    tables = Tables(overlaid.read_text())
    shapes = tables.section("shapes")
    assert shapes[""] == ["tiny", "first", "second"]
    assert shapes["hidden size"] == ["16", "8", "8"]
    different, everything = tables.rows["recipe"][:2], tables.section("recipe")
    assert different == [["", "first", "second"], ["train.learning_rate", "auto", "0.1"]]
    assert everything["student.hidden_size"] == ["8", "8"]
    assert everything["python"] == [json.loads(environment(run))["python"] for run in finished]


def environment(run: Run) -> str:
    return (run.folder / "environment.json").read_text()


def test_every_loss_is_drawn_for_every_run(overlaid: Path, finished: list[Run]) -> None:
    text = overlaid.read_text()
    logged = {key for line in finished[0].metrics() for key in line}
    expected = [label for key, label in CHARTS.items() if key in logged]
    assert {"weighted loss", CHARTS["kl"]} <= set(expected)
    for axis in ("tokens", "time"):
        parts = re.findall(f'<div class="[a-z ]*{axis}">(.*?)</div>', text, re.DOTALL)
        found = re.findall(r"<figure>.*?</figure>", "".join(parts), re.DOTALL)
        titles = [re.search(r"<figcaption>(.*?)</figcaption>", c).group(1) for c in found]
        assert titles == expected
        for chart in found:
            assert "var(--run-0)" in chart
            assert "var(--run-1)" in chart
            assert not set(re.findall(r"#\w{6}\b", chart)) & set(charts._colors().values())
    assert Tables(text).pictures == 7 + 7 + 1 + 2 * (1 + len(TERMS))


def test_one_run_alone(finished: list[Run], tmp_path: Path) -> None:
    write_report(finished[:1], tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert Tables(text).section("results")[""] == ["tiny", "first"]
    assert "var(--run-1)" not in text.replace("--run-1:", "").split("</style>")[1]


def test_a_run_that_has_not_ended(finished: list[Run], tmp_path: Path) -> None:
    folder = tmp_path / "stopped"
    shutil.copytree(finished[0].folder, folder)
    (folder / "summary.json").unlink()
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:6]) + '{"step": 6, "lo')
    write_report([Run.open(folder)], tmp_path / "page.html")
    rows = Tables((tmp_path / "page.html").read_text()).section("results")
    assert rows["status"] == ["", "at step 5 of 10"]
    assert rows["KL(teacher, student)"] == ["", contents.NONE]
    assert contents.NONE not in rows["held-out LM loss"]


def test_a_run_that_goes_on_does_not_show_the_figures_of_its_start(
    finished: list[Run], tmp_path: Path
) -> None:
    """`lrc compress` writes a summary, and `lrc resume` trains that student."""
    folder = tmp_path / "goes-on"
    shutil.copytree(finished[0].folder, folder)
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps({**summary, "tokens": 0}))
    write_report([Run.open(folder)], tmp_path / "page.html")
    rows = Tables((tmp_path / "page.html").read_text()).section("results")
    assert rows["status"] == ["", "at step 10 of 10"]
    assert rows["KL(teacher, student)"] == ["", contents.NONE]


def test_a_title_without_a_hidden_size() -> None:
    assert title("big", None, None).endswith("student")
    assert title("big", 1_000_000, None).endswith("1\N{NO-BREAK SPACE}M")


def test_before_the_first_step(finished: list[Run], tmp_path: Path) -> None:
    folder = tmp_path / "new"
    shutil.copytree(finished[0].folder, folder)
    (folder / "summary.json").unlink()
    first = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)[0]
    (folder / "metrics.jsonl").write_text(first)
    write_report([Run.open(folder)], tmp_path / "page.html")
    (folder / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match="no metrics yet"):
        write_report([Run.open(folder)], tmp_path / "page.html")


def test_equal_names_are_distinguished(finished: list[Run], tmp_path: Path) -> None:
    shutil.copytree(finished[0].folder, tmp_path / "first")
    views = read_runs([finished[0], Run.open(tmp_path / "first")])
    assert len({view.name for view in views}) == 2


def test_text_cannot_become_markup(finished: list[Run], tmp_path: Path) -> None:
    folder = tmp_path / "<b>run & co"
    shutil.copytree(finished[0].folder, folder)
    summary = json.loads((folder / "summary.json").read_text())
    summary["samples"]["student"] = "<script>alert(1)</script>"
    (folder / "summary.json").write_text(json.dumps(summary))
    write_report([Run.open(folder)], tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert "<script" not in text
    assert "&lt;script&gt;alert(1)" in text
    assert "<b>" not in text


# ---------------------------------------------------------------------- the numbers drawn


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=700), st.integers(1, 300))
def test_spans(values: list[float], points: int) -> None:
    places = list(range(len(values)))
    x, mean, low, high = spans(places, values, points)
    assert len(x) <= max(points, 1)
    assert (np.diff(x) > 0).all()
    assert (low <= mean + 1e-9).all()
    assert (mean <= high + 1e-9).all()
    assert low.min() == min(values)
    assert high.max() == max(values)
    weights = [len(part) for part in np.array_split(values, len(x))]
    assert np.average(mean, weights=weights) == pytest.approx(np.mean(values), abs=1e-6)


def test_heat_maps_show_the_values_of_their_time(
    finished: list[Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = {}
    monkeypatch.setattr(
        contents, "heat_map", lambda title, values, tokens, *_: drawn.update({title: values})
    )
    (view,) = read_runs(finished[:1])
    lines = [line for line in view.metrics if "clone_layers" in line]
    assert len(lines) == 10
    # unevenly spaced: drop the lines of steps 2 and 3
    kept = [line for line in lines if line["step"] not in (2, 3)]
    monkeypatch.setattr(contents, "COLUMNS", 5)
    view.metrics[:] = kept
    contents.clone_maps(view)
    assert tuple(drawn) == TERMS
    smallest = np.quantile([list(line["clone_layers"].values()) for line in kept], 0.01)
    for term, values in drawn.items():
        assert values.shape == (LAYERS, 5)
        for column, step in enumerate((4, 4, 6, 8, 10)):  # of 2, 4, 6, 8, 10
            line = next(line for line in kept if line["step"] == step)
            for layer in range(LAYERS):
                expected = max(line["clone_layers"][term][layer], smallest)
                assert values[layer, column] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("seconds", "text"), [(12, "12 s"), (600, "10 min"), (3600 * 1.5, "90 min"), (36000, "10.0 h")]
)
def test_durations(seconds: float, text: str) -> None:
    assert contents.duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (3e-5, "3e-05"),
        (999, "999"),
        (999.6, "1k"),
        (20_000, "20k"),
        (-1250, "-1.25k"),
        (3_276_800, "3.28M"),
        (2e9, "2B"),
    ],
)
def test_thousands_have_a_unit(value: float, text: str) -> None:
    assert short(value, digits=3) == text


def lines_of(*teachers: float | None) -> list[Line]:
    return [
        Line(Series(f"run{i}", i), [0, 20_000, 40_000], [4.0, 3.5, 3.0], teacher, marked=True)
        for i, teacher in enumerate(teachers)
    ]


def teacher_labels(svg: str) -> list[tuple[str, float]]:
    """Color and height of every label "teacher", from the top."""
    found = re.findall(r'<text style="[^"]*fill: var\((.*?)\)"([^>]*)>teacher</text>', svg)
    heights = [float(re.search(r'y="([\d.]+)"', place).group(1)) for _, place in found]
    return sorted(zip((color for color, _ in found), heights, strict=True), key=lambda x: x[1])


def test_one_teacher_has_one_gray_line_and_several_have_their_runs_colors() -> None:
    one = charts.svg_chart(Chart("loss", lines_of(2.0, 2.0, None), "tokens", logarithmic=True))
    assert [color for color, _ in teacher_labels(one)] == ["--muted"]
    assert ">20k</text>" in one
    two = charts.svg_chart(Chart("loss", lines_of(2.0, 2.01, 3.5), "tokens", logarithmic=True))
    (third, _), (second, high), (first, low) = teacher_labels(two)
    assert (first, second, third) == ("--run-0", "--run-1", "--run-2")
    assert low - high > 8  # close levels; the labels do not touch
    assert two.count("stroke-dasharray") == 3


def test_page_and_picture_draw_the_same(
    finished: list[Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same lines in the same colors; the picture has a title and no empty panel."""
    saved = []
    monkeypatch.setattr(charts, "save_picture", lambda figure, _: saved.append(figure))
    draw_curves(finished[0], tmp_path / "curves.png")
    (figure,) = saved
    expected = loss_charts(read_runs(finished[:1]))
    assert [axes.get_title(loc="left") for axes in figure.axes] == [c.title for c in expected]
    assert all(axes.lines for axes in figure.axes)
    assert "tiny" in figure.get_suptitle()
    held_out = figure.axes[0]
    assert [t.get_text() for t in held_out.texts] == ["teacher"]
    student, teacher = held_out.lines
    assert list(student.get_ydata()) == list(expected[0].lines[0].y)
    assert teacher.get_ydata()[0] == pytest.approx(expected[0].lines[0].teacher, abs=1e-3)
    assert (
        f"--run-0: {student.get_color()};" in (Path(page.__file__).parent / "page.css").read_text()
    )


def test_a_single_run_shows_its_sources(finished: list[Run], tmp_path: Path) -> None:
    folder = tmp_path / "first"
    shutil.copytree(finished[0].folder, folder)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if "held_out_lm" in line:
            line["held_out_lm_by_source"] = {"code": 2.0, "wiki": 3.0}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    held_out = loss_charts(read_runs([Run.open(folder)]))[0]
    assert [line.series.name for line in held_out.lines] == ["first", "code", "wiki"]
    assert set(held_out.lines[2].y) == {3.0}
    both = loss_charts(read_runs([Run.open(folder), finished[1]]))[0]
    assert [line.series.name for line in both.lines] == ["first", "second"]


# ------------------------------------------------------------------------------ evaluations


PUBLISHED = {
    "tasks": {"piqa": {"label": "PIQA"}, "mmlu": {"label": "MMLU"}, "sciq": {"label": "SciQ"}},
    "models": [
        {"model": "Big", "teacher": "Bigger", "tokens": "2T", "accuracy": [70.0, 40.0, 90.0]}
    ],
}


def evaluate(run: Run, limit: int | None = None, **accuracies: float) -> None:
    tasks = {
        name: {"metrics": {"acc": {"value": value, "stderr": 0.01}}, "rows": 10}
        for name, value in accuracies.items()
    }
    model = {"model": "m", "label": run.folder.name, "teacher": "t", "tokens": 320, "tasks": tasks}
    path = run.folder / evaluations.RESULTS
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"settings": {"limit": limit}, "models": [model]}))


@pytest.fixture
def copies(finished: list[Run], tmp_path: Path) -> list[Run]:
    for run in finished:
        shutil.copytree(run.folder, tmp_path / run.folder.name)
    return [Run.open(tmp_path / run.folder.name) for run in finished]


def test_evaluations_beside_the_published_ones(
    copies: list[Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluations, "_published", lambda: PUBLISHED)
    assert read_evaluations(copies) is None
    evaluate(copies[0], mmlu=0.25, piqa=0.6, own_task=0.5)
    evaluate(copies[1], limit=100, piqa=0.625)
    found = read_evaluations(copies)
    assert found is not None
    assert found.tasks == ("PIQA", "MMLU", "own_task")
    none = evaluations.NONE
    assert [(row.model, row.cells) for row in found.rows] == [
        ("first", ("60.00", "25.00", "50.00", "45.00")),
        ("second", ("62.50", none, none, none)),
        ("Big", ("70.00", "40.00", none, none)),
    ]
    assert "100 rows" in found.notes[0]
    write_report(copies, tmp_path / "page.html")
    rows = Tables((tmp_path / "page.html").read_text()).section("evaluation")
    assert rows["firstfrom t, 320 tokens"] == ["acc", "60.00", "25.00", "50.00", "45.00"]
    assert rows["Bigfrom Bigger, 2T tokens"] == ["", "70.00", "40.00", none, none]


@pytest.mark.parametrize("content", ["", "[]", '{"models": 3}', '{"models": [{"tasks": []}]}'])
def test_other_evaluation_files_are_left_out(content: str, copies: list[Run]) -> None:
    path = copies[0].folder / evaluations.RESULTS
    path.parent.mkdir()
    path.write_text(content)
    assert read_evaluations(copies) is None


# ---------------------------------------------------------------------------- command line


def call(monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> int:
    monkeypatch.setattr("sys.argv", ["lrc", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        main()
    return int(end.value.code or 0)


def test_command_line(copies: list[Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = [run.folder for run in copies]
    assert call(monkeypatch, "report", folders[0], "--prompt", "w3 w4 w5") == 0
    text = (folders[0] / "report.html").read_text()
    assert "w3 w4 w5" in text
    assert call(monkeypatch, "report", folders[0]) == 0  # an older report is replaced
    assert "w3 w4 w5" not in (folders[0] / "report.html").read_text()
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, "report", *folders) == 0
    assert (tmp_path / "report.html").is_file()
    assert call(monkeypatch, "report", tmp_path) == 2
    (tmp_path / "notes.html").write_text("<p>precious</p>")
    assert call(monkeypatch, "report", folders[0], "--out", tmp_path / "notes.html") == 2
    assert (tmp_path / "notes.html").read_text() == "<p>precious</p>"
    assert call(monkeypatch, "report", folders[0], "--out", tmp_path) == 2


def test_an_interrupted_report_keeps_the_older_one(
    copies: list[Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "out" / "page.html"
    write_report(copies, path)
    before = path.read_bytes()

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("lrc.system.files.flush", stop)
        with pytest.raises(KeyboardInterrupt):
            write_report(copies[:1], path)
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == ["page.html"]
    assert page.GENERATOR.encode() in before


# --------------------------------------------------------------------------------- browser


def test_a_browser_shows_the_pictures(overlaid: Path, tmp_path: Path, browser: Look) -> None:
    probed = add_probe(overlaid, tmp_path / "probed.html")
    size = "--window-size=1200,4000"
    seen = probe(browser, probed, size)
    assert not seen["wide"]
    shown = [chart for chart in seen["charts"] if chart["shown"]]
    assert len(shown) == 7 + 1 + 2 * (1 + len(TERMS))
    by_time = [c for c in probe(browser, probed, size, axis="by-time")["charts"] if c["shown"]]
    assert len(by_time) == len(shown)
    for chart in shown:
        left, top, right, bottom = chart["box"]
        assert right - left > 150, chart
        assert bottom - top > 20, chart
        assert chart["images"] == 1 or chart["lines"] >= 2, chart  # a line for each run

    shot = tmp_path / "page.png"
    browser(f"--screenshot={shot}", size, f"file://{overlaid}")
    pixels = np.asarray(Image.open(shot).convert("RGB")).astype(int)
    runs = [np.array(color) for color in ((0x0B, 0x66, 0xB0), (0xC1, 0x49, 0x0F))]
    for chart in shown:
        left, top, right, bottom = map(math.floor, chart["box"])
        part = pixels[top:bottom, left:right].reshape(-1, 3)
        if chart["images"]:
            assert len(np.unique(part // 16, axis=0)) > 20, chart
        else:
            for color in runs:
                assert (abs(part - color).sum(1) < 60).sum() > 20, chart


def test_it_fits_a_phone(overlaid: Path, tmp_path: Path, browser: Look) -> None:
    """In a frame, since the browser's window has a least width."""
    add_probe(overlaid, tmp_path / "probed.html")
    report = 'onload="document.body.innerHTML = this.contentDocument.body.innerHTML"'
    outer = tmp_path / "outer.html"
    outer.write_text(f'<body><iframe src="probed.html" width="380" height="900" {report}></iframe>')
    seen = probe(browser, outer, "--allow-file-access-from-files")
    assert not seen["wide"]
    for chart in seen["charts"]:
        if chart["shown"]:
            assert 250 < chart["box"][2] <= 380, chart
