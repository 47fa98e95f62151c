"""Text sources, tokenising and packing, and reading the tokens back in training."""

from lrc.data.batch import Batch
from lrc.data.cache import PackedPart, PackedText
from lrc.data.opening import open_text
from lrc.data.order import Share, ShuffledOrder
from lrc.data.packing import Progress, prepare
from lrc.data.reader import Reader, Sequences, TrainingText
from lrc.data.sources import STDLIB_DOCS, SourceFile, read_documents, source_files
from lrc.data.stream import StreamedText
from lrc.data.tokens import Tokens

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
