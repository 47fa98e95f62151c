"""`benchmarks/experts.py`, tiny."""

import runpy
import sys
from pathlib import Path

import pytest

from data_helpers import write_jsonl
from tiny_runs import save_teacher, tiny_documents

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "experts.py"


def test_every_ranking_is_measured_on_a_mixture_that_is_made_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stories = save_teacher(tmp_path, "llama", max_position_embeddings=128)
    write_jsonl(stories / "stories.jsonl", tiny_documents(300))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(stories), "mixture", "--steps", "2"])
    main = runpy.run_path(str(SCRIPT))["main"]
    main.__globals__.update(HELD_OUT=2, CALIBRATION=4, COUNTS=(8,))
    main()
    printed = capsys.readouterr().out
    assert "step 1: " in printed
    rows = [line.split("|")[1:3] for line in printed.splitlines() if line.startswith("| ")]
    starts = ["squared ", "mean nor", "sum of n", "number o", "nothing "]
    assert [name.strip()[:8] for name, _ in rows[1:]] == starts
    assert all(float(loss) > 0 for _, loss in rows[1:])
    main.__globals__["COUNTS"] = ()
    main()
    assert "step" not in capsys.readouterr().out
