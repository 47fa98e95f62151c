"""Which experts to keep? Held-out losses of students without training, by several rankings.

python benchmarks/experts.py data/stories260K data/experts

No trained mixture of experts is small enough for a CPU. So the first call trains one on the stories
of stories260K (`python -m lrc.stories260k FOLDER data/stories260K --stories 14500`) and on its
predictions, in 4 minutes on one core: a Mixtral of 4 layers, each with 16 experts of which a token
uses 2. `lrc compare shapes-experts` then compares shapes with the same teacher.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedModel

from lrc.cloning.low_rank_clone import LowRankClone
from lrc.cloning.shape import prune
from lrc.cloning.shape.experts import Read, contributions, expert_costs, number_of
from lrc.cloning.start.calibration import Block
from lrc.data import Reader, open_text
from lrc.evaluation.held_out import held_out_loss
from lrc.model.teacher import Teacher, load_teacher
from lrc.recipe import make_recipe

EXPERTS = 16
COUNTS = (12, 8, 4)
BATCH = 16
HELD_OUT = 128
CALIBRATION = 256
"""Calibration sequences of 64 tokens."""

Cost = Callable[[Tensor], Tensor]
"""From what an expert adds for some tokens, [tokens, d], to its cost for each, [tokens]."""


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("stories", type=Path, help="folder of stories260K with its stories")
    arguments.add_argument(
        "teacher", type=Path, help="folder of the mixture, made if it is missing"
    )
    arguments.add_argument("--steps", type=int, default=1500, help="steps that train the mixture")
    given = arguments.parse_args()
    stories = load_teacher(str(given.stories))
    base = {
        "teacher": {"model": str(given.stories)},
        "data": {"text": [str(given.stories / "stories.jsonl")], "sequence_length": 64},
        "student": {"hidden_size": 32},
    }
    text = open_text(make_recipe(base), stories.tokenizer)
    if not (given.teacher / "config.json").is_file():
        trained(stories, text, given.steps).save_pretrained(given.teacher)
        stories.tokenizer.save_pretrained(given.teacher)
    teacher = load_teacher(str(given.teacher))
    print(f"teacher: {loss_of(teacher.model, text):.3f}\n")
    print("| ranked by | " + " | ".join(f"{count} of {EXPERTS}" for count in COUNTS) + " |")
    print("|---|" + "---|" * len(COUNTS))
    for name, costs in rankings().items():
        losses = [loss_of(student(teacher, text, count, costs), text) for count in COUNTS]
        print(f"| {name} | " + " | ".join(f"{loss:.3f}" for loss in losses) + " |", flush=True)


def trained(stories: Teacher, text: Reader, steps: int) -> PreTrainedModel:
    """A mixture of experts that has learned the stories and the predictions of their author."""
    torch.manual_seed(0)
    config = stories.config
    model = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=config.vocab_size,
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=8,
            num_local_experts=EXPERTS,
            num_experts_per_tok=2,
            max_position_embeddings=config.max_position_embeddings,
            tie_word_embeddings=True,
            bos_token_id=config.bos_token_id,
            eos_token_id=config.eos_token_id,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.98), weight_decay=0.0)
    started = time.time()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 4e-3 * min(1.0, (step + 1) / 50) * (1 - step / steps)
        ids = text.training_batch(step * BATCH, BATCH).input_ids
        found = model(ids, output_router_logits=True)
        with torch.no_grad():
            wanted = stories.model(ids).logits.log_softmax(-1).flatten(0, 1)
        own = found.logits.log_softmax(-1).flatten(0, 1)
        kl = functional.kl_div(own, wanted, log_target=True, reduction="batchmean")
        lm = functional.cross_entropy(found.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        (kl + lm + 0.02 * found.aux_loss).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == steps - 1:
            print(f"step {step}: LM {lm.item():.3f}, {time.time() - started:.0f} s", flush=True)
    return model.eval()


def loss_of(model: PreTrainedModel, text: Reader) -> float:
    """The held-out LM loss, in nats."""
    return held_out_loss(model, text.held_out_batches(HELD_OUT, BATCH), model.config.vocab_size)


def student(teacher: Teacher, text: Reader, count: int, costs: object) -> PreTrainedModel:
    """A student with fewer experts, which is not trained."""
    base = {"teacher": {"model": "-"}, "data": {"text": ["-"]}, "student": {"experts": count}}
    real, prune.expert_costs = prune.expert_costs, costs  # type: ignore[assignment]
    try:
        method = LowRankClone.build(teacher, make_recipe(base))
        method.initialize(text.training_batch(0, CALIBRATION), lambda done, parts: None)
    finally:
        prune.expert_costs = real
    return method.student()


def rankings() -> dict[str, object]:
    """Functions with the arguments of `expert_costs`, by what they rank by."""
    generator = torch.Generator().manual_seed(0)

    def random(_block: Block, experts: nn.Module, *_: object) -> Tensor:
        return torch.rand(number_of(experts), generator=generator)

    return {
        "squared outputs in the metric of the predictions (ours)": expert_costs,
        "mean norm of outputs (REAP)": summed(lambda added: added.norm(dim=1), mean=True),
        "sum of norms of outputs": summed(lambda added: added.norm(dim=1)),
        "number of tokens": summed(lambda added: torch.ones(len(added))),
        "nothing (random)": random,
    }


def summed(cost: Cost, mean: bool = False) -> object:
    """A ranking by a sum, or a mean, over the tokens of an expert."""

    def costs(block: Block, experts: nn.Module, reads: Iterator[Read], _metric: Tensor) -> Tensor:
        total, tokens = torch.zeros(number_of(experts)), torch.zeros(number_of(experts))
        for chosen, added, _ in contributions(block, experts, reads):
            total.index_add_(0, chosen, cost(added))
            tokens.index_add_(0, chosen, torch.ones(len(added)))
        return total / tokens.clamp_min(1) if mean else total

    return costs


if __name__ == "__main__":
    main()
