"""What people and pipes get to read: whole numbers, and text as it is."""

import io
import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.progress import Progress
from rich.table import Table

from lrc.system.console import TextConsole
from lrc.train.progress import StepProgress, bar_width, describe, phase, step_progress


def console(width: int, terminal: bool) -> TextConsole:
    return TextConsole(
        file=io.StringIO(), width=width, force_terminal=terminal, color_system=None, no_color=True
    )


def printed(shown: TextConsole) -> str:
    assert isinstance(shown.file, io.StringIO)
    return shown.file.getvalue()


def table_of(rows: list[list[str]], right: bool = False) -> Table:
    table = Table(*(f"column {n}" for n in range(len(rows[0]))), caption="A note.", title="Title")
    for column in table.columns[1:]:
        column.justify = "right" if right else "left"
    for row in rows:
        table.add_row(*row)
    return table


CELLS = st.lists(
    st.lists(st.integers(0, 10**12).map("{:,}".format), min_size=3, max_size=3),
    min_size=1,
    max_size=4,
)


@given(CELLS, st.integers(20, 120), st.booleans(), st.booleans())
def test_no_number_is_ever_clipped(
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
def test_text_is_printed_as_it_is(text: str) -> None:
    shown = console(20, terminal=False)
    shown.print(text)
    with phase(shown, text) as detail:
        detail("[/nonsense]")
    shown.print(f"[bold]{text}[/b]")
    assert printed(shown) == f"{text}\n{text}\n[bold]{text}[/b]\n"


LOSSES = st.dictionaries(
    st.sampled_from(["loss", "kl", "lm", "clone", "hidden", "attention"]),
    st.floats(0, 1e7),
    min_size=1,
)


@given(LOSSES, st.floats(0, 1e7), st.integers(60, 160), st.integers(1, 10**7))
def test_the_bar_fits_and_cuts_no_number(
    losses: dict[str, float], rate: float, width: int, steps: int
) -> None:
    shown = console(width, terminal=True)
    with Progress(console=shown) as bar:
        progress = StepProgress(shown, bar, steps, 0)
        progress.step(losses, rate)
        room, text = progress._room, bar.tasks[0].description
    assert len(text) <= max(room, 0)
    terms = [f"{name} {value:.3f}" for name, value in losses.items()]
    wanted = [*terms, f"{rate:,.0f} tokens/s"]
    assert set(filter(None, text.split("  "))) <= set(wanted)
    assert describe(losses, rate, 10_000) == "  ".join(wanted)


def test_step_and_time_left_are_seen_on_80_columns() -> None:
    shown = console(80, terminal=True)
    with step_progress(shown, 12_000, 0) as progress:
        for _ in range(3):
            progress.step(dict.fromkeys(["loss", "kl", "lm", "clone", "other"], 1234.5), 99_999.0)
        progress._bar.refresh()
    lines = [line.replace("\x1b[2K", "") for line in printed(shown).splitlines()]
    last = [line for line in lines if "12000" in line][-1]
    assert "step" in last
    assert "left" in last
    assert "99,999 tokens/s" in last
    assert len(last) <= 80
    assert bar_width(shown) < bar_width(console(200, True))


ASCII = {"PYTHONIOENCODING": "ascii", "LC_ALL": "C", "COLUMNS": "70"}


@pytest.mark.parametrize("environment", [{}, ASCII])
def test_any_terminal_can_be_printed_to(environment: dict[str, str]) -> None:
    code = "import sys; sys.argv = ['lrc', 'eval', '--published']; from lrc.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, env=os.environ | environment, check=True
    )
    assert b"LRC-1.5B" in done.stdout


def test_a_pipe_that_is_closed_ends_no_command() -> None:
    code = """
import sys
from lrc.system.console import console
for number in range(100_000):
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
