"""docs/families.md says what the code does."""

import logging
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_the_page_is_the_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    """If this fails, run `python scripts/families.py`."""
    monkeypatch.setattr(logging, "disable", lambda: None)
    script = runpy.run_path(str(ROOT / "scripts" / "families.py"))
    assert script["PAGE"].read_text(encoding="utf-8") == script["page"]()
