"""Reading documents from every kind of source."""

import gzip
import json
from pathlib import Path

import datasets
import pytest
import zstandard

from data_helpers import write_jsonl
from lrc.data import read_documents, source_files, stdlib_docs, text_files
from lrc.data.rows import DOCUMENT_CHARACTERS, LONGEST_PIECE
from lrc.system.errors import UserError


def read(*sources: Path | str, field: str = "text") -> list[str]:
    return list(read_documents([str(source) for source in sources], field))


def compress(path: Path, data: bytes) -> Path:
    """Write `data`, compressed according to the file's suffix."""
    kinds = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}
    path.write_bytes(kinds[path.suffix](data) if path.suffix in kinds else data)
    return path


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
@pytest.mark.parametrize("suffix", [".txt", ".md", ".rst", ".TXT"])
def test_text_file(tmp_path: Path, suffix: str, ending: str) -> None:
    path = compress(tmp_path / f"a{suffix}{ending}", "\ufeffGrüße,\r\nworld\n\n".encode())
    assert read(path) == ["Grüße,\nworld"]


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_jsonl_file(tmp_path: Path, suffix: str, ending: str) -> None:
    rows = ['{"body": "one\\n", "n": 1}', "", '{"body": " "}', '{"body": null}', '{"body": "zwei"}']
    path = compress(tmp_path / f"a{suffix}{ending}", "\n".join(rows).encode())
    assert read(path, field="body") == ["one\n", "zwei"]


def test_half_characters_become_question_marks(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a\\ud83db \\ud83d\\ude00"}')
    assert read(path) == ["a?b \U0001f600"]


def test_large_text_is_cut_at_blank_lines(tmp_path: Path) -> None:
    paragraphs = [f"Paragraph {i}. " + "word " * 100 + "end." for i in range(50)]
    path = tmp_path / "big.txt"
    path.write_text("\n\n".join(paragraphs))
    documents = read(path)
    assert "\n\n".join(documents) == "\n\n".join(paragraphs)
    assert all(DOCUMENT_CHARACTERS <= len(d) < DOCUMENT_CHARACTERS + 600 for d in documents[:-1])
    assert len(documents) > 5


def test_text_without_blank_lines_is_cut_too(tmp_path: Path) -> None:
    lines = tmp_path / "lines.txt"
    lines.write_text("A line of text.\n" * 5_000)
    one_line = tmp_path / "one.txt"
    one_line.write_text("x" * (3 * LONGEST_PIECE + 5))
    assert all(d.endswith("A line of text.") for d in read(lines))
    assert max(map(len, read(lines))) <= LONGEST_PIECE + 20
    assert [len(d) for d in read(one_line)] == [LONGEST_PIECE] * 3 + [5]


@pytest.mark.parametrize(("name", "is_read"), [
    ("train.txt", True), ("latest.txt", True), ("contest.txt", True), ("developers.txt", True),
    ("validity.txt", True), ("testimony/a.txt", True), ("value.txt", True), ("test.txt", False),
    ("test-00000-of-00003.txt", False), ("wiki.test.txt.gz", False), ("dev-v1.1.txt", False),
    ("valid_2.md", False), ("eval/a.txt", False), ("data/validation/a.txt", False),
    ("squad_dev.txt", False), ("wiki_val.txt", False), ("README.md", False), ("LICENSE.txt", False),
])  # fmt: skip
def test_folders_give_training_files_only(tmp_path: Path, name: str, is_read: bool) -> None:
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    compress(path, b"text")
    (tmp_path / "another.txt").write_text("another")
    assert ("text" in read(tmp_path)) == is_read
    assert read(path) == ["text"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_an_endless_line_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(text_files, "LONGEST_LINE", 1 << 20)
    content = b'{"text": "ok"}\n{"text": "' + b"x" * (1 << 20)
    path = tmp_path / name
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    with pytest.raises(UserError, match=rf"{name}:2 is longer than 1 MiB"):
        read(path)


def test_folder_is_read_in_order_and_deep(tmp_path: Path) -> None:
    (tmp_path / "b" / "c").mkdir(parents=True)
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "b" / "c" / "z.txt").write_text("three")
    (tmp_path / "b" / "loop").symlink_to(tmp_path)
    (tmp_path / "a.md").write_text("one")
    (tmp_path / "code.py").write_text("no")
    (tmp_path / ".hidden" / "a.txt").write_text("no")
    write_jsonl(tmp_path / "b" / "b.jsonl", ["two"])
    datasets.Dataset.from_dict({"text": ["four"]}).save_to_disk(str(tmp_path / "d"))
    assert read(tmp_path) == ["one", "two", "three", "four"]


def test_data_set_on_disk(tmp_path: Path) -> None:
    single = datasets.Dataset.from_dict({"text": ["one", None, " ", "two"], "n": [1, 2, 3, 4]})
    single.save_to_disk(str(tmp_path / "single"))
    splits = {"train": single, "test": datasets.Dataset.from_dict({"text": ["no"]})}
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "splits"))
    assert read(tmp_path / "single", tmp_path / "splits") == ["one", "two"] * 2
    assert read(tmp_path / "splits" / "test") == ["no"]
    (tmp_path / "single" / "cache-1f.arrow").touch()
    names = {Path(f.path).name for f in source_files([str(tmp_path / "single")])}
    assert names == {"data-00000-of-00001.arrow", "dataset_info.json", "state.json"}


def test_source_files_have_size_and_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("four")
    monkeypatch.chdir(tmp_path)
    (found,) = source_files(["a.txt"])
    state = (tmp_path / "a.txt").stat()
    assert found == (str((tmp_path / "a.txt").resolve()), 4, state.st_mtime_ns)


def test_concatenated_zst_frames_are_all_read(tmp_path: Path) -> None:
    pack = zstandard.ZstdCompressor().compress
    (tmp_path / "a.txt.zst").write_bytes(pack(b"one ") + pack(b"two"))
    assert read(tmp_path / "a.txt.zst") == ["one two"]


def test_documents_are_streamed(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good"}\nbad\n')
    assert next(read_documents([str(path)], "text")) == "good"


@pytest.mark.parametrize("ending", [".gz", ".zst"])
@pytest.mark.parametrize("damage", ["cut", "garbage"])
def test_damaged_file(tmp_path: Path, ending: str, damage: str) -> None:
    path = compress(tmp_path / f"a.txt{ending}", bytes(range(48, 122)) * 10)
    whole = path.read_bytes()
    path.write_bytes(whole[:-6] if damage == "cut" else b"garbage" * 20)
    with pytest.raises(UserError, match=r"a\.txt.* is damaged or cut off"):
        read(path)


def test_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("Grüße".encode("latin-1"))
    with pytest.raises(UserError, match=r"a\.txt is not UTF-8"):
        read(tmp_path / "a.txt")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{bad", r"a\.jsonl:2 is not valid JSON"),
        ('{"text": "\udcfc"}', r"a\.jsonl:2 is not UTF-8 text"),
        ("[1]", r"a\.jsonl:2 is not a JSON object"),
        ('{"body": "x"}', r"a\.jsonl:2 has no field 'text'.*\(body\)"),
        ('{"text": 3}', r"a\.jsonl:2 has type int in 'text' instead of text"),
    ],
)
def test_bad_row(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n", errors="surrogateescape")
    with pytest.raises(UserError, match=message):
        read(path)


def test_bad_data_set(tmp_path: Path) -> None:
    data = datasets.Dataset.from_dict({"body": ["one"], "n": [1]})
    data.save_to_disk(str(tmp_path / "single"))
    datasets.DatasetDict({"validation": data}).save_to_disk(str(tmp_path / "splits"))
    with pytest.raises(UserError, match=r"no field 'text'.*body, n"):
        read(tmp_path / "single")
    with pytest.raises(UserError, match=r"has type int in 'n'"):
        read(tmp_path / "single", field="n")
    with pytest.raises(UserError, match=r"no split 'train'.*splits/validation"):
        read(tmp_path / "splits")
    (tmp_path / "single" / "state.json").unlink()
    with pytest.raises(UserError, match="cannot be read"):
        read(tmp_path / "single")


def test_missing_source_is_reported_at_once(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no file or folder '.*none\.txt'"):
        read_documents([str(tmp_path / "none.txt")], "text")
    with pytest.raises(UserError, match=r"no file or folder 'none'"):
        source_files(["none"])


def test_unreadable_kinds(tmp_path: Path) -> None:
    (tmp_path / "a.pdf").write_bytes(b"%PDF")
    for path in (tmp_path, tmp_path / "a.pdf"):
        with pytest.raises(UserError, match=r"no readable text; give files that end in"):
            read(path)


def test_paragraphs_are_prose() -> None:
    text = """Summary of the function, which is long enough.

    A hard-wrapped paragraph with a :class:`~a.Thing`, a ``literal``
    and *emphasis*, that goes on for two lines::

        code = that(is=dropped)

    * A bullet that is wrapped over two lines, the second
      of them indented.
    * Another bullet that stands for itself alone.

    >>> doctest(1)
    A result that looks like a whole sentence of prose.

    ===== =====
    table cells
    ===== =====

    :param x: A parameter that is described in a sentence.

    .. note:: A directive that is dropped with its content.
    """
    assert stdlib_docs.paragraphs(text) == [
        "Summary of the function, which is long enough.",
        "A hard-wrapped paragraph with a a.Thing, a literal and emphasis, that goes on for two "
        "lines:",
        "A bullet that is wrapped over two lines, the second of them indented.",
        "Another bullet that stands for itself alone.",
    ]


def test_stdlib_docs(monkeypatch: pytest.MonkeyPatch) -> None:
    files = stdlib_docs.source_files()
    assert len(files) > 400
    assert not any({"test", "tests", "site-packages"} & set(f.parts[-3:-1]) for f in files)
    assert len(source_files(["stdlib-docs"])) == len(files)
    few = [f for f in files if f.name in ("argparse.py", "copy.py", "os.py", "this.py")]
    monkeypatch.setattr(stdlib_docs, "source_files", lambda: few)
    documents = read("stdlib-docs")
    assert documents == read("stdlib-docs")
    assert all(len(d) >= stdlib_docs.MIN_DOCUMENT for d in documents)
    paragraphs = [p for d in documents for p in d.split("\n\n")]
    assert len(paragraphs) == len(set(paragraphs))
    assert not any(">>>" in p or "::" in p for p in paragraphs)
    assert any("Shallow copy operation on arbitrary Python objects." in d for d in documents)


def test_json_is_one_object_a_line(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"text": "one"}], indent=1))
    with pytest.raises(UserError, match=r"a\.json:1 is not valid JSON.*one JSON object per line"):
        read(path)
