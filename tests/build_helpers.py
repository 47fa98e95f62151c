"""Small mixes to build, and readers of what was built."""

import json
import random
from pathlib import Path
from typing import Any
from unittest.mock import patch

from transformers import PreTrainedTokenizerBase

from data_helpers import byte_tokenizer
from lrc.corpus.mix import Mix
from lrc.corpus.run import build_shards
from lrc.data.shards import Shards, Split, documents_of
from lrc.recipe import validated

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    "{{ eos_token }}"
)


def documents(count: int, seed: int = 0, words: int = 12) -> list[str]:
    """Texts of random words."""
    rng = random.Random(seed)
    letters = "abcdefghijklmnopqrstuvwxyz"
    return [
        " ".join("".join(rng.choices(letters, k=rng.randrange(2, 7))) for _ in range(words))
        for _ in range(count)
    ]


def rows(texts: list[str], **more: Any) -> list[dict[str, Any]]:
    return [{"text": text, **more} for text in texts]


def make_mix(folder: Path, sources: dict[str, Any], **settings: Any) -> Mix:
    """A mix of sources whose paths lie in a folder; near-duplicates are kept by default."""
    values = {"teacher": "bytes", "root": str(folder), "deduplicate": False, **settings}
    return validated(Mix, {"sources": sources, **values}, "The mix")


def build(
    mix: Mix, out: Path, workers: int = 1, tokenizer: PreTrainedTokenizerBase | None = None
) -> Shards:
    """Build a mix silently, without waiting for the disk."""
    with patch("os.fsync"):
        return build_shards(mix, tokenizer or byte_tokenizer(), out, workers)


def texts_of(shards: Shards, split: Split = "train") -> list[tuple[str, str]]:
    """Source and text of every document of a split, in the order of the shards."""
    tokenizer = byte_tokenizer()
    found = []
    for shard in shards.of_split(split):
        for source, ids in documents_of(shard):
            assert ids[0] == tokenizer.bos_token_id
            assert ids[-1] == tokenizer.eos_token_id
            found.append((shards.sources[source], tokenizer.decode(ids[1:-1].tolist())))
    return found


def summary_of(shards: Shards) -> dict[str, Any]:
    """The summary of a build."""
    return json.loads((shards.folder / "summary.json").read_text())


def steps_of(shards: Shards, source: str) -> dict[str, int]:
    """How many documents each step of a source dropped; steps that dropped none are left out."""
    steps = summary_of(shards)["sources"][source]["steps"]
    dropped = {step["step"]: step["documents_in"] - step["documents_out"] for step in steps}
    return {name: count for name, count in dropped.items() if count}


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its content."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}
