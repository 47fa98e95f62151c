"""What the Python interface takes as objects: loaded teachers, and texts."""

import gc
import hashlib
import json
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from lrc.model.teacher import Teacher, as_teacher
from lrc.recipe import Recipe
from lrc.recipe.sections import TeacherSection
from lrc.system.checksums import cache_root
from lrc.system.errors import UserError, reason
from lrc.system.files import new_file
from lrc.system.random_state import same_random_state

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

StrPath = str | os.PathLike[str]

Text = StrPath | Sequence[StrPath] | Iterable[str] | Iterable[Mapping[str, Any]]
"""Training text: a path or `stdlib-docs`; a list or tuple of these; a data set of `datasets` (a
`Dataset` or an `IterableDataset`); or any other iterable of documents as strings."""

CHARACTERS_PER_TOKEN, CHARACTERS = 16, 1_000_000
"""Text objects are read up to this many characters for every token that a run trains on, far more
than any tokenizer needs, and at least up to this many in all. They may be endless."""


def loaded_teacher(
    teacher: "Teacher | PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase | None",
    name: str | None = None,
) -> Teacher:
    """A loaded teacher, wrapped if it is a transformers model."""
    from transformers import PreTrainedModel

    if isinstance(teacher, Teacher):
        return teacher
    if not isinstance(teacher, PreTrainedModel):
        raise UserError(
            f"The teacher is a {type(teacher).__name__}: give its name or folder, a transformers "
            "model with its tokenizer, or a loaded lrc.Teacher."
        )
    if tokenizer is None:
        raise UserError("A teacher that is a transformers model needs its tokenizer: give both.")
    known = name or getattr(teacher.config, "_name_or_path", "") or type(teacher).__name__
    return as_teacher(teacher, tokenizer, known)


@contextmanager
def as_before(model: Any = None) -> Iterator[None]:
    """Context after which the caller's random numbers, and the modes and gradients of its loaded
    model, are as they were.

    Args:
        model: what the caller gives as a teacher; anything but a transformers model is left alone.
    """
    loaded = model if isinstance(model, nn.Module) else nn.Module()
    modes = [(module, module.training) for module in loaded.modules()]
    trained = [(value, value.requires_grad) for value in loaded.parameters()]
    with same_random_state():
        try:
            yield
        finally:
            gc.collect()  # hooks and what they belong to refer to each other
            for module, mode in modes:
                module.training = mode
            for value, needed in trained:
                value.requires_grad_(needed)


def refuse_loading(section: TeacherSection, teacher: Teacher) -> None:
    """Refuse settings about how a teacher is loaded that differ from how it was loaded.

    Raises:
        UserError: if there is one.
    """
    config = teacher.config
    as_loaded = {
        "revision": (None,),
        "dtype": ("auto", str(teacher.model.dtype).removeprefix("torch.")),
        "load": ("full",),
        "tie_head": (False, bool(config.tie_word_embeddings)),
        "attention": ("auto", config._attn_implementation),
    }
    other = [name for name, values in as_loaded.items() if getattr(section, name) not in values]
    if other:
        names = ", ".join(f"teacher.{name}" for name in other)
        raise UserError(
            f"The teacher is loaded already, so {names} would have no effect: load it that way and "
            "leave the setting out, or give its name or folder."
        )


def are_paths(text: Text | None) -> bool:
    """Whether a text is named by paths, or not given, instead of being an object."""
    if isinstance(text, list | tuple):
        return not any(isinstance(one, Mapping) for one in text)
    return text is None or isinstance(text, str | os.PathLike)


def paths_of(text: StrPath | Sequence[StrPath] | None) -> list[str]:
    """Paths of text as strings.

    Raises:
        UserError: if something else is among them.
    """
    if text is None:
        return []
    paths = [text] if isinstance(text, str | os.PathLike) else text
    if other := next((one for one in paths if not isinstance(one, str | os.PathLike)), None):
        raise UserError(f"The text holds a {type(other).__name__}: give paths, or documents alone.")
    return [os.fspath(path) for path in paths]


def _rows(text: Iterable[Any]) -> Iterator[Any]:
    """The rows of a text object, whose own errors are not those of the file that they go to."""
    try:
        yield from text
    except OSError as error:
        raise UserError(f"The text cannot be read ({reason(error)}).") from error


def written_text(text: Iterable[Any], recipe: Recipe) -> Path:
    """A text object as a JSONL file in the cache, named by its content.

    Raises:
        UserError: if it holds something else than documents.
    """
    if isinstance(text, Mapping):  # as `datasets` loads a data set without `split`
        raise UserError(f"The text has several parts ({', '.join(map(str, text))}): give one.")
    field, train = recipe.data.text_field, recipe.train
    wanted = train.tokens + recipe.initialize.calibration_tokens
    wanted += train.eval_sequences * recipe.data.sequence_length
    needed = CHARACTERS_PER_TOKEN * wanted / (1 - recipe.data.held_out_fraction)
    left = max(CHARACTERS, needed)
    folder = cache_root(recipe.data.cache) / "texts"
    digest, written = hashlib.sha256(), folder / f"{secrets.token_hex(8)}.jsonl"
    with new_file(written) as temporary, temporary.open("w", encoding="utf-8") as file:
        for row in _rows(text):
            document = row
            if isinstance(row, Mapping) and field in row:
                document = "" if row[field] is None else row[field]
            if not isinstance(document, str):
                raise UserError(
                    f"The text holds a {type(document).__name__}: give strings, or rows with text "
                    f"in '{field}' (data.text_field)."
                )
            line = json.dumps({field: document}) + "\n"
            digest.update(line.encode())
            file.write(line)
            left -= len(document)
            if left < 0:
                break
    return written.replace(folder / f"{digest.hexdigest()[:16]}.jsonl")
