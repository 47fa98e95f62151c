"""Tests that every family must pass, whatever its layers consist of."""

import copy
import math
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from transformers import AutoModelForCausalLM

from lrc.baselines.pruning.rotate import write_rotated
from lrc.cloning.activations import activation_of, last_hidden
from lrc.cloning.low_rank_clone import LowRankClone
from lrc.cloning.projection import project
from lrc.cloning.start.basis import principal_basis
from lrc.cloning.start.calibration import Calibration
from lrc.cloning.start.closed_form import solve
from lrc.cloning.start.streams import ActivationStore
from lrc.data.batch import Batch
from lrc.evaluation.held_out import measure_agreement
from lrc.methods import METHODS
from lrc.model.families import FAMILIES
from lrc.model.layout import LinearSite
from lrc.model.shapes import shape_of
from lrc.model.student import build_student, empty_student, student_config
from lrc.model.teacher import Teacher, load_teacher
from lrc.recipe import Recipe
from lrc.recipe.sections import CloneTerms, ObjectiveSection, StudentSection, TeacherSection
from lrc.system.errors import UserError
from lrc.train import train
from lrc.train.batches import count
from tiny import (
    DROPOUTS,
    FFN,
    HIDDEN,
    STUDENT_HIDDEN,
    TOKENS,
    gradients,
    in_turn,
    initialize_from_text,
    logits,
    relative_error,
    tiny_batch,
    tiny_method,
    tiny_teacher,
    tiny_tokens,
)
from tiny_runs import new_run, tiny_recipe

CASES = in_turn(list(FAMILIES), [False, True])
"""Every family, untied and tied."""


@pytest.fixture
def teacher(request: pytest.FixtureRequest) -> Teacher:
    family, tied = request.param
    return tiny_teacher(family, tied)


@pytest.mark.parametrize(("family", "tied"), CASES)
def test_identity_projections_give_the_teacher(family: str, tied: bool) -> None:
    teacher = tiny_teacher(family, tied)
    method = tiny_method(teacher, {"hidden_size": HIDDEN})
    with torch.no_grad():
        for value in method.projections.values.values():
            value.copy_(torch.eye(HIDDEN))
        for norm in teacher.layout.stream_norms():
            method.model.get_submodule(norm).weight.copy_(teacher.parameter(f"{norm}.weight"))
    ids = tiny_tokens(3)
    torch.testing.assert_close(
        logits(method.student(), ids), logits(teacher.model, ids), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize(("family", "tied"), CASES)
def test_losses_and_gradients_equal_plain_autograd(family: str, tied: bool) -> None:
    """In the reference the weights are functions of the projections, all logits exist at once, and
    every clone term is a mean of squares."""
    teacher = tiny_teacher(family, tied)
    method = tiny_method(teacher, {"fold_gains": True})
    batch = tiny_batch(lengths=[9, 6])
    losses, found = gradients(method, batch)
    expected = naive_losses(method, batch)
    for name in ("loss", "kl", "lm", "clone"):
        torch.testing.assert_close(losses[name], expected[name], rtol=1e-6, atol=1e-8)
    parameters = method.parameters()
    wanted = torch.autograd.grad(expected["loss"], list(parameters.values()))
    for name, gradient in zip(parameters, wanted, strict=True):
        assert relative_error(found[name], gradient) < 1e-5, name


def naive_losses(method: LowRankClone, batch: Batch) -> dict[str, Tensor]:
    """The objective as a function of the method's parameters."""
    teacher, student, layout = method.teacher, method.model, method.teacher.layout
    weights = {name: p for name, p in method.parameters().items() if "projections" not in name}
    for weight in method.projections.weights:
        projection = method.projections.values[weight.projection]
        if weight.folded and weight.norm:
            projection = teacher.gain(weight.norm)[:, None] * projection
        weights[weight.name] = project(teacher.parameter(weight.name), projection, weight.axis)
    mask = batch.token_mask()
    assert mask is not None
    seen: dict[str, dict[LinearSite, Tensor]] = {"teacher": {}, "student": {}}

    def watch(model: nn.Module, kept: dict[LinearSite, Tensor]) -> Callable[[], None]:
        def hook(site: LinearSite) -> Any:
            return lambda _m, _i, output: kept.__setitem__(site, activation_of(output))

        hooks = [
            model.get_submodule(layout.linear(site)).register_forward_hook(hook(site))
            for site in layout.observable()
        ]
        return lambda: [h.remove() for h in hooks] and None

    def run(call: Callable[..., Any]) -> Tensor:
        result: Tensor = call(batch.input_ids, attention_mask=batch.attention_mask).logits.double()
        return result[..., :TOKENS]

    ends = watch(teacher.model, seen["teacher"]), watch(student, seen["student"])
    with torch.no_grad():
        theirs = run(teacher.model)
    ours = run(lambda ids, **kw: functional_call(student, weights, (ids,), kw))
    for end in ends:
        end()
    log_p, log_q = theirs.log_softmax(-1), ours.log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)[mask].mean()
    lm = functional.cross_entropy(ours.flatten(0, 1), batch.labels().flatten(), ignore_index=-100)
    clone = torch.zeros(())
    for site in layout.observable():
        target, output = seen["teacher"][site], seen["student"][site]
        if layout.writes(site):
            key = f"layers.{site.layer}.{site.name}"
            target = target @ method.projections.values[key]
        counted = mask.view(output.shape[:-1])
        clone = clone + (output - target)[counted].square().mean()
    return {"kl": kl, "lm": lm, "clone": clone, "loss": kl + lm + method.distill.alpha * clone}


@pytest.mark.parametrize(("family", "tied"), CASES)
def test_the_closed_form_at_full_width_is_the_teacher(family: str, tied: bool) -> None:
    teacher = tiny_teacher(family, tied)
    method = LowRankClone(teacher, StudentSection(hidden_size=HIDDEN), ObjectiveSection())
    initialize_from_text(method, "closed-form", tiny_tokens(24), refine_epochs=1)
    ids = tiny_tokens(3)
    # transformers computes RMSNorm in float32, whatever the model's dtype.
    assert relative_error(logits(method.student(), ids), logits(teacher.model, ids)) < 5e-4


def test_more_layers_than_the_stream_has_dimensions() -> None:
    """Falcon-H1's layers return a tuple, whatever the calibration puts in their place."""
    teacher = tiny_teacher("falcon_h1", num_hidden_layers=4)
    method = LowRankClone(teacher, StudentSection(hidden_size=HIDDEN), ObjectiveSection())
    initialize_from_text(method, "closed-form", tiny_tokens(24), refine_epochs=1)
    ids = tiny_tokens(3)
    assert relative_error(logits(method.student(), ids), logits(teacher.model, ids)) < 5e-4


@pytest.mark.parametrize(("family", "tied"), CASES)
def test_pca_and_slicegpt_at_full_width_are_the_teacher(family: str, tied: bool) -> None:
    teacher, ids = tiny_teacher(family, tied), tiny_tokens(24)
    expected = logits(teacher.model, ids)
    method = LowRankClone(teacher, StudentSection(hidden_size=HIDDEN), ObjectiveSection())
    initialize_from_text(method, "pca", ids)
    found = logits(method.student(), ids)
    if not tied:  # a tied head cannot fold a gain
        assert relative_error(found, expected) < 5e-4
    config = copy.deepcopy(teacher.config)
    sliced = empty_student(teacher.model, config)
    with Calibration(teacher, ids, HIDDEN) as calibration:
        write_rotated(sliced, teacher, principal_basis(calibration))
    assert relative_error(logits(sliced, ids), expected) < 5e-4


@pytest.mark.parametrize(("family", "tied"), CASES)
def test_the_student_has_the_solved_stream(
    family: str, tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And it is closer to the teacher than a random start."""
    streams: list[Tensor] = []
    rotations: list[Tensor] = []
    head = solve._solved_head

    def kept(calibration: Calibration, basis: Tensor, stream: ActivationStore, *rest: Any) -> Any:
        streams.append(torch.cat([stream[part].clone() for part in calibration.batches()]))
        found = head(calibration, basis, stream, *rest)
        rotations.extend(r for r in [getattr(found[0], "rotation", None)] if r is not None)
        return found

    monkeypatch.setattr(solve, "_solved_head", kept)
    teacher, ids = tiny_teacher(family, tied), tiny_tokens(24)
    method = LowRankClone(teacher, StudentSection(hidden_size=STUDENT_HIDDEN), ObjectiveSection())
    initialize_from_text(method, "closed-form", ids, refine_epochs=0)
    read: list[Tensor] = []
    student = method.student()
    norm = student.get_submodule(teacher.family.final_norm)
    norm.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    logits(student, ids)
    expected = streams[0] @ rotations[0] if rotations else streams[0]
    assert relative_error(read[0], expected) < 1e-5
    batches = [Batch(ids)]
    solved = measure_agreement(teacher, student, batches).kl
    initialize_from_text(method, "random", ids)
    assert solved < measure_agreement(teacher, method.student(), batches).kl


def test_experts_that_read_a_latent() -> None:
    """As in Nemotron 3 Super: between the stream and the experts are two linear maps."""
    teacher = tiny_teacher("nemotron_h", moe_latent_size=5)
    assert {"latent_in", "latent_out"} <= set(teacher.layout.names())
    assert not teacher.layout.has_experts
    with pytest.raises(UserError, match="so none can be removed"):
        tiny_method(teacher, {"hidden_size": HIDDEN, "experts": 2})
    method = LowRankClone(teacher, StudentSection(hidden_size=HIDDEN), ObjectiveSection())
    initialize_from_text(method, "closed-form", tiny_tokens(24), refine_epochs=1)
    ids = tiny_tokens(3)
    assert relative_error(logits(method.student(), ids), logits(teacher.model, ids)) < 5e-4


def test_experts_beside_an_ffn_of_their_own_module() -> None:
    """As in Granite 4: both read the same norm, and their outputs are added."""
    teacher = tiny_teacher("granitemoehybrid", num_local_experts=4, num_experts_per_tok=2)
    assert {"down", "shared_gate_up", "shared_down"} <= set(teacher.layout.names())
    ids = tiny_tokens(24)
    method = LowRankClone(teacher, StudentSection(hidden_size=HIDDEN), ObjectiveSection())
    initialize_from_text(method, "closed-form", ids, refine_epochs=1)
    assert relative_error(logits(method.student(), ids), logits(teacher.model, ids)) < 5e-4
    fewer = tiny_method(teacher, {"hidden_size": HIDDEN, "experts": 2})
    initialize_from_text(fewer, "closed-form", ids)
    agreement = measure_agreement(teacher, fewer.student(), [Batch(ids)])
    assert fewer.student().config.num_local_experts == 2
    assert agreement.kl < 0.5


@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_hidden_state_gives_the_logits(family: str) -> None:
    teacher, ids = tiny_teacher(family), tiny_tokens(2)
    with torch.no_grad():
        hidden = last_hidden(teacher.model, Batch(ids))
        found = hidden @ teacher.model.get_output_embeddings().weight.T
    if (cap := teacher.logit_softcap) is not None:
        found = cap * (found / cap).tanh()
    expected = logits(teacher.model, ids)
    torch.testing.assert_close(found.to(expected.dtype), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_which_families_keep_documents_apart(family: str) -> None:
    teacher = tiny_teacher(family)
    ids = tiny_tokens(1)
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
    with torch.no_grad():
        packed = teacher.model(ids, position_ids=positions, use_cache=False).logits[:, 5:]
    error = relative_error(packed, logits(teacher.model, ids[:, 5:]))
    assert (error < 1e-5) == teacher.family.keeps_documents_apart


@pytest.mark.parametrize(("family", "checkpointing"), in_turn(list(FAMILIES), [False, True]))
def test_dropout_is_off(family: str, checkpointing: bool) -> None:
    """Whatever the configuration says, the student is in evaluation mode during training."""
    batch = tiny_batch()
    found = []
    for rate in (0.0, 0.5):
        settings = DROPOUTS.get(family, ("attention_dropout",))
        teacher = tiny_teacher(family, **dict.fromkeys(settings, rate))
        method = tiny_method(teacher, gradient_checkpointing=checkpointing)
        found.append(gradients(method, batch))
    assert torch.equal(found[0][0]["loss"], found[1][0]["loss"])
    for name, gradient in found[0][1].items():
        assert torch.equal(gradient, found[1][1][name]), name


@pytest.mark.parametrize("family", FAMILIES)
def test_everything_not_projected_is_the_teachers(family: str) -> None:
    """Parameters and saved buffers: biases, norms inside blocks, sinks, scales of layers."""
    teacher = tiny_teacher(family)
    for number, buffer in enumerate(teacher.model.buffers()):
        if buffer.is_floating_point() and buffer.ndim == 1 and len(buffer) < 5:
            buffer.copy_(torch.linspace(0.5, 0.7, len(buffer)) + number / 100)
    student = build_student(teacher, StudentSection(hidden_size=STUDENT_HIDDEN))
    theirs, ours = teacher.model.state_dict(), student.state_dict()
    changed = {p.name for p in teacher.layout.projected(teacher.model)}
    changed |= {f"{norm}.weight" for norm in teacher.layout.stream_norms()}
    changed |= {f"{teacher.family.embedding}.weight", f"{teacher.family.head}.weight"}
    for name, value in theirs.items():
        assert (name in changed) == (ours[name].shape != value.shape), name
        if name not in changed:
            assert torch.equal(ours[name], value), name
    rest = [name for name, p in student.named_parameters() if not p.requires_grad]
    assert not changed & set(rest)


RUN = {"data.sequence_length": 12, "train.tokens": 96, "train.micro_batch": 2}


def recipe_for(name: str) -> Recipe:
    """A recipe of a method; LLM-Pruner keeps the hidden size."""
    if name == "llm-pruner":
        return tiny_recipe(
            RUN, method={"name": name, "ratio": 0.3}, student={"hidden_size": HIDDEN}
        )
    return tiny_recipe(RUN, method=name)


@pytest.mark.parametrize(
    ("family", "name"), in_turn(list(FAMILIES), [name for name in METHODS if name != "lrc"])
)
def test_every_baseline_trains_or_is_refused(family: str, name: str) -> None:
    """Either a step gives gradients, or one sentence names the family."""
    teacher = tiny_teacher(family, num_key_value_heads=2, hidden_size=16)
    recipe = recipe_for(name)
    if name not in ("scratch", "activation-clone", "slicegpt"):
        with suppress(UserError):
            METHODS[name].build(teacher, recipe)
            family = ""
        if family:
            with pytest.raises(UserError, match=family):
                METHODS[name].build(teacher, recipe)
            return
    method = METHODS[name].build(teacher, recipe)
    batch = Batch(tiny_tokens(4))
    method.initialize(batch, lambda done, parts: None)
    method.begin_step(0)
    losses = method.losses(batch, count([batch]))
    losses.loss.backward()
    method.end_step()
    assert torch.isfinite(losses.loss)
    assert any(p.grad is not None for p in method.parameters().values())
    plain = method.student()
    assert torch.isfinite(logits(plain, batch.input_ids)).all()


@pytest.mark.parametrize(
    ("family", "name", "refused"),
    [
        ("qwen3_5_text", "minitron", True),
        ("gemma", "minitron", True),  # its embedding's scale depends on the width
        ("granite", "minitron", False),
        ("gpt_oss", "tinybert", True),  # sinks
        ("gemma2", "minilm", True),  # a softcap of the scores
        ("gemma3_text", "minilm", False),
        ("smollm3", "llm-pruner", False),
    ],
)
def test_which_baselines_are_refused(family: str, name: str, refused: bool) -> None:
    recipe = recipe_for(name)
    teacher = tiny_teacher(family, num_key_value_heads=2)
    if refused:
        with pytest.raises(UserError, match=family):
            METHODS[name].build(teacher, recipe)
    else:
        METHODS[name].build(teacher, recipe)


def test_a_hidden_size_that_experts_cannot_have() -> None:
    teacher = tiny_teacher("mixtral")
    with pytest.raises(UserError, match=r"hidden_size is 12.* multiple of 8: the nearest is 16"):
        student_config(teacher, StudentSection(hidden_size=12))


def test_clone_terms_go_by_the_familys_names() -> None:
    teacher = tiny_teacher("gpt_oss")
    method = tiny_method(teacher, objective={"clone": {"router": False, "gate_up": True}})
    assert {site.name for site in method.distill.sites} == {"q", "k", "v", "o", "down"}
    with pytest.raises(UserError, match=r"clone\.gate is off.*gpt_oss.*router"):
        tiny_method(teacher, objective={"clone": {"gate": False}})


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_map_has_a_clone_term(family: str) -> None:
    assert set(tiny_teacher(family).layout.names()) <= set(CloneTerms.model_fields)


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("gemma4_text", {"hidden_size_per_layer_input": 4}, "embeddings for every layer"),
        ("gemma4_text", {"use_bidirectional_attention": "all"}, "bidirectional attention"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "bidirectional attention"),
        (
            "phi3",
            {
                "head_dim": None,
                "rope_parameters": {
                    "rope_type": "longrope",
                    "rope_theta": 1e4,
                    "short_factor": [1.0] * 4,
                    "long_factor": [2.0] * 4,
                    "original_max_position_embeddings": 32,
                },
            },
            "longrope",
        ),
    ],
)
def test_what_cannot_be_cloned_is_refused(
    family: str, changes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(UserError, match=f"This {family} model has .*{reason}.*cannot be cloned"):
        tiny_teacher(family, **changes)


def test_numbers_by_layer_that_are_equal_are_one_number() -> None:
    """As Hunyuan-A13B has them."""
    lists = {"moe_topk": [2, 2], "moe_intermediate_size": [FFN, FFN], "num_shared_expert": [1, 1]}
    teacher, plain = tiny_teacher("hunyuan_v1_moe", **lists), tiny_teacher("hunyuan_v1_moe")
    ids = tiny_tokens(2)
    assert torch.equal(teacher.model(ids).logits, plain.model(ids).logits)
    assert shape_of(teacher.model).row["expert width"] == FFN
    assert shape_of(teacher.model).row["experts of a token"] == 2
    student = tiny_method(teacher, {"layers": 1, "experts": 2, "hidden_size": 8}).student()
    assert student(ids).logits.isfinite().all()
    with pytest.raises(UserError, match="layers of this hunyuan_v1_moe model differ in moe_topk"):
        tiny_teacher("hunyuan_v1_moe", moe_topk=[1, 2])


def test_a_head_with_a_bias_is_refused() -> None:
    with pytest.raises(UserError, match="The LM head of 'tiny' has a bias"):
        tiny_teacher("ernie4_5_moe", use_bias=True)


def test_experts_without_a_shared_one() -> None:
    teacher = tiny_teacher("granitemoeshared", shared_intermediate_size=0)
    assert "shared_down" not in teacher.layout.names()
    assert (
        tiny_method(teacher, {"hidden_size": 8}).student()(tiny_tokens(2)).logits.isfinite().all()
    )


@pytest.mark.parametrize("family", in_turn(list(reversed(FAMILIES))))
def test_a_folder_is_loaded_trained_and_exported(family: str, tmp_path: Path) -> None:
    """From a teacher's folder through a few steps to a student's folder."""
    teacher = tiny_teacher(family, dtype=torch.float32)
    teacher.model.save_pretrained(tmp_path / "teacher")
    teacher.tokenizer.save_pretrained(tmp_path / "teacher")
    loaded = load_teacher(TeacherSection(model=str(tmp_path / "teacher")))
    ids = tiny_tokens(2)
    found, expected = logits(loaded.model, ids), logits(teacher.model, ids)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    run = new_run(tmp_path, tokens=96, release_at=0.7)
    train(run, loaded)
    assert all(math.isfinite(line["loss"]) for line in run.metrics() if "loss" in line)
    student = AutoModelForCausalLM.from_pretrained(run.student_folder, dtype=torch.float32)
    assert type(student) is type(teacher.model)
    assert student.config.hidden_size == STUDENT_HIDDEN
    assert torch.isfinite(logits(student, ids)).all()
