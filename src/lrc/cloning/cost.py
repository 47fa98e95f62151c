"""The floating-point operations of an optimizer step, computed from the shapes (docs/cost.md).

A multiply and an add are two operations. Only matrix products are counted. At any useful size,
memory traffic limits everything else.
"""

import time
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from lrc.model.shapes import head_dim_of
from lrc.recipe.sections import LLAMA_TERMS, ObjectiveSection


@dataclass(frozen=True)
class Widths:
    """The widths of a decoder that determine its cost."""

    hidden: int
    layers: int
    attention: int
    """heads * head_dim."""
    key_value: int
    """key/value heads * head_dim."""
    ffn: int
    vocab: int

    def layer_weights(self) -> int:
        """Elements of the seven linear maps of a layer."""
        return self.hidden * (2 * self.attention + 2 * self.key_value + 3 * self.ffn)


def widths_of(model: PreTrainedModel) -> Widths:
    """Read the widths of a decoder from its configuration."""
    config = model.config
    head_dim = head_dim_of(config)
    return Widths(
        config.hidden_size,
        config.num_hidden_layers,
        config.num_attention_heads * head_dim,
        config.num_key_value_heads * head_dim,
        config.intermediate_size,
        config.vocab_size,
    )


def step_flops(
    teacher: Widths,
    student: Widths,
    tied: bool,
    tokens: int,
    sequence: int,
    objective: ObjectiveSection,
    vocab: int | None = None,
    released: bool = False,
) -> dict[str, float]:
    """Operations of one optimizer step by part.

    Args:
        teacher: widths of the teacher.
        student: widths of the student.
        tied: whether the student ties its LM head to its embedding.
        tokens: tokens per step, over all micro-batches.
        sequence: tokens per sequence.
        objective: the enabled losses.
        vocab: number of token ids in use, if the embedding has padding rows.
        released: whether the student's own weights are trained instead of projections.
    """
    layers = teacher.layers

    def attention(widths: Widths) -> int:
        """Scores and weighted values: 2 * 2 * sequence * attention for full [sequence, sequence]
        matrices, halved because a causal kernel needs half of them."""
        return 2 * sequence * widths.attention * widths.layers

    terms = set(LLAMA_TERMS) - objective.clone.off() if objective.alpha else set()
    # Projection of the teacher's outputs: forward, and the gradient of the projection.
    written = (2 if released else 4) * teacher.hidden * student.hidden
    clone = written if "down" in terms else 0
    if "o" in terms:
        # In the teacher's space: its o on the student's heads, and the gradient of the heads.
        in_teacher = 4 * teacher.hidden * teacher.attention
        clone += in_teacher if objective.attn_out == "teacher" else written
    vocab = vocab or teacher.vocab
    heads = 2 * 3 * vocab * student.hidden  # logits, gradients of the states and of the head
    if objective.kl_weight:
        heads += 2 * vocab * teacher.hidden
    vocabulary_weights = (1 if tied else 2) * teacher.vocab * teacher.hidden
    weights = layers * teacher.layer_weights() + vocabulary_weights
    learns_from_teacher = bool(terms or objective.kl_weight)
    return {
        "teacher": tokens
        * learns_from_teacher
        * (2 * layers * teacher.layer_weights() + attention(teacher)),
        "student": tokens
        * (6 * student.layers * student.layer_weights() + 3.5 * attention(student)),
        "loss": tokens * (heads + clone * layers),
        "projection": 0 if released else 4 * weights * student.hidden,
    }


def matmul_peak(device: torch.device, dtype: torch.dtype = torch.float32) -> float:
    """Measured operations per second of a large matrix product, the best of eight trials."""
    size = 1024 if device.type == "cpu" else 8192
    a = torch.randn(size, size, device=device, dtype=dtype)
    best = 0.0
    for _ in range(8):
        _synchronize(device)
        start = time.perf_counter()
        a @ a
        _synchronize(device)
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
