"""`benchmarks/overlap.py`, tiny, with two processes."""

import json
from pathlib import Path

import pytest

from prepared import EXACT, Prepared, places

FOLDER = Path(__file__).parents[2] / "benchmarks"
CODE = f"""
import sys
sys.path.insert(0, {str(FOLDER)!r})
import gpu_step, overlap, torch
gpu_step.GPU, gpu_step.DEVICE = False, torch.device("cpu")
assert overlap.merged([(4, 5), (0, 2), (1, 3), (3, 3.5)]) == [(0, 3.5), (4, 5)]
assert overlap.shared((1, 4.5), [(0, 3.5), (4, 5), (6, 7)]) == 3
overlap.main()
"""


def test_collectives_of_a_stage(tmp_path: Path, prepared: Prepared) -> None:
    out = tmp_path / "found.json"
    arguments = ["--shape", "tiny", "--stages", "released", "--out", str(out)]
    started = [
        prepared.start(*arguments, code=CODE, environment=EXACT | place) for place in places(2)
    ]
    for process in started:
        code, _, errors = process.wait()
        assert code == 0, errors[-3000:]
    found = json.loads(out.read_text())
    assert list(found) == ["released"]
    for row in found["released"].values():
        assert 0 <= row["hidden"] <= 1
    trained = 2 * 9 + 2  # parameters of two layers, embedding and final norm
    for kind in ("gloo:broadcast", "gloo:reduce"):
        assert found["released"][kind]["number"] == pytest.approx(trained), kind
