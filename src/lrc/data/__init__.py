"""Text sources, tokenising and packing to a cache, and reading it back."""

from lrc.data.batch import Batch
from lrc.data.cache import PackedPart, PackedText
from lrc.data.packing import Progress, prepare
from lrc.data.reader import Sequences, ShuffledOrder, TrainingText
from lrc.data.sources import STDLIB_DOCS, SourceFile, read_documents, source_files

__all__ = [
    "STDLIB_DOCS",
    "Batch",
    "PackedPart",
    "PackedText",
    "Progress",
    "Sequences",
    "ShuffledOrder",
    "SourceFile",
    "TrainingText",
    "prepare",
    "read_documents",
    "source_files",
]
