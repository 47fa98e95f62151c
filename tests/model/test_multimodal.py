"""The text model of a multimodal checkpoint, read by its own configuration and names."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    CONFIG_MAPPING,
    AutoModelForImageTextToText,
    VoxtralForConditionalGeneration,
)

from lrc.model.teacher import load_teacher
from lrc.preflight import check_recipe
from lrc.recipe import make_recipe
from lrc.recipe.sections import TeacherSection
from lrc.system.errors import UserError
from tiny import QUIRKS, SHAPE, TOKENS, tiny_tokenizer

SMALL = {
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "depth": 1,
    "num_heads": 2,
    "out_hidden_size": 16,
    "image_size": 28,
    "patch_size": 14,
    "head_dim": 8,
    "num_position_embeddings": 16,
}
"""Sizes of a vision tower, under the names in the various configurations."""

WRAPPERS = [
    ("gemma3", "gemma3_text"),
    ("gemma4_unified", "gemma4_unified_text"),
    ("qwen3_5", "qwen3_5_text"),
    ("qwen3_5_moe", "qwen3_5_moe_text"),
    ("mistral3", "mistral"),
    ("mistral3", "ministral3"),
    ("smolvlm", "llama"),
]


def wrapped(outer: str, text: str, folder: Path) -> Path:
    """A random multimodal model, saved."""
    quirks = {**QUIRKS.get(text, {}), "final_logit_softcapping": None}
    inner = {k: v for k, v in {**SHAPE, **quirks}.items() if v is not None}
    vision = getattr(CONFIG_MAPPING[outer](), "vision_config", None)
    sections: dict[str, Any] = {"text_config": {**inner, "model_type": text}}
    if vision is not None:
        given = vision.to_dict()
        sections["vision_config"] = {**given, **{k: v for k, v in SMALL.items() if k in given}}
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(
        CONFIG_MAPPING[outer](**sections, pad_token_id=0)
    )
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("outer", "text"), WRAPPERS)
def test_the_text_model_is_read_whole(outer: str, text: str, tmp_path: Path) -> None:
    folder = wrapped(outer, text, tmp_path / "model")
    teacher = load_teacher(TeacherSection(model=str(folder)))
    assert teacher.family.model_type == text
    whole = AutoModelForImageTextToText.from_pretrained(folder).eval()
    ids = torch.arange(3, TOKENS)[None]
    with torch.no_grad():
        torch.testing.assert_close(teacher.model(ids).logits, whole(input_ids=ids).logits)
    recipe = {"student": {"hidden_size": 8}, "data": {"text": ["stdlib-docs"]}}
    check_recipe(make_recipe({**recipe, "teacher": {"model": str(folder)}}))


def test_a_wrapper_that_does_not_say_whether_the_head_is_tied(tmp_path: Path) -> None:
    audio = CONFIG_MAPPING["voxtral"]().audio_config.to_dict()
    sizes = {**SMALL, "max_source_positions": 32, "num_mel_bins": 8}
    model = VoxtralForConditionalGeneration(
        CONFIG_MAPPING["voxtral"](
            text_config={**SHAPE, "model_type": "llama", "tie_word_embeddings": False},
            audio_config={**audio, **{k: v for k, v in sizes.items() if k in audio}},
        )
    )
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    teacher = load_teacher(TeacherSection(model=str(tmp_path)))
    assert teacher.family.model_type == "llama"
    head = teacher.model.get_output_embeddings().weight
    assert torch.equal(head, model.get_output_embeddings().weight)


@pytest.mark.parametrize(("outer", "text"), WRAPPERS)
def test_a_parameter_of_the_text_model_that_is_missing_is_named(
    outer: str, text: str, tmp_path: Path
) -> None:
    folder = wrapped(outer, text, tmp_path / "model")
    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = next(n for n in tensors if n.endswith("layers.1.input_layernorm.weight"))
    kept = {n: t for n, t in tensors.items() if n != name}
    shutil.rmtree(folder)
    wrapped(outer, text, folder)
    save_file(kept, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"layers\.1\.input_layernorm\.weight missing"):
        load_teacher(TeacherSection(model=str(folder)))
