"""Killed builds continue and give the same bytes. So does any number of processes."""

import gzip
import json
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from matplotlib.figure import Figure

from build_helpers import build, documents, files_of, make_mix, rows
from data_helpers import byte_tokenizer, write_rows
from lrc.corpus import pool, run, splitting, summary
from lrc.corpus.mix import Mix
from lrc.corpus.pieces import Unit
from lrc.corpus.unit import UnitWorker
from lrc.system import files
from lrc.system.errors import UserError


@pytest.fixture
def mix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Mix:
    """Two sources, one of them compressed, with every step that depends on the order."""
    monkeypatch.setattr(splitting, "UNIT_BYTES", 4_000)
    monkeypatch.setattr(summary, "draw", lambda _: Figure(figsize=(1, 1)))
    texts = documents(150, words=20)
    write_rows(tmp_path / "a.jsonl", rows([*texts, *texts[:30]]))
    lines = "".join(json.dumps(row) + "\n" for row in rows([*texts[:40], *documents(150, seed=1)]))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    write_rows(tmp_path / "eval" / "one.jsonl", [{"q": texts[3]}])
    return make_mix(
        tmp_path,
        {
            "a": {"files": ["a.jsonl"], "tokens": 12_000},
            "b": {"files": ["b.jsonl.gz"], "tokens": 12_000, "repeat": 3},
        },
        deduplicate=True,
        decontaminate={"folder": "eval"},
        held_out_fraction=0.1,
        shard_tokens=10_000,
    )


def in_child(work: Any) -> int:
    """Run something in a forked process; gives its exit code, negative for a signal."""

    def alone() -> None:
        # The threads of tokenizers are not forked, and would be waited for.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        work()

    process = multiprocessing.get_context("fork").Process(target=alone, daemon=True)
    process.start()
    process.join(120)
    assert process.exitcode is not None
    return process.exitcode


def test_killed_at_every_moment(mix: Mix, tmp_path: Path) -> None:
    """Killed at the first rename, the next time at the second, then at the third, ...: the files
    are left in many ways, and what was done before is not done again."""
    whole = tmp_path / "whole"
    build(mix, whole)
    out, log = tmp_path / "out", tmp_path / "log"

    def build_and_die(at: int) -> None:
        real_replace, real_process, count = os.replace, UnitWorker.process, 0

        def replace(source: Any, target: Any) -> None:
            nonlocal count
            count += 1
            if count == at:
                os.kill(os.getpid(), signal.SIGKILL)
            real_replace(source, target)

        def process(self: UnitWorker, unit: Unit) -> None:
            real_process(self, unit)
            with log.open("a") as file:
                file.write(f"{unit.name}\n")

        # `lrc.system.files` and the shards' files are put in place by the same function.
        os.replace, UnitWorker.process = replace, process  # type: ignore[method-assign]
        build(mix, out)

    codes = []
    while not codes or codes[-1] != 0:
        assert not (out / "index.json").exists()
        codes.append(in_child(lambda: build_and_die(len(codes) + 1)))
        assert codes[-1] in (0, -signal.SIGKILL)
    assert len(codes) > 8
    assert files_of(out) == files_of(whole)
    done = log.read_text().split()
    assert len(done) == len(set(done)) >= 8


@pytest.mark.parametrize("renamed", [False, True])
def test_killed_while_the_tokenizer_is_saved(mix: Mix, tmp_path: Path, renamed: bool) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    build(mix, whole)
    real = byte_tokenizer().save_pretrained

    def save_and_die(folder: Path) -> None:
        real(folder)
        if not renamed:
            _die()

    def build_and_die() -> None:
        tokenizer = byte_tokenizer()
        tokenizer.save_pretrained = save_and_die  # type: ignore[method-assign]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(run, "write_index", lambda *_: _die())
            build(mix, out, tokenizer=tokenizer)

    assert in_child(build_and_die) == -signal.SIGKILL
    build(mix, out)
    assert files_of(out) == files_of(whole)


def test_shards_that_are_finished_stay(
    mix: Mix, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(_: Any) -> None:
        raise RuntimeError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(summary, "draw", fails)
        with pytest.raises(RuntimeError):
            build(mix, tmp_path / "out")
    shards = sorted((tmp_path / "out").glob("*.bin"))
    before = [(path, path.stat().st_ino) for path in shards]
    assert len(before) >= 9
    # A shard that was cut short meanwhile is built again.
    lost = shards[-1]
    content = lost.read_bytes()
    lost.write_bytes(content[:-1])
    build(mix, tmp_path / "out")
    assert lost.read_bytes() == content
    stem = lost.name.partition(".")[0]
    for path, inode in before:
        assert (path.stat().st_ino == inode) == (not path.name.startswith(stem))


def test_processes_give_the_same_and_end_with_a_killed_build(mix: Mix, tmp_path: Path) -> None:
    """With two real processes: they end if the build is killed."""
    whole = tmp_path / "whole"
    build(mix, whole)
    out = tmp_path / "out"
    process = multiprocessing.get_context("fork").Process(target=lambda: build(mix, out, 2))
    process.start()
    results = out / "build" / "units"
    deadline = time.monotonic() + 120
    while len(list(results.glob("*.npz"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.join()
    assert children
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive
    if not (out / "index.json").exists():
        build(mix, out, workers=2)
    assert files_of(out) == files_of(whole)


def test_a_killed_process_is_reported(
    mix: Mix, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pool.Pool(2) as two:
        future = two.submit(os.kill, 0, 0)  # Starts the processes.
        two.wait(future)
        future = two.submit(_die)
        with pytest.raises(UserError, match=r"memory ran out.*--workers.*resumes the build"):
            two.wait(future)


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_two_builds_of_one_folder(mix: Mix, tmp_path: Path) -> None:
    def second(*_: Any) -> None:
        with pytest.raises(UserError, match="Another process is building"):
            build(mix, tmp_path / "out")
        raise RuntimeError("seen")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "_clear", second)
        with pytest.raises(RuntimeError, match="seen"):
            build(mix, tmp_path / "out")
    assert files.is_taken(tmp_path / "out")
