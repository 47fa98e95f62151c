"""The programs in examples/, run as users run them, on a tiny teacher."""

import json
import re
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from data_helpers import write_jsonl
from lrc.model.families import FAMILIES
from lrc.run import Run
from prepared import Prepared
from short_closing import SHORT_CLOSING
from tiny import HIDDEN, QUIRKS, tiny_method, tiny_teacher, tiny_tokens
from tiny_runs import save_teacher, tiny_documents

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny teacher and as much text as the examples read."""
    folder = tmp_path_factory.mktemp("examples")
    save_teacher(folder / "teacher")
    write_jsonl(folder / "text.jsonl", tiny_documents(600))
    return folder


Call = Callable[..., str]


@pytest.fixture
def call(folder: Path, prepared: Prepared) -> Call:
    """Returns the output of an example on the tiny teacher."""

    def output(name: str, *options: Any) -> str:
        given = ["--teacher", "teacher", "--hidden-size", 8, "--text", "text.jsonl", *options]
        program = SHORT_CLOSING + (EXAMPLES / name).read_text()
        code, printed, errors = prepared.run(*given, code=program, cwd=folder)
        assert code == 0, errors
        return printed

    return output


def test_compress(call: Call, folder: Path) -> None:
    said = call("compress.py", "--calibration-tokens", 512)
    summary = Run.open(folder / "runs" / "compressed").summary()
    assert f"{summary['student_perplexity']:.1f}" in said
    assert said.splitlines()[-1].startswith(summary["samples"]["prompt"])
    assert summary["calibration_tokens"] <= 512


def test_clone_and_start_again(call: Call, folder: Path) -> None:
    first = call("clone.py", "--tokens", 4096)
    run = Run.open(folder / "runs" / "clone")
    assert run.summary()["tokens"] == 4096
    assert call("clone.py", "--tokens", 4096) == first, "a finished run stays as it is"


def test_progress_in_ones_own_tracker(call: Call, folder: Path) -> None:
    call("trainer_callback.py", "--tokens", 12_288)
    run = Run.open(folder / "runs" / "tracked")
    rows = sqlite3.connect(folder / "metrics.sqlite").execute(
        "select step, value from metrics where run = 'tracked' and name = 'held_out_lm'"
    )
    lines = [line for line in run.metrics() if "held_out_lm" in line and line["step"]]
    assert dict(rows) == {line["step"]: line["held_out_lm"] for line in lines}
    assert len(lines) > 1


def test_a_loss_of_ones_own(call: Call, folder: Path) -> None:
    said = call("custom_loss.py", "--tokens", 40_960)
    values = [float(value) for value in re.findall(r"1 - CKA ([\d.]+)", said)]
    assert len(values) == 20
    assert 0 < values[-1] < values[0] < 1, "the hidden states did not become more alike"


def test_linear_cka(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    from custom_loss import linear_cka

    a = torch.randn(50, 6, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q
    assert torch.isclose(linear_cka(a, 3 * a @ rotation + 1), torch.ones((), dtype=a.dtype))
    b = torch.randn(50, 4, dtype=torch.float64)
    kernels = [x @ x.T for x in (a - a.mean(0), b - b.mean(0))]
    naive = (kernels[0] * kernels[1]).sum() / (kernels[0].norm() * kernels[1].norm())
    assert torch.isclose(linear_cka(a, b), naive)


@pytest.fixture
def vaultgemma(monkeypatch: pytest.MonkeyPatch) -> None:
    """The family of the example, known in this process."""
    assert "vaultgemma" not in FAMILIES, "lrc knows it now: the example needs another family"
    monkeypatch.syspath_prepend(EXAMPLES)
    from custom_family import VAULT_GEMMA

    monkeypatch.setitem(FAMILIES, "vaultgemma", VAULT_GEMMA)
    monkeypatch.setitem(QUIRKS, "vaultgemma", QUIRKS["gemma2"])


@pytest.mark.usefixtures("vaultgemma")
def test_a_family_that_lrc_does_not_know(call: Call, folder: Path) -> None:
    save_teacher(folder / "vaultgemma", "vaultgemma")
    said = call("custom_family.py", "--teacher", "vaultgemma", "--tokens", 2048)
    run = Run.open(folder / "runs" / "vaultgemma")
    assert f"{run.summary()['student_held_out_lm']:.3f}" in said
    student = AutoModelForCausalLM.from_pretrained(run.student_folder)
    assert type(student).__name__ == "VaultGemmaForCausalLM"
    assert student.config.hidden_size == 8


@pytest.mark.usefixtures("vaultgemma")
def test_the_examples_family_is_described_as_it_is() -> None:
    """Identity projections with the teacher's gains give the teacher."""
    teacher = tiny_teacher("vaultgemma", tied=True)
    method = tiny_method(teacher, {"hidden_size": HIDDEN})
    with torch.no_grad():
        for value in method.projections.values.values():
            value.copy_(torch.eye(HIDDEN))
        for norm in teacher.layout.stream_norms():
            method.model.get_submodule(norm).weight.copy_(teacher.parameter(f"{norm}.weight"))
        ids = tiny_tokens(3)
        torch.testing.assert_close(method.student()(ids).logits, teacher.model(ids).logits)


CELLS = """
import json, sys
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance()
shell.enable_gui = lambda gui=None: None  # there is no window
for cell in json.loads(sys.argv[1]):
    shell.run_cell(cell).raise_error()
"""
"""Runs the cells of a notebook."""


def test_notebook(folder: Path, prepared: Prepared) -> None:
    """It runs from top to bottom on the tiny teacher, and holds the outputs of an earlier run."""
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(EXAMPLES / "walkthrough.ipynb", as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.execution_count, "run the notebook, then save it"
            assert not any(output.output_type == "error" for output in cell.outputs)
    [parameters] = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", ())]
    changes = {"train.tokens": 4096, "initialize.calibration_tokens": 512}
    parameters.source += f"""
teacher, hidden_size, text = "teacher", 8, "text.jsonl"
settings |= {json.dumps(changes)}
"""
    cells = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    code, printed, errors = prepared.run(json.dumps(cells), code=SHORT_CLOSING + CELLS, cwd=folder)
    assert code == 0, errors
    summary = Run.open(folder / "runs" / "book").summary()
    assert f"-> {summary['student_perplexity']:.1f}" in printed
    assert (folder / "runs" / "book-student" / "config.json").is_file()
