"""The cost of a run from its shapes: operations by part, and hours at a given rate.

python benchmarks/cost.py                 the published LRC-1.5B run
python benchmarks/cost.py --rate 400      at 400 TFLOP/s instead of 350
"""

import argparse

from lrc.cloning.cost import Widths, step_flops
from lrc.recipe import load_recipe

TEACHER = Widths(hidden=3072, layers=28, attention=3072, key_value=1024, ffn=8192, vocab=128256)
"""Llama-3.2-3B-Instruct, from its published configuration."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--rate", type=float, default=350, help="achieved TFLOP/s, all GPUs together"
    )
    rate = parser.parse_args().rate
    recipe = load_recipe("paper-lrc-1.5b")
    hidden_size = recipe.student.hidden_size
    student = Widths(
        hidden_size,
        TEACHER.layers,
        TEACHER.attention,
        TEACHER.key_value,
        TEACHER.ffn,
        TEACHER.vocab,
    )
    tokens = recipe.step_tokens()
    flops = step_flops(
        TEACHER, student, True, tokens, recipe.data.sequence_length, recipe.objective
    )
    total = sum(flops.values())
    for part, operations in flops.items():
        print(
            f"{part:12} {operations / tokens / 1e9:7.2f} GFLOP a token  {operations / total:6.1%}"
        )
    print(f"{'all':12} {total / tokens / 1e9:7.2f} GFLOP a token")
    run = total * recipe.steps()
    print(f"{recipe.steps():,} steps of {tokens:,} tokens: {run:.3g} FLOP")
    print(f"{run / rate / 1e12 / 3600:,.0f} hours at {rate:g} TFLOP/s")


if __name__ == "__main__":
    main()
