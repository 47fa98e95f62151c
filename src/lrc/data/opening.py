"""Open the text that a recipe names for the training loop."""

import logging
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase as Tokenizer

from lrc.data.identity import refuse_not_embedded, tokenizer_identity
from lrc.data.packing import SHORTEST_SEQUENCE, Progress, prepare
from lrc.data.reader import Reader, Sequences, TrainingText
from lrc.data.shards import SPLITS, Shards, Split, open_shards
from lrc.data.stream import StreamedText
from lrc.data.tokens import Tokens
from lrc.recipe import Recipe
from lrc.recipe.sections import DataSection
from lrc.system.checksums import json_sha256
from lrc.system.errors import UserError

logger = logging.getLogger(__name__)


def open_text(
    recipe: Recipe,
    tokenizer: Tokenizer,
    progress: Progress | None = None,
    first_token: int | None = None,
    vocabulary: int | None = None,
) -> Reader:
    """Open the text of a recipe: shards, a stream, or files that are tokenized first.

    Args:
        recipe: the recipe.
        tokenizer: the teacher's tokenizer.
        progress: callback that receives the number of tokens prepared so far.
        first_token: token that every sequence starts with (`Teacher.first_token`); None: any.
        vocabulary: number of token ids that the teacher embeds; None: all of the tokenizer.

    Raises:
        UserError: if the text cannot be read, is too short for one training or held-out sequence,
            or does not fit the tokenizer.
    """
    data, train = recipe.data, recipe.train
    if data.stream is not None:
        return StreamedText(
            data,
            tokenizer,
            train.seed,
            train.eval_sequences,
            progress,
            first_token,
            train.accumulate,
            train.micro_batch,
            vocabulary,
        )
    if data.shards:
        if data.also_held_out:
            logger.warning(
                "Shards are trained on as they were built, even if they hold documents of "
                "data.also_held_out."
            )
        folders = shards_of(data)
        if len({held_out_fraction(folder) for folder in folders}) > 1:
            logger.warning(
                "The shards were built with different held-out fractions, so a document of several "
                "folders may be both held out and trained on: build all with the same."
            )
        for folder in folders:
            folder.require_tokenizer(tokenizer, recipe.teacher.model)
    else:
        packed = prepare(data, tokenizer, progress)
        folders = [Shards.of_cache(packed, tokenizer_identity(tokenizer), data.origin())]
    tokens = max(tokenizer.get_vocab().values()) + 1
    for folder in folders:
        for shard in folder.shards:
            shard.check(tokens, len(folder.sources))
            refuse_not_embedded(tokenizer, shard.largest_token(), vocabulary)
    sequences: dict[Split, Sequences] = {
        split: Sequences(
            _tokens(folders, split), data.sequence_length, data.document_mask, first_token
        )
        for split in SPLITS
    }
    for split, text in sequences.items():
        _check_length(text, split, data.origin())
    return TrainingText(
        sequences["train"],
        sequences["held_out"],
        train.seed,
        identity_of(folders),
        spread=bool(data.shards),
    )


def shards_of(data: DataSection) -> list[Shards]:
    """Open the folders of `data.shards`.

    Raises:
        UserError: if one has no finished shards.
    """
    return [open_shards(Path(folder).expanduser()) for folder in data.shards]


def held_out_fraction(folder: Shards) -> float | None:
    """The share of the documents of a folder that its build held out; None if it does not say."""
    fraction: float | None = folder.build.get("mix", {}).get("held_out_fraction")
    return fraction


def _tokens(folders: Sequence[Shards], split: Split) -> Tokens:
    """Combine one split of all folders; sources with the same name are merged."""
    names = list(dict.fromkeys(name for folder in folders for name in folder.sources))
    own = [[names.index(name) for name in folder.sources] for folder in folders]
    pairs = zip(folders, own, strict=True)
    shards = [(shard, n) for folder, n in pairs for shard in folder.of_split(split)]
    # With a single source, its loss is the loss of the whole text.
    sources = names if len(names) > 1 else ()
    return Tokens([shard for shard, _ in shards], sources, [numbers for _, numbers in shards])


def identity_of(folders: Sequence[Shards]) -> str:
    """Checksum of everything that determines which token is where."""
    return json_sha256([[s.split, s.tokens, s.sha256] for f in folders for s in f.shards])


def _check_length(text: Sequences, split: Split, origin: str) -> None:
    """Reject a split that does not fill one sequence."""
    if len(text):
        return
    what, tokens = {"train": "training", "held_out": "held-out"}[split], len(text.tokens)
    if not tokens:
        how = f"a {what} part" if split == "train" else "a larger held_out_fraction"
        raise UserError(f"The shards in {origin} contain no {what} text: rebuild them with {how}.")
    lower = f" or lower data.sequence_length to at most {tokens}"
    raise UserError(
        f"The shards in {origin} have {tokens} tokens of {what} text, fewer than one sequence of "
        f"{text.sequence_length}; rebuild them with more text"
        f"{lower if tokens >= SHORTEST_SEQUENCE else ''}."
    )
