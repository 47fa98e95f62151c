"""The settings of `lrc sft`: one YAML file, like a recipe."""

import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, Self

import yaml
from pydantic import Field, model_validator

from lrc.recipe import apply_overrides, validated
from lrc.recipe.sections import Section
from lrc.recipe.shipped import find_yaml
from lrc.system.yaml_files import read_yaml

SETTINGS = "sft.yaml"
"""File of the settings in the folder of a tuning."""

METRICS, BEFORE, SUMMARY = "metrics.jsonl", "before.json", "summary.json"
"""Files of the logged steps, of the losses before the first step, and of the final table."""


def _learning_rate(tuning: dict[str, Any]) -> float:
    return 1e-4 if tuning.get("lora_rank") else 1e-5


class Tuning(Section):
    """Everything that determines how a model is tuned on conversations."""

    model: str
    """The model to tune: a run's folder, a model folder, a hub id, a .gguf file or
    `package:NAME`."""

    data: list[str] = Field(min_length=1)
    """JSONL files (also .gz and .zst), or data sets of the hub. Each row holds a conversation in
    `messages` (`role` and `content`) or in `conversations` (ShareGPT: `from` and `value`)."""

    split: str = "train"
    """Split of the hub's data sets."""

    held_out_fraction: float = Field(0.02, gt=0, lt=1)
    """Share of the conversations that is held out to measure the loss; at least one."""

    held_out_conversations: int = Field(500, gt=0)
    """At most this many conversations are held out."""

    max_length: int = Field(2048, gt=1)
    """Tokens of a sequence. Longer conversations are cut at their end."""

    packing: bool = False
    """Put several conversations into one sequence. They do not see each other."""

    epochs: float = Field(1.0, gt=0)
    """Passes over the training conversations."""

    steps: int | None = Field(None, gt=0)
    """Optimizer steps, in place of `epochs`."""

    micro_batch: int = Field(4, gt=0)
    """Sequences per forward pass."""

    accumulate: int = Field(1, gt=0)
    """Forward passes per optimizer step."""

    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """How the learning rate falls after the warm-up."""

    warmup_ratio: float = Field(0.1, ge=0, lt=1)
    """Share of the steps in which the learning rate rises."""

    weight_decay: float = Field(0.0, ge=0)
    """AdamW's weight decay."""

    grad_clip: float = Field(1.0, ge=0)
    """Maximum gradient norm; 0 turns clipping off."""

    lora_rank: int = Field(0, ge=0)
    """Rank of LoRA adapters on all linear maps of the layers; they are merged at the end. 0 trains
    all weights."""

    lora_alpha: int = Field(32, gt=0)
    """Scale of the adapters: their product is multiplied by lora_alpha / lora_rank."""

    learning_rate: float = Field(default_factory=_learning_rate, gt=0)
    """Peak learning rate; by default 1e-5, and 1e-4 for LoRA adapters, whose best rates are about
    ten times those of all weights (Schulman et al. 2025, "LoRA Without Regret")."""

    teacher: str | None = None
    """A model with the same tokenizer. The student also learns from its predictions on the
    assistants' tokens."""

    on_policy: bool = False
    """Learn from the teacher on answers that the student writes itself (GKD), in place of the
    answers in the data."""

    lm_weight: float = Field(1.0, ge=0)
    """With a teacher: weight of the next-token cross-entropy."""

    kl_weight: float = Field(1.0, gt=0)
    """With a teacher: weight of T^2 * KL(teacher || student)."""

    temperature: float = Field(1.0, gt=0)
    """With a teacher: T of the softmax in the KL."""

    chunk_tokens: int = Field(512, gt=0)
    """With a teacher: tokens whose logits are in memory at once."""

    on_policy_beta: float = Field(0.5, ge=0, le=1)
    """With `on_policy`: the divergence between KL(teacher || student) at 0 and
    KL(student || teacher) at 1, as in GKD."""

    max_new_tokens: int = Field(256, gt=0)
    """With `on_policy`: length of the student's answers."""

    precision: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of the forward passes. bfloat16 means autocast with float32 weights."""

    gradient_checkpointing: bool = False
    """Compute the layers again in the backward pass instead of keeping their activations."""

    device: Literal["auto", "cpu"] = "auto"
    """`auto`: the accelerator if there is one."""

    seed: int = Field(0, ge=0, lt=1 << 32)
    """Seed of the data order, the held-out part and the adapters."""

    log_every: int = Field(10, gt=0)
    """Steps between two lines of metrics.jsonl."""

    eval_every: int = Field(100, gt=0)
    """Steps between two measurements of the held-out loss."""

    checkpoint_every: int = Field(100, gt=0)
    """Steps between two checkpoints."""

    keep_checkpoints: int = Field(2, gt=0)
    """Number of checkpoints to keep."""

    report_to: list[Literal["tensorboard", "wandb", "trackio"]] = Field(default_factory=list)
    """Where to send metrics besides metrics.jsonl. Each needs the extra of the same name."""

    @model_validator(mode="after")
    def _settings_that_go_together(self) -> Self:
        given = self.model_fields_set
        of_teacher = {"lm_weight", "kl_weight", "temperature", "chunk_tokens"} & given
        if self.on_policy and self.teacher is None:
            raise ValueError("on_policy learns from a teacher: give one")
        if of_teacher and (self.teacher is None or self.on_policy):
            raise ValueError(f"{min(of_teacher)} goes with a teacher, without on_policy")
        of_policy = {"on_policy_beta", "max_new_tokens"} & given
        if of_policy and not self.on_policy:
            raise ValueError(f"{min(of_policy)} goes with on_policy")
        if self.on_policy and self.max_new_tokens >= self.max_length:
            raise ValueError("max_new_tokens leaves no room for the prompt in max_length")
        if self.on_policy and self.packing:
            raise ValueError("packing does not go with on_policy")
        if "lora_alpha" in given and not self.lora_rank:
            raise ValueError("lora_alpha goes with lora_rank")
        return self

    def to_yaml(self) -> str:
        """The settings that were given as YAML text."""
        return yaml.safe_dump(self.model_dump(mode="json", exclude_unset=True), sort_keys=False)


def load_tuning(
    source: str | os.PathLike[str] | None, overrides: Mapping[str, Any] = MappingProxyType({})
) -> Tuning:
    """Read the settings from a YAML file or a shipped recipe (`ultrachat-sft`).

    Args:
        source: path of a YAML file, or the name of a shipped recipe; None: start from the defaults.
        overrides: settings that override the file.

    Raises:
        UserError: if the file is missing or not YAML, or a setting is unknown or out of range.
    """
    base = {} if source is None else read_yaml(find_yaml(source, "sft recipe"))
    return validated(Tuning, apply_overrides(base, overrides), "The sft recipe")


def is_tuning(folder: Path) -> bool:
    """Whether a folder is a tuning's."""
    return (folder / SETTINGS).is_file()


def open_tuning(folder: Path) -> Tuning:
    """The settings of an earlier tuning.

    Raises:
        UserError: if they are not valid.
    """
    return load_tuning(None, read_yaml(folder / SETTINGS))
