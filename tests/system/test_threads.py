"""The waiting policy is set before torch is imported, and never against the user's."""

import os
import subprocess
import sys

import pytest
import torch

from lrc.recipe.sections import TrainSection
from lrc.system.threads import SPINS
from lrc.train.setup import describe_compute

CODE = """
import os, sys
sys.argv = ["lrc", "--version"]
from lrc.cli import main
assert "torch" not in sys.modules
try:
    main()
except SystemExit:
    print(os.environ.get("GOMP_SPINCOUNT"), os.environ.get("OMP_WAIT_POLICY"))
"""


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, f"{SPINS} None"),
        ({"GOMP_SPINCOUNT": "7"}, "7 None"),
        ({"OMP_WAIT_POLICY": "active"}, "None active"),
    ],
)
def test_the_policy_of_the_command_line(given: dict[str, str], expected: str) -> None:
    names = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    environment = {key: value for key, value in os.environ.items() if key not in names}
    done = subprocess.run(
        [sys.executable, "-c", CODE], env=environment | given, capture_output=True, text=True
    )
    assert done.stdout.splitlines()[-1] == expected


@pytest.mark.parametrize(("threads", "said"), [(1, "with 1 thread,"), (3, "with 3 threads,")])
def test_a_run_says_how_many_threads_it_uses(
    threads: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert said in describe_compute(TrainSection(), torch.device("cpu"))
