"""Students with fewer layers, heads and neurons, of every family."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from transformers import AutoModelForCausalLM

from data_helpers import write_jsonl
from lrc.cloning.low_rank_clone import LowRankClone
from lrc.cloning.projection import project
from lrc.cloning.shape import prune
from lrc.cloning.shape.pruned_teacher import PrunedTeacher, asked_shape, first_units, pruned_teacher
from lrc.cloning.start.basis import StreamStatistics, stream_statistics
from lrc.cloning.start.calibration import Calibration
from lrc.cloning.start.closed_form import solve
from lrc.data.batch import Batch
from lrc.methods import METHODS, unused_settings
from lrc.model.families import FAMILIES
from lrc.model.families.base import Branch, Experts
from lrc.model.kept_units import cut
from lrc.model.layout import LinearSite
from lrc.model.pruned_shape import shape_of_config
from lrc.model.teacher import Teacher
from lrc.recipe.sections import InitializeSection, ObjectiveSection, StudentSection
from lrc.run import Run
from lrc.system.errors import UserError
from lrc.train import train
from tiny import (
    FFN,
    HEAD_DIM,
    HIDDEN,
    LAYERS,
    LLAMAS,
    TOKENS,
    gradients,
    in_turn,
    logits,
    relative_error,
    tiny_batch,
    tiny_method,
    tiny_teacher,
    tiny_tokens,
)
from tiny_runs import copy_until, tiny_documents, tiny_recipe

AXES: dict[str, dict[str, Any]] = {
    "layers": {"layers": 1},
    "neurons": {"intermediate_size": FFN // 2},
    "heads": {"kv_heads": 1},
}
WIDTHS = dict.fromkeys(AXES, "have different widths")
REFUSED: dict[str, dict[str, str]] = {
    "falcon_h1": {"heads": "self_attn.q_proj of falcon_h1"},
    "granitemoeshared": {"neurons": "No layer of this granitemoeshared model"},
    "granitemoe": {"neurons": "No layer of this granitemoe model"},
    "hunyuan_v1_moe": {"neurons": "No layer of this hunyuan_v1_moe model"},
    "minimax_m2": {
        "neurons": "No layer of this minimax_m2 model",
        "heads": "self_attn.q_norm of minimax_m2",
    },
    "solar_open": {"neurons": "solar_open models have no dense FFN"},
    "qwen2_moe": {"neurons": "No layer of this qwen2_moe model"},
    "olmo_hybrid": {"heads": "self_attn.q_norm of olmo_hybrid"},
    "qwen3_moe": {"neurons": "No layer of this qwen3_moe model has a dense FFN"},
    "qwen3_next": {"neurons": "has a dense FFN", "heads": "self_attn.q_proj of qwen3_next"},
    "qwen3_5_text": {"heads": "self_attn.q_proj of qwen3_5_text"},
    "qwen3_5_moe_text": {"neurons": "has a dense FFN", "heads": "self_attn.q_proj"},
    "gemma4_text": WIDTHS,
    "gemma4_unified_text": WIDTHS,
    "gpt_oss": {"neurons": "No layer of this gpt_oss model", "heads": "self_attn of gpt_oss"},
    "olmo2": {"heads": "self_attn.q_norm of olmo2"},
    "olmo3": {"heads": "self_attn.q_norm of olmo3"},
    "granite_swa": {"heads": "self_attn of granite_swa"},
    "mixtral": {"neurons": "No layer of this mixtral model"},
    "deepseek_v2": {"heads": "self_attn.q_b_proj of deepseek_v2"},
    "deepseek_v3": {"heads": "self_attn.q_b_proj of deepseek_v3"},
    "youtu": {"heads": "self_attn.q_b_proj of youtu"},
    "glm4_moe_lite": {"heads": "self_attn.q_b_proj of glm4_moe_lite"},
}
"""What the error says for a family whose units cannot be removed one by one, by axis."""
ALL = {"layers": 1, "intermediate_size": FFN // 2, "kv_heads": 1}


HYBRIDS = ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "olmo_hybrid", "granitemoehybrid")
"""Families with layers of several kinds, of which at least one with attention stays."""


def shaped_teacher(family: str, tied: bool = False) -> Teacher:
    return tiny_teacher(family, tied, num_key_value_heads=2)


def hybrid_teacher(family: str, *kinds: str, tied: bool = False) -> Teacher:
    """A teacher whose layers have attention of these kinds."""
    layers = {"layer_types": [f"{kind}_attention" for kind in kinds]}
    return tiny_teacher(family, tied, num_hidden_layers=len(kinds), **layers)


def built(teacher: Teacher, start: str = "closed-form", **student: Any) -> LowRankClone:
    section = StudentSection.model_validate({"hidden_size": HIDDEN, **student})
    asked_shape(teacher, section)
    return LowRankClone(
        teacher,
        section,
        ObjectiveSection(clone_scale="none"),
        start=InitializeSection.model_validate({"method": start, "refine_epochs": 0}),
    )


def solved(teacher: Teacher, start: str = "closed-form", **student: Any) -> LowRankClone:
    method = built(teacher, start, **student)
    method.initialize(Batch(tiny_tokens(24)), lambda done, parts: None)
    return method


@torch.no_grad()
def make_redundant(teacher: Teacher, axis: str) -> None:
    """Let half of a teacher's units be copies of others, or a layer write nothing."""
    for layer, branches in enumerate(teacher.layout.branches):
        module = teacher.model.get_submodule(teacher.layout.layer(layer))
        for branch in branches:
            if axis == "layers" and layer == teacher.num_layers - 1:
                for linear in branch.writers.values():
                    owner = linear.module if isinstance(linear, Experts) else linear
                    for name, parameter in module.get_submodule(owner).named_parameters():
                        if owner == linear or "down" in name:
                            parameter.zero_()
            if branch.has_experts:
                continue
            readers = [module.get_submodule(str(path)) for path in branch.readers.values()]
            if (axis == "neurons" and "down" in branch.writers) or (
                axis == "heads" and "o" in branch.writers
            ):
                for reader in readers:
                    for value in reader.parameters():
                        for whole in parts_of(value, branch, teacher):
                            half = len(whole) // 2
                            whole[half:] = whole[:half]


def parts_of(value: Tensor, branch: Branch, teacher: Teacher) -> tuple[Tensor, ...]:
    """The linear maps that are stacked in a reader."""
    if "gate_up" in branch.readers:
        return value.chunk(2)
    if "qkv" in branch.readers:
        config = teacher.config
        heads = config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads
        return value.split([HEAD_DIM * number for number in heads])
    return (value,)


@pytest.mark.parametrize(("family", "axis"), in_turn(list(FAMILIES), list(AXES)))
def test_redundant_units_cost_nothing(family: str, axis: str) -> None:
    """At the teacher's hidden size, a student without copies of other units is the teacher: what
    the start keeps takes over what the copies wrote. Families whose units cannot be removed one by
    one are refused, with the reason."""
    tied = axis != "neurons"
    teacher = shaped_teacher(family, tied)
    if axis == "layers" and family in HYBRIDS:
        teacher = hybrid_teacher(family, "linear", "full", "linear", tied=tied)
    if refused := REFUSED.get(family, {}).get(axis):
        with pytest.raises(UserError, match=refused):
            built(teacher, **AXES[axis])
        return
    make_redundant(teacher, axis)
    fewer = {"layers": teacher.num_layers - 1} if axis == "layers" else AXES[axis]
    student = solved(teacher, **fewer).student()
    ids = tiny_tokens(3)
    expected = logits(teacher.model, ids)
    tolerance = 1e-6 if axis == "layers" else 1e-3
    if teacher.layout.has_experts:  # a rounded router may choose other experts
        tolerance *= 10
    wrong = logits(student, ids) - expected
    assert wrong.square().mean() < tolerance * expected.square().mean()


@pytest.mark.parametrize(
    ("family", "changes", "kept"),
    [
        ("dots1", {"first_k_dense_replace": 3}, [0, 2, 3, 5]),
        ("deepseek_v3", {"first_k_dense_replace": 3}, [0, 4, 5]),
        ("afmoe", {"num_dense_layers": 2, "layer_types": 6 * ["full_attention"]}, [0, 2, 4]),
        ("ernie4_5_moe", {"moe_layer_start_index": 2, "moe_layer_end_index": 4}, [0, 3, 5]),
        ("qwen2_moe", {"mlp_only_layers": [0, 3]}, [0, 1, 3, 5]),
        ("qwen3_moe", {"decoder_sparse_step": 2}, [0, 1, 4]),
    ],
)
def test_layers_without_experts_stay_without(
    family: str, changes: dict[str, Any], kept: list[int]
) -> None:
    """At the teacher's hidden size, a student is the teacher whose other layers write nothing."""
    teacher = tiny_teacher(family, num_hidden_layers=6, **changes)
    method = tiny_method(teacher, {"hidden_size": HIDDEN, "layers": {"keep": kept}})
    assert isinstance(method.source, PrunedTeacher)
    with torch.no_grad():
        for value in method.projections.values.values():
            value.copy_(torch.eye(HIDDEN))
        for layer, branches in enumerate(teacher.layout.branches):
            for branch in branches if layer not in kept else ():
                for parameter in teacher.layout.projected(teacher.model):
                    if parameter.site in {LinearSite(layer, name) for name in branch.writers}:
                        teacher.model.get_parameter(parameter.name).zero_()
        for name, value in method.source.writers.items():
            value.copy_(teacher.parameter(method.source._place(name)[1]))
        for path in method.source.layout.stream_norms():
            gain = method.source.parameter(f"{path}.weight")
            method.model.get_submodule(path).weight.copy_(gain)
    ids = tiny_tokens(2)
    torch.testing.assert_close(logits(method.student(), ids), logits(teacher.model, ids))


def test_a_gate_of_attention_has_the_rows_of_its_queries() -> None:
    """Also where as many neurons are kept."""
    teacher = tiny_teacher("afmoe", num_attention_heads=4, num_key_value_heads=2)
    own = 2 * HEAD_DIM
    pruned = built(teacher, kv_heads={"keep": [1]}, intermediate_size=own).source
    assert isinstance(pruned, PrunedTeacher)
    for name in ("q", "z"):
        rows, columns = pruned.slices(LinearSite(0, name))
        assert columns is None
        assert rows is not None
        assert rows.tolist() == list(range(own, 2 * own))


@pytest.mark.parametrize("family", ["granitemoehybrid", "nemotron_h"])
def test_mamba_layers_keep_all_if_attention_has_fewer_heads(family: str) -> None:
    pruned = built(shaped_teacher(family), kv_heads=1).source
    assert isinstance(pruned, PrunedTeacher)
    kinds = set()
    for layer, branches in enumerate(pruned.layout.branches):
        for name in branches[0].linears:
            cut = any(part is not None for part in pruned.slices(LinearSite(layer, name)))
            assert cut == ("q" in branches[0].readers)
        kinds.add("q" in branches[0].readers)
    assert kinds == {True, False}


@pytest.mark.parametrize("family", LLAMAS)
def test_identity_projections_give_the_pruned_teacher(family: str) -> None:
    teacher = shaped_teacher(family)
    keep = {"layers": {"keep": [0]}, "intermediate_size": {"keep": [1, 4, 5]}}
    method = tiny_method(teacher, {"hidden_size": HIDDEN, "kv_heads": {"keep": [1]}, **keep})
    assert isinstance(method.source, PrunedTeacher)
    expected = cut(teacher.model, method.source.kept)
    with torch.no_grad():
        for value in method.projections.values.values():
            value.copy_(torch.eye(HIDDEN))
        for name, value in method.source.writers.items():
            value.copy_(expected.get_parameter(name))
        for norm in method.source.layout.stream_norms():
            method.model.get_submodule(norm).weight.copy_(expected.get_parameter(f"{norm}.weight"))
    ids = tiny_tokens(3)
    torch.testing.assert_close(logits(method.student(), ids), logits(expected, ids))


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "gemma3_text"])
def test_losses_and_gradients_equal_plain_autograd(family: str) -> None:
    """Projections and writers are trained together. Clone terms pair kept layers and kept units."""
    student = {"layers": {"keep": [0]}, "intermediate_size": {"keep": [1, 4, 5, 9]}}
    if family in LLAMAS:
        student["kv_heads"] = {"keep": [1]}
    method = tiny_method(shaped_teacher(family), {"fold_gains": True, **student})
    batch = tiny_batch(lengths=[9, 6])
    losses, found = gradients(method, batch)
    expected = naive_losses(method, batch)
    for name in ("loss", "clone"):
        torch.testing.assert_close(losses[name], expected[name], rtol=1e-6, atol=1e-8)
    parameters = method.parameters()
    assert any(name.startswith("writers.") for name in parameters)
    wanted = torch.autograd.grad(expected["loss"], list(parameters.values()))
    for name, gradient in zip(parameters, wanted, strict=True):
        assert relative_error(found[name], gradient) < 1e-5, name


def naive_losses(method: LowRankClone, batch: Batch) -> dict[str, Tensor]:
    """The objective as a function of the method's parameters."""
    source, teacher, layout = method.source, method.teacher, method.source.layout
    assert isinstance(source, PrunedTeacher)
    parameters = method.parameters()
    weights = {name: p for name, p in parameters.items() if name.endswith("norm.weight")}
    for weight in method.projections.weights:
        projection = method.projections.values[weight.projection]
        if weight.folded and weight.norm:
            projection = source.gain(weight.norm)[:, None] * projection
        value = source.writers.get(weight.name, source.parameter(weight.name))
        weights[weight.name] = project(value, projection, weight.axis)
    mask = batch.token_mask()
    assert mask is not None

    def watch(
        model: nn.Module, paths: dict[Any, str]
    ) -> tuple[dict[Any, Tensor], Callable[[], None]]:
        seen: dict[Any, Tensor] = {}

        def hook(key: Any) -> Any:
            return lambda _module, _inputs, output: seen.__setitem__(key, output)

        hooks = [model.get_submodule(p).register_forward_hook(hook(k)) for k, p in paths.items()]
        return seen, lambda: [h.remove() for h in hooks] and None

    own, end_own = watch(method.model, {site: layout.linear(site) for site in layout.sites()})
    whole = teacher.layout.linear
    theirs, end_theirs = watch(
        teacher.model,
        {s: whole(s._replace(layer=source.kept.layers[s.layer])) for s in layout.sites()},
    )
    with torch.no_grad():
        of_teacher = teacher.model(batch.input_ids, attention_mask=batch.attention_mask).logits
    arguments = {"attention_mask": batch.attention_mask}
    of_student = functional_call(method.model, weights, (batch.input_ids,), arguments).logits
    end_own()
    end_theirs()
    log_p, log_q = (x[..., :TOKENS].log_softmax(-1) for x in (of_teacher, of_student))
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)[mask].mean()
    labels = batch.labels().flatten()
    lm = functional.cross_entropy(of_student[..., :TOKENS].flatten(0, 1), labels, ignore_index=-100)
    clone = torch.zeros(())
    for site in layout.sites():
        target = theirs[site]
        if layout.writes(site):
            target = target @ method.projections.values[f"layers.{site.layer}.{site.name}"]
        elif site.name == "gate_up":
            target = torch.cat(
                [half[..., source.kept.neurons[0]] for half in target.chunk(2, -1)], -1
            )
        elif site.name in ("gate", "up"):
            target = target[..., source.kept.neurons[0]]
        elif method.section.kv_heads is not None:
            size = target.shape[-1] // 2
            target = target[..., size:]  # the second of two groups
        clone = clone + (own[site] - target)[mask].square().mean()
    return {"clone": clone, "loss": kl + lm + method.distill.alpha * clone}


def test_every_start_of_a_smaller_shape() -> None:
    """The closed form is far ahead of the others, which random weights do not suit."""
    teacher = shaped_teacher("llama")
    ids = tiny_tokens(3)
    expected = logits(teacher.model, ids).log_softmax(-1)
    kl = {}
    for start in ("closed-form", "pca", "random"):
        student = solved(teacher, start, hidden_size=12, **ALL).student()
        own = logits(student, ids).log_softmax(-1)
        kl[start] = float((expected.exp() * (expected - own)).sum(-1).mean())
    assert kl["closed-form"] < 0.7 * min(kl["pca"], kl["random"]), kl


def test_one_pass_gives_the_statistics_of_pruning_and_of_the_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The closed form comes out as if it collected its own on the pruned teacher."""
    passes = []

    def counted(calibration: Calibration) -> StreamStatistics:
        passes.append(calibration)
        return stream_statistics(calibration)

    for module in (prune, solve):
        monkeypatch.setattr(module, "stream_statistics", counted)
    method = solved(shaped_teacher("llama"), hidden_size=12, **ALL)
    assert len(passes) == 1
    start = InitializeSection(refine_epochs=0)
    own = solve.closed_form_start(method.projections, start, tiny_tokens(24), None).projections
    assert len(passes) == 2
    for key, value in method.projections.values.items():
        assert torch.equal(value, own[key]), key


def test_a_run_resumes_and_exports(tmp_path: Path) -> None:
    """With trained writers, across the release, bit for bit. The student opens in transformers."""
    teacher = tiny_teacher("llama", dtype=torch.float32, num_key_value_heads=2)
    text = [str(write_jsonl(tmp_path / "text.jsonl", tiny_documents()))]
    changes = {
        "student.layers": 1,
        "student.kv_heads": 1,
        "student.intermediate_size": 6,
        "data.text": text,
        "data.cache": str(tmp_path / "cache"),
        "data.sequence_length": 16,
        "train.micro_batch": 2,
        "train.checkpoint_every": 1,
        "train.keep_checkpoints": 20,
        "train.release_at": 0.5,
        "initialize.calibration_tokens": 128,
        "train.tokens": 32 * 6,
    }
    run = Run.create(tmp_path / "whole", tiny_recipe(changes))
    train(run, teacher)
    expected = (run.student_folder / "model.safetensors").read_bytes()
    model = AutoModelForCausalLM.from_pretrained(run.student_folder)
    shape = model.config
    assert (shape.num_hidden_layers, shape.num_key_value_heads, shape.intermediate_size) == (
        1,
        1,
        6,
    )
    for step in (0, 2, 4):
        resumed = copy_until(run, tmp_path / f"from-{step}", step)
        train(resumed, teacher)
        assert (resumed.student_folder / "model.safetensors").read_bytes() == expected


@pytest.mark.parametrize(
    ("student", "message"),
    [
        ({"intermediate_size": FFN + 1}, f"the teacher's is {FFN}: choose at most {FFN}"),
        ({"kv_heads": 3}, "choose at most 2"),
        ({"layers": 3}, "choose at most 2"),
        ({"layers": {"keep": [1]}}, "must keep layer 0"),
        ({"intermediate_size": {"keep": [0, FFN]}}, f"the teacher's last is {FFN - 1}"),
        ({"hidden_size": HIDDEN}, "choose a smaller one"),
        ({"hidden_size": HIDDEN, "layers": LAYERS}, "choose a smaller one"),
        ({"hidden_size": HIDDEN + 2, "layers": 1}, "choose a size no larger"),
    ],
)
def test_sizes_that_do_not_fit(student: dict[str, Any], message: str) -> None:
    recipe = tiny_recipe({f"student.{name}": value for name, value in student.items()})
    with pytest.raises(UserError, match=message):
        LowRankClone.build(shaped_teacher("llama"), recipe)


@pytest.mark.parametrize("keep", [[1, 0], [0, 0], [-1, 0], []])
def test_kept_units_that_are_no_selection(keep: list[int]) -> None:
    with pytest.raises(UserError, match="keep"):
        tiny_recipe({"student.layers": {"keep": keep}})


def test_layers_of_other_kinds_are_refused() -> None:
    """Every second layer of this model has experts, so a student whose second layer has none cannot
    be written down."""
    teacher = tiny_teacher("ernie4_5_moe", num_hidden_layers=4, moe_layer_interval=2)
    section = StudentSection.model_validate({"hidden_size": 8, "layers": {"keep": [0, 2, 3]}})
    with pytest.raises(UserError, match="ernie4_5_moe model: its layers are of several kinds"):
        pruned_teacher(teacher, first_units(teacher, section))


@pytest.mark.parametrize("family", HYBRIDS)
def test_a_layer_with_attention_stays(family: str) -> None:
    """Even if it writes nothing. transformers cannot generate from a student without one."""
    teacher = hybrid_teacher(family, "linear", "linear", "full")
    make_redundant(teacher, "layers")
    student = solved(teacher, layers=2, hidden_size=8).student()
    assert student.config.layer_types == ["linear_attention", "full_attention"]
    assert student.generate(tiny_tokens(1), max_new_tokens=2).shape[1] > tiny_tokens(1).shape[1]
    with pytest.raises(UserError, match=r"has attention, .* keep one that has, such as 2"):
        built(teacher, layers={"keep": [0, 1]}, hidden_size=8)


def test_layers_that_the_configuration_refuses() -> None:
    teacher = hybrid_teacher("olmo_hybrid", "full", "full", "linear")
    with pytest.raises(UserError, match=r"cannot have this shape: .* 'linear_attention' layer"):
        built(teacher, layers={"keep": [0, 1]}, hidden_size=8)


def test_a_smaller_shape_costs_less() -> None:
    """Students of fewer units take fewer operations; the teacher takes as many."""
    teacher = shaped_teacher("llama")
    whole = built(teacher, hidden_size=12)
    smaller = built(teacher, hidden_size=12, **ALL)
    assert smaller.distill.sites
    cost, less = (method.step_flops(0, 64, 16) for method in (whole, smaller))
    assert cost is not None
    assert less is not None
    assert 0.5 < less / cost < 0.95


@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("lrc", "llm-pruner")])
def test_other_methods_use_the_shape_or_say_that_they_do_not(name: str) -> None:
    recipe = tiny_recipe({"student.layers": 1, "student.intermediate_size": 6}, method=name)
    method = METHODS[name].build(shaped_teacher("llama"), recipe)
    shape = shape_of_config(method.student().config)
    unused = {"student.layers", "student.intermediate_size"} & set(unused_settings(recipe))
    assert (shape.layers, shape.neurons) == ((LAYERS, FFN) if unused else (1, 6))
    assert bool(unused) == (name != "scratch")
