"""Fixtures that several test files share."""

import gc
import importlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton

from command_line import Command
from lrc.stories260k import save_stories
from lrc.system.progress import log_progress, show_progress_with
from lrc.train import closing
from pages import Look, headless_browser
from prepared import Prepared
from short_closing import SHORT
from stories import shared_data
from tiny import LLAMAS


@pytest.fixture(autouse=True, scope="session")
def libraries_are_no_garbage() -> Iterator[None]:
    """Let the collector of garbage pass over the million objects of imported libraries."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True, scope="session")
def no_disk() -> Iterator[None]:
    """Do not wait for the disk: no machine loses its power here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Use a temporary folder in place of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LRC_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def own_log() -> Iterator[None]:
    """Undo the changes of a command line in this process to logging and progress."""
    logger = logging.getLogger("lrc")
    yield
    logger.handlers, logger.propagate = [], True
    logger.setLevel(logging.NOTSET)
    show_progress_with(log_progress)


@pytest.fixture(autouse=True, scope="session")
def short_closing() -> Iterator[None]:
    """Shorten the end of runs in this process. Runs in other processes are whole."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SHORT.items():
            patch.setattr(closing, name, value)
        yield


@pytest.fixture
def exact_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every RMSNorm keep the precision of its input.

    In transformers it computes in float32 even in a float64 model, which is too coarse for finite
    differences.
    """

    def forward(self: nn.Module, hidden: Tensor) -> Tensor:
        variance = hidden.pow(2).mean(-1, keepdim=True)
        return self.weight * (hidden * torch.rsqrt(variance + self.variance_epsilon))

    for family in LLAMAS:
        module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
        for name in dir(module):
            if name.endswith("RMSNorm"):
                monkeypatch.setattr(getattr(module, name), "forward", forward)


@pytest.fixture(scope="session")
def stories_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """stories260K as a transformers model folder."""
    model = "models/stories260K"
    data = shared_data(f"{model}/stories260K.bin", f"{model}/tok512.bin")
    folder = tmp_path_factory.mktemp("stories") / "stories260K"
    save_stories(data / model, folder)
    return folder


@pytest.fixture
def lrc(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run the command line in this process."""
    return Command(monkeypatch, capsys)


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prepared]:
    """Run the command line, or other code, in processes that have the libraries imported."""
    server = Prepared(tmp_path_factory.mktemp("prepared"))
    yield server
    server.close()


@pytest.fixture
def browser(tmp_path: Path) -> Look:
    """Run a headless Chromium."""
    return headless_browser(tmp_path / "profile")
