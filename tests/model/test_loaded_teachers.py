"""Models and tokenizers that are wrapped as teachers after somebody else has loaded them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from transformers import AutoModelForCausalLM

from data_helpers import write_jsonl
from lrc.data import open_text
from lrc.exporting.plain import export_student
from lrc.model.teacher import as_teacher
from lrc.recipe.sections import ObjectiveSection, StudentSection
from lrc.system.errors import UserError
from tiny import (
    HIDDEN,
    ROWS,
    TOKENS,
    LowRankClone,
    initialize_from_text,
    logits,
    relative_error,
    tiny_method,
    tiny_teacher,
    tiny_tokenizer,
    tiny_tokens,
)
from tiny_runs import tiny_documents, tiny_recipe


def test_a_quantized_model_is_refused() -> None:
    model = tiny_teacher("llama").model
    linear = model.model.layers[1].mlp.down_proj
    linear.weight = nn.Parameter(linear.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(UserError, match="'it' is quantized: give its name or folder"):
        as_teacher(model, tiny_tokenizer(), "it")


@pytest.mark.parametrize("target", ["q_proj", "down_proj", "embed_tokens"])
def test_a_model_with_adapters_is_refused(target: str) -> None:
    model = tiny_teacher("qwen3").model
    inject_adapter_in_model(LoraConfig(target_modules=[target]), model)
    with pytest.raises(UserError, match=rf"no \S*{target}\.weight.*merge adapters first"):
        as_teacher(model, tiny_tokenizer(), "it")


def test_a_head_of_its_own_is_kept_whatever_the_configuration_says() -> None:
    model = tiny_teacher("llama", tied=True).model
    model.lm_head.weight = nn.Parameter(torch.randn_like(model.lm_head.weight))
    teacher = as_teacher(model, tiny_tokenizer(), "it")
    assert "has two matrices that differ: both are used" in teacher.notes[0]
    method = LowRankClone(teacher, StudentSection(hidden_size=HIDDEN), ObjectiveSection())
    initialize_from_text(method, "closed-form", tiny_tokens(24), refine_epochs=1)
    ids = tiny_tokens(3)
    assert relative_error(logits(method.student(), ids), logits(model, ids)) < 5e-4


def extended(count: int, special: bool = True) -> Any:
    """The tiny tokenizer with added tokens."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"<image{i}>" for i in range(count)], special_tokens=special)
    return tokenizer


@pytest.mark.parametrize("stream", [False, True])
def test_added_tokens_without_an_embedding(stream: bool, tmp_path: Path) -> None:
    """As in Gemma 3's text models, whose tokenizer adds an image token."""
    teacher = as_teacher(tiny_teacher("llama").model, extended(ROWS - TOKENS + 2), "it")
    assert teacher.vocab_size == ROWS
    for name, token in (("known", "<image0>"), ("unknown", f"<image{ROWS - TOKENS}>")):
        write_jsonl(tmp_path / f"{name}.jsonl", [*tiny_documents(), f"w3 {token} w4"])

    def opened(name: str, parse: bool) -> Any:
        path = str(tmp_path / f"{name}.jsonl")
        data = {"text": [path], "cache": str(tmp_path / "cache")}
        if stream:
            data = {"stream": {"dataset": "json", "data_files": [path]}}
        data |= {"sequence_length": 8, "parse_special_tokens": parse}
        recipe = tiny_recipe(data=data)
        text = open_text(recipe, teacher.tokenizer, vocabulary=teacher.vocab_size)
        return text.training_batch(0, 400)

    opened("known", parse=True)
    opened("unknown", parse=False)
    with pytest.raises(UserError, match=r"token '<image4>' \(37\), but the teacher embeds only 37"):
        opened("unknown", parse=True)


def test_a_tokenizer_of_another_model_is_refused() -> None:
    with pytest.raises(UserError, match=f"has {TOKENS} tokens but the model embeds only"):
        tiny_teacher("llama", vocab_size=TOKENS - 1)


def test_a_student_refers_to_no_code_of_its_teacher(tmp_path: Path) -> None:
    teacher = tiny_teacher("llama")
    teacher.config.auto_map = {"AutoModelForCausalLM": "modeling_x.X"}
    export_student(tiny_method(teacher).student(), teacher.tokenizer, None, tmp_path / "student")
    AutoModelForCausalLM.from_pretrained(tmp_path / "student", trust_remote_code=True)
