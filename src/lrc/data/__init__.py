"""Text sources, tokenizing and packing into a cache or shards, and reading tokens in training."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lrc.data.batch import Batch
    from lrc.data.cache import PackedPart, PackedText
    from lrc.data.opening import open_text
    from lrc.data.order import Share, ShuffledOrder
    from lrc.data.packing import Progress, prepare
    from lrc.data.reader import Reader, Sequences, TrainingText
    from lrc.data.sources import STDLIB_DOCS, SourceFile, read_documents, source_files
    from lrc.data.stream import StreamedText
    from lrc.data.tokens import Tokens

_HOME = {
    "STDLIB_DOCS": "lrc.data.sources",
    "Batch": "lrc.data.batch",
    "PackedPart": "lrc.data.cache",
    "PackedText": "lrc.data.cache",
    "Progress": "lrc.data.packing",
    "Reader": "lrc.data.reader",
    "Sequences": "lrc.data.reader",
    "Share": "lrc.data.order",
    "ShuffledOrder": "lrc.data.order",
    "SourceFile": "lrc.data.sources",
    "StreamedText": "lrc.data.stream",
    "Tokens": "lrc.data.tokens",
    "TrainingText": "lrc.data.reader",
    "open_text": "lrc.data.opening",
    "prepare": "lrc.data.packing",
    "read_documents": "lrc.data.sources",
    "source_files": "lrc.data.sources",
}

__all__ = [
    "STDLIB_DOCS",
    "Batch",
    "PackedPart",
    "PackedText",
    "Progress",
    "Reader",
    "Sequences",
    "Share",
    "ShuffledOrder",
    "SourceFile",
    "StreamedText",
    "Tokens",
    "TrainingText",
    "open_text",
    "prepare",
    "read_documents",
    "source_files",
]


def __getattr__(name: str) -> Any:
    """Import a public name on first use: `lrc data build` processes do not need torch, which takes
    200 MB in each."""
    if name not in _HOME:
        raise AttributeError(f"module 'lrc.data' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
