"""The table of benchmarks/busy.py."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "busy.py"


@pytest.mark.slow
def test_every_policy_is_measured() -> None:
    command = [sys.executable, str(SCRIPT), "--tiny", "--rounds", "1", "--steps", "2"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    rows = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 7
    assert all(float(row.split("|")[2]) > 0 for row in rows[2:])
