"""The cost of a run from its shapes: operations by part, and hours at a given rate.

python benchmarks/cost.py                 the published LRC-1.5B run
python benchmarks/cost.py --rate 400      at 400 TFLOP/s instead of 350
"""

import argparse

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lrc.cloning.cost import step_flops
from lrc.model.layout import layout_of
from lrc.recipe import load_recipe


def llama(hidden_size: int) -> LlamaForCausalLM:
    """Llama-3.2-3B-Instruct, from its published configuration but for the hidden size, without
    weights."""
    config = LlamaConfig(
        hidden_size=hidden_size,
        intermediate_size=8192,
        num_attention_heads=24,
        num_key_value_heads=8,
        head_dim=128,
        num_hidden_layers=28,
        vocab_size=128256,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        return LlamaForCausalLM(config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--rate", type=float, default=350, help="achieved TFLOP/s, all GPUs together"
    )
    rate = parser.parse_args().rate
    recipe = load_recipe("paper-lrc-1.5b")
    teacher, tokens = llama(3072), recipe.step_tokens()
    flops = step_flops(
        teacher,
        llama(recipe.student.hidden_size),
        tokens,
        recipe.data.sequence_length,
        recipe.objective,
        layout_of(teacher).observable(),
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
