"""Why a student's own weights learn faster than projections into its teacher's: four experiments.

    rank      every reader (q, k, v, gate, up) gets a free low-rank addition, W_T P + A B with A
              [out, r] and B [r, d_S], where A starts at zero; also, every reader and writer gets
              one of full rank
    parts     readers, writers, the embedding or all of them get a free addition D of their own
              shape, W_T P + D, where D starts at zero: own weights for these parts alone
    geometry  the same students in other coordinates: the teacher weight of each reader, including
              the gain, is replaced by the orthonormal U of its U S V^T, and P by S V^T P (likewise
              for writers), so that a step of Adam has the same length in all of its directions
    norms     a teacher with norms inside its attention, a Qwen3 of stories260K's shape that is
              first trained on the stories: projections with these norms trained too, and released
              weights with these norms frozen

All students train for the same tokens from the same closed-form start without a clone loss. Each
uses the best rate of a grid, which is reported. Prepare the stories as for `lrc compare release`.

    python benchmarks/release_why.py data/stories260K OUT
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from lrc.cloning.low_rank_clone import LowRankClone
from lrc.cloning.method import Method
from lrc.cloning.projection import Projections, project, projection_gradient
from lrc.data import open_text
from lrc.methods import METHODS
from lrc.model.teacher import load_tokenizer
from lrc.recipe import make_recipe
from lrc.run import Run
from lrc.system.errors import DivergedError
from lrc.train import train

READERS = ("q", "k", "v", "gate", "up")
WRITERS = ("o", "down")
LINEARS = READERS + WRITERS
RATES = (3e-3, 1e-2, 3e-2)
RANKS = (1, 2, 4, 8, 16, 32)
TEACHER_STEPS, TEACHER_BATCH, TEACHER_RATE = 3000, 32, 5e-3


class Added(LowRankClone):
    """LRC with free additions to some of its weights."""

    names: ClassVar[tuple[str, ...]] = READERS
    """Linear maps that get one, and `embedding`."""

    def _begin(self) -> None:
        super()._begin()
        layout = self.teacher.layout
        paths = [layout.linear(site) for site in layout.sites() if site.name in self.names]
        if "embedding" in self.names:
            paths.append(self.teacher.family.embedding)
        self.added: dict[str, dict[str, nn.Parameter]] = {}
        generator = torch.Generator().manual_seed(0)
        for path in paths:
            weight = self.model.get_parameter(f"{path}.weight")
            self.added[f"{path}.weight"] = self.new_addition(weight, generator)

    def new_addition(self, weight: Tensor, generator: torch.Generator) -> dict[str, nn.Parameter]:
        """The parameters of an addition, which is zero at first."""
        return {"d": nn.Parameter(torch.zeros_like(weight))}

    def addition(self, parts: dict[str, nn.Parameter]) -> Tensor:
        """The addition itself."""
        return parts["d"]

    def set_gradients(self, parts: dict[str, nn.Parameter], gradient: Tensor) -> None:
        """Bring the gradient of a weight to its addition."""
        parts["d"].grad = gradient.clone()

    def parameters(self) -> dict[str, nn.Parameter]:
        added = self.added.items()
        return super().parameters() | {
            f"added.{path}.{name}": value for path, parts in added for name, value in parts.items()
        }

    @torch.no_grad()
    def _add(self) -> None:
        for path, parts in self.added.items():
            self.model.get_parameter(path).data.add_(self.addition(parts))

    def begin_step(self, step: int) -> None:
        super().begin_step(step)
        self._add()

    def student(self) -> Any:
        model = super().student()
        self._add()
        return model

    @torch.no_grad()
    def end_step(self) -> None:
        super().end_step()
        for path, parts in self.added.items():
            gradient = self.model.get_parameter(path).grad
            assert gradient is not None
            self.set_gradients(parts, gradient)


class Ranked(Added):
    """Free additions of low rank."""

    rank: ClassVar[int]

    def new_addition(self, weight: Tensor, generator: torch.Generator) -> dict[str, nn.Parameter]:
        out, width = weight.shape
        start = torch.randn(self.rank, width, generator=generator) / width**0.5
        return {"a": nn.Parameter(torch.zeros(out, self.rank)), "b": nn.Parameter(start)}

    def addition(self, parts: dict[str, nn.Parameter]) -> Tensor:
        return parts["a"] @ parts["b"]

    def set_gradients(self, parts: dict[str, nn.Parameter], gradient: Tensor) -> None:
        parts["a"].grad, parts["b"].grad = gradient @ parts["b"].T, parts["a"].T @ gradient


class Whitened(LowRankClone):
    """LRC in whitened coordinates from the first step on."""

    def stage_ends(self) -> tuple[int, ...]:
        return (0,)

    def next_stage(self) -> dict[str, Any]:
        self.projections = WhitenedProjections(self.projections)
        return {"stage": "whitened"}


class WhitenedProjections(Projections):
    """Projections in coordinates where the teacher's weights are orthonormal.

    Args:
        plain: the projections to start from.
    """

    @torch.no_grad()
    def __init__(self, plain: Projections) -> None:
        self.teacher, self.hidden_size, self.weights = plain.teacher, plain.hidden_size, []
        self.values = dict(plain.values)
        self.kept: dict[str, Tensor] = {}
        """What takes the place of the teacher's weights, by name."""
        for weight in plain.weights:
            full = self.teacher.parameter(weight.name).clone()
            if weight.folded and weight.norm:
                full *= self.teacher.gain(weight.norm)
            left, strengths, right = torch.linalg.svd(full, full_matrices=False)
            value = plain.values[weight.projection]
            if weight.axis == -1:
                value, kept = strengths[:, None] * (right @ value), left
            else:
                value, kept = strengths[:, None] * (left.T @ value), right
            self.values[weight.projection] = nn.Parameter(value)
            self.kept[weight.name] = kept.contiguous()
            self.weights.append(replace(weight, norm=None, folded=False))
        assert len({weight.projection for weight in self.weights}) == len(self.weights)

    @torch.no_grad()
    def write_into(self, student: PreTrainedModel) -> None:
        for weight in self.weights:
            out = student.get_parameter(weight.name).data
            value = self.values[weight.projection]
            project(self.kept[weight.name], value, weight.axis, out)

    @torch.no_grad()
    def backward(self, student: PreTrainedModel) -> None:
        for weight in self.weights:
            gradient = student.get_parameter(weight.name).grad
            assert gradient is not None
            value = self.values[weight.projection]
            value.grad = projection_gradient(self.kept[weight.name], gradient, weight.axis)


def inner_norms(method: Method) -> dict[str, nn.Parameter]:
    """Gains of the norms inside a student's attention."""
    named = method.model.named_parameters()
    return {name: p for name, p in named if ".q_norm." in name or ".k_norm." in name}


class InnerNormsToo(LowRankClone):
    """Projections, with the inner norms trained too."""

    def parameters(self) -> dict[str, nn.Parameter]:
        inner = inner_norms(self)
        for value in inner.values():
            value.requires_grad_(True)
        return super().parameters() | inner


class InnerNormsFrozen(LowRankClone):
    """Released weights except the inner norms."""

    def parameters(self) -> dict[str, nn.Parameter]:
        found = super().parameters()
        if self.released:
            for name, value in inner_norms(self).items():
                value.requires_grad_(False)
                del found[name]
        return found


def train_teacher(source: Path, folder: Path, text: list[str]) -> None:
    """Train a Qwen3 of the shape of the model in `source` on the stories."""
    shape = AutoModelForCausalLM.from_pretrained(source).config
    tokenizer = load_tokenizer(str(source))
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    names += ("num_key_value_heads", "vocab_size", "max_position_embeddings")
    settings = {name: getattr(shape, name) for name in names}
    head_dim = shape.hidden_size // shape.num_attention_heads
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(**settings, head_dim=head_dim, tie_word_embeddings=True))
    base = {"teacher": {"model": str(source)}, "student": {"hidden_size": 32}}
    recipe = make_recipe(base, {"data.text": text, "data.sequence_length": 64})
    reader = open_text(recipe, tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=TEACHER_RATE, betas=(0.9, 0.99))
    for step in range(TEACHER_STEPS):
        batch = reader.training_batch(step * TEACHER_BATCH, TEACHER_BATCH)
        logits = model(batch.input_ids, use_cache=False).logits
        loss = functional.cross_entropy(logits.flatten(0, 1), batch.labels().flatten())
        loss.backward()
        left = 1 - step / TEACHER_STEPS
        for group in optimizer.param_groups:
            group["lr"] = TEACHER_RATE * min(left, (step + 1) / 100)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def best(
    name: str,
    kind: type[LowRankClone],
    out: Path,
    base: dict[str, Any],
    rates: tuple[float, ...] = RATES,
    **settings: Any,
) -> dict[str, Any]:
    """Held-out loss at the best of several rates; the result of a rate that ran before is read from
    disk."""
    found: dict[float, float] = {}
    for rate in rates:
        overrides = {"train.learning_rate": rate, **{k: v for k, v in settings.items()}}
        run = Run(out / f"{name}-lr{rate:g}", make_recipe(base, overrides))
        METHODS["lrc"] = kind
        try:
            summary = train(run)
            found[rate] = summary["student_held_out_lm"]
        except DivergedError:
            found[rate] = float("inf")
        finally:
            METHODS["lrc"] = LowRankClone
    rate = min(found, key=lambda r: found[r])
    result = {"name": name, "loss": found[rate], "rate": rate, "tries": found}
    print(json.dumps(result), flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="folder with stories260K and its stories.jsonl")
    parser.add_argument("out", type=Path, help="folder for the runs")
    parser.add_argument("--tokens", type=int, default=819_200)
    parser.add_argument("--ranks", type=int, nargs="*", default=list(RANKS))
    parser.add_argument("--rates", type=float, nargs="+", default=list(RATES))
    parser.add_argument(
        "--only",
        nargs="+",
        default=["rank", "parts", "geometry", "norms"],
        help="experiments to run",
    )
    arguments = parser.parse_args()
    text = [str(arguments.source / "stories.jsonl")]
    base = {
        "teacher": {"model": str(arguments.source)},
        "student": {"hidden_size": 32},
        "objective": {"alpha": 0},
        "data": {"text": text, "held_out_fraction": 0.02, "sequence_length": 64},
        "train": {
            "tokens": arguments.tokens,
            "micro_batch": 16,
            "warmup_ratio": 0.02,
            "eval_every": 100,
            "eval_sequences": 128,
            "log_every": 100,
            "checkpoint_every": 100_000,
            "keep_checkpoints": 1,
            "device": "cpu",
        },
    }
    out, rates = arguments.out, tuple(arguments.rates)
    never, released = {"train.release_at": 1.0}, {"train.release_at": 0.0}
    results = []
    if {"rank", "parts", "geometry"} & set(arguments.only):
        results.append(best("never", LowRankClone, out, base, rates, **never))
        results.append(best("released", LowRankClone, out, base, rates, **released))
    if "rank" in arguments.only:
        for rank in arguments.ranks:
            kind = type("Readers", (Ranked,), {"rank": rank})
            results.append(best(f"readers-rank-{rank}", kind, out, base, rates, **never))
        if arguments.ranks:
            kind = type("Whole", (Ranked,), {"rank": max(arguments.ranks), "names": LINEARS})
            results.append(best(f"all-rank-{kind.rank}", kind, out, base, rates, **never))
    if "parts" in arguments.only:
        parts = {
            "readers": READERS,
            "writers": WRITERS,
            "embedding": ("embedding",),
            "all": (*LINEARS, "embedding"),
        }
        for name, names in parts.items():
            kind = type("Free", (Added,), {"names": names})
            results.append(best(f"free-{name}", kind, out, base, rates, **never))
    if "geometry" in arguments.only:
        wide = (*rates, 3 * max(rates))
        results.append(best("whitened", Whitened, out, base, wide, **never))
    if "norms" in arguments.only:
        folder = out / "qwen3"
        if not folder.exists():
            train_teacher(arguments.source, folder, text)
        base = {**base, "teacher": {"model": str(folder)}}
        for name, kind, when in (
            ("qwen3-never", LowRankClone, never),
            ("qwen3-never-norms-too", InnerNormsToo, never),
            ("qwen3-released", LowRankClone, released),
            ("qwen3-released-norms-frozen", InnerNormsFrozen, released),
        ):
            results.append(best(name, kind, out, base, rates, **when))
    (out / "results.json").write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
