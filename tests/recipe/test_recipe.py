"""Reading recipes, and messages about mistakes in them."""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from lrc.recipe import Recipe, load_recipe, make_recipe, parse_override
from lrc.recipe.sections import Keep, Section
from lrc.recipe.shipped import find_yaml, shipped
from lrc.system.errors import UserError


def smallest(**sections: Any) -> dict[str, Any]:
    """The required settings of a recipe, and `sections`."""
    needed = {
        "teacher": {"model": "some/model"},
        "student": {"hidden_size": 64},
        "data": {"text": ["a.txt"]},
    }
    return {**needed, **sections}


def refusal(settings: dict[str, Any], overrides: dict[str, Any] | None = None) -> str:
    """The message of a refusal."""
    with pytest.raises(UserError) as caught:
        make_recipe(settings, overrides or {})
    return str(caught.value)


def test_defaults_and_the_published_settings() -> None:
    recipe = make_recipe(smallest())
    assert recipe.initialize.method == "closed-form"
    assert recipe.student.fold_gains
    assert recipe.objective.clone_scale == "relative"
    assert (recipe.objective.temperature, recipe.objective.kl_weight) == (1, 1)
    assert recipe.train.token_grad_clip == 5
    assert (recipe.objective.alpha, recipe.objective.clones_at(1 / 3)) == ("auto", False)
    assert not recipe.objective.clone.off()
    assert recipe.initialize.std == 0.02
    assert (recipe.train.learning_rate, recipe.train.release_at) == ("auto", 0)
    paper = load_recipe("paper-lrc-1.5b")
    assert (paper.student.fold_gains, paper.initialize.method) == (False, "random")
    assert (paper.objective.temperature, paper.objective.kl_weight) == (40, 1.28)
    assert (paper.objective.alpha, paper.objective.alpha_left(1)) == (0.2, 1)
    assert paper.objective.clone_scale == "none"
    assert (paper.train.token_grad_clip, paper.train.release_at) == (0, 1)


def test_fingerprints_differ_if_results_may_differ() -> None:
    """Explicit defaults and the way to load the teacher do not count."""
    present = make_recipe(smallest()).fingerprint()
    for settings, same in (
        ({"train.tokens": make_recipe(smallest()).train.tokens}, True),
        ({"teacher.load": "layers"}, True),
        ({"train.seed": 1}, False),
        ({"train.release_at": 0.5}, False),
        ({"objective.alpha_schedule": "constant"}, False),
    ):
        assert (make_recipe(smallest(), settings).fingerprint() == present) == same, settings


def test_steps_are_rounded_up() -> None:
    train = {"tokens": 1001, "micro_batch": 5, "accumulate": 2}
    recipe = make_recipe(smallest(data={"text": ["a"], "sequence_length": 10}, train=train))
    assert recipe.step_tokens() == 100
    assert recipe.steps() == 11


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("student.hiden_size", "student.hidden_size"),
        ("train.learning-rate", "train.learning_rate"),
        ("objective.clone.upp", "objective.clone.up"),
        ("techer", "teacher"),
    ],
)
def test_unknown_key_names_the_nearest(override: str, nearest: str) -> None:
    assert f"unknown key '{override}' (nearest: '{nearest}')" in refusal(smallest(), {override: 1})


def test_all_mistakes_are_reported_together() -> None:
    settings = smallest(student={"hidden_size": -2}, train={"tokns": 5, "schedule": "steps"})
    del settings["data"]
    message = refusal(settings)
    assert "'student.hidden_size' is -2" in message
    assert "unknown key 'train.tokns' (nearest: 'train.tokens')" in message
    assert "'train.schedule' is 'steps'" in message
    assert "'data' is missing" in message
    assert message.count("\n") == 0


def test_value_of_the_wrong_kind() -> None:
    assert "'teacher' is 'name'" in refusal(smallest(teacher="name"))
    assert "'student.hidden_size' is 'wide'" in refusal(smallest(student={"hidden_size": "wide"}))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"train.learning_rate": -1},
            "'train.learning_rate' is -1: input should be greater than 0, or input should be "
            "'auto'",
        ),
        (
            {"student.kv_heads": "two"},
            "'student.kv_heads' is 'two': input should be a valid integer, unable to parse string "
            "as an integer, or input should be a mapping of settings",
        ),
        (
            {"student.kv_heads": {"keep": [2, 1]}},
            "'student.kv_heads.keep' is [2, 1]: give each index once, ascending, from 0",
        ),
        (
            {"student.layers": {"keep": [1, "b"]}},
            "'student.layers.keep.1' is 'b': input should be a valid integer, unable to parse "
            "string as an integer",
        ),
        ({"train.evaluate": 3}, "'train.evaluate' is 3: input should be a mapping of settings"),
        ({"data.also_held_out": {"code": 3}}, "'data.also_held_out.code.0' is 3: input should be"),
        (
            {"method": {"name": "llm-pruner", "rati": 0.5}},
            "unknown key 'method.rati' (nearest: 'method.ratio')",
        ),
    ],
)
def test_settings_of_several_types_are_named_once(settings: dict[str, Any], said: str) -> None:
    message = refusal(smallest(), settings)
    assert f"The recipe has mistakes: {said}" in message
    assert message.count("' is ") <= 1


def numeric_settings(section: type[Section], prefix: str = "") -> Iterator[tuple[str, type]]:
    """The settings of a section and those below it that are one number, or a list of numbers."""
    for name, field in section.model_fields.items():
        kinds = (field.annotation, *get_args(field.annotation))
        for kind in kinds:
            if isinstance(kind, type) and issubclass(kind, Section):
                yield from numeric_settings(kind, f"{prefix}{name}.")
        shown = str(field.annotation)
        if bool not in kinds and re.search(r"\b(int|float)\b", shown):
            yield f"{prefix}{name}", list if "list" in shown or "tuple" in shown else int


@pytest.mark.parametrize("value", [True, False, math.nan, math.inf, -math.inf])
def test_only_finite_numbers_are_numbers(value: float) -> None:
    """YAML's true is no 1, and .inf and .nan are refused, in any numeric setting of a recipe."""
    given = {**smallest(), "train": {"evaluate": {"tasks": ["a"], "every_tokens": 1}}}
    found = [
        (key, kind)
        for key, kind in numeric_settings(Recipe)
        if not key.startswith(("method.", "data.stream."))  # which need more settings
    ]
    assert {"train.tokens", "train.betas", "student.kv_heads.keep", "objective.alpha"} <= {
        key for key, _ in found
    }
    shown = f"'{value}'".lower() if isinstance(value, bool) else str(value)
    for key, kind in found:
        several = kind is list
        name = f"{key}.0" if several else key
        assert f"'{name}' is {shown}" in refusal(given, {key: [value, 0.5] if several else value})
    method = {"name": "llm-pruner", "ratio": value}
    assert "'method.ratio'" in refusal(smallest(method=method))


def test_a_single_value_is_a_list_of_one() -> None:
    texts = ["train.report_to=tensorboard", "data.stream.dataset=json"]
    texts += ["data.stream.data_files=a.jsonl", "student.layers.keep=3"]
    texts += ["train.evaluate={tasks: arc_easy, every_tokens: 10}"]
    texts += ["data.also_held_out={code: a.jsonl, chat: [b.jsonl, c.jsonl]}"]
    recipe = make_recipe(smallest(), dict(parse_override(text) for text in texts))
    assert recipe.train.report_to == ["tensorboard"]
    assert recipe.data.stream is not None
    assert recipe.data.stream.data_files == ["a.jsonl"]
    assert recipe.data.origin() == "json (a.jsonl)"
    assert recipe.data.also_held_out == {"code": ["a.jsonl"], "chat": ["b.jsonl", "c.jsonl"]}
    assert recipe.student.layers == Keep(keep=[3])
    assert recipe.train.evaluate is not None
    assert recipe.train.evaluate.tasks == ["arc_easy"]
    assert make_recipe(smallest(), {"data.text": "a.txt"}).data.text == ["a.txt"]
    assert "'data.text.0' is 3" in refusal(smallest(), {"data.text": 3})


def test_every_loss_off_is_refused() -> None:
    off = {"alpha": 0, "kl_weight": 0, "lm_weight": 0}
    assert "every loss is off" in refusal(smallest(objective=off))
    no_terms = {"kl_weight": 0, "lm_weight": 0, "clone": dict.fromkeys(["q", "k", "v", "o"], False)}
    no_terms["clone"].update(gate=False, up=False, down=False)
    assert "every loss is off" in refusal(smallest(objective=no_terms))


def test_overrides_replace_settings() -> None:
    settings = smallest(train={"tokens": 5})
    texts = ["train.tokens=10", "train.learning_rate=1e-4", "data.text=[b.txt, c.txt]"]
    texts += ["objective.clone.q=false", "data.cache=", "teacher.model=a=b", "train.eps=1E-6"]
    recipe = make_recipe(settings, dict(parse_override(text) for text in texts))
    assert recipe.train.tokens == 10
    # YAML 1.1 reads 1e-4 as a string.
    assert recipe.train.learning_rate == 1e-4
    assert recipe.train.eps == 1e-6
    assert recipe.data.text == ["b.txt", "c.txt"]
    assert not recipe.objective.clone.q
    assert recipe.data.cache is None
    assert recipe.teacher.model == "a=b"


@pytest.mark.parametrize("text", ["train.tokens", "=5", ""])
def test_override_without_a_value(text: str) -> None:
    with pytest.raises(UserError, match=r"is not a setting; write it as section\.key=value"):
        parse_override(text)


def test_override_that_is_not_yaml() -> None:
    with pytest.raises(UserError, match="not valid YAML"):
        parse_override("data.text=[a")


def test_override_below_a_value() -> None:
    assert "'train' is a value, not a section" in refusal(smallest(train=3), {"train.tokens": 5})


def test_initialize_by_name_alone() -> None:
    assert make_recipe(smallest(initialize="random")) == make_recipe(
        smallest(initialize={"method": "random"})
    )
    assert "'initialize.method' is 'zeros'" in refusal(smallest(initialize="zeros"))


def test_a_section_by_name_alone_takes_overrides() -> None:
    settings = smallest(initialize="closed-form")
    recipe = make_recipe(settings, {"initialize.calibration_tokens": 99})
    assert recipe.initialize.method == "closed-form"
    assert recipe.initialize.calibration_tokens == 99
    assert settings["initialize"] == "closed-form"


def test_yaml_round_trip(tmp_path: Path) -> None:
    recipe = make_recipe(smallest(train={"learning_rate": 3e-5}))
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.to_yaml())
    assert load_recipe(path) == recipe
    assert load_recipe(str(path), {"train.seed": 4}).train.seed == 4
    # Every default is written out.
    assert set(yaml.safe_load(recipe.to_yaml())) == set(Recipe.model_fields)


def test_files_that_are_not_recipes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no recipe 'none'"):
        load_recipe("none")
    path = tmp_path / "bad.yaml"
    path.write_text("a: [")
    with pytest.raises(UserError, match=r"bad\.yaml is not valid YAML"):
        load_recipe(path)
    path.write_text("just words")
    with pytest.raises(UserError, match=r"bad\.yaml holds no settings"):
        load_recipe(path)


@pytest.mark.parametrize("name", shipped("recipe"))
def test_shipped_recipe_is_valid(name: str) -> None:
    assert find_yaml(name, "recipe").is_file()
    load_recipe(name)


def test_only_projections_start_from_a_teacher_on_the_disk() -> None:
    with pytest.raises(UserError, match=r"layers works only with method lrc, not with minitron"):
        make_recipe(smallest(method="minitron") | {"teacher": {"model": "x", "load": "layers"}})
