"""Gradient checkpointing, of whole layers or of the cheap operations alone."""

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers import PreTrainedModel

from lrc.sections import Checkpointing

_aten = torch.ops.aten
_PRODUCTS = {
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
}


def recompute(student: PreTrainedModel, how: Checkpointing) -> None:
    """Let a student compute activations again in the backward pass, as the recipe says."""
    if not how:
        return
    options: dict[str, Any] = {"use_reentrant": False}
    if how == "elementwise":
        options["context_fn"] = keep_products
    student.activation_checkpointing_enable(options)
    student.train()  # transformers recomputes in training mode only


def keep_products() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Contexts of torch's checkpointing that keep what matrix products and attention gave.

    Norms, activation functions, rotary embeddings and the differences of the clone terms are
    computed again in the backward pass: a few percent of the time of a step, for about half of
    what a Llama's layer keeps.
    """
    return create_selective_checkpoint_contexts(_policy)  # type: ignore[no-untyped-call]


def _policy(_context: Any, operation: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    if operation in _PRODUCTS:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE
