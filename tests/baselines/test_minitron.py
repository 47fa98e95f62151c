"""Importance from activations, against loops over tokens, and the resulting student."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from lrc.baselines.minitron import Minitron
from lrc.baselines.pruning.importance import ActivationImportance, measure_importance
from lrc.data.batch import Batch
from lrc.methods import METHODS
from lrc.model.kept_units import cut
from lrc.model.pruned_shape import PrunedShape, shape_of_config
from lrc.model.teacher import Teacher, as_teacher
from lrc.recipe import Recipe, make_recipe
from stories import sample
from tiny import FFN, HEAD_DIM, LLAMAS, tiny_batch, tiny_teacher
from tiny_runs import tiny_recipe

HIDDEN, LAYERS, KV_HEADS, QUERIES = 24, 3, 3, 2
"""Sizes of the teachers here; QUERIES is the number of query heads per key/value head."""

BATCHES = {
    "whole": tiny_batch(rows=10),
    "padded": tiny_batch(rows=3, lengths=[9, 4, 6]),
    "documents": tiny_batch(documents=[[4, 5], [2, 3, 4]]),
}


def grouped(family: str = "llama", **changes: Any) -> Teacher:
    heads = {"num_attention_heads": QUERIES * KV_HEADS, "num_key_value_heads": KV_HEADS}
    return tiny_teacher(family, hidden_size=HIDDEN, num_hidden_layers=LAYERS, **heads, **changes)


def recipe_of(**sections: Any) -> Recipe:
    return tiny_recipe(**{"method": "minitron", "student": {"hidden_size": 12}, **sections})


def pool(scores: list[Tensor], how: str) -> Tensor:
    """One score per part, from the scores [parts] of tokens or sequences."""
    if how == "mean":
        return sum(score.abs() for score in scores) / len(scores)
    return sum(score**2 for score in scores) ** 0.5


class Reference:
    """The teacher's activations, sequence by sequence, by transformers' own modules."""

    def __init__(self, teacher: Teacher, batch: Batch) -> None:
        model = teacher.model
        self.seen: dict[str, Tensor] = {}
        handles = []
        for path, module in model.named_modules():
            keep = self._keeper(path)
            handles.append(module.register_forward_hook(keep))
        with torch.no_grad():
            model(
                batch.input_ids,
                position_ids=batch.position_ids,
                attention_mask=batch.attention_mask,
                use_cache=False,
            )
        for handle in handles:
            handle.remove()
        mask = torch.ones_like(batch.input_ids) if batch.attention_mask is None else None
        self.tokens = [
            [i for i, counts in enumerate(row) if counts]
            for row in (batch.attention_mask if mask is None else mask).tolist()
        ]

    def _keeper(self, path: str) -> Any:
        def keep(_module: Any, inputs: Any, output: Any) -> None:
            self.seen[f"{path}.out"] = output[0] if isinstance(output, tuple) else output
            if inputs:
                self.seen[f"{path}.in"] = inputs[0]

        return keep

    def pooled(self, values: Tensor, over_tokens: str, over_sequences: str) -> Tensor:
        rows = [
            pool([row[i] for i in tokens], over_tokens)
            for row, tokens in zip(values, self.tokens, strict=True)
        ]
        return pool(rows, over_sequences)

    def importance(self, over_tokens: str, over_sequences: str) -> ActivationImportance:
        how = over_tokens, over_sequences
        norms = ["input_layernorm", "post_attention_layernorm"]
        paths = [f"model.layers.{i}.{norm}" for i in range(LAYERS) for norm in norms]
        hidden = [self.pooled(self.seen[f"{p}.out"], *how) for p in [*paths, "model.norm"]]
        groups, neurons, influence = [], [], []
        for i in range(LAYERS):
            layer = f"model.layers.{i}"
            heads = self.seen[f"{layer}.self_attn.o_proj.in"].split(QUERIES * HEAD_DIM, -1)
            norms_of = torch.stack([(head**2).sum(-1) ** 0.5 for head in heads], -1)
            groups.append(self.pooled(norms_of, *how))
            neurons.append(self.pooled(self.seen[f"{layer}.mlp.down_proj.in"], *how))
            before, after = self.seen[f"{layer}.in"], self.seen[f"{layer}.out"]
            changes = [
                1 - before[b, i] @ after[b, i] / before[b, i].norm() / after[b, i].norm()
                for b, tokens in enumerate(self.tokens)
                for i in tokens
            ]
            influence.append(sum(changes) / len(changes))
        return ActivationImportance(
            sum(hidden), torch.stack(groups), torch.stack(neurons), torch.stack(influence)
        )


@pytest.mark.parametrize("family", LLAMAS)
@pytest.mark.parametrize("batch", list(BATCHES))
@pytest.mark.parametrize("how", [("mean", "l2"), ("l2", "mean")])
def test_importance(family: str, batch: str, how: tuple[Any, Any]) -> None:
    teacher = grouped(family)
    told: list[tuple[int, int]] = []
    ours = measure_importance(teacher, BATCHES[batch], *how, lambda *done: told.append(done))
    theirs = Reference(teacher, BATCHES[batch]).importance(*how)
    for name in ("hidden", "groups", "neurons", "layers"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=1e-6, atol=0)
    assert told[-1] == (len(told), len(told)) == ((2, 2) if batch == "whole" else (1, 1))
    assert not any(module._forward_hooks for module in teacher.model.modules())


def test_the_largest_scores_stay() -> None:
    scores = ActivationImportance(
        torch.tensor([3.0, 1, 4, 1.5, 5]),
        torch.tensor([[1.0, 2], [9, 8], [5, 7]]),
        torch.tensor([[1.0, 2, 3], [9, 7, 8], [1, 3, 2]]),
        torch.tensor([0.3, 0.1, 0.2]),
    )
    kept = scores.most_important(PrunedShape(layers=2, hidden=3, kv_heads=1, neurons=2))
    assert kept.layers == [0, 2]
    assert kept.hidden.tolist() == [0, 2, 4]
    assert [group.tolist() for group in kept.groups] == [[1], [1]]
    assert [neurons.tolist() for neurons in kept.neurons] == [[1, 2], [1, 2]]


def test_idle_parts_are_pruned_first() -> None:
    """Idle layers, heads, neurons and channels are pruned."""
    teacher = grouped()
    with torch.no_grad():
        for name, weight in teacher.model.named_parameters():
            if "layers.1" in name and name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.mul_(1e-3)
            if name.endswith("v_proj.weight"):
                weight[HEAD_DIM : 2 * HEAD_DIM] *= 1e-3
            if name.endswith("up_proj.weight"):
                weight[[2, 7]] *= 1e-3
            if weight.shape == (HIDDEN,):
                weight[[0, 5]] = 1e-3
    recipe = recipe_of(
        method={"name": "minitron", "layers": 2, "kv_heads": 2, "intermediate_size": FFN - 2},
        student={"hidden_size": 20},
    )
    method = METHODS["minitron"].build(teacher, recipe)
    assert isinstance(method, Minitron)
    kept = method.choose(BATCHES["whole"], lambda done, parts: None)
    assert kept.layers == [0, 2]
    assert [group.tolist() for group in kept.groups] == [[0, 2]] * 2
    assert all(set(n.tolist()) == set(range(FFN)) - {2, 7} for n in kept.neurons)
    assert not {0, 5} & set(kept.hidden.tolist())

    method.initialize(BATCHES["whole"], lambda done, parts: None)
    student = cut(teacher.model, kept)
    for (name, ours), theirs in zip(
        method.student().named_parameters(), student.parameters(), strict=True
    ):
        assert torch.equal(ours, theirs), name
    assert method.parameters().keys() == dict(student.named_parameters()).keys()
    (note,) = method.notes()
    assert "more than 3% apart" in note


@pytest.mark.parametrize("tie_projections", [None, False])
def test_the_default_shape_is_lrcs(tie_projections: bool | None) -> None:
    teacher = tiny_teacher("llama", tied=True)
    recipe = recipe_of(student={"hidden_size": 8, "tie_projections": tie_projections})
    method = METHODS["minitron"].build(teacher, recipe)
    clone = METHODS["lrc"].build(teacher, make_recipe({**recipe.model_dump(), "method": "lrc"}))
    ours, theirs = method.student(), clone.student()
    assert [p.shape for p in ours.parameters()] == [p.shape for p in theirs.parameters()]
    assert method.notes() == []
    flops = method.step_flops(0, 64, 16)
    scratch = METHODS["scratch"].build(
        teacher, make_recipe({**recipe.model_dump(), "method": "scratch"})
    )
    assert flops == scratch.step_flops(0, 64, 16)


def test_fewer_layers_cost_less() -> None:
    whole, half = (
        METHODS["minitron"].build(grouped(), recipe_of(method={"name": "minitron", "layers": n}))
        for n in (3, 1)
    )
    assert half.step_flops(0, 64, 16) < whole.step_flops(0, 64, 16)


def test_the_papers_losses_are_the_default() -> None:
    paper = recipe_of().objective
    assert (paper.kl_weight, paper.temperature, paper.lm_weight) == (1, 1, 0)
    asked = recipe_of(objective={"lm_weight": 0.5, "temperature": 3}).objective
    assert (asked.kl_weight, asked.temperature, asked.lm_weight) == (1, 3, 0.5)
    other = make_recipe({**recipe_of().model_dump(exclude={"objective"}), "method": "scratch"})
    assert other.objective.lm_weight == 1
    for name in ({"name": "minitron"}, "minitron"):
        again = make_recipe({**other.model_dump(exclude={"objective"}), "method": name})
        assert again == recipe_of()
    resolved = make_recipe({**other.model_dump(), "method": "minitron"})
    assert resolved.objective == other.objective


def test_padding_does_not_count() -> None:
    teacher = grouped()
    short = tiny_batch(rows=2, length=5)
    ids = torch.cat([short.input_ids, torch.full((2, 3), 7)], 1)
    mask = (torch.arange(8) < 5).long().expand(2, 8)
    padded = replace(short, input_ids=ids, attention_mask=mask)
    ours, theirs = (measure_importance(teacher, batch, "mean", "l2") for batch in (padded, short))
    for name in ("hidden", "groups", "neurons", "layers"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=1e-5, atol=0)


@torch.no_grad()
def test_important_parts_matter_for_the_loss(stories_folder: Path) -> None:
    """In a trained model, removing the most important parts costs more than removing the least."""
    model = AutoModelForCausalLM.from_pretrained(stories_folder)
    teacher = as_teacher(model, AutoTokenizer.from_pretrained(stories_folder), "stories")
    ids = sample(teacher, 32, 64)
    importance = measure_importance(teacher, Batch(ids), "mean", "l2")
    opposite = ActivationImportance(
        -importance.hidden, -importance.groups, -importance.neurons, -importance.layers
    )
    whole = shape_of_config(model.config)
    for part, size in (("layers", 4), ("hidden", 48), ("kv_heads", 2), ("neurons", 129)):
        shape = replace(whole, **{part: size})
        losses = [
            cut(model, scores.most_important(shape))(ids, labels=ids).loss.item()
            for scores in (importance, opposite)
        ]
        assert losses[0] < losses[1] - 0.05, part
