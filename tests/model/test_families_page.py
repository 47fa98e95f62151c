"""docs/families.md says what the code does."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_page_is_the_codes() -> None:
    """If this fails, run `python scripts/families.py`."""
    command = [sys.executable, str(ROOT / "scripts" / "families.py"), "--check"]
    assert subprocess.run(command, capture_output=True).returncode == 0
