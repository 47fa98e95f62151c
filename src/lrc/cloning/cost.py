"""The floating-point operations of an optimizer step, counted from the models' own parameters
(docs/cost.md).

A multiply and an add are two operations. Only matrix products and short convolutions are counted.
At any useful size, memory traffic limits everything else.
"""

import time
from collections.abc import Collection

import torch
from torch import nn
from transformers import PreTrainedModel

from lrc.model.layout import LinearSite, layout_of
from lrc.recipe.sections import ObjectiveSection

CHUNK = 64
"""Tokens that a gated delta net computes at once."""


def token_weights(model: PreTrainedModel) -> dict[str, float]:
    """How many elements of each weight in the layers a token is multiplied with. Of experts, only
    those count that see the token."""
    prefix = f"{layout_of(model).family.layers}."
    experts = {
        f"{module}.{name}"
        for module, child in model.named_modules()
        for name, value in child.named_parameters(recurse=False)
        if value.ndim == 3 and not isinstance(child, nn.Conv1d)
    }
    return {
        name: value.numel()
        * (model.config.num_experts_per_tok / len(value) if name in experts else 1)
        for name, value in model.named_parameters()
        if name.startswith(prefix) and value.ndim > 1 and not name.endswith("bias")
    }


MIXER_WRITERS = ("o", "out_proj")
"""The writers of the blocks that mix tokens."""


def mixing(model: PreTrainedModel, sequence: int) -> tuple[float, float]:
    """Operations per token of a forward pass that mix tokens: those of attention, which computes
    only the scores that it uses, and those of gated delta nets and Mamba layers."""
    layout, config = layout_of(model), model.config
    attention = recurrence = 0.0
    mixers = [site for site in layout.sites() if site.name in MIXER_WRITERS]
    for site in mixers:
        path = layout.linear(site)
        block = model.get_submodule(path.rpartition(".")[0])
        values = model.get_submodule(path).weight.shape[1]
        if hasattr(block, "head_v_dim"):
            keys, values = block.head_k_dim, block.head_v_dim
            products = 3 * CHUNK * keys + 2 * CHUNK * values + 3 * keys * values
            recurrence += 2 * block.num_v_heads * products
            continue
        if hasattr(block, "ssm_state_size"):
            state, chunk = block.ssm_state_size, block.chunk_size
            products = chunk * (block.num_heads * state + values) + 2 * values * state
            recurrence += 2 * products
            continue
        keys = values
        if hasattr(block, "kv_b_proj"):  # latent attention, whose heads differ in width
            keys = config.num_attention_heads * config.qk_head_dim
        attention += 2 * seen_keys(config, site.layer, sequence) * (keys + values)
    return attention, recurrence


def seen_keys(config: object, layer: int, sequence: int) -> float:
    """Keys that a query of a layer sees in a sequence, on average."""
    window = getattr(config, "sliding_window", None) or sequence
    kinds = getattr(config, "layer_types", None)
    if window >= sequence or (kinds and kinds[layer] != "sliding_attention"):
        return sequence / 2
    return window - window**2 / (2 * sequence)


def step_flops(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    tokens: int,
    sequence: int,
    objective: ObjectiveSection,
    sites: Collection[LinearSite] = (),
    vocab: int | None = None,
    released: bool = False,
    source: PreTrainedModel | None = None,
) -> dict[str, float]:
    """Operations of one optimizer step by part.

    Args:
        teacher: the teacher.
        student: the student.
        tokens: tokens per step, over all micro-batches.
        sequence: tokens per sequence.
        objective: the losses.
        sites: where activations are cloned.
        vocab: number of token ids in use, if the embedding has padding rows.
        released: whether the student's own weights are trained instead of projections.
        source: the pruned teacher whose weights are projected; None: the teacher.
    """
    source = source or teacher
    layout = layout_of(source)
    theirs, ours = teacher.config.hidden_size, student.config.hidden_size
    rows = teacher.config.vocab_size
    vocab = vocab or rows
    clone = 0.0
    for site in sites:
        if layout.writes(site):
            width = ours
            # Projection of the teacher's output, and the gradient of the projection.
            passes = 2 if released else 4
            if site.name == "o" and objective.attn_out == "teacher":
                # The teacher's o on the student's heads, and the gradient of the heads.
                width = source.get_submodule(layout.linear(site)).weight.shape[1]
                passes = 4
            clone += passes * theirs * width
    heads = 2 * 3 * vocab * ours  # logits, gradients of the states and of the head
    if objective.kl_weight:
        heads += 2 * vocab * theirs
    projected = {parameter.name for parameter in layout.projected(source)}
    elements = sum(source.get_parameter(name).numel() for name in projected)
    elements += (1 if student.config.tie_word_embeddings else 2) * rows * theirs
    attention, recurrence = mixing(teacher, sequence)
    forward = 2 * sum(token_weights(teacher).values()) + attention + recurrence
    # Forward, gradients of the activations, and of the weights that are trained. Attention computes
    # its scores twice.
    attention, recurrence = mixing(student, sequence)
    trained = 3.5 * attention + 3 * recurrence
    for name, count in token_weights(student).items():
        trained += (6 if released or name in projected else 4) * count
    return {
        "teacher": tokens * forward if sites or objective.kl_weight else 0.0,
        "student": tokens * trained,
        "loss": tokens * (heads + clone),
        "projection": 0.0 if released else 4 * elements * ours,
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
