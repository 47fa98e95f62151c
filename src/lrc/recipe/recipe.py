"""A run's whole configuration, typed and validated: one YAML file is one run.

`lrc.recipe.sections` defines the settings. The error for an unknown key names the nearest valid
key, and one message lists all mistakes of a file.
"""

import copy
import difflib
import hashlib
import os
from collections.abc import Iterable, Mapping
from types import MappingProxyType, NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import ValidationError, ValidationInfo, field_validator, model_validator

from lrc.recipe.method_sections import METHOD_SECTIONS, LrcSection, MethodSection
from lrc.recipe.sections import (
    LLAMA_TERMS,
    DataSection,
    InitializeSection,
    ObjectiveSection,
    Section,
    StudentSection,
    TeacherSection,
    TrainSection,
)
from lrc.recipe.shipped import find_yaml
from lrc.system.errors import UserError
from lrc.system.yaml_files import parse_yaml, read_yaml

SectionType = TypeVar("SectionType", bound=Section)

SHORT_FORMS = {"method": "name", "initialize": "method"}

KEEP_THE_REST = ("initialize",)
"""Sections of which a short form changes one setting. That of `method` is another section, with
other settings."""
"""Sections that can be written as a single value: `initialize: random`."""

ORIGINS = ("text", "shards", "stream")
"""Settings of the data section; a recipe must give exactly one."""


class Recipe(Section):
    """Everything that determines what a run does."""

    method: MethodSection = LrcSection(name="lrc")
    teacher: TeacherSection
    student: StudentSection
    initialize: InitializeSection = InitializeSection()
    objective: ObjectiveSection = ObjectiveSection()
    data: DataSection
    train: TrainSection = TrainSection()

    @field_validator(*SHORT_FORMS, mode="before")
    @classmethod
    def _name_alone(cls, value: Any, info: ValidationInfo) -> Any:
        return {SHORT_FORMS[str(info.field_name)]: value} if isinstance(value, str) else value

    @model_validator(mode="before")
    @classmethod
    def _objective_of_the_method(cls, settings: Any) -> Any:
        """Use the loss settings of the method's paper where the recipe gives none."""
        if not isinstance(settings, dict):
            return settings
        method, given = settings.get("method"), settings.get("objective") or {}
        name = method.get("name") if isinstance(method, dict) else method
        own = getattr(METHOD_SECTIONS.get(str(name)), "objective", None)
        if own is None or not isinstance(given, dict):
            return settings
        return {**settings, "objective": {**own, **given}}

    @model_validator(mode="after")
    def _something_to_learn(self) -> "Recipe":
        loss = self.objective
        weights = (
            loss.kl_weight,
            loss.lm_weight,
            not loss.clone.off().issuperset(LLAMA_TERMS) and loss.clones_at(1),
        )
        if isinstance(self.method, LrcSection) and not any(weights):
            raise ValueError(
                "every loss is off, at least at the end of the run: set kl_weight, lm_weight or "
                "alpha above 0"
            )
        if loss.alignment == "explicit" and loss.attn_out == "teacher":
            raise ValueError(
                "objective.alignment: explicit aligns attention outputs itself; set "
                "objective.attn_out to student"
            )
        return self

    @model_validator(mode="after")
    def _layers_on_disk(self) -> "Recipe":
        if self.teacher.load == "layers" and not isinstance(self.method, LrcSection):
            raise ValueError(
                f"teacher.load: layers works only with method lrc, not with {self.method.name}; "
                "set teacher.load to full"
            )
        return self

    @model_validator(mode="after")
    def _one_origin(self) -> "Recipe":
        given = [name for name in ORIGINS if getattr(self.data, name)]
        if len(given) != 1:
            names = " and ".join(f"data.{name}" for name in given) or "none"
            raise ValueError(f"give one of data.text, data.shards and data.stream, not {names}")
        if self.data.held_out and given != ["text"]:
            raise ValueError(f"data.held_out goes with data.text, not with data.{given[0]}")
        return self

    def step_tokens(self) -> int:
        """Tokens per optimizer step."""
        return self.train.step_sequences() * self.data.sequence_length

    def steps(self) -> int:
        """Optimizer steps in the whole run."""
        return -(-self.train.tokens // self.step_tokens())

    def fingerprint(self) -> str:
        """A checksum of the recipe, which ties checkpoints to it.

        Settings at their defaults are left out, so that a new setting keeps older checkpoints
        valid. `teacher.load` and `teacher.shard` are left out too, because they change no result.
        """
        places = {"teacher": {"load", "shard"}}
        settings = self.model_dump_json(exclude_defaults=True, exclude=places)
        return hashlib.sha256(settings.encode()).hexdigest()

    def to_yaml(self) -> str:
        """The resolved recipe as YAML text, with every default written out."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def load_recipe(
    source: str | os.PathLike[str], overrides: Mapping[str, Any] = MappingProxyType({})
) -> Recipe:
    """Read a recipe from a YAML file, or a shipped recipe by name (`quickstart`).

    Args:
        source: path of a YAML file, or the name of a shipped recipe.
        overrides: settings that override the file, by dotted key: `{"train.tokens": 10_000}`.

    Raises:
        UserError: if the file is missing or not YAML, or a setting is unknown or out of range; one
            message lists all mistakes.
    """
    return make_recipe(read_yaml(find_yaml(source, "recipe")), overrides)


def make_recipe(
    settings: dict[str, Any], overrides: Mapping[str, Any] = MappingProxyType({})
) -> Recipe:
    """Validate nested settings after applying overrides by dotted key.

    Raises:
        UserError: if a setting is unknown, missing or out of range.
    """
    return validated(Recipe, apply_overrides(settings, overrides), "The recipe")


def validated(kind: type[SectionType], settings: Any, what: str) -> SectionType:
    """Validate settings.

    Args:
        kind: class of the section to build.
        settings: nested settings.
        what: name of the whole in messages.

    Raises:
        UserError: if a setting is unknown, missing or out of range; the message lists all mistakes.
    """
    if null := [key for key, value in flatten({"": settings}).items() if "\0" in str(value)]:
        raise UserError(f"{what} has mistakes: '{null[0].strip('.')}' holds a null character.")
    try:
        return kind.model_validate(settings)
    except ValidationError as error:
        found: dict[tuple[str, ...], list[Any]] = {}
        for problem in error.errors():
            if problem["type"] == "default_factory_not_called":
                continue  # another setting has a mistake
            found.setdefault(_setting(problem["loc"], kind)[0], []).append(problem)
        within = {at[:length] for at in found for length in range(1, len(at))}
        problems = [_explain(same, kind, what) for at, same in found.items() if at not in within]
        raise UserError(f"{what} has mistakes: {'; '.join(problems)}.") from error


def flatten(section: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested settings to dotted keys."""
    flat: dict[str, Any] = {}
    for name, value in section.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def apply_overrides(settings: dict[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Copy nested settings and set some of them by dotted key.

    Raises:
        UserError: if a part of a key before its last one names a value, not a section.
    """
    settings = copy.deepcopy(settings)
    _drop_origins(settings, overrides)
    for key, value in overrides.items():
        apply_override(settings, key, value)
    return settings


def parse_override(text: str) -> tuple[str, Any]:
    """Split `section.key=value`, where the value is YAML.

    Raises:
        UserError: if the text does not have that form.
    """
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UserError(f"'{text}' is not a setting; write it as section.key=value.")
    try:
        return key, parse_yaml(value)
    except UserError as error:
        raise UserError(f"The value of '{text}' is not valid YAML ({error}).") from error


def parse_overrides(texts: Iterable[str], flags: Mapping[str, tuple[str, Any]]) -> dict[str, Any]:
    """Collect settings from `section.key=value` texts and from command-line flags.

    Args:
        texts: texts for `parse_override`.
        flags: by dotted key, its flag and the flag's value; None or no value means not given.

    Raises:
        UserError: if a text does not have that form, a flag's value is an empty text, or a key is
            given twice.
    """
    pairs = [(flag, key, value) for key, (flag, value) in flags.items() if value not in (None, [])]
    for flag, _, value in pairs:
        if value == "" or (isinstance(value, list) and "" in value):
            raise UserError(f"{flag} is empty: give it a value, or leave it out.")
    pairs += [(f"--set {key}", key, value) for key, value in map(parse_override, texts)]
    return combine(pairs)


def combine(given: Iterable[tuple[str, str, Any]]) -> dict[str, Any]:
    """Collect settings that come from several places, by dotted key.

    Args:
        given: how a setting was given, for messages, its dotted key, and its value.

    Raises:
        UserError: if a key is given twice, or a section would replace a setting that is given.
    """
    found: dict[str, Any] = {}
    known: dict[str, str] = {}
    for how, key, value in given:
        short = key in SHORT_FORMS and isinstance(value, str)
        means = f"{key}.{SHORT_FORMS[key]}" if short else key
        if means in known:
            twice = f"{how} twice" if known[means] == how else f"{known[means]} and {how}"
            raise UserError(f"'{means}' is given more than once ({twice}): give it once.")
        replaced = None if short and key in KEEP_THE_REST else f"{key}."
        below = next((k for k in known if replaced and k.startswith(replaced)), None)
        if below is not None:
            raise UserError(
                f"{how} replaces all of '{key}', also {below} ({known[below]}): set single "
                f"settings of '{key}', or give it first."
            )
        known[means], found[key] = how, value
    return found


def names_text(overrides: Mapping[str, Any]) -> bool:
    """Whether settings by dotted key say which text to learn from."""
    inside = overrides.get("data")
    names = [key.split(".")[1] for key in overrides if key.startswith("data.")]
    return not {*names, *(inside if isinstance(inside, dict) else ())}.isdisjoint(ORIGINS)


def apply_override(settings: dict[str, Any], key: str, value: Any) -> None:
    """Set one dotted key in nested settings."""
    *parents, last = key.split(".")
    for parent in parents:
        below = settings.get(parent)
        if below is None:
            below = settings[parent] = {}
        elif isinstance(below, str) and parent in SHORT_FORMS:
            below = settings[parent] = {SHORT_FORMS[parent]: below}
        if not isinstance(below, dict):
            raise UserError(f"'{key}' cannot be set: '{parent}' is a value, not a section.")
        settings = below
    if not parents and last in KEEP_THE_REST and isinstance(value, str):
        rest = settings.get(last)
        value = {**(rest if isinstance(rest, dict) else {}), SHORT_FORMS[last]: value}
    settings[last] = value


def _drop_origins(settings: dict[str, Any], overrides: Mapping[str, Any]) -> None:
    """Drop the settings' origin of the text if the overrides name another one."""
    data = settings.get("data")
    chosen = {key.split(".")[1] for key in overrides if key.startswith("data.")} & set(ORIGINS)
    if isinstance(data, dict) and chosen:
        others = {*ORIGINS, *([] if "text" in chosen else ["held_out"])} - chosen
        for name in others:
            data.pop(name, None)


def _setting(
    location: tuple[int | str, ...], kind: type[Section]
) -> tuple[tuple[str, ...], type[Section] | None]:
    """The path of a setting that pydantic complains about, without the names of the types that it
    may have, and the section that holds it."""
    path: list[str] = []
    types: list[Any] = [kind]
    holder = None
    for part in map(str, location):
        sections = [t for t in types if isinstance(t, type) and issubclass(t, Section)]
        if len(types) > 1 and not (len(sections) == 1 and part in sections[0].model_fields):
            chosen = METHOD_SECTIONS.get(part)  # how pydantic names a method's section
            types = [t for t in types if t is chosen or getattr(t, "__name__", "") == part]
            continue
        path.append(part)
        holder = sections[0] if sections else None
        inner = types[0] if types else Any
        if holder:
            field = holder.model_fields.get(part)
            types = _types(field.annotation) if field else []
        else:
            types = _types(get_args(inner)[-1]) if get_args(inner) else []
    return tuple(path), holder


def _types(annotation: Any) -> list[Any]:
    """The types that a value may have besides None."""
    if get_origin(annotation) in (Union, UnionType):
        return [kind for kind in get_args(annotation) if kind is not NoneType]
    return [annotation]


def _explain(problems: list[Any], kind: type[Section], what: str) -> str:
    """Turn pydantic's problems with one setting, one for each type that it may have, into a clause
    that says what to do."""
    problem = problems[0]
    path, holder = _setting(problem["loc"], kind)
    name = ".".join(path) or f"{what[0].lower()}{what[1:]}"
    if problem["type"] == "extra_forbidden" and holder:
        known = list(holder.model_fields)
        near = difflib.get_close_matches(path[-1], known, n=1, cutoff=0.0)
        return f"unknown key '{name}' (nearest: '{'.'.join([*path[:-1], *near])}')"
    if problem["type"] == "missing":
        return f"'{name}' is missing"
    if problem["type"] == "union_tag_not_found":
        return f"'{name}.name' is missing"
    if problem["type"] == "union_tag_invalid":
        return f"'{name}' is '{problem['ctx']['tag']}': choose one of {', '.join(METHOD_SECTIONS)}"
    messages = [
        "input should be a mapping of settings"
        if problem["type"] == "model_type"
        else problem["msg"].removeprefix("Value error, ")
        for problem in problems
    ]
    if not path:
        return "; ".join(messages)
    messages = [f"{message[0].lower()}{message[1:]}" for message in messages]
    return f"'{name}' is {problem['input']!r}: {', or '.join(messages)}"
