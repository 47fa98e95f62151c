"""Runs that are killed several times, through the real command line."""

import json
from pathlib import Path
from typing import Any

from prepared import Prepared

Start = tuple[Any, ...]
"""When a process is killed ("stepping" or "saving"), after how many steps, and its arguments."""

KILLED = """
import json, os, signal, sys
import lrc.cli.training
from lrc.cli import main
from lrc.train import loop


def killed(when, step, *arguments):
    name = {"stepping": "_step", "saving": "_save"}[when]
    real = getattr(loop.Loop, name)

    def dies(self, *arguments):
        if self.setup.state.step == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, *arguments)

    setattr(loop.Loop, name, dies)
    sys.argv = ["lrc", *arguments]
    main()


for case in json.loads(sys.argv[1]):
    child = os.fork()
    if not child:
        killed(*case)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (case, status)
    folder = os.path.join(sys.argv[2], "checkpoints")
    kept = os.listdir(folder) if os.path.isdir(folder) else []
    print(json.dumps(sorted(name for name in kept if name.startswith("step-"))[-1:]))
"""
"""Runs the command line in several processes, each killed before a step or a checkpoint."""


def run_and_kill(prepared: Prepared, folder: Path, starts: list[Start]) -> list[int | None]:
    """Start a run and resume it, killing every process. Returns the step of the newest checkpoint
    that each one left."""
    code, output, errors = prepared.run(json.dumps(starts, default=str), folder, code=KILLED)
    assert code == 0, errors
    lines = [line for line in output.splitlines() if line == "[]" or line[:7] == '["step-']
    return [int(line[7:-2]) if line != "[]" else None for line in lines]
