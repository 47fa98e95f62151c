"""English prose that ships with CPython: a training text for offline trials and tests.

The text comes from `pydoc_data.topics` (the language reference) and from the docstrings of the
standard library, parsed from its source files. The only library module that runs is the data module
`pydoc_data.topics`. Only paragraphs that read like sentences are kept. Doctests, code, tables,
field lists and grammar are dropped, because a small student would spend its capacity on their
layout. The text differs slightly between Python versions.
"""

import ast
import importlib
import re
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

MIN_PARAGRAPH = 40
"""Length of the shortest paragraph that is kept, in characters."""

MIN_DOCUMENT = 200
"""Length of the shortest document that is kept, in characters."""

_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}

_BULLET = re.compile(r"(?:[*\-+•]|\(?\w{1,2}[.)])\s+(?=\S)")
_DEFINITION = re.compile(r"\S+(?: \S+)?(?:\s+--?\s|:\s+)\S")
_FIELD = re.compile(r":\w+(?: [\w*, ]+)?:(?:\s|$)")
_RULE = re.compile(r"([=\-~*^#\"'`.+_])\1{2,}$")
_TABLE = re.compile(r"[=\-+|\s]{5,}$|\||.*\|\s*$")
_ROLE = re.compile(r":[a-z:]+:`[!~]?([^`<]+?)(?:\s*<[^`]*>)?`")
_CODE = re.compile(r"``?([^`\n]+?)(?:``?|'(?!\w))")
_EMPHASIS = re.compile(r"(?<![\w*])\*{1,2}(\w[\w .,:-]*)\*{1,2}(?![\w*])")
_SENTENCE_END = re.compile(r"[.!?:][\"')\]]*$")
_PLAIN_WORD = re.compile(r"[(\"']*[A-Za-z][a-z'\-]*[,.;:!?)\"']*$")
_MARKUP = re.compile(r"::=|>>>|->|==|\\|[{}<>|=]{2}|\w+\(self")


def source_files() -> list[Path]:
    """The Python files that `documents` reads, in order, without tests."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = (path for path in root.rglob("*.py") if path.is_file())
    return sorted(f for f in files if not _SKIPPED_FOLDERS.intersection(f.relative_to(root).parts))


def documents() -> Iterator[str]:
    """One document per topic of the language reference, then one per module, in a fixed order.

    Paragraphs are separated by blank lines. Repeated paragraphs are skipped.
    """
    seen: set[str] = set()
    for docstrings in _texts():
        kept = []
        for docstring in docstrings:
            for paragraph in paragraphs(docstring):
                if paragraph not in seen:
                    seen.add(paragraph)
                    kept.append(paragraph)
        document = "\n\n".join(kept)
        if len(document) >= MIN_DOCUMENT:
            yield document


def _texts() -> Iterator[Iterable[str]]:
    """The raw texts of each document."""
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        topics = {}  # Some Python distributions omit it.
    for name in sorted(topics):
        yield [topics[name]]
    for path in source_files():
        yield _docstrings(path)


def _docstrings(path: Path) -> list[str]:
    """Docstrings of a module, its classes and its functions, in source order."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Invalid escapes in library strings.
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError, OSError):
            return []  # A template, or a file for another Python version.
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(tree) if isinstance(node, owners)]
    nodes.sort(key=lambda node: getattr(node, "lineno", 0))
    return [text for node in nodes if (text := ast.get_docstring(node))]


def paragraphs(text: str) -> list[str]:
    """The paragraphs of a docstring or reStructuredText page that read like sentences.

    Hard-wrapped lines are joined and inline markup is removed.
    """
    joined = (" ".join(" ".join(lines).split()) for lines in _blocks(text))
    return [plain for paragraph in joined if _reads_like_prose(plain := _plain(paragraph))]


def _blocks(text: str) -> Iterator[list[str]]:
    """Groups of lines, one per paragraph; code, tables and fields are dropped."""
    block: list[str] = []
    margin = hang = 0  # Indentation of the block's first line, and of its continuation lines.
    literal: int | None = None  # Drop everything indented deeper than this.
    in_doctest = False
    for line in [*text.expandtabs().splitlines(), ""]:
        stripped = line.strip()
        indent = len(line) - len(line.lstrip())
        ends = not stripped or bool(_RULE.match(stripped)) or bool(_TABLE.match(stripped))
        if not stripped:
            in_doctest = False
        elif literal is not None and indent > literal:
            ends = True
        else:
            literal = None
            if stripped.startswith(">>>"):
                in_doctest = True
            if stripped.startswith(".. ") or _FIELD.match(stripped):
                literal, ends = indent, True
        if block and (ends or in_doctest or _starts_new(stripped, indent, margin, hang, block)):
            if block[-1].endswith("::"):
                block[-1] = block[-1][:-1]
                if ends:
                    literal = margin
            yield block
            block = []
        if ends or in_doctest:
            continue
        if not block:
            margin = indent
            marker = _BULLET.match(stripped)
            hang = indent + (marker.end() if marker else 0)
        elif len(block) == 1 and _DEFINITION.match(block[0]):
            hang = indent
        block.append(stripped)


def _starts_new(stripped: str, indent: int, margin: int, hang: int, block: list[str]) -> bool:
    """Whether a line begins a new paragraph without a blank line before it."""
    if _BULLET.match(stripped) and stripped[0] in "*-+•":
        return True
    if len(block) == 1 and _DEFINITION.match(block[0]) and indent > margin:
        return False
    return indent not in (margin, hang)


def _plain(paragraph: str) -> str:
    """Remove bullet, roles, code quotes and emphasis marks from a paragraph."""
    if marker := _BULLET.match(paragraph):
        paragraph = paragraph[marker.end() :]
    paragraph = _ROLE.sub(r"\1", paragraph)
    paragraph = _CODE.sub(r"\1", paragraph)
    return _EMPHASIS.sub(r"\1", paragraph)


def _reads_like_prose(paragraph: str) -> bool:
    """Whether a paragraph is long enough, starts and ends like a sentence and is mostly words."""
    words = paragraph.split()
    return (
        len(paragraph) >= MIN_PARAGRAPH
        and len(words) >= 5
        and (paragraph[0].isupper() or paragraph[0] in "\"'(" or len(words) >= 12)
        and _SENTENCE_END.search(paragraph) is not None
        and _MARKUP.search(paragraph) is None
        and sum(1 for word in words if _PLAIN_WORD.match(word)) >= 0.75 * len(words)
    )
