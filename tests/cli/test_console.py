"""Output for people and pipes: whole numbers and unchanged text."""

import io
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lrc.cli import explain
from lrc.cli.console import TextConsole
from lrc.cli.display import Bars, bar_width, fit, show_library
from lrc.system import progress
from lrc.system.installed import is_installed
from lrc.system.progress import LoggedTask, log_progress, task
from lrc.system.tables import Table


def console(width: int, terminal: bool) -> TextConsole:
    return TextConsole(
        file=io.StringIO(), width=width, force_terminal=terminal, color_system=None, no_color=True
    )


def printed(shown: TextConsole) -> str:
    assert isinstance(shown.file, io.StringIO)
    return shown.file.getvalue()


def table_of(rows: list[list[str]], right: bool = False) -> Table:
    header = [f"column {n}" for n in range(len(rows[0]))]
    return Table(header, "Title", "A note.", range(1, len(header)) if right else (), rows)


CELLS = st.lists(
    st.lists(st.integers(0, 10**12).map("{:,}".format), min_size=3, max_size=3),
    min_size=1,
    max_size=4,
)


@given(CELLS, st.integers(20, 120), st.booleans(), st.booleans())
def test_no_number_is_clipped(
    rows: list[list[str]], width: int, terminal: bool, right: bool
) -> None:
    shown = console(width, terminal)
    shown.print(table_of(rows, right))
    text = printed(shown)
    for row in rows:
        for cell in row:
            assert cell in text
    assert "A note." in text
    assert "…" not in text


def test_a_pipe_gets_markdown() -> None:
    shown = console(40, terminal=False)
    shown.print(table_of([["a|b", "1,000", "*"], ["[/b] :smile:", "2", "$\\frac$"]], right=True))
    assert printed(shown).splitlines() == [
        "Title",
        "| column 0     | column 1 | column 2 |",
        "| ------------ | -------: | -------: |",
        "| a\\|b         |    1,000 |        * |",
        "| [/b] :smile: |        2 |  $\\frac$ |",
        "A note.",
    ]


def test_a_narrow_terminal_gets_a_list() -> None:
    shown = console(30, terminal=True)
    shown.print(table_of([["first", "1,234,567,890", "1,234,567,890"]]))
    assert printed(shown).splitlines() == [
        "Title",
        "first",
        "  column 1  1,234,567,890",
        "  column 2  1,234,567,890",
        "A note.",
    ]


@given(st.text(st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"]), max_size=60))
def test_text_is_printed_unchanged(text: str) -> None:
    shown = console(20, terminal=False)
    shown.print(text)
    shown.print(f"[bold]{text}[/b]")
    assert printed(shown) == f"{text}\n[bold]{text}[/b]\n"


def test_the_log_is_printed_unchanged() -> None:
    shown = console(80, terminal=False)
    show_library(shown)
    with task("Reading [/nonsense]", 10) as reading:
        reading.update(3)
        logging.getLogger("lrc.train").warning("100%% of %s", "[b]")
    assert printed(shown) == "Reading [/nonsense]\n100% of [b]\n"


def test_a_long_task_logs_its_progress(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    now = 0.0
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now)
    with log_progress("Reading", 1000, 100, "tokens") as reading:
        for done in range(100, 1001, 100):
            now += 20.0
            reading.update(done, detail="a.txt")
    assert caplog.messages == [
        "Reading",
        "Reading: 200 tokens of 1,000, 2.5 tokens/s, a.txt, 0:05:20 left",
        "Reading: 400 tokens of 1,000, 3.8 tokens/s, a.txt, 0:02:40 left",
        "Reading: 600 tokens of 1,000, 4.2 tokens/s, a.txt, 0:01:36 left",
        "Reading: 800 tokens of 1,000, 4.4 tokens/s, a.txt, 0:00:46 left",
        "Reading: 1,000 tokens of 1,000, 4.5 tokens/s, a.txt",
    ]


@given(st.integers(0, 100), st.integers(0, 100), st.integers(0, 100))
def test_the_time_left_is_shown_only_if_known(first: int, more: int, rest: int) -> None:
    working = LoggedTask("Working", first + more + rest, first)
    working.update(first + more)
    known = more > 0 and more >= progress.LEAST_SHARE * (more + rest)
    assert (working.left() is not None) == known


@given(st.lists(st.floats(0, 1e7).map("loss {:.3f}".format), min_size=1), st.integers(-9, 200))
def test_a_detail_fits_and_cuts_no_number(terms: list[str], room: int) -> None:
    text = fit(", ".join(terms), room)
    assert len(text) <= max(room, 0)
    assert ", ".join(terms).startswith(text)
    assert not text or text.split(", ") == terms[: text.count(", ") + 1]


def test_count_and_time_left_fit_in_80_columns() -> None:
    shown = console(80, terminal=True)
    bars = Bars(shown)
    with bars.task("Training", 12_000, 0, "") as training, bars.task("Reading", None, 0, ""):
        for step in range(1, 4):
            training.update(step, detail="99,999 tokens/s" + 5 * ", loss 1234.567")
        bars._progress.refresh()
    lines = [line.replace("\x1b[2K", "") for line in printed(shown).splitlines()]
    last = [line for line in lines if "12,000" in line][-1]
    assert "3 of 12,000" in last
    assert "left" in last
    assert "99,999 tokens/s" in last
    assert len(last) <= 80
    assert any("Reading" in line for line in lines)
    assert bar_width(shown) < bar_width(console(200, True))


ASCII = {"PYTHONIOENCODING": "ascii", "LC_ALL": "C", "COLUMNS": "70"}


@pytest.mark.parametrize("environment", [{}, ASCII])
def test_output_works_on_any_terminal(environment: dict[str, str]) -> None:
    code = "import sys; sys.argv = ['lrc', 'eval', '--published']; from lrc.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, env=os.environ | environment, check=True
    )
    assert b"LRC-1.5B" in done.stdout


def test_a_closed_pipe_ends_no_command() -> None:
    code = """
import sys
from lrc.cli.console import console
for number in range(20_000):
    console.print(f"line {number}")
print("went on", file=sys.stderr)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "line 0\n"
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == "went on\n"
    assert process.wait() == 0


def test_too_little_memory_is_no_bug() -> None:
    for error in (
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
    ):
        sentence, code = explain(error)
        assert code == 2
        assert "train.micro_batch" in sentence
    assert explain(RuntimeError("shapes differ"))[1] == 1


def test_a_folder_is_not_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wandbs").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert not is_installed("wandbs")
    assert is_installed("torch")
