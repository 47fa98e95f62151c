"""The package: what its wheel holds, and that it works in an empty environment."""

import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
import torch

from data_helpers import write_jsonl
from tiny_runs import save_teacher, tiny_documents

ROOT = Path(__file__).parents[1]

RUN = """
import lrc
settings = {"train.tokens": 64, "train.micro_batch": 2, "data.sequence_length": 16}
settings |= {"data.held_out_fraction": 0.2, "train.eval_sequences": 4}
run = lrc.clone("teacher", hidden_size=8, text="text.jsonl", out="run", settings=settings)
print(lrc.__file__, run.student().config.hidden_size)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout."""
    pytest.importorskip("build")
    pytest.importorskip("setuptools_scm")
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, ROOT]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    [found] = out.iterdir()
    return found


def test_the_wheel_holds_every_file_of_the_package(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    source = ROOT / "src"
    files = {
        str(file.relative_to(source))
        for file in (source / "lrc").rglob("*")
        if file.is_file() and file.suffix != ".pyc"
    }
    assert files <= names
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"lrc", "low_rank_clone"}


@pytest.mark.slow
def test_the_wheel_works_in_an_empty_environment(wheel: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=True)
    binaries = tmp_path / "venv" / "bin"
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}

    def call(*command: object) -> str:
        done = subprocess.run(
            [binaries / str(command[0]), *map(str, command[1:])],
            capture_output=True, text=True, cwd=tmp_path, env=env,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    index = "https://download.pytorch.org/whl/cpu"
    same_torch = f"torch=={torch.__version__}"
    call("pip", "install", "--quiet", "--retries", 1, "--extra-index-url", index, same_torch, wheel)
    assert call("lrc", "--version").split()[1] == wheel.name.split("-")[1]
    assert "| torch" in call("lrc", "env")
    save_teacher(tmp_path / "teacher")
    write_jsonl(tmp_path / "text.jsonl", tiny_documents())
    assert f"{binaries.parent}" in call("python", "-c", RUN)
