"""A training step on one GPU, with random weights in a real model's shape: time, memory, kernels,
host synchronizations, and each part with the torch code and with the Triton kernels.

The steps are the training loop's own, of a recipe like a user's (bfloat16 autocast, AdamW,
clipping), on random tokens. Kinds of step:

    projected   before the release: projections, all clone terms, KL, LM
    released    after it, with the clone terms
    distilled   after it, without them, as in the last two thirds of a default run
    floor       teacher forward with its LM head, and a plain student's forward and backward with
                the LM loss; also with torch.compile over whole layers and the Triton LM loss

Shapes: `smollm2-135m` to 288 with 2,048 and 16,384 tokens a step, also with `train.cuda_graph`,
then `llama-3.2-3b` to 1536 with sequences of 2,048. Everything is printed as it is measured, and
written to --out as JSON. Nothing new starts a minute before --minutes are over.

    python benchmarks/gpu_step.py --out step.json
    python benchmarks/gpu_step.py --tiny                on a CPU, only to see that it runs
"""

import argparse
import gc
import itertools
import json
import re
import shutil
import statistics
import subprocess
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import lrc
from lrc.cloning.activations import last_hidden
from lrc.cloning.cost import matmul_peak
from lrc.cloning.kernels import use_triton
from lrc.cloning.kernels.liger import apply_liger
from lrc.cloning.low_rank_clone import LowRankClone
from lrc.cloning.objective import VocabularyWeights, compare_activations, vocabulary_losses
from lrc.cloning.token_clipping import clip_output
from lrc.data.batch import Batch
from lrc.model.teacher import Teacher, as_teacher
from lrc.recipe import make_recipe
from lrc.run import Run
from lrc.system.distributed import ALONE, World
from lrc.system.progress import Task
from lrc.train.batches import count
from lrc.train.cuda_graph import SMALL, WARM_UP
from lrc.train.loop import Loop
from lrc.train.setup import Setup, autocast, find_device, new_state

DEVICE = find_device("auto")
GPU = DEVICE.type == "cuda"
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
"""Dense bfloat16 operations a second from the data sheets. Other cards: a measured product."""

STEPS = {
    "projected": {"train.release_at": 1.0},
    "released": {"train.release_at": 0.0},
    "distilled": {"train.release_at": 0.0, "objective.alpha": 0.0},
}

KINDS = {
    "triton": ("kl_lm", "clone_", "weights_and_loss", "_token", "clip_factors"),
    "liger": ("rms_norm", "swiglu", "geglu", "rope"),
    "sort": ("sort", "radix", "median", "kth"),
    "attention": ("flash", "fmha", "attention", "cudnn"),
    "product": ("gemm", "nvjet", "xmma", "cutlass", "mm", "matmul"),
    "optimizer": ("adam", "foreach", "multi_tensor"),
    "copy": ("memcpy", "memset", "copy"),
    "reduction": ("reduce", "norm", "sum"),
}
"""Kinds of GPU kernels by words in their names, the first that fits; the others: elementwise."""

LONGEST = 25
"""Number of kernels whose time is printed by name."""


@dataclass(frozen=True)
class Shape:
    """A teacher's shape, the student's hidden size, and the sizes of a micro-batch."""

    config: dict[str, Any]
    hidden_size: int
    sequence: int
    micro_batches: tuple[int, ...]
    accumulate: int = 1
    """Of the largest micro-batch, for a step as in the paper."""


SHAPES = {
    "smollm2-135m": Shape(
        {
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "head_dim": 64,
            "vocab_size": 49152,
        },
        288,
        256,
        (8, 64),
    ),
    "llama-3.2-3b": Shape(
        {
            "hidden_size": 3072,
            "intermediate_size": 8192,
            "num_hidden_layers": 28,
            "num_attention_heads": 24,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 128256,
        },
        1536,
        2048,
        (3, 6),
        accumulate=4,
    ),
}
TINY = Shape(
    {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "vocab_size": 65,
    },
    16,
    8,
    (1,),
)


class RandomText:
    """What the loop needs of a text: random tokens."""

    sources: tuple[str, ...] = ()
    training_sequences = 1 << 40

    def __init__(self, vocab: int, sequence: int) -> None:
        self.vocab, self.sequence = vocab, sequence

    def state(self) -> dict[str, Any]:
        return {}

    def training_batch(self, first: int, rows: int) -> Batch:
        generator = torch.Generator().manual_seed(first)
        return Batch(torch.randint(self.vocab, (rows, self.sequence), generator=generator))


class Report:
    """Prints and writes what is measured, and skips what there is no time for."""

    def __init__(self, out: Path | None, minutes: float, only: str = "") -> None:
        self.out, self.only, self.began = out, only, time.perf_counter()
        self.last_start = 60 * (minutes - 1)
        self.found: dict[str, Any] = {}

    def seconds(self) -> float:
        return time.perf_counter() - self.began

    def add(self, name: str, value: Any) -> None:
        self.found[name] = value
        print(f"[{self.seconds():5.0f} s] {name}: {json.dumps(value)}", flush=True)
        if self.out is not None:
            self.out.write_text(json.dumps(self.found, indent=1))

    def measure(self, name: str, part: Callable[[], Any]) -> None:
        """Add a part. One that fails does not stop the others."""
        if not re.search(self.only, name):
            return
        if self.seconds() > self.last_start:
            return self.add(name, "not measured: no time left")
        try:
            self.add(name, part())
        except torch.OutOfMemoryError:
            self.add(name, "out of memory")
        except Exception as error:
            traceback.print_exc()
            self.add(name, f"failed: {error!r}"[:300])
        gc.collect()  # hooks and what they belong to refer to each other
        if GPU:
            torch.cuda.empty_cache()


def median_seconds(call: Callable[[], object], repeats: int, warm: int = 2) -> float:
    """Median seconds of a call, with everything it starts on the device."""
    found = []
    for repeat in range(warm + repeats):
        _synchronize()
        start = time.perf_counter()
        call()
        _synchronize()
        if repeat >= warm:
            found.append(time.perf_counter() - start)
    return statistics.median(found)


def _synchronize() -> None:
    if GPU:
        torch.cuda.synchronize()


def make_teacher(shape: Shape) -> Teacher:
    """A random teacher, made on the device: drawing its numbers on a CPU takes too long."""
    config = LlamaConfig(
        **shape.config,
        tie_word_embeddings=True,
        max_position_embeddings=shape.sequence,
        attn_implementation="sdpa",
    )
    with DEVICE:
        model = LlamaForCausalLM(config).to(DEVICE, torch.bfloat16 if GPU else torch.float32)
    words = {f"w{i}": i for i in range(shape.config["vocab_size"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0")
    return as_teacher(model, fast, "random")


class Steps:
    """The training loop of a recipe, on random tokens."""

    def __init__(
        self,
        teacher: Teacher,
        shape: Shape,
        kernels: str,
        micro_batch: int,
        kind: str,
        graph: bool = False,
        accumulate: int = 1,
        optimizer: str = "muon",
        world: World = ALONE,
    ) -> None:
        self.tokens, self.sequence = accumulate * micro_batch * shape.sequence, shape.sequence
        recipe = make_recipe(
            {"initialize": "random", "data": {"text": "random"}, "teacher": {"model": "random"}},
            {
                "student.hidden_size": shape.hidden_size,
                "data.sequence_length": shape.sequence,
                "train.micro_batch": micro_batch,
                "train.accumulate": accumulate,
                "train.tokens": 10**10,  # so that alpha is not zero yet
                "train.precision": "bfloat16" if GPU else "float32",
                "train.kernels": kernels,
                "train.cuda_graph": graph,
                "train.optimizer": optimizer,
                **STEPS[kind],
            },
        )
        with DEVICE:
            self.method = LowRankClone.build(teacher, recipe)
            for value in self.method.projections.values.values():
                nn.init.normal_(value, std=recipe.initialize.std)
        if GPU and use_triton(recipe.train.kernels, DEVICE):
            apply_liger(teacher.model, self.method.model)
        text: Any = RandomText(teacher.vocab_size, shape.sequence)
        run = Run.create(Path(tempfile.gettempdir()) / "lrc-gpu-step-is-never-written", recipe)
        state = new_state(self.method, recipe, world=world)
        setup = Setup(teacher, self.method, state, DEVICE, False)
        self.loop = Loop(run, setup, text, world=world)
        self.loop.batches = self.loop.open_batches()
        self.progress = Task("steps")
        self.loop._change_stage(self.progress)

    def step(self) -> dict[str, Any]:
        return self.loop._step(self.progress)

    def flops(self) -> float:
        flops = self.method.step_flops(1, self.tokens, self.sequence)
        assert flops is not None
        return flops


@contextmanager
def peak_memory(found: dict[str, Any]) -> Iterator[None]:
    """Add the peak of the allocated memory in the block, in GiB."""
    if GPU:
        torch.cuda.reset_peak_memory_stats()
    yield
    if GPU:
        found["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)


class Benchmark:
    """All measurements of a shape."""

    def __init__(
        self,
        name: str,
        shape: Shape,
        report: Report,
        peak: float,
        bandwidth: float,
        repeats: int,
    ) -> None:
        self.name, self.shape, self.report = name, shape, report
        self.peak, self.repeats, self.bandwidth = peak, repeats, bandwidth
        self.teacher = make_teacher(shape)

    def go(self, kernels: Sequence[str]) -> None:
        """Measure everything: the compiled floor and the kernels `torch` first, because
        liger-kernel's modules stay in the teacher."""
        if GPU:
            largest = self.shape.micro_batches[-1]
            self.measure("floor, compiled", partial(self.floor, "auto", largest, compiled=True))
        self.measure("optimizers", self.optimizers)
        for choice in kernels:
            self.measure_with(choice)

    def optimizers(self) -> dict[str, dict[str, float]]:
        """Milliseconds of an update of what is trained."""
        found: dict[str, dict[str, float]] = {}
        for kind, name in itertools.product(("projected", "released"), ("adamw", "muon")):
            steps = Steps(self.teacher, self.shape, "torch", 1, kind, optimizer=name)
            state = steps.loop.setup.state
            gradients = {value: torch.randn_like(value) for value in state.parameters.values()}

            def update(state: Any = state, gradients: Any = gradients) -> None:
                for value, gradient in gradients.items():
                    value.grad = gradient
                state.optimizer.step()

            seconds = median_seconds(update, self.repeats)
            found.setdefault(kind, {})[name] = round(1e3 * seconds, 2)
        return found

    def measure_with(self, kernels: str) -> None:
        """Measure everything with some kernels."""
        self.parts(kernels)
        for micro_batch, kind in itertools.product(self.shape.micro_batches, STEPS):
            where = f"{kind}, micro-batch {micro_batch}, {kernels}"
            self.measure(where, partial(self.steps, kernels, micro_batch, kind))
            if GPU and self.teacher.model.num_parameters() <= SMALL:
                graph = partial(self.steps, kernels, micro_batch, kind, graph=True)
                self.measure(f"{where}, CUDA graph", graph)
        first, largest = self.shape.micro_batches[0], self.shape.micro_batches[-1]
        if (accumulate := self.shape.accumulate) > 1:
            step = partial(self.steps, kernels, largest, "projected", accumulate=accumulate)
            self.measure(f"projected, micro-batch {largest} x {accumulate}, {kernels}", step)
        self.measure(f"floor, eager, {kernels}", partial(self.floor, kernels, largest))
        for kind in ("projected", "distilled"):
            self.measure(f"parts of {kind}, {kernels}", partial(self.step_parts, kernels, kind))
            self.measure(f"kernels of {kind}, {kernels}", partial(self.kernels, kernels, kind))
        if GPU:
            self.measure(f"syncs of projected, {kernels}", partial(self.syncs, kernels, first))

    def measure(self, name: str, part: Callable[[], Any]) -> None:
        self.report.measure(f"{self.name}: {name}", part)

    def steps(
        self,
        kernels: str,
        micro_batch: int,
        kind: str,
        graph: bool = False,
        accumulate: int = 1,
    ) -> dict[str, Any]:
        found: dict[str, Any] = {}
        with peak_memory(found):
            steps = Steps(self.teacher, self.shape, kernels, micro_batch, kind, graph, accumulate)
            warm = WARM_UP + 2 if graph else 2  # the last two record
            seconds = median_seconds(steps.step, self.repeats, warm)
        found |= self.rates(seconds, steps.tokens)
        found["mfu"] = round(steps.flops() / seconds / self.peak, 4)
        return found

    def rates(self, seconds: float, tokens: int) -> dict[str, Any]:
        return {"ms": round(1e3 * seconds, 2), "tokens_per_second": round(tokens / seconds)}

    def floor(self, kernels: str, micro_batch: int, compiled: bool = False) -> dict[str, Any]:
        """With the same student, its LM loss alone and the teacher's whole forward pass."""
        choice = "torch" if compiled else kernels  # the compiler fuses what liger-kernel does
        steps = Steps(self.teacher, self.shape, choice, micro_batch, "distilled")
        student, teacher = steps.method.model, self.teacher.model
        train = steps.loop.run.recipe.train
        batch = steps.loop.batches.take(0).batches[0]
        counts = count([batch])
        weights = VocabularyWeights(
            0.0, 1.0, 1.0, counts.tokens, counts.labels, self.teacher.vocab_size, 4096
        )._replace(triton=use_triton(kernels, DEVICE))
        layers = (*teacher.model.layers, *student.model.layers)
        steps.method.distill.remove_hooks()

        def step() -> None:
            with autocast(train, DEVICE):
                with torch.no_grad():
                    hidden = last_hidden(teacher, batch).flatten(0, 1)
                    for rows in hidden.split(weights.chunk_tokens):
                        rows @ teacher.get_output_embeddings().weight.T
                losses = vocabulary_losses(
                    last_hidden(student, batch).flatten(0, 1),
                    student.get_output_embeddings().weight,
                    hidden,
                    teacher.get_output_embeddings().weight,
                    batch.labels().flatten(),
                    None,
                    weights,
                )
            losses.weighted.backward()
            for parameter in student.parameters():
                parameter.grad = None

        limits = torch._dynamo.config
        limits.recompile_limit = max(limits.recompile_limit, 64)
        try:
            for layer in layers if compiled else ():
                layer.compile()
            return self.rates(median_seconds(step, self.repeats, warm=3), steps.tokens)
        finally:
            for layer in layers:
                layer._compiled_call_impl = None

    def step_parts(self, kernels: str, kind: str) -> dict[str, float]:
        """Milliseconds of a step by part, with a wait after each: the sum is more than a step. With
        a CUDA graph for a small teacher, so that passes and losses are one part, `student`."""
        graph = GPU and self.teacher.model.num_parameters() <= SMALL
        steps = Steps(self.teacher, self.shape, kernels, self.shape.micro_batches[0], kind, graph)
        for _ in range(WARM_UP + 2):
            steps.step()
        clock = steps.method.clock
        clock.seconds.clear()
        clock.part = partial(waiting_part, clock.part)  # type: ignore[method-assign]
        for _ in range(self.repeats):
            steps.step()
        return {n: round(1e3 * s / self.repeats, 2) for n, s in clock.seconds.items()}

    def kernels(self, kernels: str, kind: str) -> dict[str, Any]:
        """Launches and milliseconds of a step by kind of kernel."""
        steps = Steps(self.teacher, self.shape, kernels, self.shape.micro_batches[-1], kind)
        steps.step()
        activity = ProfilerActivity.CUDA if GPU else ProfilerActivity.CPU
        place = DeviceType.CUDA if GPU else DeviceType.CPU
        with profile(activities=[activity]) as profiler:
            steps.step()
            _synchronize()
        found = [
            (
                event.key,
                event.count,
                event.self_device_time_total if GPU else event.self_cpu_time_total,
            )
            for event in profiler.key_averages()
            if event.device_type == place  # the CPU's calls that launch kernels are listed as well
        ]
        found.sort(key=lambda kernel: -kernel[2])
        longest = [[name[:120], n, round(us / 1e3, 3)] for name, n, us in found[:LONGEST]]
        return {**by_kind(iter(found)), "longest": longest}

    def syncs(self, kernels: str, micro_batch: int) -> dict[str, int]:
        """Synchronizations of a step by the line of ours that waits."""
        steps = Steps(self.teacher, self.shape, kernels, micro_batch, "projected")
        steps.step()
        with count_warnings() as places:
            torch.cuda.set_sync_debug_mode("warn")
            try:
                steps.step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return dict(places.most_common())

    def parts(self, kernels: str) -> None:
        """The parts that the kernels replace, alone."""
        for chunk in (512, 4096) if GPU else (4,):
            name = f"KL and LM, chunk {chunk}, {kernels}"
            self.measure(name, partial(self.vocabulary, kernels, chunk))
        for width in (self.shape.hidden_size, self.shape.config["intermediate_size"]):
            name = f"clone term and clipping, width {width}, {kernels}"
            self.measure(name, partial(self.clone, kernels, width))

    def vocabulary(self, kernels: str, chunk: int) -> dict[str, Any]:
        """KL + LM with the products of the heads, and these alone."""
        vocab, dtype = self.shape.config["vocab_size"], self._dtype()
        student, teacher = self.shape.hidden_size, self.shape.config["hidden_size"]
        hidden, head = _normal(chunk, student, dtype=dtype), _normal(vocab, student, dtype=dtype)
        theirs = _normal(chunk, teacher, dtype=dtype), _normal(vocab, teacher, dtype=dtype)
        hidden.requires_grad_()
        head.requires_grad_()
        labels = torch.randint(vocab, (chunk,), device=DEVICE)
        triton = use_triton(kernels, DEVICE)
        weights = VocabularyWeights(1.0, 1.0, 1.0, chunk, chunk, vocab, chunk, triton=triton)

        def losses() -> None:
            vocabulary_losses(hidden, head, *theirs, labels, None, weights)

        def products() -> None:
            with torch.no_grad():
                logits = hidden @ head.T
                theirs[0] @ theirs[1].T
                logits @ head
                logits.T @ hidden

        whole, rest = (median_seconds(part, self.repeats) for part in (losses, products))
        return {
            "us_per_token": round(1e6 * whole / chunk, 3),
            "us_per_token_of_products": round(1e6 * rest / chunk, 3),
            "bytes_per_logit": round((whole - rest) * self.bandwidth / (chunk * vocab), 1),
        }

    def clone(self, kernels: str, width: int) -> dict[str, Any]:
        """A clone term with relative weights, forward and backward, and the clipping after it."""
        shape = (self.shape.micro_batches[0], self.shape.sequence, width)
        teacher = _normal(*shape, dtype=self._dtype())
        student = teacher + 0.1 * _normal(*shape, dtype=self._dtype())
        received = _normal(*shape, dtype=self._dtype())
        spared = torch.zeros(shape[:2], dtype=torch.bool, device=DEVICE)
        triton = use_triton(kernels, DEVICE)

        def step(backward: bool = True) -> None:
            output = student.detach().requires_grad_() * 1  # a linear map's output has a history
            clip_output(output, spared, 5.0, triton)
            compared, loss = compare_activations(
                output, teacher, None, shape[0] * shape[1], True, triton=triton
            )
            if backward:
                torch.autograd.backward((compared, loss), (received, torch.ones_like(loss)))

        forward = median_seconds(lambda: step(backward=False), self.repeats)
        whole = median_seconds(step, self.repeats)
        return {
            name: round(1e12 * seconds / student.numel(), 2)
            for name, seconds in (("forward_ps_per_element", forward), ("ps_per_element", whole))
        }

    def _dtype(self) -> torch.dtype:
        return self.teacher.model.dtype


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of a copy in the device's memory."""
    source = torch.empty(2**30 if GPU else 2**22, dtype=torch.uint8, device=DEVICE)
    copy = torch.empty_like(source)
    return 2 * source.numel() / median_seconds(lambda: copy.copy_(source), 10)


def _normal(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, device=DEVICE, dtype=dtype)


def by_kind(kernels: Iterator[tuple[str, int, float]]) -> dict[str, dict[str, float]]:
    """Sum names, launches and microseconds of kernels by `KINDS`."""
    found: dict[str, dict[str, float]] = {}
    for name, launches, microseconds in kernels:
        words = (kind for kind, some in KINDS.items() if any(w in name.lower() for w in some))
        row = found.setdefault(next(words, "elementwise"), {"launches": 0, "ms": 0.0})
        row["launches"] += launches
        row["ms"] = round(row["ms"] + microseconds / 1e3, 3)
    return dict(sorted(found.items(), key=lambda item: -item[1]["ms"]))


@contextmanager
def waiting_part(part: Callable[[str], Any], name: str) -> Iterator[None]:
    """A part of a clock, with what it starts on the device."""
    _synchronize()
    with part(name):
        yield
        _synchronize()


@contextmanager
def count_warnings() -> Iterator[Counter[str]]:
    """Count CUDA's warnings of waits in the block by the innermost line of ours on the stack."""
    places: Counter[str] = Counter()

    package = Path(lrc.__file__).parent

    def note(message: object, _category: object, filename: str, line: int, *_: object) -> None:
        frames = [(Path(frame.filename), frame.lineno) for frame in traceback.extract_stack()]
        ours = [
            (str(path.relative_to(package)), at)
            for path, at in frames
            if path.is_relative_to(package)
        ]
        where, at = ours[-1] if ours else (filename, line)
        if "synchronizing" in str(message):
            places[f"{where}:{at}"] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        yield places


def nvidia_driver() -> str | None:
    """The version of the driver."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=list(SHAPES), nargs="+", default=list(SHAPES))
    parser.add_argument("--kernels", choices=["torch", "triton"], nargs="+")
    parser.add_argument("--only", default="", help="regular expression of what is measured")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tiny", action="store_true", help="a tiny shape, to see that it runs")
    arguments = parser.parse_args()
    if not (GPU or arguments.tiny):
        parser.error("this machine has no CUDA GPU; --tiny shows on a CPU that the script runs")
    report = Report(arguments.out, arguments.minutes, arguments.only)
    card = torch.cuda.get_device_name() if GPU else "CPU"
    peak = next((peak for name, peak in PEAKS.items() if name in card), None)
    if peak is None:
        peak = matmul_peak(DEVICE, torch.bfloat16 if GPU else torch.float32)
    bandwidth = copy_bandwidth()
    report.add(
        "machine",
        {
            "card": card,
            "driver": nvidia_driver(),
            "cuda": torch.version.cuda,
            "torch": torch.__version__,
            "date": date.today().isoformat(),
            "operations_per_second": peak,
            "bytes_per_second": bandwidth,
        },
    )
    shapes = {"tiny": TINY} if arguments.tiny else {n: SHAPES[n] for n in arguments.shape}
    kernels = sorted(arguments.kernels or (["torch", "triton"] if GPU else ["torch"]))
    for name, shape in shapes.items():
        benchmark = Benchmark(name, shape, report, peak, bandwidth, 1 if arguments.tiny else 5)
        benchmark.go(kernels)
    report.add("seconds", round(report.seconds()))


if __name__ == "__main__":
    main()
