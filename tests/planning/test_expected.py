"""Expected losses: a fit that says when it does not know."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from transformers import LlamaConfig

from lrc.model.pruned_shape import PrunedShape
from lrc.planning.expected import Expected, MeasuredRun, features, measured_runs

TEACHER_LOSS = 1.7


def law(shape: PrunedShape, tokens: float) -> float:
    """A loss that falls with tokens and with the sizes, as the fit supposes."""
    gap = 40 * tokens**-0.4 * (shape.hidden / 64) ** -0.5 * (shape.neurons / 172) ** -0.2
    return TEACHER_LOSS + gap


def runs(noise: float = 0.0) -> list[MeasuredRun]:
    """Runs of several shapes and lengths."""
    generator = np.random.default_rng(0)
    found = []
    for hidden, neurons in ((32, 172), (48, 82), (64, 40), (64, 60), (40, 120), (56, 90)):
        for tokens in (100_000, 300_000, 1_000_000):
            shape = PrunedShape(5, hidden, 4, neurons)
            wrong = math.exp(noise * generator.standard_normal())
            loss = TEACHER_LOSS + (law(shape, tokens) - TEACHER_LOSS) * wrong
            number = 59_000  # all of one size
            found.append(MeasuredRun(shape, number, tokens, loss, TEACHER_LOSS, "a run"))
    return found


ASKED, NUMBER = PrunedShape(5, 52, 4, 100), 59_000


def test_a_fit_predicts_what_it_has_not_seen() -> None:
    expected = Expected(runs())
    found = expected.of(ASKED, NUMBER, 500_000)
    assert found.loss == pytest.approx(law(ASKED, 500_000), abs=1e-6)
    assert expected.error < 1e-6
    assert "a fit to 18 runs" in found.reason


def test_the_error_is_that_of_runs_left_out() -> None:
    """Compared with fits by numpy's own solver for the normal equations."""
    noisy = runs(noise=0.1)
    misses = []
    for run in noisy:
        others = [other for other in noisy if other is not run]
        rows = np.array([features(one.shape, one.parameters, one.tokens) for one in others])
        asked = features(run.shape, run.parameters, run.tokens)
        varying = [0, 2, 5]  # parameters, layers and heads are the same
        design = np.column_stack([np.ones(len(rows)), rows[:, varying]])
        gaps = np.log([one.loss - TEACHER_LOSS for one in others])
        weights = np.linalg.pinv(design) @ gaps
        loss = TEACHER_LOSS + math.exp(weights[0] + asked[varying] @ weights[1:])
        misses.append(abs(loss - run.loss))
    assert Expected(noisy).error == pytest.approx(np.mean(misses), rel=1e-6)


def test_a_fit_does_not_claim_what_it_does_not_know() -> None:
    for expected, tokens, shape, reason in (
        (Expected(runs(noise=1.0)), 500_000, ASKED, "misses runs left out"),
        (Expected(runs()), 5_000_000, ASKED, "outside"),
        (Expected(runs()), 500_000, replace(ASKED, layers=4), "outside"),
        (Expected(runs()[:4]), 500_000, ASKED, "too few"),
        (Expected([]), 500_000, ASKED, "no run of this teacher"),
    ):
        found = expected.of(shape, NUMBER, tokens)
        assert found.loss is None
        assert reason in found.reason


def test_a_measured_shape_is_quoted() -> None:
    run = runs()[0]
    found = Expected([run]).of(run.shape, run.parameters, run.tokens + 1000)
    assert (found.loss, found.reason) == (run.loss, "measured: a run")


def stories() -> LlamaConfig:
    """The configuration of stories260K."""
    return LlamaConfig(
        hidden_size=64,
        intermediate_size=172,
        num_hidden_layers=5,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=512,
    )


def test_runs_belong_to_their_teacher() -> None:
    """The shipped table, and another teacher of the same sizes."""
    config = stories()
    shipped = measured_runs(config)
    assert any(run.shape.hidden == 32 and abs(run.loss - 1.866) < 0.001 for run in shipped)
    for run in shipped:
        assert run.loss > run.teacher_loss
        assert run.source
    config.vocab_size = 513
    assert not measured_runs(config)
    assert not measured_runs(config, json.dumps({"runs": []}))


def test_shapes_beside_the_measured_ones_are_like_them() -> None:
    """All measured shapes have about as many parameters, so a fit knows nothing of what a little
    more are worth. It must not make that up."""
    expected = Expected(measured_runs(stories()))
    for parameters, hidden, neurons, kv_heads, layers in [
        (133_312, 64, 72, 2, 5),
        (128_784, 48, 80, 4, 5),
        (131_648, 64, 64, 4, 4),
        (133_312, 64, 40, 4, 5),
    ]:
        found = expected.of(PrunedShape(layers, hidden, kv_heads, neurons), parameters, 819_200)
        assert found.loss is not None
        assert 1.78 < found.loss < 1.92
