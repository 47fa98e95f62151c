"""The line that says what a recipe chose."""

import pytest

from lrc.recipe.choices import choices
from tiny_runs import tiny_recipe


def test_defaults_and_the_recipes_own() -> None:
    assert choices(tiny_recipe(), 10**9, 35) == (
        "Defaults, from our comparisons (benchmarks/comparisons/README.md): closed-form start, "
        "16,384 calibration tokens, own weights from the start, alpha 0.2 falling to zero over 33% "
        "of the steps, Muon, learning rate 8.42e-05."
    )
    paper = {
        "initialize.method": "random",
        "objective.alpha_schedule": "constant",
        "train.release_at": 1,
        "train.optimizer": "adamw",
        "train.learning_rate": 1e-4,
    }
    assert choices(tiny_recipe(paper), 10**9, 35) == (
        "From the recipe: random start, projections to the end, constant alpha 0.2, AdamW, "
        "learning rate 0.0001."
    )
    assert choices(tiny_recipe({"method": "scratch"}), 10**9, 35) is None


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("initialize.calibration_tokens", 65536, "65,536 calibration tokens"),
        ("train.release_at", 0.3, "own weights after 30% of the steps"),
        ("objective.alpha", 0, "no clone loss"),
        (
            "objective.alpha_zero_at",
            0.5,
            "alpha 0.2 falling to zero over 50% of the steps",
        ),
    ],
)
def test_one_change(key: str, value: float, told: str) -> None:
    default, _, given = str(choices(tiny_recipe({key: value}), 10**9, 35)).partition(
        " From the recipe: "
    )
    assert given == f"{told}."
    assert told not in default
    assert "learning rate 8.42e-05" in default
