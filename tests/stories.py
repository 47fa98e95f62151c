"""stories260K for tests, where its files are there."""

import os
from pathlib import Path

from stories260k import save_stories

__all__ = ["save_stories", "stories_source"]


def stories_source() -> Path:
    """The folder of the two files: in $LRC_SHARED_DATA, or in `shared/data` beside the checkout."""
    beside = Path(__file__).parents[2] / "shared" / "data"
    return Path(os.environ.get("LRC_SHARED_DATA", beside)) / "models" / "stories260K"
