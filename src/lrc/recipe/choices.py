"""What a recipe decides where the paper leaves a choice, and why, in one line."""

from lrc.recipe.learning_rate import learning_rate
from lrc.recipe.method_sections import LrcSection
from lrc.recipe.recipe import Recipe
from lrc.recipe.sections import ALPHA_ZERO_AT, ObjectiveSection

EVIDENCE = "benchmarks/comparisons/README.md"

OPTIMIZERS = {"adamw": "AdamW", "muon": "Muon"}


def choices(recipe: Recipe, parameters: int, terms: int) -> str | None:
    """One line that names start, calibration tokens, release, clone loss and learning rate of a
    run, and which of them are our defaults; None for another method than LRC.

    Args:
        recipe: the run's recipe.
        parameters: elements of the student's weights.
        terms: number of clone terms in all layers.
    """
    if not isinstance(recipe.method, LrcSection):
        return None
    usual = {name: type(getattr(recipe, name))() for name in ("initialize", "objective", "train")}
    start, loss, train = recipe.initialize, recipe.objective, recipe.train
    alpha = ("alpha", "alpha_schedule", "alpha_zero_at")
    named = [
        (f"{start.method} start", "initialize", ("method",)),
        (f"{start.calibration_tokens:,} calibration tokens", "initialize", ("calibration_tokens",)),
        (_release(train.release_at), "train", ("release_at",)),
        (_clone(loss, terms), "objective", alpha),
        (OPTIMIZERS[train.optimizer], "train", ("optimizer",)),
        (_rate(recipe, parameters), "train", ("learning_rate", "release_learning_rate")),
    ]
    ours: dict[bool, list[str]] = {True: [], False: []}
    for text, section, keys in named:
        if start.method == "random" and "calibration_tokens" in keys:
            continue
        mine = getattr(recipe, section)
        same = all(getattr(mine, key) == getattr(usual[section], key) for key in keys)
        ours[same].append(text)
    parts = []
    if ours[True]:
        parts.append(f"Defaults, from our comparisons ({EVIDENCE}): {', '.join(ours[True])}.")
    if ours[False]:
        parts.append(f"From the recipe: {', '.join(ours[False])}.")
    return " ".join(parts)


def _rate(recipe: Recipe, parameters: int) -> str:
    first, later = learning_rate(recipe, parameters), recipe.train.release_learning_rate
    if later is None or recipe.train.release_at == 1:
        return f"learning rate {first:.3g}"
    if recipe.train.release_at == 0:
        return f"learning rate {later:.3g}"
    return f"learning rate {first:.3g}, after the release {later:.3g}"


def _release(share: float) -> str:
    if share == 1:
        return "projections to the end"
    return f"own weights after {share:.0%} of the steps" if share else "own weights from the start"


def _clone(loss: ObjectiveSection, terms: int) -> str:
    if loss.alpha == 0:
        return "no clone loss"
    alpha = f"{loss.peak_alpha(terms):.3g}"
    if loss.alpha_schedule == "constant":
        return f"constant alpha {alpha}"
    share = loss.alpha_zero_at or ALPHA_ZERO_AT
    return f"alpha {alpha} falling to zero over {share:.0%} of the steps"
