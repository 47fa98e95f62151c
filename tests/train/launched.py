"""What each process of a launch runs: the command line, once for each list of arguments.

`faults` break one process: rank, step and kind. With `late`, what processes send arrives when they
wait for it, and is not a number before, and each solves another start, as rounding on GPUs may do.
"""

import json
import os
import resource
import sys
from collections.abc import Callable
from typing import Any

import torch

import lrc.cli
from lrc.cloning.method import Method
from lrc.methods import METHODS
from lrc.system.distributed import World, join, leave, restarts
from lrc.train.loop import Loop


def another_start(initialize: Callable[..., Any], rank: int) -> Callable[..., Any]:
    def start(self: Method, *arguments: Any) -> Any:
        report = initialize(self, *arguments)
        for value in self.parameters().values():
            value.data.mul_(1 + rank)
        return report

    return start


def main() -> None:
    commands, faults, late = json.loads(sys.argv[1])
    lrc.cli.leave = lambda: None  # the next command goes on with the same processes
    world = join()
    step_of_loop = Loop._step
    if faults and faults["rank"] == world.rank and not restarts():

        def broken(self: Loop, progress):  # type: ignore[no-untyped-def]
            if self.setup.state.step == faults["step"]:
                if faults["kind"] == "kill":
                    os.kill(os.getpid(), 9)
                if faults["kind"] == "terminate":
                    os.kill(os.getpid(), 15)
                if faults["kind"] == "nan":
                    for value in self.setup.method.model.parameters():
                        value.data.fill_(float("nan"))
                if faults["kind"] == "full disk":
                    import lrc.train.checkpoint as checkpoint

                    def full(*_):  # type: ignore[no-untyped-def]
                        raise OSError(28, "No space left on device")

                    checkpoint.save_file = full
            return step_of_loop(self, progress)

        Loop._step = broken  # type: ignore[method-assign]
    if late:
        send = World.send

        def send_late(self: World, tensor: torch.Tensor, owner: int) -> Callable[[], None]:
            if self.rank != owner:
                tensor.fill_(float("nan"))
            return lambda: send(self, tensor, owner)()

        World.send = send_late  # type: ignore[method-assign]
        for kind in METHODS.values():
            kind.initialize = another_start(kind.initialize, world.rank)  # type: ignore[method-assign]
    code = 0
    for command in commands:
        mine = command[world.rank] if isinstance(command[0], list) else command
        sys.argv = ["lrc", *mine]
        try:
            lrc.cli.main()
        except SystemExit as end:
            code = code or int(end.code or 0)
    leave()
    sys.stdout.flush()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    os.write(1, f"\npeak {peak} KiB\n".encode())  # at once: the processes share the pipe
    sys.exit(code)


if __name__ == "__main__":
    main()
