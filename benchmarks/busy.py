"""What another busy process costs a training step on a CPU, by the waiting policy of OpenMP.

Threads of OpenMP spin while they wait for each other. On a machine whose cores are all taken, a
spinning thread holds a core that the other one needs, and a step takes several times as long. The
policy must be in the environment before torch is imported, so each is measured in a process of its
own: a step on a quiet machine, and beside a process that computes all the time. Rounds alternate
between the policies, so all share the disturbances of the machine.

    python benchmarks/busy.py                 SmolLM2's widths, four layers, 1,024 tokens
    python benchmarks/busy.py --tiny          a few seconds, for the tests
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

POLICIES: dict[str, dict[str, str]] = {
    "as torch is": {},
    "passive": {"OMP_WAIT_POLICY": "passive"},
    "spin 1,000": {"GOMP_SPINCOUNT": "1000"},
    "spin 4,000 (lrc)": {"GOMP_SPINCOUNT": "4000"},
    "spin 10,000": {"GOMP_SPINCOUNT": "10000"},
    "spin 100,000": {"GOMP_SPINCOUNT": "100000"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
NAMES = {name for policy in POLICIES.values() for name in policy}


def measure(tiny: bool, steps: int) -> float:
    """Median seconds of a step of Low-Rank Clone in this process."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from lrc.cloning.low_rank_clone import LowRankClone
    from lrc.cloning.start import initialize
    from lrc.data.batch import Batch
    from lrc.model.teacher import as_teacher
    from lrc.recipe.sections import InitializeSection, ObjectiveSection, StudentSection
    from lrc.system.memory import keep_freed_memory
    from lrc.train.batches import count

    keep_freed_memory()
    torch.manual_seed(0)
    width = 64 if tiny else 576
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=2 if tiny else 4,
        num_attention_heads=width // 64 or 1,
        num_key_value_heads=max(1, width // 192),
        vocab_size=128 if tiny else 16_384,
        tie_word_embeddings=True,
    )
    words = Tokenizer(
        models.WordLevel({f"w{i}": i for i in range(config.vocab_size)}, unk_token="w0")
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0")
    teacher = as_teacher(LlamaForCausalLM(config), tokenizer, "random")
    method = LowRankClone(
        teacher, StudentSection(hidden_size=width // 2), ObjectiveSection(), token_grad_clip=5.0
    )
    nothing = torch.empty(0, 0, dtype=torch.int64)
    initialize(method, InitializeSection(method="random"), nothing)
    batch = Batch(torch.randint(0, config.vocab_size, (1 if tiny else 4, 32 if tiny else 256)))
    counts, seconds = count([batch]), []
    for step in range(steps + 2):
        began = time.perf_counter()
        method.begin_step(step)
        method.losses(batch, counts).loss.backward()  # type: ignore[no-untyped-call]
        method.end_step()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[2:])


def run(policy: dict[str, str], busy: bool, options: argparse.Namespace) -> float:
    """The same in a new process with a policy."""
    environment = {k: v for k, v in os.environ.items() if k not in NAMES} | policy
    command = [sys.executable, __file__, "--measure", "--steps", str(options.steps)]
    other = None
    if busy:
        other = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        done = subprocess.run(
            command + ["--tiny"] * options.tiny,
            env=environment,
            check=True,
            capture_output=True,
            text=True,
        )
    finally:
        if other:
            other.kill()
    return float(json.loads(done.stdout))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.tiny, options.steps)))
        return
    found: dict[tuple[str, bool], list[float]] = {}
    for number in range(options.rounds):
        for name, policy in POLICIES.items():
            for busy in (False, True):
                seconds = run(policy, busy, options)
                found.setdefault((name, busy), []).append(seconds)
                print(f"round {number + 1}: {name}, busy {busy}: {seconds:.3f} s", flush=True)
    quiet = statistics.median(found["as torch is", False])
    print("\n| policy | quiet, s | of torch's own | busy, s | busy / quiet |")
    print("|---|---|---|---|---|")
    for name in POLICIES:
        mine, beside = (statistics.median(found[name, busy]) for busy in (False, True))
        ratios = f"{mine / quiet:.2f} | {beside:.3f} | {beside / mine:.1f}"
        print(f"| {name} | {mine:.3f} | {ratios} |")


if __name__ == "__main__":
    main()
