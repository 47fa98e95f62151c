"""The command line in this process."""

import sys
from collections.abc import Callable
from typing import Any

import pytest

from lrc.cli import main

Command = Callable[..., tuple[int, str, str]]
"""Runs `lrc` with arguments: exit code, output, errors."""


def command_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """The command line without the hub, on a wide terminal."""

    def run(*arguments: Any) -> tuple[int, str, str]:
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        monkeypatch.setenv("COLUMNS", "200")
        monkeypatch.setattr(sys, "argv", ["lrc", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        return int(end.value.code or 0), *capsys.readouterr()

    return run
