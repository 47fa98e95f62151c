"""Fixtures that several test files share."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton

from command_line import Command, command_line
from pages import Look, headless_browser
from stories import save_stories, shared_data, stories_source


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep what the tests remember of files out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LRC_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def stories_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """stories260K as a transformers model folder."""
    source = stories_source()
    if not (source / "stories260K.bin").is_file():
        if shared_data().is_dir():  # where there is real data, nothing of it may be missing
            pytest.fail(f"stories260K is not in {source}")
        pytest.skip("there is no real data; set LRC_SHARED_DATA to its folder")
    folder = tmp_path_factory.mktemp("stories") / "stories260K"
    save_stories(source, folder)
    return folder


@pytest.fixture
def lrc(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run the command line in this process: exit code, output, errors."""
    return command_line(monkeypatch, capsys)


@pytest.fixture
def browser(tmp_path: Path) -> Look:
    """Run a headless Chromium."""
    return headless_browser(tmp_path / "profile")
