"""Atomic writing of files and folders, and the C library's memory."""

import errno
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from lrc.system import files
from lrc.system.checksums import remembered
from lrc.system.errors import UserError
from lrc.system.files import hold, is_taken, new_file, new_folder, write_text
from lrc.system.limits import bounded
from lrc.system.memory import keep_freed_memory


def test_a_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def fill() -> None:
        with new_file(path) as temporary:
            temporary.write_text("half")
            raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="disk is full"):
        fill()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    for name in ("old", "new"):
        with new_folder(path) as temporary:
            (temporary / name).write_text(name)
    assert [file.name for file in path.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_write_keeps_the_old_folder(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    with new_folder(path) as temporary:
        (temporary / "old").write_text("old")

    def fill() -> None:
        with new_folder(path) as temporary:
            (temporary / "new").write_text("half")
            raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="disk is full"):
        fill()
    assert [file.name for file in path.iterdir()] == ["old"]
    assert list(tmp_path.iterdir()) == [path]


def test_an_unwritable_place_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UserError, match="choose another path"):
        write_text(tmp_path / "file" / "below", "text")


def test_keeping_freed_memory_is_accepted_or_declined() -> None:
    assert keep_freed_memory() in (True, False)


def test_links_are_not_followed(tmp_path: Path) -> None:
    """Names of temporary files are random, and the files are created exclusively."""
    names = set()
    for _ in range(3):
        with new_file(tmp_path / "a.txt") as temporary:
            names.add(temporary.name)
            assert os.stat(temporary).st_size == 0
            temporary.write_text("x")
        with new_folder(tmp_path / "folder") as temporary:
            names.add(temporary.name)
    assert len(names) == 6
    target = tmp_path / "target"
    target.write_text("precious")
    (tmp_path / ".lock").symlink_to(target)
    with pytest.raises(UserError), hold(tmp_path, "held"):
        pass
    assert target.read_text() == "precious"


def killed_while_writing(path: Path, folder: bool) -> subprocess.Popen[str]:
    """A process that is in the middle of writing."""
    kind = "new_folder" if folder else "new_file"
    code = f"""
import sys, time
from pathlib import Path
from lrc.system.files import {kind}
with {kind}(Path(sys.argv[1])) as temporary:
    ({"temporary / 'x'" if folder else "temporary"}).write_text("half")
    print("writing", flush=True)
    time.sleep(60)
"""
    command = [sys.executable, "-c", code, str(path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    return process


@pytest.mark.parametrize("folder", [False, True])
def test_only_files_of_killed_processes_are_removed(
    tmp_path: Path, folder: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_CLAIM_SECONDS", 0.0)
    path = tmp_path / "a"
    process = killed_while_writing(path, folder)
    try:
        (left,) = tmp_path.iterdir()
        files.remove_left_overs(tmp_path)
        assert left.exists()
    finally:
        process.kill()
        process.wait()
    assert left.exists()
    with (new_folder if folder else new_file)(path) as temporary:
        assert temporary != left
        (temporary / "x" if folder else temporary).write_text("whole")
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_replaced_is_filled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with new_folder(Path(".")) as temporary:
        (temporary / "x").write_text("x")
    assert [file.name for file in tmp_path.iterdir()] == ["x"]


def test_links_to_nothing_devices_and_files_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "file").write_text("x")
    (tmp_path / "place").mkdir()
    (tmp_path / "good").symlink_to("place")
    for writer in (new_file, new_folder):
        with pytest.raises(UserError, match="a link to nowhere"), writer(tmp_path / "link"):
            pass
    with pytest.raises(UserError, match="is a file"), new_folder(tmp_path / "file"):
        pass
    with pytest.raises(UserError, match="not a file that can be replaced"), new_file(tmp_path):
        pass
    with pytest.raises(UserError, match="not a file"), new_file(Path("/dev/null")):
        pass
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    with new_folder(tmp_path / "good") as temporary:
        (temporary / "x").write_text("x")
    assert (tmp_path / "place" / "x").read_text() == "x"
    assert is_taken(tmp_path / "link")
    assert not is_taken(tmp_path / "none")


ERRNOS = (
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EMFILE, errno.EACCES, errno.EROFS, errno.EIO,
    errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ENODEV,
)  # fmt: skip


@pytest.mark.parametrize("number", ERRNOS)
@pytest.mark.parametrize("rust", [False, True])
def test_every_system_error_becomes_one_sentence(tmp_path: Path, number: int, rust: bool) -> None:
    """From Python, and from Rust libraries, which have their own error types."""
    error: Exception = OSError(number, os.strerror(number))
    if rust:
        error = Exception(f"I/O error: {os.strerror(number)} (os error {number})")
    with pytest.raises(UserError) as caught, files.disk_errors(tmp_path / "a"):
        raise error
    sentence = str(caught.value)
    assert sentence.endswith(".")
    assert ": " in sentence, "what to do"
    assert "\n" not in sentence
    if number == errno.ENOSPC:
        assert "disk is full" in sentence


def test_other_errors_are_not_changed(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), files.disk_errors(tmp_path / "a"):
        raise ZeroDivisionError


@pytest.mark.parametrize(
    "error",
    [
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"),
        RecursionError("maximum recursion depth exceeded"),
        MemoryError(),
        KeyError("weight_map"),
        ValueError(),
        ValueError("first:\n  second line\nthird"),
        OSError(errno.EIO, "Input/output error"),
        RuntimeError("x" * 5000),
    ],
)
def test_anything_that_reading_raises_is_one_sentence(error: Exception) -> None:
    with pytest.raises(UserError) as caught, files.reading("the file", "get another"):
        raise error
    sentence = str(caught.value)
    assert sentence.startswith("the file cannot be read (")
    assert sentence.endswith("): get another.")
    assert len(sentence) < 400
    assert "\n" not in sentence


@pytest.mark.parametrize("text", ["", "[1]", "null", "{", "[" * 100_000, "\x00", '"x"'])
def test_json_that_is_no_object_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match=r"a\.json cannot be read"):
        files.read_json(tmp_path / "a.json", "get another")


def test_one_process_at_a_time(tmp_path: Path) -> None:
    with hold(tmp_path / "new", "held"):
        with pytest.raises(UserError, match=r"^held$"), hold(tmp_path / "new", "held"):
            pass
        assert not is_taken(tmp_path / "new"), "a lock is not content"
    with hold(tmp_path / "new", "held"):
        pass


def test_time_and_memory_can_be_bounded() -> None:
    def spin() -> None:
        while True:
            pass

    for work in (spin, lambda: bytearray(2 << 30)):
        with pytest.raises(UserError, match=r"^too much$"), bounded(1, 0.5, "too much"):
            work()
    with bounded(1, 0.5, "too much"):
        pass
    assert len(bytearray(1 << 30)) == 1 << 30, "the limit must be removed"


def test_cached_findings_hold_until_the_file_changes(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("one")
    calls = []

    def find_out(file: Path) -> int:
        calls.append(file)
        return len(file.read_text())

    assert [remembered(path, "length", find_out) for _ in range(3)] == [3] * 3
    assert len(calls) == 1
    before = path.stat()
    path.write_text("two")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert remembered(path, "length", find_out) == 3
    assert len(calls) == 2, "an inode's time of change cannot be set"
    assert remembered(path, "other", find_out) == 3
    assert len(calls) == 3
