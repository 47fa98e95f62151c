"""Processes that begin with the libraries imported.

An import of torch, transformers and datasets takes seconds. One process imports them for all tests
of a worker, and every other is forked from it before it has started a thread.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from socket import socket
from typing import Any

CLI = "from lrc.cli import main; main()"
"""The command line."""

EXACT = {"OMP_NUM_THREADS": "1", "MKL_CBWR": "COMPATIBLE", "HF_HUB_OFFLINE": "1"}
EXACT |= {"CUDA_VISIBLE_DEVICES": "0"}
"""MKL's products of small matrices depend on where they lie in memory, unless it is asked for the
same numbers."""

SERVER = """
import atexit, gc, json, os, sys
import datasets, matplotlib.pyplot, transformers.generation
import lrc.api, lrc.cli.training
from transformers.models.llama import modeling_llama
from transformers.models.qwen3 import modeling_qwen3

gc.collect()
gc.freeze()  # as `libraries_are_no_garbage` in conftest.py
atexit.register(gc.unfreeze)
ended = {}
for line in sys.stdin:
    request = json.loads(line)
    if "wait" in request:
        pid, options = request["wait"]
        if pid not in ended and (found := os.waitpid(pid, options))[0]:
            ended[pid] = os.waitstatus_to_exitcode(found[1])
        reply = ended.get(pid)
    else:
        child = os.fork()
        if not child:
            break
        reply = child
    print(json.dumps(reply), flush=True)
else:
    sys.exit()
for number, path in ((0, os.devnull), (1, request["output"]), (2, request["errors"])):
    os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND), number)
os.environ.update(request["environment"])
if request["folder"]:
    os.chdir(request["folder"])
sys.argv = request["arguments"]
exec(request["code"])
"""


def places(size: int) -> list[dict[str, str]]:
    """What torchrun sets for each of several processes of this machine."""
    with socket() as any_port:
        any_port.bind(("localhost", 0))
        port = str(any_port.getsockname()[1])
    common = {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
    common |= {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    return [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)]


@dataclass(frozen=True)
class Started:
    """A process of `Prepared`."""

    server: "Prepared"
    pid: int
    output: Path
    errors: Path

    def poll(self) -> int | None:
        """The exit code, or minus the number of a signal; None while the process runs."""
        code: int | None = self.server.ask(wait=[self.pid, os.WNOHANG])
        return code

    def wait(self) -> tuple[int, str, str]:
        """The exit code, or minus the number of a signal, the output and the errors, when the
        process has ended."""
        code = self.server.ask(wait=[self.pid, 0])
        return code, self.output.read_text(), self.errors.read_text()

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)


class Prepared:
    """Starts Python code in processes without the hub, on a wide terminal.

    Args:
        folder: where their output is written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.number = folder, 0
        self.environment = {"HF_HUB_OFFLINE": "1", "COLUMNS": "400"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            env=os.environ | self.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, **request: Any) -> Any:
        """The reply of the process that has imported the libraries."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps(request), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    def start(
        self,
        *arguments: Any,
        code: str = CLI,
        cwd: Path | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> Started:
        """Start a command, or other code with arguments."""
        self.number += 1
        output, errors = (self.folder / f"{self.number}.{kind}" for kind in ("out", "err"))
        output.touch()
        errors.touch()
        pid = self.ask(
            code=code,
            arguments=["lrc", *map(str, arguments)],
            environment={k: v for k, v in os.environ.items() if k.startswith("LRC_")}
            | dict(environment or {}),
            folder=str(cwd) if cwd else None,
            output=str(output),
            errors=str(errors),
        )
        return Started(self, pid, output, errors)

    def run(self, *arguments: Any, **options: Any) -> tuple[int, str, str]:
        """Exit code, output and errors of a command, or of other code with arguments."""
        return self.start(*arguments, **options).wait()

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()
