"""The pruning core: shapes, slices and sizes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM

from lrc.baselines.pruning.shape import target_shape, teacher_shape
from lrc.baselines.pruning.size import compare_sizes, parameter_count, size_notes
from lrc.exporting.plain import export_student
from lrc.model.kept_units import KeptUnits, cut, keep_all
from lrc.model.pruned_shape import PrunedShape, pruned_config
from lrc.model.shapes import shape_of
from lrc.model.teacher import Teacher
from lrc.recipe.method_sections import PrunedShapeSection
from lrc.recipe.sections import StudentSection
from lrc.system.errors import UserError
from tiny import FFN, HEAD_DIM, HIDDEN, LAYERS, TINY_CASES, Case, tiny_teacher, tiny_tokens

IDS = tiny_tokens(2, 9, seed=0)
GROUPED = {"num_attention_heads": 6, "num_key_value_heads": 3, "num_hidden_layers": 3}


def grouped(family: str = "llama", tied: bool = False, **changes: Any) -> Teacher:
    """A teacher of three layers, with two query heads for each of three key/value heads."""
    hidden = 18  # must be a multiple of Llama's heads
    return tiny_teacher(family, tied, **{**GROUPED, "hidden_size": hidden, **changes})


KEPT = KeptUnits(
    [0, 2],
    torch.tensor([1, 2, 5, 6, 7, 11, 13, 17]),
    [torch.tensor([0, 2]), torch.tensor([1, 2])],
    [torch.tensor([3, 4, 9, 19, 11]), torch.tensor([0, 2, 5, 8, 13])],
)


def by_hand(weights: dict[str, Tensor], kept: KeptUnits, tied: bool) -> dict[str, Tensor]:
    """The pruned weights of a `grouped` teacher, row by row."""

    def pick(value: Tensor, rows: list[int], columns: list[int] | None = None) -> Tensor:
        value = torch.stack([value[row] for row in rows])
        return value if columns is None else torch.stack([value[:, c] for c in columns], 1)

    hidden = kept.hidden.tolist()
    everything = range(weights["model.embed_tokens.weight"].shape[0])
    names = (
        ["model.embed_tokens.weight"] if tied else ["model.embed_tokens.weight", "lm_head.weight"]
    )
    found = {name: pick(weights[name], list(everything), hidden) for name in names}
    found["model.norm.weight"] = pick(weights["model.norm.weight"], hidden)
    for new, old in enumerate(kept.layers):
        groups = kept.groups[new].tolist()
        neurons = kept.neurons[new].tolist()
        heads = [head for group in groups for head in (2 * group, 2 * group + 1)]
        queries = [head * HEAD_DIM + i for head in heads for i in range(HEAD_DIM)]
        keys = [group * HEAD_DIM + i for group in groups for i in range(HEAD_DIM)]
        sides = {
            "self_attn.q_proj": (queries, hidden),
            "self_attn.k_proj": (keys, hidden),
            "self_attn.v_proj": (keys, hidden),
            "self_attn.o_proj": (hidden, queries),
            "mlp.gate_proj": (neurons, hidden),
            "mlp.up_proj": (neurons, hidden),
            "mlp.down_proj": (hidden, neurons),
            "input_layernorm": (hidden, None),
            "post_attention_layernorm": (hidden, None),
            "self_attn.q_norm": (list(range(HEAD_DIM)), None),
            "self_attn.k_norm": (list(range(HEAD_DIM)), None),
        }
        for path, (rows, columns) in sides.items():
            theirs = f"model.layers.{old}.{path}"
            if f"{theirs}.weight" in weights:
                name = f"model.layers.{new}.{path}.weight"
                found[name] = pick(weights[f"{theirs}.weight"], rows, columns)
            if f"{theirs}.bias" in weights:
                found[f"model.layers.{new}.{path}.bias"] = pick(weights[f"{theirs}.bias"], rows)
    return found


@pytest.mark.parametrize("case", TINY_CASES)
def test_weights_are_the_slices(case: Case) -> None:
    family, tied, changes = case
    teacher = grouped(family, tied, **changes)
    before = {name: value.clone() for name, value in teacher.model.state_dict().items()}
    state = torch.get_rng_state()
    student = cut(teacher.model, KEPT)
    assert torch.equal(torch.get_rng_state(), state)
    ours = dict(student.named_parameters())
    theirs = by_hand(dict(teacher.model.named_parameters()), KEPT, tied)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name
    assert (student.lm_head.weight is student.model.embed_tokens.weight) == tied
    assert all(parameter.requires_grad for parameter in ours.values())
    for name, value in teacher.model.state_dict().items():
        assert torch.equal(value, before[name])
    config = student.config
    assert (config.num_hidden_layers, config.hidden_size, config.intermediate_size) == (2, 8, 5)
    assert (config.num_attention_heads, config.num_key_value_heads) == (4, 2)
    assert config.head_dim == HEAD_DIM
    assert [layer.self_attn.layer_idx for layer in student.model.layers] == [0, 1]
    assert student.generation_config.eos_token_id == [1, 2]
    assert config._attn_implementation == teacher.config._attn_implementation


@pytest.mark.parametrize("case", TINY_CASES)
def test_keeping_all_is_the_model(case: Case) -> None:
    family, tied, changes = case
    teacher = grouped(family, tied, **changes)
    student = cut(teacher.model, keep_all(teacher.model))
    with torch.no_grad():
        assert torch.equal(student(IDS).logits, teacher.model(IDS).logits)


@pytest.mark.parametrize("part", ["layer", "group", "neuron"])
def test_parts_without_effect_can_be_removed(part: str) -> None:
    """If their outputs are zero, the logits do not change."""
    teacher = grouped("qwen3")
    kept = keep_all(teacher.model)
    model = teacher.model
    with torch.no_grad():
        if part == "layer":
            model.model.layers[1].self_attn.o_proj.weight.zero_()
            model.model.layers[1].mlp.down_proj.weight.zero_()
            kept = KeptUnits([0, 2], kept.hidden, kept.groups[:2], kept.neurons[:2])
        elif part == "group":
            for layer in model.model.layers:
                layer.self_attn.o_proj.weight[:, 2 * HEAD_DIM : 4 * HEAD_DIM] = 0
            kept = KeptUnits(kept.layers, kept.hidden, [torch.tensor([0, 2])] * 3, kept.neurons)
        else:
            for layer in model.model.layers:
                layer.mlp.down_proj.weight[:, 4] = 0
            rest = torch.tensor([i for i in range(FFN) if i != 4])
            kept = KeptUnits(kept.layers, kept.hidden, kept.groups, [rest] * 3)
        ours, theirs = cut(model, kept)(IDS).logits, model(IDS).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_every_shape(data: st.DataObject) -> None:
    """A cut to any shape has the right widths, weights and size, and runs."""
    family = data.draw(st.sampled_from(["llama", "mistral", "qwen2", "qwen3"]))
    tied = data.draw(st.booleans())
    teacher = grouped(family, tied, hidden_size=24)

    def choose(count: int, least: int = 1) -> Tensor:
        some = st.lists(st.integers(0, count - 1), min_size=least, max_size=least, unique=True)
        return torch.tensor(data.draw(some))

    layers = sorted(choose(3, data.draw(st.integers(1, 3))).tolist())
    kv_heads, neurons = data.draw(st.integers(1, 3)), data.draw(st.integers(1, FFN))
    hidden = 2 * kv_heads * data.draw(st.integers(1, 24 // (2 * kv_heads)))
    kept = KeptUnits(
        layers,
        choose(24, hidden),
        [choose(3, kv_heads) for _ in layers],
        [choose(FFN, neurons) for _ in layers],
    )
    shape = PrunedShape(len(layers), hidden, kv_heads, neurons)
    assert kept.shape == shape
    student = cut(teacher.model, kept)
    theirs = by_hand(dict(teacher.model.named_parameters()), kept, tied)
    for name, value in student.named_parameters():
        assert torch.equal(value, theirs.pop(name)), name
    assert not theirs
    with torch.no_grad():
        assert student(IDS).logits.isfinite().all()
    config = pruned_config(teacher, shape)
    assert parameter_count(teacher, config) == shape_of(student).parameters


def test_a_tied_model_can_be_cut_untied() -> None:
    teacher = grouped("qwen2", tied=True)
    student = cut(teacher.model, KEPT, tied=False)
    head = student.lm_head.weight
    assert head is not student.model.embed_tokens.weight
    assert torch.equal(head, teacher.model.model.embed_tokens.weight[:, KEPT.hidden])


def test_layer_types_follow_the_kept_layers() -> None:
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    teacher = grouped("qwen3", layer_types=kinds, use_sliding_window=True, sliding_window=4)
    shape = PrunedShape(2, 18, 3, FFN)
    assert pruned_config(teacher, shape, [0, 2]).layer_types == kinds[::2]
    assert pruned_config(teacher, shape, [0, 1]).layer_types == kinds[:2]
    with pytest.raises(UserError, match=r"method.layers is 2, .* of 2 kinds .* all 3 have to stay"):
        target_shape(teacher, StudentSection(hidden_size=8), PrunedShapeSection(layers=2))


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_the_export_runs_in_plain_transformers(family: str, tmp_path: Path) -> None:
    teacher = grouped(family, dtype=torch.float32)
    student = cut(teacher.model, KEPT)
    export_student(student, teacher.tokenizer, "card", tmp_path / "student")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, student(IDS).logits)


def test_uneven_layers_are_refused() -> None:
    even = keep_all(grouped().model)
    with pytest.raises(ValueError, match="same number of heads and neurons"):
        KeptUnits(even.layers, even.hidden, even.groups, [*even.neurons[1:], torch.arange(3)])


def asked(teacher: Teacher, hidden: int, **section: int) -> PrunedShape:
    return target_shape(teacher, StudentSection(hidden_size=hidden), PrunedShapeSection(**section))


def test_the_target_is_lrcs_shape_by_default() -> None:
    teacher = tiny_teacher("llama")
    assert asked(teacher, 8) == PrunedShape(LAYERS, 8, 1, FFN)
    assert asked(teacher, HIDDEN) == teacher_shape(teacher) == PrunedShape(LAYERS, HIDDEN, 1, FFN)
    assert asked(grouped(), 8, layers=1, kv_heads=2, intermediate_size=7) == PrunedShape(1, 8, 2, 7)


def test_the_hidden_size_must_suit_the_remaining_heads() -> None:
    with pytest.raises(UserError, match="even multiple of their 6 attention heads"):
        asked(grouped(), 8)
    asked(grouped(), 8, kv_heads=2)
    asked(grouped("qwen3"), 8)


def test_all_wrong_sizes_are_reported_together() -> None:
    with pytest.raises(UserError) as error:
        asked(tiny_teacher("llama"), 18, layers=3, kv_heads=2, intermediate_size=21)
    message = str(error.value)
    for words in (
        "method.layers is 3, but the teacher's is 2",
        "method.kv_heads is 2, but the teacher's is 1",
        "method.intermediate_size is 21, but the teacher's is 20",
        "student.hidden_size is 18, but the teacher's is 16",
    ):
        assert words in message


@pytest.mark.parametrize("tied", [False, True])
def test_sizes_are_compared_with_lrcs(tied: bool) -> None:
    teacher = tiny_teacher("llama", tied)
    student = StudentSection(hidden_size=8)
    same = compare_sizes(teacher, student, pruned_config(teacher, PrunedShape(LAYERS, 8, 1, FFN)))
    assert same.student == same.clone
    assert same.fair
    assert "%" not in same.sentence()
    for fewer, fair in ((1, True), (2, False)):
        shape = PrunedShape(LAYERS, 8, 1, FFN - fewer)
        sizes = compare_sizes(teacher, student, pruned_config(teacher, shape))
        assert sizes.clone - sizes.student == fewer * LAYERS * 3 * 8
        assert sizes.fair == fair
        words = f"has {sizes.student:,} parameters, LRC's {sizes.clone:,} ({sizes.excess:+.1%})"
        assert words in sizes.sentence()
        assert sizes.sentence().endswith("more than 3% apart.") != fair
        config = pruned_config(teacher, shape)
        assert size_notes(teacher, student, config) == [sizes.sentence()]
        # At the teacher's hidden size, LRC's student would be the teacher.
        config = pruned_config(teacher, replace(shape, hidden=HIDDEN))
        assert size_notes(teacher, StudentSection(hidden_size=HIDDEN), config) == []
