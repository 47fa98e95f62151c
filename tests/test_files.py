"""Writing whole or not at all, and the C library's memory."""

from pathlib import Path

import pytest

from lrc.errors import UserError
from lrc.files import new_file, new_folder, write_text
from lrc.memory import keep_freed_memory


def test_a_failed_file_leaves_the_old_one(tmp_path: Path) -> None:
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


def test_a_failed_folder_leaves_the_old_one(tmp_path: Path) -> None:
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


def test_a_place_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UserError, match="choose a folder"):
        write_text(tmp_path / "file" / "below", "text")


def test_keeping_freed_memory_is_accepted_or_declined() -> None:
    assert keep_freed_memory() in (True, False)
