"""The plain export: safetensors, tokenizer, generation config and model card.

transformers 5 writes some settings under names that 4.x does not know. For these, 4.x silently uses
its defaults: another rotary base, no rotary scaling. So we write both names.
"""

import copy
import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from lrc.model.loading import without_bars
from lrc.model.precision import store_parameters_as
from lrc.system.errors import UserError, reason
from lrc.system.files import new_folder

logger = logging.getLogger(__name__)


def export_student(
    student: PreTrainedModel,
    tokenizer: Tokenizer,
    card: str | None,
    folder: Path,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a model folder that plain transformers 4.57 and later can open.

    Args:
        student: the student with its weights computed.
        tokenizer: the teacher's tokenizer.
        card: text of the model card; None: no card.
        folder: the folder to write; an older export there is replaced completely.
        dtype: element type of the written weights; None: the student's own.

    Raises:
        UserError: if a weight is not finite or too large for the element type, the disk is full, or
            the folder cannot be written.
    """
    check_range(student.named_parameters(), dtype or student.dtype)
    if dtype not in (None, student.dtype):
        student = copy.deepcopy(student)
        store_parameters_as(student, dtype)
    _drop_invalid_generation(student)
    with new_folder(folder) as temporary, without_bars():
        student.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        _update(temporary / "config.json", model_settings)
        _update(temporary / "tokenizer_config.json", tokenizer_settings)
        if card is not None:
            (temporary / "README.md").write_text(card, encoding="utf-8")


def _drop_invalid_generation(student: PreTrainedModel) -> None:
    """Leave out a generation config that transformers refuses to write."""
    generation = student.generation_config
    try:
        if generation is not None:
            generation.validate(strict=True)
    except ValueError as error:
        logger.warning(
            "The teacher's generation config is not valid, so only its special tokens are kept: %s",
            reason(error),
        )
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        kept = {name: getattr(generation, name) for name in names}
        student.generation_config = GenerationConfig(**kept)


def check_range(weights: Iterable[tuple[str, Tensor]], dtype: torch.dtype) -> None:
    """Refuse weights that an element type cannot hold.

    Args:
        weights: names and weights.
        dtype: element type of the written weights.

    Raises:
        UserError: if a weight is not finite or would become infinite; the message names it.
    """
    largest = torch.finfo(dtype).max
    for name, value in weights:
        low, high = (float(v) for v in torch.aminmax(value.detach().to(torch.float32)))
        reach = max(abs(low), abs(high))
        if not reach < float("inf"):
            raise UserError(
                f"The weights of {name} are not finite: the training diverged. Start again with a "
                "lower train.learning_rate, or export an older checkpoint."
            )
        if reach > largest:
            raise UserError(
                f"The weights of {name} reach {reach:,.0f}. This exceeds {str(dtype)[6:]}'s "
                f"{largest:,.0f}, so they would become infinite: export to bfloat16 or float32."
            )


BY_KIND = ("gemma3_text", "olmo3")
"""Families of 4.x whose rotary embedding differs between kinds of layers."""


def model_settings(config: dict[str, Any]) -> dict[str, Any]:
    """The settings that transformers 4.x reads in a config.json and 5 does not write."""
    rope: Any = config.get("rope_parameters")
    found = _rope_settings(rope) if isinstance(rope, dict) else {}
    if config.get("model_type") in BY_KIND:
        found = _rope_settings(rope["full_attention"])
        found["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
    if "num_local_experts" in config:
        found["num_experts"] = config["num_local_experts"]
    return found


def _rope_settings(rope: dict[str, Any]) -> dict[str, Any]:
    """The settings of a rotary embedding, which 5 has in one dictionary."""
    if "rope_theta" not in rope:
        return {}
    apart = "rope_theta", "partial_rotary_factor"
    scaling = {name: value for name, value in rope.items() if name not in apart}
    kind = scaling.get("rope_type", "default")
    found = {name: rope[name] for name in apart if name in rope}
    return {**found, "rope_scaling": None if kind == "default" else scaling}


def tokenizer_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """The tokenizer_config.json settings for transformers 4.x that replace those written by 5."""
    found: dict[str, Any] = {}
    if settings.get("tokenizer_class") == "TokenizersBackend":
        found["tokenizer_class"] = "PreTrainedTokenizerFast"
    extra = settings.get("extra_special_tokens")
    if isinstance(extra, list):
        found["additional_special_tokens"] = extra
        found["extra_special_tokens"] = {}
    return found


def _update(path: Path, changes_of: Any) -> None:
    """Update settings in a JSON file that was just written."""
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings |= changes_of(settings)
    text = json.dumps(settings, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8")
