"""A mix: which text `lrc data build` takes, from where, how much, and what it filters out.

One YAML file is one mix. Sources are read in the order given; if two sources contain nearly the
same document, the earlier source keeps it. Every source passes these filters, in this order, and
the summary counts documents before and after each:

    malformed and blank rows, numbers, values, characters, keep_matching, drop_matching,
    overlap with evaluation sets, tokens, near-duplicates (of this and all earlier sources), budget

The amount of text taken from a source depends on its settings:

* `tokens: 1B`: that many training tokens; or
* `weight: 0.6`: a share of the mix's `tokens` that remain after the sources with their own budgets;
  weights are relative shares of tokens, not of documents; or
* neither: all its text.

Reading stops once a budget is met, so a huge source is not read to its end. A source with less text
than its budget runs dry: the build warns, the mix becomes smaller and its shares shift, unless
`repeat` allows documents to occur several times.
"""

import copy
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

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
        match = _AMOUNT.fullmatch(value)
        try:
            value = float(match[1]) * _UNITS[match[2].upper()] if match else float(value)
        except ValueError:
            value = math.nan
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("give a number, such as 500_000, 10M or 2.5B")
    return round(value) if isinstance(value, float) else value


def comparisons(text: str) -> list[tuple[str, float]]:
    """Split `>= 3 and < 5` into its comparisons.

    Raises:
        ValueError: if the text does not have that form.
    """
    found = [_COMPARISON.fullmatch(part) for part in re.split(r"\band\b|,", text)]
    if not all(found):
        raise ValueError("give comparisons with numbers, such as '>= 4' or '> 0.5 and <= 1'")
    return [(match[1], float(match[2])) for match in found if match]


def _pattern(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"not a valid regular expression ({error})") from None
    return text


def _checked_comparisons(text: str) -> str:
    comparisons(text)
    return text


Amount = Annotated[int, BeforeValidator(_amount), Field(gt=0)]
Comparison = Annotated[str, AfterValidator(_checked_comparisons)]
Pattern = Annotated[str, AfterValidator(_pattern)]


class Bounds(Section):
    """An inclusive range; an omitted end is open."""

    min: int | None = Field(None, ge=0)
    """Smallest value kept."""

    max: int | None = Field(None, gt=0)
    """Largest value kept."""

    def contain(self, value: int) -> bool:
        """Whether a value is in the range."""
        return (self.min is None or value >= self.min) and (self.max is None or value <= self.max)

    def __str__(self) -> str:
        """The range as text, such as `200 to 8000`."""
        return f"{0 if self.min is None else self.min} to {'∞' if self.max is None else self.max}"


class Filters(Section):
    """Conditions that a source's documents must meet. Fields may be nested: `meta.language`."""

    numbers: dict[str, Comparison] = Field(default_factory=dict)
    """Numeric fields and the comparison that their values must meet: `{int_score: ">= 4"}`,
    `{score: ">= 2.5 and < 4"}`. An empty field (null) never meets a comparison."""

    values: dict[str, list[str | bool | int]] = Field(default_factory=dict)
    """Fields and the values to keep: `{language: [en]}`."""

    characters: Bounds = Bounds()
    """Length of the text in characters."""

    keep_matching: Pattern | None = None
    """Regular expression that must match somewhere in the text."""

    drop_matching: Pattern | None = None
    """Regular expression that must not match anywhere in the text."""

    tokens: Bounds = Bounds()
    """Length in tokens, without bos and eos."""

    @field_validator("values")
    @classmethod
    def _quoted(cls, values: dict[str, list[Any]]) -> dict[str, list[Any]]:
        for field, kept in values.items():
            kinds = {type(value) for value in kept}
            if bool in kinds and str in kinds:
                raise ValueError(
                    f"'{field}' has both texts and {next(v for v in kept if isinstance(v, bool))}: "
                    "YAML reads no, yes, on and off as truth values, so put them in quotes"
                )
        return values


class Source(Section):
    """One source of text: a hub data set (`hub`) or local files (`files`)."""

    hub: str | None = None
    """A data set's hub id (`HuggingFaceFW/fineweb-edu`) or anything else that
    `datasets.load_dataset` accepts."""

    config: str | None = None
    """Configuration of the hub data set."""

    split: str = "train"
    """Split of the hub data set."""

    revision: str | None = None
    """Revision of the hub data set (branch, tag or commit)."""

    streaming: bool = True
    """Read the hub data set during the download and store none of it. Off: download all of it
    first, which lets all processes read it in parallel."""

    files: list[str] = Field(default_factory=list)
    """Files, folders or patterns (`text/*.parquet`): Parquet, JSONL (.jsonl, .json) and text (.txt,
    .md, .rst), the latter two plain, .gz or .zst; data sets saved by `datasets`; `stdlib-docs`."""

    shuffle_files: bool = False
    """Read the files in an order drawn from the mix's seed, so that a budget samples a large data
    set throughout and not only from its beginning."""

    text: str = "text"
    """Field with the text."""

    chat: str | None = None
    """Field with the conversation, instead of `text`: a list of `{role, content}` (`messages`) or
    of `{from, value}` (ShareGPT). It is rendered with the teacher's chat template."""

    parse_special_tokens: bool = False
    """Whether special tokens written out in `text` (`</s>`, `<|im_start|>`) become control tokens;
    in conversations, those of the chat template always do."""

    weight: float | None = Field(None, gt=0)
    """Share of the mix's tokens."""

    tokens: Amount | None = None
    """Number of training tokens to take."""

    repeat: int = Field(1, ge=1)
    """How often a document may occur if the source has less text than its budget."""

    filters: Filters = Filters()
    """Conditions that its documents must meet."""

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

    Two documents that share a fraction s of their runs count as duplicates with probability
    1 - (1 - s^rows)^bands. With the defaults, which are FineWeb's, this is 5% at s = 0.5, 56% at
    0.7, and 92% at 0.8.
    """

    bands: int = Field(14, ge=1, le=64)
    """Bands per signature; a document is dropped if one band equals an earlier document's."""

    rows: int = Field(8, ge=1, le=64)
    """MinHash values per band."""

    words: int = Field(5, ge=1, le=64)
    """Words per run."""

    memory_mib: int = Field(1024, ge=1)
    """Maximum size of the in-memory index: 42 bytes per document with 14 bands (10 million
    documents take 420 MB). Beyond it, more and more documents are dropped by mistake, with a
    warning."""


class Decontaminate(Section):
    """Removal of documents that overlap evaluation sets."""

    folder: str
    """Folder of the evaluation sets: JSONL files (also .gz and .zst), one per set. Every text field
    counts separately, including nested fields."""

    words: int = Field(13, ge=2, le=64)
    """A document is dropped if this many consecutive words (lower case, without punctuation) also
    occur in an evaluation set."""


class Mix(Section):
    """Everything that determines the content of the shards."""

    teacher: str
    """The model whose tokenizer and chat template are used: a hub id, a folder, a .gguf file or
    `package:NAME`."""

    revision: str | None = None
    """Hub revision of the teacher."""

    tokens: Amount | None = None
    """Training tokens of the whole mix, divided according to each source's `weight`."""

    sources: dict[str, Source] = Field(min_length=1, max_length=1 << 16)
    """The sources by name, in the order in which they are read."""

    deduplicate: Deduplicate | None = Deduplicate()
    """Near-duplicate removal; `false` turns it off."""

    decontaminate: Decontaminate | None = None
    """Removal of documents that overlap evaluation sets; off if empty."""

    held_out_fraction: float = Field(0.001, ge=0, lt=1)
    """Share of the documents that is held out, in addition to the budgets; determined by their
    content, so that the same text is never in both splits."""

    longest_document: int = Field(1_000_000, ge=1_000)
    """Maximum length in characters; longer documents are split at the end of a paragraph, line or
    word."""

    bad_rows: int = Field(100, ge=0)
    """Malformed rows of a source that are skipped; one more stops the build."""

    shard_tokens: Amount = 100_000_000
    """Approximate number of tokens per shard."""

    seed: int = Field(0, ge=0, lt=1 << 64)
    """Seed of the order of the documents in the shards."""

    root: str = "."
    """Base folder for relative paths in `files` and `decontaminate.folder`."""

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
            raise ValueError(f"'{boundless[0]}' needs its own `weight` or `tokens`")
        if self.tokens is not None and not weighted:
            raise ValueError("`tokens` of the whole mix has no effect without a `weight`")
        if self.tokens is not None and fixed >= self.tokens:
            raise ValueError(
                "the sources' own `tokens` leave nothing of the mix's `tokens` for weights"
            )
        if none := [name for name, budget in self.budgets().items() if budget == 0]:
            raise ValueError(
                f"the weight of '{none[0]}' leaves it no token: raise it, or remove it"
            )
        return self

    def budgets(self) -> dict[str, int | None]:
        """Training tokens to take from each source; None means all its text."""
        sources = self.sources.values()
        rest = (self.tokens or 0) - sum(source.tokens or 0 for source in sources)
        whole = sum(source.weight or 0.0 for source in sources)
        return {
            name: round(rest * source.weight / whole) if source.weight else source.tokens
            for name, source in self.sources.items()
        }

    def path(self, relative: str) -> Path:
        """Resolve a path of the mix relative to its root."""
        return Path(self.root).expanduser() / Path(relative).expanduser()


def absolute(path: str | os.PathLike[str]) -> str:
    """A path relative to the present folder, as one that does not depend on the mix's root."""
    return str(Path(path).expanduser().absolute())


def load_mix(source: str | Path, overrides: Mapping[str, Any] = MappingProxyType({})) -> Mix:
    """Read a mix from a YAML file, or a shipped mix by name (`mixed-1.1`).

    Args:
        source: path of a YAML file, or the name of a shipped mix.
        overrides: settings that override the file, by dotted key.

    Raises:
        UserError: if the file is missing or not YAML, or a setting is unknown or out of range; one
            message lists all mistakes.
    """
    settings = copy.deepcopy(read_yaml(find_yaml(source, "mix")))
    for key, value in overrides.items():
        apply_override(settings, key, value)
    return validated(Mix, settings, "The mix")
