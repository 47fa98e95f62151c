"""Tests of the student of every family whose layers are Llama's."""

import copy
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModelForCausalLM

from lrc.cloning.low_rank_clone import LowRankClone
from lrc.model.families import FAMILIES, family_of
from lrc.model.shapes import shape_of
from lrc.model.student import check_hidden_size, derive_config, empty_student, student_config
from lrc.model.teacher import Teacher, element_type
from lrc.recipe.sections import ObjectiveSection, StudentSection
from lrc.system.errors import UserError
from tiny import (
    FFN,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    KV_HEADS,
    LAYERS,
    LLAMAS,
    READERS,
    ROWS,
    STUDENT_HIDDEN,
    TINY_CASES,
    WRITERS,
    expected_weights,
    gradients,
    linear_path,
    stream_norms,
    tiny_batch,
    tiny_method,
    tiny_teacher,
    tiny_tokens,
)


@pytest.fixture(params=TINY_CASES)
def teacher(request: pytest.FixtureRequest) -> Teacher:
    family, tied, changes = request.param
    return tiny_teacher(family, tied, **changes)


def values_of(method: LowRankClone) -> dict[str, torch.Tensor]:
    return {key: value.detach() for key, value in method.projections.values.items()}


@pytest.mark.parametrize("fold_gains", [False, True])
@pytest.mark.parametrize("tie_projections", [None, False, True])
def test_weights_equal_the_formulas(
    teacher: Teacher, fold_gains: bool, tie_projections: bool | None
) -> None:
    settings = {"fold_gains": fold_gains, "tie_projections": tie_projections}
    method = tiny_method(teacher, settings)
    student = method.student()
    expected = expected_weights(teacher, values_of(method), fold_gains, tie_projections)
    for name, value in expected.items():
        torch.testing.assert_close(student.get_parameter(name), value, rtol=0, atol=1e-13)


def test_all_other_weights_are_the_teachers(teacher: Teacher) -> None:
    method = tiny_method(teacher)
    student = method.student()
    projected = expected_weights(teacher, values_of(method))
    norms = {f"{path}.weight" for path in stream_norms()}
    others = {n: p for n, p in student.named_parameters() if n not in projected and n not in norms}
    assert all("_proj.bias" in name or "_norm.weight" in name for name in others)
    for name, value in others.items():
        original = teacher.model.get_parameter(name)
        assert torch.equal(value, original)
        assert value.data_ptr() != original.data_ptr()
        assert not value.requires_grad
    gradients(method, tiny_batch())
    assert all(value.grad is None for value in others.values())


@pytest.mark.parametrize(
    ("family", "kept"),
    [
        ("llama", set()),
        ("mistral", set()),
        ("qwen2", {f"{linear_path(0, name)}.bias" for name in "qkv"}),
        ("qwen3", {f"model.layers.0.self_attn.{name}_norm.weight" for name in "qk"}),
    ],
)
def test_what_each_family_keeps(family: str, kept: set[str]) -> None:
    model = tiny_method(tiny_teacher(family)).model
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert {name for name in frozen if name.startswith("model.layers.0.")} == kept


def test_student_is_of_the_teachers_class(teacher: Teacher) -> None:
    student = tiny_method(teacher).student()
    assert type(student) is type(teacher.model)
    assert type(student.config) is type(teacher.config)
    assert type(student).__module__.startswith("transformers.")


def test_config_differs_in_hidden_size_alone(teacher: Teacher) -> None:
    config = tiny_method(teacher).student().config
    ours, theirs = config.to_dict(), teacher.config.to_dict()
    assert (config.hidden_size, config.head_dim) == (STUDENT_HIDDEN, HEAD_DIM)
    differing = {key for key in ours | theirs if ours.get(key) != theirs.get(key)}
    assert differing - {"_name_or_path"} == {"hidden_size"}
    assert HEADS * HEAD_DIM != HIDDEN


def test_head_dim_is_explicit_even_if_the_teachers_is_not() -> None:
    teacher = tiny_teacher("qwen2", head_dim=None)
    assert not hasattr(teacher.config, "head_dim")
    config = student_config(teacher, StudentSection(hidden_size=STUDENT_HIDDEN))
    assert config.to_dict()["head_dim"] == HIDDEN // HEADS


def test_shapes_of_the_student(teacher: Teacher) -> None:
    shapes = {name: tuple(p.shape) for name, p in tiny_method(teacher).model.named_parameters()}
    q, kv, d = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, STUDENT_HIDDEN
    assert shapes["model.embed_tokens.weight"] == (ROWS, d)
    assert shapes[f"{linear_path(1, 'q')}.weight"] == (q, d)
    assert shapes[f"{linear_path(1, 'k')}.weight"] == (kv, d)
    assert shapes[f"{linear_path(1, 'o')}.weight"] == (d, q)
    assert shapes[f"{linear_path(1, 'gate')}.weight"] == (FFN, d)
    assert shapes[f"{linear_path(1, 'down')}.weight"] == (d, FFN)
    assert all(shapes[f"{path}.weight"] == (d,) for path in stream_norms())
    assert ("lm_head.weight" in shapes) != teacher.config.tie_word_embeddings


def test_gains_start_at_one(teacher: Teacher) -> None:
    method = LowRankClone(teacher, StudentSection(hidden_size=8), ObjectiveSection())
    gains = [value for value in method.parameters().values() if value.ndim == 1]
    assert len(gains) == 2 * LAYERS + 1
    assert all(torch.equal(gain, torch.ones_like(gain)) for gain in gains)


def test_keys_of_the_projections(teacher: Teacher) -> None:
    keys = {f"layers.{i}.{m}" for i in range(LAYERS) for m in (*READERS, *WRITERS)}
    shared = tiny_method(teacher, {"tie_projections": True}).projections.values
    apart = tiny_method(teacher, {"tie_projections": False}).projections.values
    default = tiny_method(teacher).projections.values
    assert set(shared) == {*keys, "embedding"}
    assert set(apart) == {*keys, "embedding", "head"}
    assert set(default) == set(shared if teacher.config.tie_word_embeddings else apart)


@pytest.mark.parametrize("teacher_ties", [False, True])
@pytest.mark.parametrize("tie_projections", [None, False, True])
def test_student_ties_where_weights_and_projections_do(
    teacher_ties: bool, tie_projections: bool | None
) -> None:
    teacher = tiny_teacher("llama", teacher_ties)
    student = tiny_method(teacher, {"tie_projections": tie_projections}).student()
    ties = teacher_ties and tie_projections is not False
    assert student.config.tie_word_embeddings is ties
    embedding, head = student.get_input_embeddings(), student.get_output_embeddings()
    assert (embedding.weight is head.weight) is ties


def test_unknown_family_names_the_known_ones() -> None:
    with pytest.raises(UserError) as caught:
        family_of("gpt_neox")
    message = str(caught.value)
    assert "'gpt_neox'" in message
    assert all(family in message for family in FAMILIES)


def test_fit_hidden_size_is_taken(teacher: Teacher) -> None:
    for hidden_size in (2, 8, 14):
        config = student_config(teacher, StudentSection(hidden_size=hidden_size))
        assert config.hidden_size == hidden_size


@pytest.mark.parametrize("hidden_size", [HIDDEN, HIDDEN + 2])
def test_hidden_size_not_smaller(teacher: Teacher, hidden_size: int) -> None:
    with pytest.raises(UserError, match=rf"is {hidden_size}, but the teacher's is {HIDDEN}"):
        student_config(teacher, StudentSection(hidden_size=hidden_size))


def test_odd_hidden_size(teacher: Teacher) -> None:
    with pytest.raises(UserError, match=r"student\.hidden_size is 7.* even"):
        student_config(teacher, StudentSection(hidden_size=7))


@pytest.mark.parametrize(("hidden_size", "nearest"), [(8, 6), (10, 12), (2, 6), (15, 12)])
def test_llama_hidden_size_not_divided_by_heads(hidden_size: int, nearest: int) -> None:
    teacher = tiny_teacher("llama", hidden_size=18, num_attention_heads=3)
    with pytest.raises(UserError, match=rf"is {hidden_size}, .* 3 .*heads: .* is {nearest}\."):
        student_config(teacher, StudentSection(hidden_size=hidden_size))
    assert student_config(teacher, StudentSection(hidden_size=nearest)).hidden_size == nearest


def test_a_hidden_size_that_mamba_layers_cannot_have() -> None:
    """They stay as wide as the teacher's, 32, and the configuration has that as a multiple."""
    teacher = tiny_teacher("granitemoehybrid")
    with pytest.raises(UserError, match=r"is 12, but the width .* Mamba layers .* nearest is 8\."):
        student_config(teacher, StudentSection(hidden_size=12))
    config = student_config(teacher, StudentSection(hidden_size=4))
    assert (config.hidden_size, config.mamba_expand) == (4, 8)


def test_without_mamba_layers_any_hidden_size_will_do(tmp_path: Path) -> None:
    """The configuration checks Mamba's width even then."""
    teacher = tiny_teacher("granitemoehybrid", layer_types=["full_attention"] * 2)
    student = tiny_method(teacher, {"hidden_size": 10, "intermediate_size": 6}).student()
    student.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    ids = tiny_tokens(2)
    torch.testing.assert_close(again(ids).logits, student(ids).logits)
    assert again.config.shared_intermediate_size == 6
    assert shape_of(again).row["FFN width"] == 6


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_sizes_that_the_models_own_class_refuses(family: str) -> None:
    """They are refused with the nearest one that it takes."""
    teacher = tiny_teacher(family, num_attention_heads=4, num_key_value_heads=2)
    config = copy.deepcopy(teacher.config)
    teacher.family.set_hidden_size(config, 6)
    try:
        config.validate()
    except StrictDataclassError:
        with pytest.raises(UserError, match="nearest"):
            check_hidden_size(teacher, 6)
        with pytest.raises(UserError, match="cannot have this shape"):
            empty_student(teacher.model, derive_config(teacher, StudentSection(hidden_size=6)))
    else:
        assert not teacher.family.divides_by_heads


@pytest.mark.parametrize("family", [name for name in LLAMAS if name != "llama"])
def test_other_families_need_no_division_by_heads(family: str) -> None:
    teacher = tiny_teacher(family, hidden_size=18, num_attention_heads=3)
    assert tiny_method(teacher, {"hidden_size": 8}).student().config.hidden_size == 8


@pytest.mark.parametrize(
    ("name", "device", "dtype"),
    [
        ("auto", "cuda:1", torch.bfloat16),
        ("auto", "cpu", torch.float32),
        ("float16", "cuda", torch.float16),
        ("float64", "cpu", torch.float64),
    ],
)
def test_element_types_of_teachers(name: str, device: str, dtype: torch.dtype) -> None:
    assert element_type(name, device) == dtype
