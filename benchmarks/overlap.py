"""How much of what processes send each other is hidden behind the passes of a step.

    torchrun --nproc-per-node 2 benchmarks/overlap.py --shape small --out overlap.json
    torchrun --nproc-per-node 8 benchmarks/overlap.py --shape llama-3.2-3b      # a GPU for each

torch's profiler records some steps of the real loop on random tokens. A collective is hidden while
the same process computes: on GPUs, while any other kernel runs; on CPUs, while it projects, and
while the teacher, the student or the losses run, forward or backward. Those of the first process
are printed for each stage of `lrc`: projections, released weights, and released weights without
clone terms.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

import gpu_step
from lrc.system.clock import Clock
from lrc.system.distributed import join, leave

STEPS = 4
"""Steps that are recorded."""

COMPUTES = ("teacher", "student", "loss", "projection")
"""Parts of the clock in which a process computes what collectives may hide behind."""

SMALL = gpu_step.Shape(
    {
        "hidden_size": 256,
        "intermediate_size": 688,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "vocab_size": 2048,
    },
    128,
    128,
    (4,),
)
"""A teacher whose steps take part of a second on a CPU core."""

SHAPES = gpu_step.SHAPES | {"tiny": gpu_step.TINY, "small": SMALL}

Span = tuple[float, float]


@contextmanager
def recorded_parts() -> Iterator[None]:
    """Let the profiler see the parts of the clock."""
    part = Clock.part

    @contextmanager
    def recorded(self: Clock, name: str) -> Iterator[None]:
        with part(self, name), record_function(f"part:{name}"):
            yield

    Clock.part = recorded  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        Clock.part = part  # type: ignore[method-assign]


def merged(spans: Iterable[Span]) -> list[Span]:
    """Spans of time without overlaps."""
    found: list[Span] = []
    for begin, end in sorted(spans):
        if found and begin <= found[-1][1]:
            found[-1] = found[-1][0], max(end, found[-1][1])
        else:
            found.append((begin, end))
    return found


def shared(span: Span, others: list[Span]) -> float:
    """How much of a span lies in spans that do not overlap."""
    begin, end = span
    return sum(max(0.0, min(end, last) - max(begin, first)) for first, last in others)


def measure(steps: gpu_step.Steps) -> dict[str, dict[str, float]]:
    """Record some steps; number, milliseconds and hidden share of each collective."""
    for _ in range(2):  # the second step knows what may be sent early
        steps.step()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * gpu_step.GPU
    with recorded_parts(), profile(activities=activities) as prof:
        for _ in range(STEPS):
            steps.step()
    steps.loop.sends.wait()
    collectives: dict[str, list[Span]] = defaultdict(list)
    computes: list[Span] = []
    for event in prof.events() or []:
        span = event.time_range.start, event.time_range.end
        name = event.name
        on_gpu = event.device_type == DeviceType.CUDA
        if on_gpu and "nccl" in name.lower():
            collectives[name.split("(")[0]].append(span)
        elif on_gpu or name.removeprefix("part:") in COMPUTES:
            computes.append(span)
        elif name.startswith("gloo:"):
            collectives[name].append(span)
    computes = merged(computes)
    found = {}
    for name, spans in sorted(collectives.items()):
        total = sum(end - begin for begin, end in spans)
        hidden = sum(shared(span, computes) for span in spans)
        found[name] = {
            "number": len(spans) / STEPS,
            "ms": round(total / STEPS / 1000, 3),
            "hidden": round(hidden / total, 3) if total else 1.0,
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--stages", nargs="+", choices=gpu_step.STEPS, default=[*gpu_step.STEPS])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    world = join()
    results, shape = {}, SHAPES[options.shape]
    for kind in options.stages:
        teacher, largest = gpu_step.make_teacher(shape), shape.micro_batches[-1]
        steps = gpu_step.Steps(
            teacher, shape, "auto", largest, kind, accumulate=world.size, world=world
        )
        results[kind] = measure(steps)
        if world.leads:
            print(f"{kind}, {world.size} processes:")
            for name, row in results[kind].items():
                print(
                    f"  {name}: {row['number']:.1f} a step, {row['ms']:.2f} ms in all, "
                    f"{row['hidden']:.0%} of it while this process computes"
                )
    if world.leads and options.out:
        options.out.write_text(json.dumps(results, indent=1))
    leave()


if __name__ == "__main__":
    main()
