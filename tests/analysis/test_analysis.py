"""`lrc analyze neurons`: masks, activity, planted neurons, question files, and refusals."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

pytest.importorskip("lm_eval")

from benchmarks_data import ROWS, save_byte_model
from command_line import Command
from data_helpers import write_rows
from lrc.analysis.masking import activity, draw_others, masked, most_active
from lrc.analysis.neurons import NeuronResult
from lrc.analysis.questions import questions_of_file
from lrc.data.batch import Batch
from lrc.evaluation.harness import evaluate_rows, evaluate_task, harness_model, open_tasks
from lrc.evaluation.local_data import use_folder
from lrc.system.errors import UserError
from tiny import FFN, LAYERS, LLAMAS, tiny_batch, tiny_teacher, watch

RIGHT, WRONG = "w9", "w10"
PLANTED = (1, 7)
"""Layer and index of the neuron that decides in the planted models."""


# ------------------------------------------------------------------------------------- masks


@pytest.mark.parametrize("family", LLAMAS)
def test_a_mask_equals_zero_columns_of_down(family: str) -> None:
    teacher = tiny_teacher(family)
    neurons = torch.rand(LAYERS, FFN, generator=torch.Generator().manual_seed(3)) < 0.4
    neurons[0] = False  # a layer without masked neurons
    ids = tiny_batch().input_ids
    without = copy.deepcopy(teacher.model)
    for layer, chosen in enumerate(neurons):
        without.get_submodule(f"model.layers.{layer}.mlp.down_proj").weight[:, chosen] = 0
    before = teacher.model(ids).logits
    with masked(teacher.model, teacher.layout, neurons):
        found = teacher.model(ids).logits
    torch.testing.assert_close(found, without(ids).logits, rtol=1e-12, atol=1e-12)
    assert (found - before).abs().max() > 1e-3
    assert torch.equal(teacher.model(ids).logits, before), "the mask was not removed"


def test_a_mask_goes_when_the_model_fails() -> None:
    teacher = tiny_teacher("llama")
    neurons = torch.ones(LAYERS, FFN, dtype=torch.bool)
    with pytest.raises(RuntimeError), masked(teacher.model, teacher.layout, neurons):
        raise RuntimeError
    assert not any(module._forward_pre_hooks for module in teacher.model.modules())


@pytest.mark.parametrize("positions", ["all", "last"])
@pytest.mark.parametrize("family", LLAMAS)
def test_activity_excludes_padding(family: str, positions: Any) -> None:
    teacher = tiny_teacher(family)
    lengths = [4, 9, 1, 6]
    batch = tiny_batch(rows=4, lengths=lengths)
    parts = [
        Batch(batch.input_ids[i : i + 2], None, batch.attention_mask[i : i + 2]) for i in (0, 2)
    ]
    found = activity(teacher.model, teacher.layout, parts, positions)

    paths = {
        (i, name): f"model.layers.{i}.mlp.{name}_proj"
        for i in range(LAYERS)
        for name in ("gate", "up")
    }
    rows: dict[int, list[Tensor]] = {layer: [] for layer in range(LAYERS)}
    for ids, length in zip(batch.input_ids, lengths, strict=True):
        seen, end = watch(teacher.model, paths)
        teacher.model(ids[None, :length])
        end()
        for layer in range(LAYERS):
            states = (functional.silu(seen[layer, "gate"]) * seen[layer, "up"])[0].abs()
            rows[layer].append(states if positions == "all" else states[-1:])
    expected = torch.stack([torch.cat(rows[layer]).mean(0) for layer in range(LAYERS)])
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 5), st.integers(1, 4), st.integers(2, 9), st.booleans(), st.data())
def test_choosing_neurons(
    seed: int, layers: int, width: int, per_layer: bool, data: st.DataObject
) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(layers, width, generator=generator)
    most = width // 2 if per_layer else layers * width // 2
    count = data.draw(st.integers(1, most))
    chosen = most_active(values, count, per_layer)
    assert chosen.shape == values.shape
    if per_layer:
        assert (chosen.sum(1) == count).all()
        for row, taken in zip(values, chosen, strict=True):
            assert row[taken].min() > row[~taken].max()
    else:
        assert chosen.sum() == count
        assert values[chosen].min() > values[~chosen].max()
    if (2 * chosen.sum(1) > width).any():
        with pytest.raises(UserError, match="too few others"):
            draw_others(chosen, generator)
        return
    drawn = draw_others(chosen, generator)
    assert not (drawn & chosen).any()
    assert torch.equal(drawn.sum(1), chosen.sum(1))


def test_draws_differ_and_cover_all_other_neurons() -> None:
    important = torch.zeros(2, 10, dtype=torch.bool)
    important[1, 3] = True
    generator = torch.Generator().manual_seed(0)
    draws = [draw_others(important, generator).nonzero().tolist() for _ in range(200)]
    assert {tuple(place) for draw in draws for place in draw} == {
        (1, i) for i in range(10) if i != 3
    }


# ---------------------------------------------------------------------------- planted neurons


def save_planted(folder: Path, place: tuple[int, int], hidden: int) -> str:
    """A Llama that says `RIGHT` because of one neuron, and would say `WRONG` without it.

    Coordinate 0 of the stream is 1 for every token and makes every model say `WRONG`; the planted
    neuron is the most active one and writes coordinate 1, which says `RIGHT`. Nothing else writes
    to the stream, but all neurons are active.
    """
    teacher = tiny_teacher("llama", dtype=torch.float32, hidden_size=hidden)
    model, (layer, index) = teacher.model, place
    for block in model.model.layers:
        block.self_attn.o_proj.weight.zero_()
        block.mlp.down_proj.weight.zero_()
        for norm in (block.input_layernorm, block.post_attention_layernorm):
            norm.weight.fill_(1)
    model.model.norm.weight.fill_(1)
    embedding = model.model.embed_tokens.weight
    embedding[:, 0], embedding[:, 1] = 1, 0
    mlp = model.model.layers[layer].mlp
    mlp.gate_proj.weight[index] = mlp.up_proj.weight[index] = 0
    mlp.gate_proj.weight[index, 0] = mlp.up_proj.weight[index, 0] = 8
    mlp.down_proj.weight[1, index] = 1
    words = teacher.tokenizer.get_vocab()
    model.lm_head.weight.zero_()
    model.lm_head.weight[words[RIGHT], 1] = 1
    model.lm_head.weight[words[WRONG], 0] = 1
    model.save_pretrained(folder)
    teacher.tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A teacher, a student with the same planted neuron, and one with it elsewhere."""
    folder = tmp_path_factory.mktemp("planted")
    return {
        "teacher": save_planted(folder / "teacher", PLANTED, 16),
        "student": save_planted(folder / "student", PLANTED, 8),
        "stranger": save_planted(folder / "stranger", (0, 2), 8),
    }


@pytest.fixture
def facts(tmp_path: Path) -> Path:
    rows = [
        {
            "question": f"w{3 + i} w{11 + i % 4}",
            "choices": [WRONG, RIGHT] if i % 2 else [RIGHT, WRONG],
            "answer": i % 2 if i % 3 else RIGHT,
        }
        for i in range(11)
    ]
    return write_rows(tmp_path / "facts.jsonl", rows)


def result_in(folder: Path) -> NeuronResult:
    return NeuronResult.model_validate_json((folder / "neurons.json").read_text())


def test_a_planted_neuron_is_found_and_decides_in_both(
    planted: dict[str, str], facts: Path, tmp_path: Path, lrc: Command
) -> None:
    models = (planted["student"], "--teacher", planted["teacher"])
    out = tmp_path / "out"
    options = ("--questions", facts, "--neurons", 1, "--random-draws", 4, "--out", out)
    printed = lrc.printed("analyze", "neurons", *models, *options)
    assert "1.000" in printed
    assert "0.000 (-100%)" in printed
    result = result_in(out)
    assert result.important == (PLANTED,)
    assert result.by_layer == result.student_by_layer == (0, 1)
    assert result.shared == 1
    for model in (result.teacher, result.student):
        for half, questions in (("apart", 6), ("selection", 5)):
            assert getattr(model.unmasked, half).value == 1
            assert getattr(model.important, half).value == 0
            assert [getattr(draw, half).value for draw in model.random] == [1] * 4
            assert getattr(model.unmasked, half).questions == questions
    text = (out / "neurons.md").read_text()
    assert "| none | 1.000 | 1.000 | 1.000 | 1.000 | 0.85 | 0.48 |" in text
    assert "0.62 (-27%)" in text
    assert (out / "neurons.png").stat().st_size > 5_000


def test_a_student_with_the_neuron_elsewhere_loses_nothing(
    planted: dict[str, str], facts: Path, tmp_path: Path, lrc: Command
) -> None:
    models = (planted["stranger"], "--teacher", planted["teacher"])
    options = ("--questions", facts, "--neurons", 1, "--random-draws", 0)
    lrc.printed("analyze", "neurons", *models, *options, "--out", tmp_path / "out")
    result = result_in(tmp_path / "out")
    assert result.important == (PLANTED,)
    assert result.teacher.important.apart.value == 0
    assert result.student.important.apart.value == 1
    assert result.shared == 0
    assert result.student_by_layer == (1, 0)
    assert "random" not in (tmp_path / "out" / "neurons.md").read_text()


def test_settings_reach_the_experiment(
    planted: dict[str, str], facts: Path, tmp_path: Path, lrc: Command
) -> None:
    def go(name: str, *options: Any) -> NeuronResult:
        models = (planted["student"], "--teacher", planted["teacher"], "--questions", facts)
        lrc.printed("analyze", "neurons", *models, "--out", tmp_path / name, *options)
        return result_in(tmp_path / name)

    first = go("first", "--neurons", 3, "--random-draws", 2)
    assert go("again", "--neurons", 3, "--random-draws", 2) == first
    share = go("share", "--share", 0.1, "--per-layer", "--random-draws", 1)
    assert "mean of 2 draws" in (tmp_path / "first" / "neurons.md").read_text()
    assert "in each layer; one draw." in (tmp_path / "share" / "neurons.md").read_text()
    assert share.by_layer == (2, 2)
    assert share.settings["count"] == 2
    assert first.by_layer == tuple(sum(i == layer for i, _ in first.important) for layer in (0, 1))
    assert len(first.important) == 3
    limited = go("limited", "--neurons", 1, "--limit", 4, "--positions", "last")
    assert limited.student.unmasked.apart.questions == 2
    assert limited.settings["positions"] == "last"


# --------------------------------------------------------------------------------- questions


@pytest.fixture(scope="module")
def byte_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {
        "teacher": save_byte_model(folder / "teacher"),
        "student": save_byte_model(folder / "student", seed=1, hidden_size=8),
    }


def test_sciq_is_scored_as_the_harness_does(
    byte_models: dict[str, Path], tmp_path: Path, lrc: Command
) -> None:
    for folder in ("data", "scratch"):
        (tmp_path / folder).mkdir()
    write_rows(tmp_path / "data" / "sciq.jsonl", ROWS["sciq"](9))
    models = (byte_models["student"], "--teacher", byte_models["teacher"])
    options = ("--data", tmp_path / "data", "--neurons", 4, "--random-draws", 1)
    printed = lrc.printed("analyze", "neurons", *models, *options, "--out", tmp_path / "out")
    assert "Accuracy on sciq: 5 questions held out and 4 used" in printed
    result = result_in(tmp_path / "out")

    manager = open_tasks(["sciq"])
    use_folder(manager, ["sciq"], tmp_path / "data", limited=False, scratch=tmp_path / "scratch")
    for name, found in (("teacher", result.teacher), ("student", result.student)):
        model = AutoModelForCausalLM.from_pretrained(byte_models[name])
        for layer, index in result.important:
            model.model.layers[layer].mlp.down_proj.weight.data[:, index] = 0
        lm = harness_model(model, AutoTokenizer.from_pretrained(byte_models[name]), 4)
        expected = evaluate_task(lm, manager, "sciq", limit=None).metrics["acc"].value
        halves = found.important
        right = [half.value * half.questions for half in (halves.apart, halves.selection)]
        assert sum(right) == pytest.approx(9 * expected)


def test_open_questions_are_right_if_the_greedy_answer_is(
    planted: dict[str, str], tmp_path: Path
) -> None:
    rows = [{"question": "w3", "answer": word} for word in (RIGHT, WRONG, "w4", f"{RIGHT} {RIGHT}")]
    path = write_rows(tmp_path / "open.jsonl", rows)
    (tmp_path / "scratch").mkdir()
    questions = questions_of_file(path, tmp_path / "scratch")
    model = AutoModelForCausalLM.from_pretrained(planted["teacher"])
    lm = harness_model(model, AutoTokenizer.from_pretrained(planted["teacher"]), 2)
    assert evaluate_rows(lm, questions.manager, questions.task, None) == [1, 0, 0, 1]


def test_a_context_is_read_before_the_question(tmp_path: Path) -> None:
    rows = [
        {"context": "Ice floats.", "question": "What floats?", "choices": ["ice", "x"], "answer": 0}
    ]
    (tmp_path / "scratch").mkdir()
    path = write_rows(tmp_path / "q.jsonl", rows)
    task = questions_of_file(path, tmp_path / "scratch").task
    task.build_all_requests(rank=0, world_size=1)
    arguments = [request.args for request in task.instances]
    prompt = "Ice floats.\nQuestion: What floats?\nAnswer:"
    assert arguments == [(prompt, " ice"), (prompt, " x")]
    assert task.doc_to_target(task.eval_docs[0]) == 0


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"question": "q", "answer": 1}, "must be a string"),
        ({"question": "q"}, "lacks a question or an answer"),
        ({"question": "", "answer": "a"}, "lacks a question or an answer"),
        ({"question": 3, "answer": "a"}, "question that is not a string"),
        ({"question": "q", "answer": "a", "choices": ["a"]}, "two or more"),
        ({"question": "q", "answer": 2, "choices": ["a", "b"]}, "not one of its choices"),
        ({"question": "q", "answer": -1, "choices": ["a", "b"]}, "not one of its choices"),
        ({"question": "q", "answer": True, "choices": ["a", "b"]}, "not one of its choices"),
        ({"question": "q", "answer": "c", "choices": ["a", "b"]}, "not one of its choices"),
        ({"question": "q", "answer": "a", "choices": ["a", "a"]}, "not one of its choices"),
        ({"question": "q", "answer": "a", "hint": "b"}, "field 'hint'"),
    ],
)
def test_lines_that_are_not_questions(row: dict[str, Any], words: str, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "q.jsonl", [row])
    with pytest.raises(UserError, match=words) as error:
        questions_of_file(path, tmp_path)
    assert "Line 1 of" in str(error.value)


def test_what_is_refused(
    planted: dict[str, str],
    byte_models: dict[str, Path],
    facts: Path,
    tmp_path: Path,
    lrc: Command,
) -> None:
    student, teacher = planted["student"], planted["teacher"]
    ask = ("--questions", facts, "--out", tmp_path / "out")
    pair = ("analyze", "neurons", student, "--teacher", teacher, "--neurons", 1)
    assert "name its teacher" in lrc.refusal("analyze", "neurons", student, *ask)
    assert "the same" in lrc.refusal("analyze", "neurons", student, "--teacher", student, *ask)
    other = lrc.refusal("analyze", "neurons", byte_models["student"], "--teacher", teacher, *ask)
    assert "2 layers of FFN width 24" in other
    assert "2 layers of FFN width 20" in other
    assert "more than half of the 40" in lrc.refusal(*pair, *ask, "--neurons", 21)
    assert "leaves too few others" in lrc.refusal(*pair, *ask, "--neurons", 20)
    assert "not both" in lrc.refusal(*pair, *ask, "--share", 0.1)
    assert "give --data or --questions, not both" in lrc.refusal(*pair, *ask, "--data", tmp_path)
    assert "no file" in lrc.refusal(*pair, "--questions", tmp_path / "none.jsonl")
    assert "is a group of tasks" in lrc.refusal(*pair, "--task", "mmlu", "--data", tmp_path)
    kinds = ["mlp", "linear_attention", "full_attention"]
    hybrid = tiny_teacher("nemotron_h", dtype=torch.float32, layer_types=kinds)
    for name in ("small", "large"):
        hybrid.model.save_pretrained(tmp_path / name)
        hybrid.tokenizer.save_pretrained(tmp_path / name)
    models = (tmp_path / "small", "--teacher", tmp_path / "large")
    assert "layers without an FFN" in lrc.refusal("analyze", "neurons", *models, *ask)
    write_rows(facts, [json.loads(facts.read_text().splitlines()[0])])
    assert "two or more" in lrc.refusal(*pair, *ask)
    assert not (tmp_path / "out").exists()
