"""Read hub data sets with `datasets`."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from lrc.corpus.mix import Source
from lrc.corpus.pieces import missing_field
from lrc.system.errors import UserError
from lrc.system.hub import cache_alone_if_unreachable, no_way


def load(source: Source, columns: set[str]) -> Any:
    """Load the data set of a source: a `Dataset`, or an `IterableDataset` if it is streamed.

    Args:
        source: the source, with `hub` set.
        columns: the required fields; other fields are dropped.

    Raises:
        UserError: if the data set cannot be loaded or lacks a field.
    """
    import datasets  # Slow to import, and most mixes do not need it.

    problem = cache_alone_if_unreachable()
    name, config = source.hub, source.config
    options = {"split": source.split, "revision": source.revision, "streaming": source.streaming}
    try:
        data = datasets.load_dataset(name, config, **options)
    except Exception as error:  # `datasets` lets any error of the network layers through.
        raise UserError(
            f"The data set '{name}' (config {config}, split {source.split}) cannot be loaded "
            f"({no_way(problem, error)}); check its name, config and split, and the connection to "
            "the hub."
        ) from error
    names = data.column_names
    if names is None:  # Without a description, only the rows of a streamed data set show them.
        return data
    heads = {column if column in names else column.partition(".")[0] for column in columns}
    for column in sorted(heads.difference(names)):
        raise missing_field(f"The data set '{name}'", column, names)
    return data.select_columns(sorted(heads))


def arrow_files(data: Any) -> list[Path] | None:
    """The files of a data set on disk; None if it is not on disk, or includes only part of the
    files' rows."""
    import datasets

    if not isinstance(data, datasets.Dataset) or not data.cache_files:
        return None
    files = [Path(entry["filename"]) for entry in data.cache_files]
    rows = sum(len(datasets.Dataset.from_file(str(file))) for file in files)
    return files if rows == len(data) else None


def parts(data: Any) -> list[Callable[[], Any]]:
    """A streamed data set file by file (as divided by `datasets`), each opened when called; any
    other data set is a single part."""
    count = getattr(data, "num_shards", 1) if hasattr(data, "state_dict") else 1
    if count < 2:
        return [lambda: data]
    return [partial(data.shard, num_shards=count, index=index) for index in range(count)]
