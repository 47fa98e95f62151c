"""Students with fewer experts, of every family that has some."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from data_helpers import write_jsonl
from lrc.cloning.distill_pass import ClonePair
from lrc.cloning.low_rank_clone import LowRankClone
from lrc.cloning.shape.experts import choose_experts, expert_costs
from lrc.cloning.shape.pruned_teacher import PrunedTeacher
from lrc.cloning.start.calibration import Block
from lrc.data.batch import Batch
from lrc.model.families import FAMILIES
from lrc.model.layout import LinearSite
from lrc.model.pruned_shape import shape_of_config
from lrc.model.teacher import Teacher
from lrc.recipe.sections import InitializeSection, ObjectiveSection, StudentSection
from lrc.run import Run
from lrc.system.errors import UserError
from lrc.train import train
from tiny import HIDDEN, gradients, logits, tiny_method, tiny_teacher, tiny_tokens
from tiny_runs import copy_until, tiny_documents, tiny_recipe

NUMBER = 8
SETTINGS = {
    "afmoe": "num_experts",
    "deepseek_v2": "n_routed_experts",
    "dots1": "n_routed_experts",
    "ernie4_5_moe": "moe_num_experts",
    "exaone_moe": "num_experts",
    "granitemoe": "num_local_experts",
    "granitemoeshared": "num_local_experts",
    "hunyuan_v1_moe": "num_experts",
    "hy_v3": "num_experts",
    "mellum": "num_experts",
    "minimax_m2": "num_local_experts",
    "solar_open": "n_routed_experts",
    "mixtral": "num_local_experts",
    "gpt_oss": "num_local_experts",
    "deepseek_v3": "n_routed_experts",
    "glm4_moe": "n_routed_experts",
    "glm4_moe_lite": "n_routed_experts",
    "nemotron_h": "n_routed_experts",
    "qwen2_moe": "num_experts",
    "qwen3_moe": "num_experts",
    "qwen3_next": "num_experts",
    "qwen3_5_moe_text": "num_experts",
}
"""Families with experts, and what they call their number."""


def expert_teacher(family: str, **changes: Any) -> Teacher:
    more = {SETTINGS[family]: NUMBER, "num_key_value_heads": 2, **changes}
    return tiny_teacher(family, **more)


def built(teacher: Teacher, **student: Any) -> LowRankClone:
    return LowRankClone(
        teacher,
        StudentSection.model_validate({"hidden_size": HIDDEN, **student}),
        ObjectiveSection(clone_scale="none"),
        start=InitializeSection(refine_epochs=0),
    )


def solved(teacher: Teacher, **student: Any) -> LowRankClone:
    method = built(teacher, **student)
    method.initialize(Batch(tiny_tokens(24)), lambda done, parts: None)
    return method


def chosen(method: LowRankClone) -> list[list[int]]:
    """The kept experts of the layers."""
    assert isinstance(method.source, PrunedTeacher)
    return method.source.kept.lists()["experts"]  # type: ignore[no-any-return]


def with_experts(model: PreTrainedModel, keep: list[int]) -> PreTrainedModel:
    """The model with some experts of each layer, made from its saved weights."""
    config = copy.deepcopy(model.config)
    setattr(config, SETTINGS[config.model_type], len(keep))
    smaller = type(model)(config).to(model.dtype)
    state = model.state_dict()
    for name, value in state.items():
        routed = any(f".{part}." in name for part in ("gate", "router", "experts"))
        routed |= name.endswith(("correction_bias", "expert_bias"))
        if routed and NUMBER in value.shape[:2]:
            state[name] = value[keep] if len(value) == NUMBER else value[:, keep]
    smaller.load_state_dict(state)
    return smaller.eval()


def test_every_family_with_experts_is_here() -> None:
    found = {name for name in FAMILIES if tiny_teacher(name).layout.has_experts}
    assert found == SETTINGS.keys()
    for family in SETTINGS:
        assert shape_of_config(expert_teacher(family).config).experts == NUMBER


@pytest.mark.parametrize("family", SETTINGS)
@torch.no_grad()
def test_identity_projections_give_the_teacher_without_some_experts(family: str) -> None:
    teacher = expert_teacher(family)
    for name, buffer in teacher.model.named_buffers():
        if "correction_bias" in name:
            buffer.uniform_(-0.5, 0.5)
    keep = [0, 3, 5, 6]  # two of each of deepseek_v3's groups
    method = tiny_method(teacher, {"hidden_size": HIDDEN, "experts": {"keep": keep}})
    expected = with_experts(teacher.model, keep)
    for value in method.projections.values.values():
        value.copy_(torch.eye(HIDDEN))
    for norm in method.source.layout.stream_norms():
        method.model.get_submodule(norm).weight.copy_(expected.get_parameter(f"{norm}.weight"))
    student, ids = method.student(), tiny_tokens(3)
    torch.testing.assert_close(logits(student, ids), logits(expected, ids))
    own = student.state_dict()
    for name, value in expected.state_dict().items():
        if name.endswith(("correction_bias", "router.bias", "expert_bias")):
            assert torch.equal(own[name], value), name


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_the_choice_is_part_of_a_checkpoint(family: str) -> None:
    teacher = expert_teacher(family)
    method = solved(teacher, experts=4)
    again = built(teacher, experts=4)
    again.load_state(method.state())
    assert chosen(again) == chosen(method)
    assert chosen(method)[1] != [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("family", "bias"),
    [
        ("gpt_oss", "router.bias"),
        ("deepseek_v3", "gate.e_score_correction_bias"),
        ("glm4_moe", "gate.e_score_correction_bias"),
    ],
)
@torch.no_grad()
def test_experts_that_no_token_uses_go_first(family: str, bias: str) -> None:
    teacher = expert_teacher(family)
    idle = [1, 2, 4, 7]
    for name, value in teacher.model.state_dict(keep_vars=True).items():
        if name.endswith(bias):
            value[idle] = -1e4
    method = solved(teacher, experts=4)
    layout = method.source.layout
    used = [
        one
        for one, branches in zip(chosen(method), layout.branches, strict=True)
        if branches[1].has_experts
    ]
    assert used
    assert all(one == [0, 3, 5, 6] for one in used)
    ids = tiny_tokens(3)
    wrong = logits(method.student(), ids) - (expected := logits(teacher.model, ids))
    assert wrong.square().mean() < 1e-9 * expected.square().mean()


@torch.no_grad()
def test_the_cost_is_what_the_predictions_lose() -> None:
    """By a loop over tokens and experts of mixtral."""
    teacher = expert_teacher("mixtral")
    module = teacher.model.get_submodule("model.layers.1.mlp")
    generator = torch.Generator().manual_seed(3)
    draw = torch.randn(HIDDEN, HIDDEN, generator=generator, dtype=torch.float64)
    metric = draw @ draw.T
    states = torch.randn(2, 3, 7, HIDDEN, generator=generator, dtype=torch.float64)
    weights = torch.rand(2, 3, 7, 1, generator=generator, dtype=torch.float64)

    def reads() -> Iterator[tuple[Tensor, Tensor]]:
        yield from zip(states, weights, strict=True)

    block = Block(module, (states[0],), {})
    found = expert_costs(block, module.get_submodule("experts"), reads(), metric)
    expected = torch.zeros(NUMBER, dtype=torch.float64)
    router, gate_up, down = (
        module.get_parameter(name)
        for name in ("gate.weight", "experts.gate_up_proj", "experts.down_proj")
    )
    for x, w in zip(states.reshape(-1, HIDDEN), weights.flatten(), strict=True):
        probabilities = (router @ x).softmax(0)
        two = probabilities.topk(2).indices.tolist()
        for j in two:
            gate, up = (gate_up[j] @ x).chunk(2)
            share = probabilities[j] / probabilities[two].sum()
            added = w * share * (down[j] @ (torch.nn.functional.silu(gate) * up))
            expected[j] += added @ metric @ added
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)  # a router in float32


def test_each_group_keeps_as_many() -> None:
    costs = torch.tensor([9.0, 8, 7, 6, 1, 2, 3, 4])
    assert choose_experts(costs, 4, 1).tolist() == [0, 1, 2, 3]
    assert choose_experts(costs, 4, 2).tolist() == [0, 1, 6, 7]
    assert choose_experts(costs, 4, 4).tolist() == [0, 2, 5, 7]


def test_router_of_routerare_cloned_for_the_kept_experts() -> None:
    keep = [1, 2, 6]
    teacher = expert_teacher("mixtral")
    method = solved(teacher, experts={"keep": keep})
    ids = tiny_tokens(2)
    compared = []
    real = method.distill.pair
    assert real is not None

    def keep_routers(site: LinearSite, *activations: Tensor) -> ClonePair:
        pair = real(site, *activations)
        if site.name == "router":
            compared.append(pair.teacher.clone())
        return pair

    method.distill.pair = keep_routers
    gradients(method, Batch(ids))
    seen = []
    hooks = [
        layer.mlp.gate.register_forward_hook(lambda _m, _i, output: seen.append(output[0]))
        for layer in teacher.model.model.layers
    ]
    with torch.no_grad():
        teacher.model(ids)
    for hook in hooks:
        hook.remove()
    for of_router, whole in zip(compared, seen, strict=True):
        wanted = whole.view(-1, NUMBER)[:, keep]
        torch.testing.assert_close(of_router.reshape(-1, len(keep)), wanted)


@pytest.mark.parametrize(
    ("family", "experts", "message"),
    [
        ("mixtral", 1, "each token uses 2: keep at least 2"),
        ("mixtral", NUMBER + 1, f"choose at most {NUMBER}"),
        ("mixtral", {"keep": [0, NUMBER]}, f"the teacher's last is {NUMBER - 1}"),
        ("deepseek_v3", 5, "2 experts from 1 of 2 groups of equal size: give a multiple of 2, at"),
        ("deepseek_v3", 2, "at least 4"),
        ("of threes", 4, "3 experts from 1 of 2 groups of equal size: .* at least 6"),
        ("deepseek_v3", {"keep": [0, 1, 2, 5]}, "as many of each of the router's 2 groups of 4"),
        ("deepseek_v3", {"keep": [0, 1, 2, 3]}, "as many of each"),
    ],
)
def test_experts_that_do_not_fit(family: str, experts: Any, message: str) -> None:
    recipe = tiny_recipe({"student.experts": experts})
    more = {"num_experts_per_tok": 3} if family == "of threes" else {}
    teacher = expert_teacher("mixtral" if family == "mixtral" else "deepseek_v3", **more)
    with pytest.raises(UserError, match=message):
        LowRankClone.build(teacher, recipe)


def test_a_dense_teacher_has_none() -> None:
    recipe = tiny_recipe({"student.experts": 2})
    with pytest.raises(UserError, match=r"llama models have no experts: leave student\.experts"):
        LowRankClone.build(tiny_teacher("llama"), recipe)


def test_a_run_resumes_across_the_release_and_exports(tmp_path: Path) -> None:
    teacher = tiny_teacher("mixtral", dtype=torch.float32, num_local_experts=NUMBER)
    changes = {
        "student.experts": 5,
        "data.text": [str(write_jsonl(tmp_path / "text.jsonl", tiny_documents()))],
        "data.cache": str(tmp_path / "cache"),
        "data.sequence_length": 16,
        "train.micro_batch": 2,
        "train.checkpoint_every": 1,
        "train.keep_checkpoints": 20,
        "train.release_at": 0.5,
        "train.tokens": 32 * 6,
        "initialize.calibration_tokens": 128,
    }
    run = Run.create(tmp_path / "run", tiny_recipe(changes))
    train(run, teacher)
    expected = (run.student_folder / "model.safetensors").read_bytes()
    model = AutoModelForCausalLM.from_pretrained(run.student_folder)
    assert model.config.num_local_experts == 5
    card = (run.student_folder / "README.md").read_text()
    assert "with a smaller hidden size and fewer experts, made by" in card
    assert f"| experts | {NUMBER} | 5 |" in card
    assert model.model.layers[0].mlp.experts.down_proj.shape[0] == 5
    for step in (5, 2):
        again = copy_until(run, tmp_path / f"from-{step}", step)
        train(again, teacher)
        assert (again.student_folder / "model.safetensors").read_bytes() == expected
