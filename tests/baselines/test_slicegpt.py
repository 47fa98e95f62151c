"""SliceGPT against the teacher whose residual stream is projected by hooks."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from lrc.baselines.pruning.rotate import write_rotated
from lrc.baselines.slicegpt import SliceGpt
from lrc.data.batch import Batch
from lrc.methods import METHODS
from lrc.model.teacher import Teacher, as_teacher
from lrc.recipe import Recipe
from lrc.system.errors import UserError
from stories import sample
from tiny import HIDDEN, TINY_CASES, Case, tiny_teacher, tiny_tokens
from tiny_runs import tiny_recipe

IDS = tiny_tokens(3, 9, seed=0)


def recipe_of(hidden_size: int) -> Recipe:
    return tiny_recipe(method="slicegpt", student={"hidden_size": hidden_size})


def sliced(teacher: Teacher, hidden_size: int, ids: Tensor = IDS) -> SliceGpt:
    """The method after its start."""
    method = METHODS["slicegpt"].build(teacher, recipe_of(hidden_size))
    assert isinstance(method, SliceGpt)
    method.initialize(Batch(ids), lambda done, parts: None)
    return method


def random_basis(hidden_size: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    square = torch.randn(HIDDEN, HIDDEN, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(square).Q[:, :hidden_size]


@torch.no_grad()
def projected_logits(teacher: Teacher, projector: Tensor) -> Tensor:
    """Logits of the teacher if everything written to its stream is projected.

    A tied head reads the projected states through its projected rows.
    """
    model = teacher.model
    paths = ["model.embed_tokens"]
    for i in range(teacher.num_layers):
        paths += [f"model.layers.{i}.self_attn.o_proj", f"model.layers.{i}.mlp.down_proj"]
    handles = [
        model.get_submodule(path).register_forward_hook(lambda _m, _i, out: out @ projector)
        for path in paths
    ]
    if model.config.tie_word_embeddings:
        norm = model.model.norm
        handles.append(norm.register_forward_hook(lambda _m, _i, out: out @ projector))
    logits = model(IDS).logits
    for handle in handles:
        handle.remove()
    return logits


@pytest.mark.usefixtures("exact_norms")
@pytest.mark.parametrize("case", TINY_CASES)
def test_the_whole_width_is_the_teacher(case: Case) -> None:
    family, tied, changes = case
    teacher = tiny_teacher(family, tied, **changes)
    student = sliced(teacher, HIDDEN).student()
    assert (student.lm_head.weight is student.model.embed_tokens.weight) == tied
    with torch.no_grad():
        ours, theirs = student(IDS).logits, teacher.model(IDS).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)
    weight = student.model.layers[0].self_attn.q_proj.weight
    assert not torch.allclose(weight, teacher.model.model.layers[0].self_attn.q_proj.weight)


@pytest.mark.usefixtures("exact_norms")
@pytest.mark.parametrize("case", TINY_CASES)
def test_a_cut_stream_is_the_teachers_projected(case: Case) -> None:
    """With a tiny eps, since it is added to a mean over d_S or d_T numbers."""
    family, tied, changes = case
    teacher = tiny_teacher(family, tied, rms_norm_eps=1e-14, **changes)
    student = METHODS["slicegpt"].build(teacher, recipe_of(8)).student()
    basis = random_basis(8)
    write_rotated(student, teacher, basis)
    with torch.no_grad():
        ours = student(IDS).logits
    theirs = projected_logits(teacher, basis @ basis.T)
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)


@settings(max_examples=10, deadline=None)
@given(
    hidden_size=st.integers(1, HIDDEN // 2).map(lambda half: 2 * half),
    family=st.sampled_from(["mistral", "qwen2", "qwen3"]),
    tied=st.booleans(),
)
def test_every_width(hidden_size: int, family: str, tied: bool) -> None:
    teacher = tiny_teacher(family, tied, rms_norm_eps=1e-12)
    student = METHODS["slicegpt"].build(teacher, recipe_of(hidden_size)).student()
    basis = random_basis(hidden_size, seed=hidden_size)
    write_rotated(student, teacher, basis)
    with torch.no_grad():
        ours = student(IDS).logits
    theirs = projected_logits(teacher, basis @ basis.T)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)  # norms are float32 inside


@pytest.mark.usefixtures("exact_norms")
def test_leading_directions_are_kept() -> None:
    """A teacher whose stream has only eight directions loses nothing."""
    teacher = tiny_teacher("llama", rms_norm_eps=1e-14)
    plane = random_basis(8, seed=3)
    projector = plane @ plane.T
    with torch.no_grad():
        for name, weight in teacher.model.named_parameters():
            if name.endswith("embed_tokens.weight"):
                weight.copy_(weight @ projector)
            elif name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.copy_(projector @ weight)
        theirs = teacher.model(IDS).logits
        ours = sliced(teacher, 8).student()(IDS).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-7)


def test_the_student_is_of_lrcs_shape_and_plain(tmp_path: Path) -> None:
    teacher = tiny_teacher("qwen3", tied=True, dtype=torch.float32)
    method = sliced(teacher, 8)
    clone = METHODS["lrc"].build(teacher, tiny_recipe())
    shapes = [p.shape for p in method.student().parameters()]
    assert shapes == [p.shape for p in clone.student().parameters()]
    assert all(parameter.requires_grad for parameter in method.parameters().values())
    method.student().save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, method.student()(IDS).logits)


def test_what_cannot_be_sliced() -> None:
    with pytest.raises(UserError, match="teacher's is 16: choose a size no larger"):
        METHODS["slicegpt"].build(tiny_teacher("qwen3"), recipe_of(18))


def leading(stream: Tensor, hidden_size: int) -> Tensor:
    """Projector on the leading principal directions of a normalized stream."""
    rows = stream.flatten(0, 1).double()
    rows = rows / rows.pow(2).mean(-1, keepdim=True).sqrt()
    basis = torch.linalg.eigh(rows.T @ rows).eigenvectors[:, -hidden_size:]
    return (basis @ basis.T).to(stream.dtype)


@torch.no_grad()
def sliced_by_block(teacher: Teacher, ids: Tensor, seen: int, hidden_size: int) -> Tensor:
    """Logits of the paper's SliceGPT, one rotation per block, found in order on the cut stream.

    A skip matrix Q_l^T Q_(l+1) of a cut stream is the projection Q_(l+1) Q_(l+1)^T of the whole
    one, so the teacher's own layers run here, with the stream projected before and inside them.

    Args:
        teacher: an untied or tied Llama; the head is taken as untied.
        ids: tokens [sequences, length].
        seen: sequences that the rotations are found on.
        hidden_size: d_S.
    """
    model = teacher.model.model
    stream = model.embed_tokens(ids)
    turn = model.rotary_emb(stream, torch.arange(ids.shape[1])[None])
    stream = stream @ leading(stream[:seen], hidden_size)
    for layer in model.layers:
        attention, _ = layer.self_attn(layer.input_layernorm(stream), turn, attention_mask=None)
        stream = stream + attention
        stream = stream @ leading(stream[:seen], hidden_size)
        stream = stream + layer.mlp(layer.post_attention_layernorm(stream))
        stream = stream @ leading(stream[:seen], hidden_size)
    return teacher.model.lm_head(model.norm(stream))


def loss_of(logits: Tensor, ids: Tensor) -> float:
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()


def test_what_one_rotation_costs(stories_folder: Path) -> None:
    """A little, on a trained model, as the method's docstring says."""
    model = AutoModelForCausalLM.from_pretrained(stories_folder)
    teacher = as_teacher(model, AutoTokenizer.from_pretrained(stories_folder), "stories")
    ids = sample(teacher, 64, 96)
    seen, width, fresh = 48, model.config.hidden_size, ids[48:]
    with torch.no_grad():
        theirs = loss_of(model(fresh).logits, fresh)
        assert (
            abs(loss_of(sliced_by_block(teacher, ids, seen, width)[seen:], fresh) - theirs) < 1e-3
        )
        for hidden_size, most in ((48, 0.4), (32, 1.0)):
            by_block = loss_of(sliced_by_block(teacher, ids, seen, hidden_size)[seen:], fresh)
            one = loss_of(sliced(teacher, hidden_size, ids[:seen]).student()(fresh).logits, fresh)
            assert theirs < by_block < one < by_block + most
