"""The command line in this process."""

import sys
from typing import Any

import pytest

from lrc.cli import main


class Command:
    """`lrc` with arguments, without the hub, on a wide terminal: exit code, output, errors."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch, self.capsys = monkeypatch, capsys

    def __call__(self, *arguments: Any) -> tuple[int, str, str]:
        self.monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        self.monkeypatch.setenv("COLUMNS", "200")
        self.monkeypatch.setattr(sys, "argv", ["lrc", *map(str, arguments)])
        self.capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        return int(end.value.code or 0), *self.capsys.readouterr()

    def printed(self, *arguments: Any) -> str:
        """The output of a command that succeeds."""
        code, output, errors = self(*arguments)
        assert code == 0, errors
        return output

    def refusal(self, *arguments: Any) -> str:
        """The one sentence of a command that refuses its arguments."""
        code, _, errors = self(*arguments)
        assert code == 2, errors
        assert "Traceback" not in errors
        (sentence,) = [line for line in errors.splitlines() if line.startswith("Error: ")]
        return sentence
