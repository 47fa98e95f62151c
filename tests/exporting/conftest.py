"""Fixtures for exports."""

from pathlib import Path
from typing import Any

import pytest

from gguf_helpers import stories_clone


@pytest.fixture(scope="module")
def clone(stories_folder: Path) -> tuple[Any, Any]:
    """A clone of stories260K and its tokenizer."""
    return stories_clone(stories_folder)
