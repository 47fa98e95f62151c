"""The LM loss of each source, from the tokens to the closing table."""

import json
import math
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from command_line import Command
from data_helpers import Document, write_rows, write_shards
from lrc.cloning.objective import VocabularyWeights, vocabulary_losses
from lrc.data import Batch, StreamedText, TrainingText
from lrc.data.by_source import SourceLosses
from lrc.data.identity import tokenizer_identity
from lrc.evaluation.held_out import held_out_loss, measure_agreement
from lrc.recipe import Recipe, make_recipe
from lrc.run import Run
from lrc.train import train
from lrc.train.batches import count
from lrc.train.checkpoint import list_checkpoints
from lrc.train.closing import closing_table
from tiny import TOKENS, tiny_method, tiny_teacher, tiny_tokenizer
from tiny_runs import assert_same_run, copy_until, save_teacher, tiny_documents

NAMES = ("web", "code", "unused")


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 9), st.integers(-1, 2)), max_size=30), st.integers(1, 7))
def test_sums_by_source(tokens: list[tuple[float, int]], at_once: int) -> None:
    sums = SourceLosses(NAMES)
    for start in range(0, len(tokens), at_once):
        losses, sources = zip(*tokens[start : start + at_once], strict=True)
        sums.add(torch.tensor(losses, dtype=torch.float64), torch.tensor(sources))
    expected = {
        name: [loss for loss, source in tokens if source == number]
        for number, name in enumerate(NAMES)
    }
    assert sums.labels() == {name: len(losses) for name, losses in expected.items() if losses}
    means = {name: sum(losses) / len(losses) for name, losses in expected.items() if losses}
    assert sums.means() == pytest.approx(means)
    assert set(sums.report("x_")) == ({"x_lm_by_source", "x_labels_by_source"} if means else set())


def random_batch(seed: int = 0, masked: bool = True) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, TOKENS, (3, 9), generator=generator)
    positions = torch.tensor([[*range(4), *range(5)]] * 3) if masked else None
    sources = torch.randint(0, 2, (3, 9), generator=generator)
    return Batch(ids, position_ids=positions, source_ids=sources)


def naive_losses(model: torch.nn.Module, batch: Batch) -> list[tuple[float, int]]:
    """Loss and source of every label, from full logits, token by token."""
    positions = batch.position_ids
    with torch.no_grad():
        logits = model(input_ids=batch.input_ids, position_ids=positions, use_cache=False).logits
    found = []
    for row in range(len(batch.input_ids)):
        for place in range(batch.input_ids.shape[1] - 1):
            if positions is not None and positions[row, place + 1] == 0:
                continue
            label = batch.input_ids[row, place + 1]
            loss = functional.cross_entropy(logits[row, place, :TOKENS], label)
            found.append((loss.item(), int(batch.source_ids[row, place + 1])))
    return found


def means_of(found: list[tuple[float, int]]) -> dict[str, float]:
    result = {}
    for number, name in enumerate(NAMES):
        losses = [loss for loss, source in found if source == number]
        if losses:
            result[name] = math.fsum(losses) / len(losses)
    return result


@pytest.mark.parametrize("masked", [False, True])
def test_losses_of_a_step_by_source(masked: bool) -> None:
    """Over two micro-batches. The loss itself does not change."""
    method = tiny_method(tiny_teacher("llama"))
    batches = [random_batch(seed, masked) for seed in (0, 1)]
    sums = SourceLosses(NAMES)
    method.begin_step(0)
    for batch in batches:
        losses = method.losses(batch, count(batches))
        losses.loss.backward()
        sums.add_batch(losses.token_lm, batch)
        plain = method.losses(Batch(batch.input_ids, batch.position_ids), count(batches))
        assert plain.token_lm is None
        assert torch.equal(plain.loss, losses.loss)
    found = [f for batch in batches for f in naive_losses(method.student(), batch)]
    assert sums.means() == pytest.approx(means_of(found), rel=1e-6)
    assert sum(sums.labels().values()) == len(found) == count(batches).labels


@pytest.mark.parametrize("chunk_tokens", [1, 4, 100])
def test_loss_of_every_token(chunk_tokens: int) -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    hidden, head = draw(11, 5), draw(9, 5)
    labels = torch.tensor([3, -100, 0, 8, -100, 1, 1, 2, 5, 6, 7])
    weights = VocabularyWeights(1.0, 1.0, 2.0, 11, 9, 9, chunk_tokens)
    token_lm = torch.full((11,), math.nan, dtype=torch.float64)
    with_tokens = vocabulary_losses(hidden, head, hidden, head, labels, None, weights, token_lm)
    without = vocabulary_losses(hidden, head, hidden, head, labels, None, weights)
    assert all(torch.equal(a, b) for a, b in zip(with_tokens, without, strict=True))
    expected = functional.cross_entropy(
        hidden @ head.T, labels, ignore_index=-100, reduction="none"
    )
    torch.testing.assert_close(token_lm, expected, rtol=1e-12, atol=0)


def test_held_out_by_source() -> None:
    teacher = tiny_teacher("qwen3", tied=True)
    student = tiny_method(teacher).student()
    batches = [random_batch(seed) for seed in (0, 1)]
    sums = SourceLosses(NAMES)
    found = [f for batch in batches for f in naive_losses(student, batch)]
    theirs = [f for batch in batches for f in naive_losses(teacher.model, batch)]
    loss = held_out_loss(student, batches, teacher.vocab_size, sums)
    assert loss == pytest.approx(sum(value for value, _ in found) / len(found))
    assert sums.means() == pytest.approx(means_of(found))
    agreement = measure_agreement(teacher, student, batches, NAMES)
    assert agreement.student_loss == pytest.approx(loss)
    assert {n: v[1] for n, v in agreement.by_source.items()} == pytest.approx(means_of(found))
    assert {n: v[0] for n, v in agreement.by_source.items()} == pytest.approx(means_of(theirs))
    assert {n: v[2] for n, v in agreement.by_source.items()} == sums.labels()


def documents(source: str, first: int, number: int) -> list[Document]:
    """Documents of a source whose words go up by one (web) or by two (code)."""
    step = 1 + ("web", "code").index(source)
    lengths = [7 + (first + i) % 11 for i in range(number)]
    return [
        (source, [0, *(3 + (first + i + step * j) % 30 for j in range(length)), 1])
        for i, length in enumerate(lengths)
    ]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A tiny teacher and shards of two sources."""
    folder = save_teacher(tmp_path_factory.mktemp("teacher"))
    shards = tmp_path_factory.mktemp("shards") / "shards"
    write_shards(
        shards,
        [
            ("train", documents("web", 0, 20) + documents("code", 1, 5)),
            ("train", documents("code", 100, 9) + documents("web", 200, 9)),
            ("held_out", documents("web", 300, 6) + documents("code", 400, 6)),
        ],
        tokenizer_identity(tiny_tokenizer()),
        ("web", "code"),
    )
    return make_recipe(
        {
            "teacher": {"model": str(folder)},
            "student": {"hidden_size": 8},
            "initialize": {"method": "closed-form", "calibration_tokens": 256},
            "data": {"shards": str(shards), "sequence_length": 16, "document_mask": True},
            "train": {
                "tokens": 12 * 64,
                "micro_batch": 2,
                "accumulate": 2,
                "eval_every": 4,
                "checkpoint_every": 7,
            },
        }
    )


def go_on(run: Run, folder: Path) -> Run:
    """A copy of a finished run, continued from its last checkpoint but one."""
    last = int(list_checkpoints(run.checkpoints)[0].name.removeprefix("step-"))
    resumed = copy_until(run, folder, last - 1)
    train(resumed)
    return resumed


def test_run_on_shards(recipe: Recipe, tmp_path: Path) -> None:
    """Closed-form start, metrics by source, the closing table, and resuming in the second epoch."""
    run = Run.create(tmp_path / "run", recipe)
    train(run)
    lines = run.metrics()
    for line in (line for line in lines if "lm" in line):
        labels, losses = line["labels_by_source"], line["lm_by_source"]
        assert set(labels) <= {"web", "code"}
        mean = sum(losses[name] * labels[name] for name in labels) / sum(labels.values())
        assert mean == pytest.approx(line["lm"], rel=1e-5)
    assert any(len(line.get("lm_by_source", ())) == 2 for line in lines)
    measured = [line for line in lines if "held_out_lm" in line]
    assert len(measured) == 4
    assert all(set(line["held_out_lm_by_source"]) == {"web", "code"} for line in measured)
    by_source = run.summary()["held_out_by_source"]
    for name, values in by_source.items():
        assert values["student_lm"] == pytest.approx(measured[-1]["held_out_lm_by_source"][name])
    rows = closing_table(run.summary()).rows
    assert [
        "  of code",
        *(f"{by_source['code'][f'{who}_lm']:.4f}" for who in ("teacher", "student")),
    ] in rows
    assert (run.folder / "curves.png").exists()
    assert_same_run(go_on(run, tmp_path / "resumed"), run)


def test_training_begins_after_the_calibration_text(recipe: Recipe, tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", recipe)
    read = TrainingText.training_batch
    patch = mock.patch.object(TrainingText, "training_batch", autospec=True, side_effect=read)
    with patch as taken:
        train(run)
    (first, calibration), *trained = (call.args[1:] for call in taken.call_args_list)
    assert (first, calibration) == (0, 256 // recipe.data.sequence_length)
    positions = [p for position, many in trained for p in range(position, position + many)]
    sequences = recipe.steps() * recipe.train.step_sequences()
    assert positions == list(range(calibration, calibration + sequences))


def test_run_on_a_stream(recipe: Recipe, tmp_path: Path) -> None:
    """The same with documents that are read, shuffled and packed on the fly."""
    source = write_rows(tmp_path / "text.jsonl", ({"body": text} for text in tiny_documents()))
    changes = {
        "data.stream.dataset": "json",
        "data.stream.data_files": [str(source)],
        "data.stream.shuffle_documents": 5,
        "data.text_field": "body",
        "data.held_out_fraction": 0.2,
    }
    streamed = make_recipe(recipe.model_dump(), changes)
    run = Run.create(tmp_path / "run", streamed)
    train(run)
    lines = run.metrics()
    assert len({line["loss"] for line in lines if "loss" in line}) == streamed.steps()
    assert not any("lm_by_source" in line for line in lines)
    # It skips to its position instead of reading all documents again.
    load = StreamedText.load_state
    with mock.patch.object(StreamedText, "load_state", autospec=True, side_effect=load) as loaded:
        resumed = go_on(run, tmp_path / "resumed")
    calibration = 256 // streamed.data.sequence_length
    taken = calibration + 7 * streamed.train.step_sequences()
    (part,) = loaded.call_args.args[1]["parts"]
    assert part["position"] == taken
    assert_same_run(resumed, run)


def test_command_line(recipe: Recipe, tmp_path: Path, lrc: Command) -> None:
    """Without a recipe file; folders without shards are refused."""

    def arguments(*shards: str) -> list[str]:
        shape = ["--teacher", recipe.teacher.model, "--hidden-size", "8", "--out"]
        settings = [f"--set=data.shards={json.dumps(shards)}", "--set=data.sequence_length=16"]
        return ["compress", *shape, str(tmp_path / "run"), *settings]

    none = arguments(str(tmp_path / "none"))
    assert "contains no finished shards" in lrc.refusal(*none)
    assert not (tmp_path / "run").exists()
    lrc.printed(*arguments(*recipe.data.shards))
    assert set(Run.open(tmp_path / "run").summary()["held_out_by_source"]) == {"web", "code"}
