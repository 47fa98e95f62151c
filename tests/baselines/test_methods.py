"""Methods that train a plain student, and LRC's ablations, in float64 against their papers'
formulas."""

import gc
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from lrc.baselines.attention import OBSERVED
from lrc.baselines.plain import PlainStudent
from lrc.cloning.low_rank_clone import LowRankClone
from lrc.cloning.method import Method
from lrc.data.batch import Batch
from lrc.methods import METHODS, unused_settings
from lrc.model.teacher import Teacher
from lrc.recipe import Recipe, make_recipe
from lrc.recipe.sections import StudentSection
from lrc.system.errors import UserError
from tiny import (
    FFN,
    HEAD_DIM,
    HIDDEN,
    LAYERS,
    LLAMAS,
    QUIRKS,
    STUDENT_HIDDEN,
    TERMS,
    TOKENS,
    WRITERS,
    expected_weights,
    gradients,
    linear_path,
    randomize,
    tiny_batch,
    tiny_teacher,
    watch,
)
from tiny_runs import tiny_recipe

Losses = dict[str, Tensor]

BATCHES = {
    "whole": [tiny_batch(rows=3)],
    "padded": [tiny_batch(lengths=[9, 4]), tiny_batch(rows=1, length=7, lengths=[5], seed=3)],
    "documents": [tiny_batch(documents=[[4, 5], [2, 3, 4]])],
}
"""Micro-batches of one step."""


pytestmark = pytest.mark.usefixtures("exact_norms")


def recipe_of(method: Any, **sections: dict[str, Any]) -> Recipe:
    objective = {"chunk_tokens": 7, "temperature": 3.0, "kl_weight": 0.7, "lm_weight": 0.9}
    return tiny_recipe(
        method=method,
        objective=objective | sections.pop("objective", {}),
        train={"token_grad_clip": 0} | sections.pop("train", {}),
        **sections,
    )


def built(teacher: Teacher, recipe: Recipe) -> Method:
    """The method with all its parameters far from zero."""
    method = METHODS[recipe.method.name].build(teacher, recipe)
    randomize({n: p for n, p in method.parameters().items() if p.ndim == 2 or "norm" in n}, seed=5)
    return method


def close(ours: Any, theirs: Any, rtol: float = 1e-9, atol: float = 1e-11) -> None:
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)


# The reference: plain forward passes watched by hooks, and loops over rows and heads.


class Seen:
    """What hooks record in a forward pass."""

    def __init__(self, model: Any, batch: Batch, weights: dict[str, Tensor] | None = None) -> None:
        paths: dict[Any, str] = {-1: "model.embed_tokens"}
        paths |= {i: f"model.layers.{i}" for i in range(LAYERS)}
        paths |= {(i, name): linear_path(i, name) for i in range(LAYERS) for name in TERMS}
        norms = {"q": "q_norm", "k": "k_norm"} if "qwen3" in type(model).__name__.lower() else {}
        paths |= {
            (i, f"{name}_normed"): f"model.layers.{i}.self_attn.{norm}"
            for i in range(LAYERS)
            for name, norm in norms.items()
        }
        self.outputs, end = watch(model, paths)
        inputs = {"attention_mask": batch.attention_mask, "position_ids": batch.position_ids}
        inputs |= {"use_cache": False}
        self.logits = functional_call(model, weights or {}, (batch.input_ids,), inputs).logits
        end()
        self.states = [self.outputs[i] for i in range(-1, LAYERS)]
        positions = batch.position_ids
        if positions is None:
            positions = torch.arange(batch.input_ids.shape[1])[None]
        self.turn = model.model.rotary_emb(self.states[0], positions)

    def heads(self, layer: int, name: str) -> Tensor:
        """q, k (both turned) or v by head, [b, heads, s, head_dim]."""
        flat = self.outputs.get((layer, f"{name}_normed"), self.outputs[layer, name])
        heads = flat.reshape(*flat.shape[:2], -1, HEAD_DIM).transpose(1, 2)
        if name == "v":
            return heads
        cos, sin = (t[:, None] for t in self.turn)
        half = HEAD_DIM // 2
        swapped = torch.cat([-heads[..., half:], heads[..., :half]], dim=-1)
        return heads * cos + swapped * sin

    def scores(self, layer: int) -> Tensor:
        """Attention scores [b, heads, s, s]."""
        queries, keys = self.heads(layer, "q"), self.heads(layer, "k")
        by_query = [keys[:, h * keys.shape[1] // queries.shape[1]] for h in range(queries.shape[1])]
        return queries @ torch.stack(by_query, 1).transpose(-1, -2) / math.sqrt(HEAD_DIM)

    def value_scores(self, layer: int) -> Tensor:
        values = self.heads(layer, "v")
        return values @ values.transpose(-1, -2) / math.sqrt(HEAD_DIM)


def keys_of(batch: Batch, family: str) -> list[list[list[int]]]:
    """The keys that every query sees, [b][s]; none for padding."""
    rows, length = batch.input_ids.shape
    window = QUIRKS.get(family, {}).get("sliding_window", length)
    mask = torch.ones(rows, length) if batch.attention_mask is None else batch.attention_mask
    document = torch.zeros(rows, length)
    if batch.position_ids is not None:
        document = (batch.position_ids == 0).cumsum(1)
    return [
        [
            [
                k
                for k in range(max(0, q - window + 1), q + 1)
                if mask[b, q] and mask[b, k] and document[b, k] == document[b, q]
            ]
            for q in range(length)
        ]
        for b in range(rows)
    ]


def kept(batch: Batch) -> Tensor:
    mask = batch.attention_mask
    return torch.ones_like(batch.input_ids).bool() if mask is None else mask.bool()


def mean_over_rows(
    batches: Sequence[Batch], family: str, value: Callable[[int, int, int, list[int]], Any]
) -> Tensor:
    """Mean over all tokens of all batches of `value(batch number, row, query, keys)`."""
    values = [
        value(n, b, q, keys)
        for n, batch in enumerate(batches)
        for b, row in enumerate(keys_of(batch, family))
        for q, keys in enumerate(row)
        if keys
    ]
    return torch.stack(values).mean()


def mean_squares(pairs: Sequence[tuple[Tensor, Tensor]], relative: bool) -> Tensor:
    """Mean squared difference over tokens [n, d] of all batches."""
    tokens = sum(len(ours) for ours, _ in pairs)
    total = torch.zeros((), dtype=torch.float64)
    for ours, theirs in pairs:
        own, squares = (side.detach().square().mean(-1) for side in (ours, theirs))
        size = torch.maximum(own, squares) + squares.median()
        weight = 1 / size if relative else torch.ones(len(ours))
        total = total + ((ours - theirs).square().mean(-1) * weight).sum()
    return total / tokens


class Reference:
    """Both models over the micro-batches of a step."""

    def __init__(self, method: Method, teacher: Teacher, batches: Sequence[Batch]) -> None:
        weights = {}
        if isinstance(method, LowRankClone):
            fold = StudentSection.model_fields["fold_gains"].default
            weights = expected_weights(teacher, method.projections.values, fold)
        model = method.model
        self.family, self.batches = teacher.family.model_type, batches
        self.ours = [Seen(model, batch, weights) for batch in batches]
        with torch.no_grad():
            self.theirs = [Seen(teacher.model, batch) for batch in batches]

    def vocabulary(self, temperature: float) -> Losses:
        kl, lm = [], []
        for ours, theirs, batch in zip(self.ours, self.theirs, self.batches, strict=True):
            s, t = (seen.logits[..., :TOKENS] for seen in (ours, theirs))
            p, q = ((logits / temperature).softmax(-1) for logits in (t, s))
            kl.append((p * (p / q).log()).sum(-1)[kept(batch)])
            labels = batch.labels()
            lm.append(
                functional.cross_entropy(s[labels >= 0], labels[labels >= 0], reduction="none")
            )
        return {"kl": temperature**2 * torch.cat(kl).mean(), "lm": torch.cat(lm).mean()}

    def relation(self, scores: str, layer: int) -> Tensor:
        """KL between softmaxes over the keys that a query sees, head by head."""

        def value(n: int, b: int, q: int, keys: list[int]) -> Tensor:
            ours, theirs = (
                getattr(side[n], scores)(layer)[b, :, q, keys] for side in (self.ours, self.theirs)
            )
            p, s = theirs.softmax(-1), ours.softmax(-1)
            return torch.stack([(p[h] * (p[h] / s[h]).log()).sum() for h in range(len(p))]).mean()

        return mean_over_rows(self.batches, self.family, value)

    def attention(self) -> Tensor:
        """Mean squared difference of scores over keys and heads, summed over layers."""

        def value(layer: int) -> Callable[[int, int, int, list[int]], Tensor]:
            return lambda n, b, q, keys: functional.mse_loss(
                self.ours[n].scores(layer)[b, :, q, keys],
                self.theirs[n].scores(layer)[b, :, q, keys],
            )

        return sum(
            mean_over_rows(self.batches, self.family, value(layer)) for layer in range(LAYERS)
        )

    def hidden(self, alignment: dict[str, nn.Parameter], relative: bool) -> Tensor:
        """Mean squared difference of aligned hidden states, summed over states."""
        return sum(
            mean_squares(
                [
                    (ours.states[i][kept(b)] @ alignment[f"alignment.{i}"], t.states[i][kept(b)])
                    for ours, t, b in zip(self.ours, self.theirs, self.batches, strict=True)
                ],
                relative,
            )
            for i in range(LAYERS + 1)
        )

    def clone(self, alignment: dict[str, nn.Parameter], relative: bool) -> Tensor:
        """LRC's clone terms with explicit alignment of the writers, summed over all places."""
        total = torch.zeros((), dtype=torch.float64)
        for i in range(LAYERS):
            for name in TERMS:
                pairs = []
                for ours, theirs, batch in zip(self.ours, self.theirs, self.batches, strict=True):
                    output = ours.outputs[i, name][kept(batch)]
                    if name in WRITERS:
                        output = output @ alignment[f"alignment.layers.{i}.{name}"]
                    pairs.append((output, theirs.outputs[i, name][kept(batch)]))
                total = total + mean_squares(pairs, relative)
        return total


def expected(method: Method, recipe: Recipe, reference: Reference) -> Losses:
    """Every loss of a method, from its paper's formula."""
    loss, name = recipe.objective, recipe.method.name
    losses = reference.vocabulary(loss.temperature)
    total = loss.lm_weight * losses["lm"]
    relative = loss.clone_scale == "relative"
    if name == "minilm":
        del losses["kl"]
        losses["attention_relation"] = reference.relation("scores", LAYERS - 1)
        losses["value_relation"] = reference.relation("value_scores", LAYERS - 1)
        both = losses["attention_relation"] + losses["value_relation"]
        return {**losses, "loss": total + recipe.method.relation_weight * both}
    total = total + loss.kl_weight * losses["kl"]
    if name == "tinybert":
        losses["hidden"] = reference.hidden(method.alignment, relative)
        losses["attention"] = reference.attention()
        section = recipe.method
        total = total + section.hidden_weight * losses["hidden"]
        total = total + section.attention_weight * losses["attention"]
    elif name in ("activation-clone", "lrc"):
        losses["clone"] = reference.clone(method.alignment, relative)
        mean = losses["clone"] / (LAYERS * len(TERMS))
        total = total + (7 * mean if loss.alpha == "auto" else loss.alpha * losses["clone"])
    return {**losses, "loss": total}


RECIPES = {
    "scratch": recipe_of("scratch"),
    "tinybert": recipe_of({"name": "tinybert", "hidden_weight": 0.6, "attention_weight": 1.4}),
    "tinybert-relative": recipe_of("tinybert", objective={"clone_scale": "relative"}),
    "minilm": recipe_of({"name": "minilm", "relation_weight": 1.7}),
    "activation-clone": recipe_of("activation-clone"),
    "explicit": recipe_of("lrc", objective={"alignment": "explicit", "clone_scale": "relative"}),
}


@pytest.mark.parametrize("family", LLAMAS)
@pytest.mark.parametrize("batches", list(BATCHES))
@pytest.mark.parametrize("name", list(RECIPES))
def test_losses_and_gradients(family: str, batches: str, name: str) -> None:
    teacher = tiny_teacher(family, tied=batches == "padded")
    recipe, step = RECIPES[name], BATCHES[batches]
    method = built(teacher, recipe)
    losses, grads = gradients(method, *step)
    reference = Reference(method, teacher, step)
    theirs = expected(method, recipe, reference)
    theirs_grads = torch.autograd.grad(theirs["loss"], list(method.parameters().values()))
    assert set(losses) - {"clone_layers"} == set(theirs)
    for key, value in theirs.items():
        assert value > 1e-3, key
        close(losses[key], value.detach())
    for (key, grad), other in zip(grads.items(), theirs_grads, strict=True):
        assert grad.abs().max() > 1e-9, key
        close(grad, other)


@pytest.mark.parametrize("name", ["tinybert", "minilm"])
def test_grouped_queries(name: str) -> None:
    teacher = tiny_teacher("llama", num_attention_heads=4, num_key_value_heads=2)
    method, step = built(teacher, RECIPES[name]), BATCHES["padded"]
    losses, _ = gradients(method, *step)
    theirs = expected(method, RECIPES[name], Reference(method, teacher, step))
    for key, value in theirs.items():
        close(losses[key], value.detach())


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_the_reference_scores_are_the_attention_of_transformers(kv_heads: int) -> None:
    teacher = tiny_teacher("qwen3", num_attention_heads=4, num_key_value_heads=kv_heads)
    teacher.model.set_attn_implementation("eager")
    batch = BATCHES["padded"][0]
    seen = Seen(teacher.model, batch)
    maps = teacher.model(
        batch.input_ids, attention_mask=batch.attention_mask, output_attentions=True
    ).attentions
    for b, row in enumerate(keys_of(batch, "qwen3")):
        for q, keys in enumerate(row):
            for layer in range(LAYERS if keys else 0):
                ours = seen.scores(layer)[b, :, q, keys].softmax(-1)
                close(ours, maps[layer][b, :, q, keys], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", list(RECIPES))
def test_recomputing_changes_nothing(name: str) -> None:
    recipe = RECIPES[name]
    again = recipe.model_copy(
        update={"train": recipe.train.model_copy(update={"gradient_checkpointing": True})}
    )
    (losses, grads), (losses_again, grads_again) = (
        gradients(built(tiny_teacher("llama"), r), *BATCHES["padded"]) for r in (recipe, again)
    )
    close(losses_again["loss"], losses["loss"])
    for key, grad in grads.items():
        close(grads_again[key], grad)


@pytest.mark.parametrize("name", list(RECIPES))
@pytest.mark.parametrize("how", [False, True])
def test_the_student_has_no_dropout(name: str, how: bool) -> None:
    recipe = RECIPES[name]
    recipe = recipe.model_copy(
        update={"train": recipe.train.model_copy(update={"gradient_checkpointing": how})}
    )
    (losses, grads), (losses_again, grads_again) = (
        gradients(built(tiny_teacher("llama", attention_dropout=p), recipe), *BATCHES["padded"])
        for p in (0.0, 0.5)
    )
    assert torch.equal(losses_again["loss"], losses["loss"])
    assert all(torch.equal(grads_again[key], grad) for key, grad in grads.items())


@pytest.mark.parametrize("name", list(RECIPES))
def test_the_teacher_does_not_change(name: str) -> None:
    teacher = tiny_teacher("llama")
    before = {key: value.clone() for key, value in teacher.model.state_dict().items()}
    method = built(teacher, RECIPES[name])
    gradients(method, *BATCHES["whole"])
    for model in (teacher.model, method.student()):
        assert model.config._attn_implementation == "sdpa" != OBSERVED
    assert not any(module._forward_hooks for module in method.student().modules())
    del method
    gc.collect()
    assert not any(module._forward_hooks for module in teacher.model.modules())
    for key, value in teacher.model.state_dict().items():
        assert torch.equal(value, before[key])
    assert all(p.grad is None for p in teacher.model.parameters())


@pytest.mark.parametrize("tied", [False, True])
def test_a_random_student_is_initialized_by_transformers(tied: bool) -> None:
    teacher = tiny_teacher("qwen2", tied)
    state = torch.get_rng_state()
    recipe = recipe_of("scratch", initialize={"seed": 4})
    method = METHODS["scratch"].build(teacher, recipe)
    assert torch.equal(torch.get_rng_state(), state)
    student = method.student()
    torch.manual_seed(4)
    own = type(teacher.model)(student.config)
    for (name, ours), theirs in zip(student.named_parameters(), own.parameters(), strict=True):
        assert torch.equal(ours, theirs.double()), name
    assert student.config.hidden_size == STUDENT_HIDDEN
    assert student.config.head_dim == HEAD_DIM
    assert student.model.layers[0].mlp.up_proj.weight.shape == (FFN, STUDENT_HIDDEN)
    assert student.config.tie_word_embeddings == tied
    assert ("lm_head.weight" in method.parameters()) == (not tied)
    other = METHODS["scratch"].build(teacher, recipe_of("scratch", initialize={"seed": 5}))
    assert not torch.equal(other.student().lm_head.weight, student.lm_head.weight)


def test_alignment_is_trained_but_not_exported() -> None:
    for name, shapes in (("tinybert", LAYERS + 1), ("activation-clone", 2 * LAYERS)):
        method = built(tiny_teacher("llama"), RECIPES[name])
        aligned = {k: v for k, v in method.parameters().items() if k.startswith("alignment.")}
        assert [v.shape for v in aligned.values()] == [(STUDENT_HIDDEN, HIDDEN)] * shapes
        assert aligned.keys() <= method.decayed()
        assert not any("alignment" in key for key in method.student().state_dict())
    off = recipe_of({"name": "tinybert", "hidden_weight": 0})
    method = built(tiny_teacher("llama"), off)
    assert not any(k.startswith("alignment.") for k in method.parameters())
    assert "hidden" not in gradients(method, *BATCHES["whole"])[0]


def test_pre_training_needs_no_teacher_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = tiny_teacher("llama")
    method = built(teacher, recipe_of("scratch", objective={"kl_weight": 0}))
    monkeypatch.setattr(type(teacher.model.model), "forward", refuse_for(teacher.model.model))
    losses, _ = gradients(method, *BATCHES["whole"])
    assert set(losses) == {"loss", "lm"}
    close(losses["loss"], 0.9 * losses["lm"])


def refuse_for(model: nn.Module) -> Callable[..., Any]:
    forward = type(model).forward

    def checked(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        assert self is not model, "the teacher must not run"
        return forward(self, *args, **kwargs)

    return checked


@pytest.mark.parametrize(
    "recipe",
    [
        recipe_of("scratch", objective={"kl_weight": 0, "lm_weight": 0}),
        recipe_of({"name": "minilm", "relation_weight": 0}, objective={"lm_weight": 0}),
    ],
    ids=["scratch", "minilm"],
)
def test_every_loss_off_is_refused(recipe: Recipe) -> None:
    with pytest.raises(UserError, match=f"Every loss of method {recipe.method.name} is off"):
        METHODS[recipe.method.name].build(tiny_teacher("llama"), recipe)


def test_settings_without_effect_are_found() -> None:
    recipe = recipe_of(
        "minilm",
        initialize={"method": "pca", "seed": 3},
        objective={"clone": {"q": False}, "alpha": 0.3},
    )
    assert unused_settings(recipe) == [
        "initialize.method",
        "objective.alpha",
        "objective.kl_weight",
        "objective.temperature",
        "objective.clone",
    ]
    assert unused_settings(make_recipe(recipe.model_dump() | {"method": "lrc"})) == []
    for name in METHODS:
        assert unused_settings(tiny_recipe(method=name)) == []


def test_every_method_is_complete() -> None:
    """Requirements for every new method."""
    sections = tiny_recipe()
    for name, method in METHODS.items():
        assert method.title
        for key in method.used_settings or ():
            section, _, setting = key.partition(".")
            assert setting in type(getattr(sections, section)).model_fields, (name, key)
        built = method.build(tiny_teacher("llama", intermediate_size=64), recipe_of(name))
        assert not isinstance(built, PlainStudent) or method.used_settings


def test_operations_of_a_step_follow_the_losses() -> None:
    teacher = tiny_teacher("llama")
    with_teacher, alone = (
        METHODS["scratch"]
        .build(teacher, recipe_of("scratch", objective={"kl_weight": weight}))
        .step_flops(0, 64, 16)
        for weight in (1, 0)
    )
    clone = METHODS["lrc"].build(teacher, recipe_of("lrc")).step_flops(0, 64, 16)
    assert 0 < alone < with_teacher < clone
    for name in ("tinybert", "minilm", "activation-clone"):
        assert METHODS[name].build(teacher, recipe_of(name)).step_flops(0, 64, 16) is None
