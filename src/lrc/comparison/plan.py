"""The plan of a comparison: its typed YAML file and the resulting recipes.

Every entry is the base recipe with some settings changed. Its learning rate is the one in the grid
with the lowest held-out loss after a short budget. Then it trains on the full budget once per seed.
"""

import math
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, field_validator, model_validator

from lrc.methods import unused_settings
from lrc.recipe import Recipe, apply_overrides, make_recipe, validated
from lrc.recipe.learning_rate import OTHERS, is_fitted
from lrc.recipe.sections import Section
from lrc.recipe.shipped import find_yaml
from lrc.system.errors import UserError
from lrc.system.yaml_files import read_yaml

SETTABLE = ("tokens", "seeds", "grid", "thresholds")
"""Settings of a comparison that overrides may change, as they may those of its recipe."""

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.+-]*$")]
Rate = Annotated[float, Field(gt=0)] | Literal["auto"]
"""A learning rate to try; `auto` is that of `train.learning_rate: auto`."""

RESERVED = MappingProxyType(
    {
        "train.tokens": "the comparison's `tokens`",
        "train.seed": "the comparison's `seeds`",
        "initialize.seed": "the comparison's `seeds`",
    }
)
"""Settings of a run that the comparison sets, except the tried rate, and what sets each one."""

HELD_OUT = "held-out"
"""Name of the main held-out text in the table."""


def sorted_rates(rates: Iterable[Rate]) -> list[Rate]:
    """Each of the rates once, `auto` last."""
    return sorted(set(rates), key=lambda rate: math.inf if rate == "auto" else rate)


def written_rate(rate: Rate) -> str:
    """A rate for people and in names of folders."""
    return rate if rate == "auto" else f"{rate:g}"


class Grid(Section):
    """The choice of learning rates: each rate is tried on a short budget."""

    learning_rates: list[Rate] = Field(min_length=1)
    """The rates that every entry tries, unless it names its own."""

    tokens: int = Field(gt=0)
    """Training tokens per try."""

    seed: int = 0
    """Seed of the tries."""


class Entry(Section):
    """One system of the comparison."""

    name: Name
    """Its name in tables, pictures and folders."""

    settings: dict[str, Any] = Field({}, alias="set")
    """Settings that differ from the base recipe, by dotted key, or by section: `train: {optimizer:
    adamw}` changes nothing else of `train`."""

    learning_rates: list[Rate] | None = Field(None, min_length=1)
    """Its own grid; a single rate is used without a search."""

    tries: Literal["learning_rate", "release_learning_rate"] = "learning_rate"
    """The setting of `train` that these rates are for; the other one goes in `set`."""

    rate_of: Name | None = None
    """Entry whose chosen rate this entry uses instead of its own search; for ablations."""

    seeds: list[int] | None = Field(None, min_length=1)
    """Its own seeds. Empty: the comparison's."""

    @field_validator("settings")
    @classmethod
    def _by_setting(cls, settings: dict[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in settings.items():
            if isinstance(value, dict) and "." not in key and key != "method":
                found |= {f"{key}.{name}": own for name, own in value.items()}
            else:
                found[key] = value
        return found

    def reserved(self) -> dict[str, str]:
        """Settings that the comparison sets for this entry, and what sets each one."""
        return {**RESERVED, f"train.{self.tries}": "the entry's `learning_rates`"}


class Comparison(Section):
    """A comparison."""

    recipe: str | dict[str, Any]
    """The base: a recipe's YAML file, the name of a shipped recipe, or the sections themselves."""

    tokens: int = Field(gt=0)
    """Training tokens of every run."""

    seeds: list[int] = Field([0], min_length=1)
    """Each seeds the order of the data and the random part of the initialization."""

    grid: Grid | None = None
    """The choice of learning rates. Not needed if every entry names a single one."""

    thresholds: list[float] = Field(default_factory=list)
    """Held-out losses. The table reports how many tokens each entry needs to reach them."""

    preparation: str | None = None
    """Command that makes teacher and text, if needed; the error message quotes it if they are
    missing."""

    reference: Name | None = None
    """Entry whose parameter count the others are compared with. Empty: the first entry."""

    entries: list[Entry] = Field(min_length=1)

    @field_validator("thresholds")
    @classmethod
    def _once(cls, thresholds: list[float]) -> list[float]:
        return list(dict.fromkeys(thresholds))

    @model_validator(mode="after")
    def _names(self) -> "Comparison":
        names = [entry.name for entry in self.entries]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two entries are named '{name}'; give each its own name")
        searching = [entry.name for entry in self.entries if entry.rate_of is None]
        for entry in self.entries:
            if entry.rate_of is not None and entry.rate_of not in searching:
                raise ValueError(
                    f"entry '{entry.name}' takes the rate of '{entry.rate_of}', which is not an "
                    "entry with its own rate"
                )
            if entry.rate_of is not None and entry.learning_rates is not None:
                raise ValueError(
                    f"entry '{entry.name}' has both rate_of and learning_rates; remove one of them"
                )
        for entry in self.entries:
            own = entry.learning_rates or []
            if self.grid is None and entry.rate_of is None and len(set(own)) != 1:
                raise ValueError(
                    f"without a grid, entry '{entry.name}' needs a single rate in learning_rates; "
                    "add it, or a grid with learning_rates and tokens"
                )
        if self.reference is not None and self.reference not in names:
            raise ValueError(f"the reference '{self.reference}' is not an entry")
        for seeds in (self.seeds, *(entry.seeds or [] for entry in self.entries)):
            if len(set(seeds)) < len(seeds):
                raise ValueError("a seed appears twice")
        return self

    def rates(self, entry: Entry) -> list[Rate]:
        """Learning rates that an entry tries."""
        shared = self.grid.learning_rates if self.grid else []
        return sorted_rates(entry.learning_rates or shared)

    def reference_name(self) -> str:
        """Name of the entry whose parameter count the others are compared with."""
        return self.reference or self.entries[0].name

    def named(self, names: Collection[str]) -> list[Entry]:
        """The entries with the given names, in the comparison's order."""
        return [entry for entry in self.entries if entry.name in names]

    def searching(self, entry: Entry) -> Entry:
        """The entry whose tries choose the rate of an entry: itself, or that of its `rate_of`."""
        return next(other for other in self.entries if other.name == (entry.rate_of or entry.name))

    def tried_rates(self, entry: Entry) -> list[Rate]:
        """The rates that an entry tries; none if it uses another entry's, or a single one."""
        rates = self.rates(entry)
        return rates if entry.rate_of is None and len(rates) > 1 else []

    def searches(self) -> Iterator[tuple[Entry, Rate]]:
        """Every entry and rate to try."""
        return ((entry, rate) for entry in self.entries for rate in self.tried_rates(entry))

    def seeds_of(self, entry: Entry) -> list[int]:
        """The seeds of an entry."""
        return entry.seeds or self.seeds

    def all_seeds(self) -> list[int]:
        """The seeds of all entries, the comparison's first."""
        own = (seed for entry in self.entries for seed in self.seeds_of(entry))
        return list(dict.fromkeys([*self.seeds, *own]))

    def grid_recipe(self, entry: Entry, rate: Rate) -> Recipe:
        """The recipe of a try: without benchmarks."""
        grid = self.grid or Grid(learning_rates=[rate], tokens=self.tokens)
        return self._recipe(entry, rate, grid.tokens, grid.seed, {"train.evaluate": None})

    def run_recipe(self, entry: Entry, rate: Rate, seed: int) -> Recipe:
        """The recipe of a run on the full budget."""
        return self._recipe(entry, rate, self.tokens, seed)

    def _recipe(
        self,
        entry: Entry,
        rate: Rate,
        tokens: int,
        seed: int,
        more: Mapping[str, Any] = MappingProxyType({}),
    ) -> Recipe:
        assert isinstance(self.recipe, dict)  # resolved by `load_comparison`
        decided = {
            "train.tokens": tokens,
            f"train.{entry.tries}": rate,
            "train.seed": seed,
            "initialize.seed": seed,
            **more,
        }
        return make_recipe(self.recipe, {**entry.settings, **decided})


def load_comparison(
    source: str | os.PathLike[str], overrides: Mapping[str, Any] = MappingProxyType({})
) -> Comparison:
    """Read a comparison from a YAML file, or a shipped comparison by name (`fast`).

    Args:
        source: path of a YAML file, or the name of a shipped comparison.
        overrides: by dotted key, settings of the base recipe or of the comparison itself:
            `{"data.text": ["corpus/"], "seeds": [0]}`.

    Returns:
        The comparison, with its base recipe loaded and every entry's recipe checked.

    Raises:
        UserError: if the file is missing, or the file or a recipe has mistakes; one message lists
            all of them.
    """
    path = find_yaml(source, "comparison")
    own = {key: value for key, value in overrides.items() if key.split(".")[0] in SETTABLE}
    overrides = {key: value for key, value in overrides.items() if key not in own}
    what = "The comparison" if own else str(path)
    comparison = validated(Comparison, apply_overrides(_read(path), own), what)
    base = comparison.recipe
    if isinstance(base, str):
        beside = path.parent / base
        base = read_yaml(beside if beside.is_file() else find_yaml(base, "recipe"))
    reserved = {key: by for entry in comparison.entries for key, by in entry.reserved().items()}
    for key in overrides:
        if key in reserved:
            raise UserError(f"'{key}' comes from {reserved[key]}: change that instead.")
    base = apply_overrides(base, overrides)
    changes: dict[str, Any] = {"recipe": base}
    if {"teacher", "teacher.model", "data", "data.text"} & overrides.keys():
        changes["preparation"] = None  # it makes other files
    comparison = comparison.model_copy(update=changes)
    _check_entries(comparison)
    return comparison


def _read(path: Path) -> dict[str, Any]:
    """Read a comparison's YAML file. With `base`, it changes another comparison: `recipe` and
    `grid` setting by setting, an entry by its name, everything else as a whole. `keep` lists the
    base's entries that stay, in their new order, and may place the file's own among them; without
    it all stay. Own entries that it does not name come last.

    Raises:
        UserError: if a file is missing or is no mapping, an entry has no name, or `keep` is no list
            of names or names an unknown entry.
    """
    changes = read_yaml(path)
    if "base" not in changes:
        return changes
    name = str(changes.pop("base"))
    beside = path.parent / name
    settings = _read(beside if beside.is_file() else find_yaml(name, "comparison"))
    for section in ("recipe", "grid"):
        if isinstance(settings.get(section), dict) and isinstance(changes.get(section), dict):
            changes[section] = _merged(settings[section], changes[section])
    entries, own = _by_name(settings, name), _by_name(changes, str(path))
    kept = changes.pop("keep", list(entries))
    if not (isinstance(kept, list) and all(isinstance(entry, str) for entry in kept)):
        raise UserError(f"{path} has mistakes: 'keep' must be a list of names of entries.")
    if unknown := [entry for entry in kept if entry not in entries and entry not in own]:
        raise UserError(f"{path} keeps the entry '{unknown[0]}', which {name} does not have.")
    entries = {
        entry: _merged(entries.get(entry, {}), own.get(entry, {}))
        for entry in dict.fromkeys([*kept, *own])
    }
    return {**settings, **changes, "entries": list(entries.values())}


def _by_name(settings: dict[str, Any], path: str) -> dict[str, dict[str, Any]]:
    entries = settings.get("entries") or []
    if not (
        isinstance(entries, list)
        and all(isinstance(e, dict) and isinstance(e.get("name"), str) for e in entries)
    ):
        raise UserError(f"{path} has mistakes: 'entries' must be a list of entries with a name.")
    return {entry["name"]: entry for entry in entries}


def _merged(settings: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Nested settings with some of them changed; null drops a setting."""
    both = {
        key: _merged(settings[key], value)
        for key, value in changes.items()
        if isinstance(value, dict) and isinstance(settings.get(key), dict)
    }
    merged = {**settings, **changes, **both}
    return {key: value for key, value in merged.items() if value is not None}


def _check_entries(comparison: Comparison) -> None:
    """Refuse entries whose recipes are not valid.

    Raises:
        UserError: if an entry sets a key that the comparison sets or its method does not use, or
            its recipe has mistakes.
    """
    problems = []
    refused: dict[str, list[str]] = {}
    first: dict[str, Any] = {}
    for entry in comparison.entries:
        reserved = entry.reserved()
        problems += [
            f"entry '{entry.name}' sets '{key}', which comes from {reserved[key]}"
            for key in entry.settings
            if key in reserved
        ]
        try:
            recipe = comparison.run_recipe(entry, 1e-4, 0)
        except UserError as error:
            refused.setdefault(str(error).rstrip("."), []).append(entry.name)
            continue
        measured = held_out_settings(recipe)
        first = measured | first
        if other := [key for key, value in measured.items() if value != first[key]]:
            problems.append(
                f"entry '{entry.name}' has another {' and '.join(other)} than the first, so "
                "they would not be measured alike: give all the same"
            )
        if entry == comparison.entries[0] and HELD_OUT in recipe.data.also_held_out:
            problems.append(
                f"data.also_held_out names a text '{HELD_OUT}', which is a column of the table "
                "already: give it another name"
            )
        method = recipe.method.name
        releases = method == "lrc" and recipe.train.release_at < 1
        if entry.tries == "release_learning_rate" and not releases:
            problems.append(
                f"entry '{entry.name}' tries rates for the time after a release, but has no release"
            )
        if entry.tries == "release_learning_rate" and "auto" in comparison.rates(entry):
            problems.append(
                f"entry '{entry.name}' tries the rate 'auto' for the time after a release, which "
                "takes numbers only: give it learning_rates of its own"
            )
        rates = comparison.rates(comparison.searching(entry))
        if "auto" in rates and entry.tries == "learning_rate" and not is_fitted(recipe):
            problems.append(
                f"entry '{entry.name}' tries the rate 'auto', which is no rule for its method or "
                f"random start but always {OTHERS:g}: give it learning_rates of its own"
            )
        problems += [
            f"entry '{entry.name}' sets '{key}', which has no effect with method {method}"
            for key in unused_settings(recipe)
            if any(f"{key}.".startswith(f"{own}.") for own in entry.settings)
        ]
    problems += by_entry(refused, comparison)
    if problems:
        raise UserError("The comparison has mistakes: " + "; ".join(problems) + ".")


def held_out_settings(recipe: Recipe) -> dict[str, Any]:
    """What decides on which held-out tokens and rows of tasks a recipe's students are measured, and
    how."""
    data, teacher = recipe.data, recipe.teacher
    names = ["held_out", "also_held_out", "text_field", "parse_special_tokens", "sequence_length"]
    names += ["document_mask"]
    if not data.held_out:  # then a part of the training text is held out
        names += ["text", "shards", "stream", "held_out_fraction"]
    found = {"teacher.model": teacher.model, "teacher.revision": teacher.revision}
    found |= {f"data.{name}": getattr(data, name) for name in names}
    if (tasks := recipe.train.evaluate) is not None:
        found |= {f"train.evaluate.{name}": getattr(tasks, name) for name in ("limit", "data")}
    return found | {"train.eval_sequences": recipe.train.eval_sequences}


def by_entry(refused: Mapping[str, Sequence[str]], comparison: Comparison) -> list[str]:
    """Problems for people, given the names of the entries that have each."""
    problems = []
    for reason, names in refused.items():
        shared = len(names) == len(comparison.entries) > 1
        entries = ", ".join(f"'{name}'" for name in names)
        problems.append(f"{'all entries' if shared else f'entry {entries}'}: {reason}")
    return problems
