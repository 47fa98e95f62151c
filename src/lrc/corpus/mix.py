"""A mix: which text `lrc data build` takes from where, how much of it, and what it leaves out.

One YAML file is one mix. Sources stand in the order in which they are read; where two sources hold
nearly the same document, the earlier one keeps it. Every source passes these filters, in this
order, and the summary counts documents before and after each:

    malformed and blank rows, numbers, values, characters, keep_matching, drop_matching,
    overlap with evaluation sets, tokens, near-duplicates (of this and all earlier sources), budget

How much is taken. A source gives

* `tokens: 1B`, that many training tokens; or
* `weight: 0.6`, its share of what the mix's own `tokens` leave after the sources with budgets of
  their own: weights are relative shares of tokens, not of documents; or
* neither: all that it has.

Reading stops as soon as a budget is met, so that a huge source is not read to its end. A source
that has less than its budget runs dry: the build warns, and the mix becomes smaller and its shares
shift, unless `repeat` allows documents to occur several times.
"""

import copy
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

import yaml
from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator

from lrc.recipe import apply_override, validated
from lrc.recipe.sections import Section
from lrc.recipe.shipped import find_yaml
from lrc.system.yaml_files import read_yaml

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_AMOUNT = re.compile(r"\s*([0-9.]+)\s*([KMBT]?)\s*", re.IGNORECASE)
_COMPARISON = re.compile(r"\s*(>=|<=|==|!=|>|<)\s*(-?[0-9.]+(?:e-?[0-9]+)?)\s*")


def _amount(value: Any) -> Any:
    """Read `10B`, `1.5M` or `2e9` as a number of tokens."""
    if isinstance(value, str):
        if match := _AMOUNT.fullmatch(value):
            return round(float(match[1]) * _UNITS[match[2].upper()])
        try:
            value = float(value)
        except ValueError:
            raise ValueError("give a number, such as 500_000, 10M or 2.5B") from None
    return round(value) if isinstance(value, float) else value


def comparisons(text: str) -> list[tuple[str, float]]:
    """Split `>= 3 and < 5` into its comparisons.

    Raises:
        ValueError: the text is not of that form.
    """
    found = [_COMPARISON.fullmatch(part) for part in re.split(r"\band\b|,", text)]
    if not all(found):
        raise ValueError("give comparisons with numbers, such as '>= 4' or '> 0.5 and <= 1'")
    return [(match[1], float(match[2])) for match in found if match]


def _pattern(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"it is no regular expression ({error})") from None
    return text


def _checked_comparisons(text: str) -> str:
    comparisons(text)
    return text


Amount = Annotated[int, BeforeValidator(_amount), Field(gt=0)]
Comparison = Annotated[str, AfterValidator(_checked_comparisons)]
Pattern = Annotated[str, AfterValidator(_pattern)]


class Bounds(Section):
    """A range, both ends included; an end left out is open."""

    min: int | None = Field(None, ge=0)
    """Smallest that is kept."""

    max: int | None = Field(None, gt=0)
    """Largest that is kept."""

    def contain(self, value: int) -> bool:
        """Whether a value lies inside."""
        return (self.min is None or value >= self.min) and (self.max is None or value <= self.max)

    def __str__(self) -> str:
        """Like `200 to 8000`."""
        return f"{0 if self.min is None else self.min} to {'∞' if self.max is None else self.max}"


class Filters(Section):
    """What a source's documents must be like to be kept. Fields may be nested: `meta.language`."""

    numbers: dict[str, Comparison] = Field(default_factory=dict)
    """Numeric fields and the comparison that their values must meet: `{int_score: ">= 4"}`,
    `{score: ">= 2.5 and < 4"}`. An empty field (null) meets none."""

    values: dict[str, list[str | bool | int]] = Field(default_factory=dict)
    """Fields and the values that are kept: `{language: [en]}`."""

    characters: Bounds = Bounds()
    """Length of the text in characters."""

    keep_matching: Pattern | None = None
    """Regular expression that must be found somewhere in the text."""

    drop_matching: Pattern | None = None
    """Regular expression that must not be found in the text."""

    tokens: Bounds = Bounds()
    """Length in tokens, without bos and eos."""


class Source(Section):
    """One source of text: a hub data set (`hub`) or local files (`files`)."""

    hub: str | None = None
    """A data set's id on the hub (`HuggingFaceFW/fineweb-edu`) or whatever else
    `datasets.load_dataset` takes."""

    config: str | None = None
    """Configuration of the hub data set."""

    split: str = "train"
    """Split of the hub data set."""

    revision: str | None = None
    """Revision of the hub data set (branch, tag or commit)."""

    streaming: bool = True
    """Read the hub data set while it is downloaded and keep nothing of it; off: download all of it
    first, which lets all processes read it at once."""

    files: list[str] = Field(default_factory=list)
    """Files, folders or patterns (`text/*.parquet`): Parquet, JSONL (.jsonl, .json) and text (.txt,
    .md, .rst), the latter two plain, .gz or .zst; data sets saved by `datasets`; `stdlib-docs`."""

    shuffle_files: bool = False
    """Read the files in an order drawn by the mix's seed, so that a budget takes its share of a
    large data set here and there and not from its beginning."""

    text: str = "text"
    """Field of the text."""

    chat: str | None = None
    """Field of the conversation, in place of `text`: a list of `{role, content}` (`messages`) or
    of `{from, value}` (ShareGPT). It is rendered with the teacher's chat template."""

    parse_special_tokens: bool = False
    """Whether special tokens that are written out in `text` (`</s>`, `<|im_start|>`) become the
    control tokens themselves; in conversations, those of the chat template always do."""

    weight: float | None = Field(None, gt=0)
    """Share of the mix's tokens."""

    tokens: Amount | None = None
    """Training tokens that are taken."""

    repeat: int = Field(1, ge=1)
    """How often a document may occur where the source has less than its budget."""

    filters: Filters = Filters()
    """What its documents must be like."""

    @model_validator(mode="after")
    def _consistent(self) -> "Source":
        if bool(self.hub) == bool(self.files):
            raise ValueError("give either `hub` or `files`")
        defaults = type(self).model_fields
        set_ = [name for name in defaults if getattr(self, name) != defaults[name].get_default()]
        hub_only = [name for name in ("config", "split", "revision", "streaming") if name in set_]
        if self.files and hub_only:
            raise ValueError(f"{', '.join(hub_only)}: no effect without `hub`")
        if self.chat is not None and "text" in set_:
            raise ValueError("give either `text` or `chat`")
        if self.weight is not None and self.tokens is not None:
            raise ValueError("give either `weight` or `tokens`")
        if self.repeat > 1 and self.weight is None and self.tokens is None:
            raise ValueError("`repeat` has no effect without `weight` or `tokens`")
        return self


class Deduplicate(Section):
    """Near-duplicate removal: MinHash of runs of words, compared band by band.

    Two documents that share a fraction s of their runs are taken for duplicates with probability
    1 - (1 - s^rows)^bands: with the defaults, which are FineWeb's, 5% at s = 0.5, 56% at 0.7,
    92% at 0.8.
    """

    bands: int = Field(14, ge=1, le=64)
    """Bands of a signature; a document is dropped where one equals an earlier document's."""

    rows: int = Field(8, ge=1, le=64)
    """MinHash values of a band."""

    words: int = Field(5, ge=1, le=64)
    """Words of a run."""

    memory_mib: int = Field(1024, ge=1)
    """Largest size of the index in memory: 42 bytes a document with 14 bands (10 million documents
    take 420 MB). Beyond it, more and more documents are dropped by mistake, with a warning."""


class Decontaminate(Section):
    """Removal of documents that overlap evaluation sets."""

    folder: str
    """Folder of the evaluation sets: JSONL files (.gz and .zst too), one a set. Every field of
    text counts, nested ones too, each by itself."""

    words: int = Field(13, ge=2, le=64)
    """A document is dropped where so many words in a row (lower case, without punctuation) stand in
    an evaluation set too."""


class Mix(Section):
    """All that decides what shards hold."""

    teacher: str
    """The model whose tokenizer and chat template are used: a hub id, a folder, a .gguf file or
    `package:NAME`."""

    revision: str | None = None
    """Hub revision of the teacher."""

    tokens: Amount | None = None
    """Training tokens of the whole mix, which `weight`s divide."""

    sources: dict[str, Source] = Field(min_length=1, max_length=1 << 16)
    """The sources by name, in the order in which they are read."""

    deduplicate: Deduplicate | None = Deduplicate()
    """Near-duplicate removal; `false` turns it off."""

    decontaminate: Decontaminate | None = None
    """Removal of what overlaps evaluation sets; empty: none."""

    held_out_fraction: float = Field(0.001, ge=0, lt=1)
    """Share of the documents that is held out, beside the budgets; by their wording, so that the
    same text never stands on both sides."""

    longest_document: int = Field(1_000_000, ge=1_000)
    """Characters; longer documents are divided, at a paragraph's, line's or word's end."""

    bad_rows: int = Field(100, ge=0)
    """Malformed rows of a source that are skipped; one more ends the build."""

    shard_tokens: Amount = 100_000_000
    """About how many tokens a shard has."""

    seed: int = Field(0, ge=0)
    """Decides the order of the documents in the shards."""

    root: str = "."
    """Folder that relative paths of `files` and `decontaminate.folder` start from."""

    @field_validator("deduplicate", mode="before")
    @classmethod
    def _switch(cls, value: Any) -> Any:
        return {True: {}, False: None}[value] if isinstance(value, bool) else value

    @model_validator(mode="after")
    def _budgets_add_up(self) -> "Mix":
        weighted = [name for name, source in self.sources.items() if source.weight is not None]
        fixed = sum(source.tokens or 0 for source in self.sources.values())
        if weighted and self.tokens is None:
            raise ValueError(f"`weight` of '{weighted[0]}' needs `tokens` of the whole mix")
        boundless = [n for n, s in self.sources.items() if s.weight is None and s.tokens is None]
        if self.tokens is not None and boundless:
            raise ValueError(f"'{boundless[0]}' needs a `weight` or `tokens` beside the mix's own")
        if self.tokens is not None and not weighted:
            raise ValueError("`tokens` of the whole mix has no effect without a `weight`")
        if self.tokens is not None and fixed >= self.tokens:
            raise ValueError("the sources' own `tokens` leave nothing of the mix's for weights")
        return self

    def budgets(self) -> dict[str, int | None]:
        """Training tokens that each source is to give; None: all that it has."""
        sources = self.sources.values()
        rest = (self.tokens or 0) - sum(source.tokens or 0 for source in sources)
        whole = sum(source.weight or 0.0 for source in sources)
        return {
            name: round(rest * source.weight / whole) if source.weight else source.tokens
            for name, source in self.sources.items()
        }

    def path(self, relative: str) -> Path:
        """A path of the mix, from its root."""
        return Path(self.root).expanduser() / Path(relative).expanduser()

    def to_yaml(self) -> str:
        """The resolved mix as YAML text, with every default written out."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def load_mix(source: str | Path, overrides: Mapping[str, Any] = MappingProxyType({})) -> Mix:
    """Read a mix from a YAML file, or a shipped one by its name (`mixed-1.1`).

    Args:
        source: path of a YAML file, or the name of a shipped mix.
        overrides: settings that win over the file, by dotted key.

    Raises:
        UserError: the file is missing or not YAML, or a setting is unknown or out of range; all
            mistakes are in the one message.
    """
    settings = copy.deepcopy(read_yaml(find_yaml(source, "mix")))
    for key, value in overrides.items():
        apply_override(settings, key, value)
    return validated(Mix, settings, "The mix")
