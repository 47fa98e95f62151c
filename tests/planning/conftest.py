"""A teacher in a folder."""

from pathlib import Path

import pytest

from tiny import WIDE
from tiny_runs import file_settings, save_teacher


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher with its weights, and a text."""
    folder = tmp_path_factory.mktemp("plan")
    save_teacher(folder / "teacher", "llama", **WIDE)
    file_settings(folder)
    return folder
