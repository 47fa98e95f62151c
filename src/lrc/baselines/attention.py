"""Queries, keys and values of a model's attention, and the token relations they define.

transformers lets a program register its own attention function. While `observe_attention` is open,
the model uses one that passes queries, keys and values to an observer, as the attention receives
them (after rotary embedding and the norms inside the attention), and then calls transformers' own
`sdpa` function. This works the same way for every family, without reimplementing any attention.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lrc.model.layout import layout_of
from lrc.model.precision import upcast_dtype
from lrc.system.errors import UserError

OBSERVED = "lrc_observed"
"""Name of the observed attention among transformers' attention functions."""


@dataclass(frozen=True)
class Heads:
    """The inputs of an attention block."""

    query: Tensor
    """[batch, heads, sequence, head_dim]"""
    key: Tensor
    """[batch, key/value heads, sequence, head_dim]"""
    value: Tensor
    """[batch, key/value heads, sequence, head_dim]"""
    visible: Tensor
    """Which keys a query sees: bool [batch or 1, 1, sequence, sequence]."""
    scaling: float
    """Factor of the scores."""

    def scores(self) -> Tensor:
        """Attention scores before the softmax, including masked ones,
        [batch, heads, sequence, sequence]."""
        groups = self.query.shape[1] // self.key.shape[1]
        return _products(self.query, self.key.repeat_interleave(groups, dim=1)) * self.scaling

    def value_scores(self) -> Tensor:
        """Scaled products of values with values, [batch, key/value heads, sequence, sequence]."""
        return _products(self.value, self.value) * self.value.shape[-1] ** -0.5


def _products(a: Tensor, b: Tensor) -> Tensor:
    """Dot products of all pairs of rows, in float32 at least."""
    dtype = upcast_dtype(a)
    with torch.autocast(a.device.type, enabled=False):
        return a.to(dtype) @ b.to(dtype).transpose(-1, -2)


def check_observable(model: PreTrainedModel, layers: Iterable[int]) -> None:
    """Refuse a model whose attention is not the one that `observe_attention` calls.

    Raises:
        UserError: if some layers have no attention, or one with sinks or a softcap of its scores.
    """
    layout, kind = layout_of(model), model.config.model_type
    plain = all(layout.attention(layer).endswith(".self_attn") for layer in layers)
    capped = getattr(model.config, "attn_logit_softcapping", None) is not None
    if not plain or capped or not model._supports_sdpa:
        raise UserError(
            f"The attention of {kind} models cannot be observed, because it is not plain softmax "
            "attention in every layer: use another method, or tinybert with "
            "method.attention_weight: 0."
        )


@contextmanager
def observe_attention(
    model: PreTrainedModel,
    layers: Iterable[int],
    observer: Callable[[int, Heads], None],
) -> Iterator[None]:
    """Pass the inputs of some layers' attention to an observer while the context is open.

    Args:
        model: the model; it uses `sdpa` while observed, whatever its setting.
        layers: layers to observe.
        observer: function that gets the layer and the inputs of its attention.
    """
    layout = layout_of(model)
    modules = {model.get_submodule(layout.attention(layer)): layer for layer in layers}

    def attention(
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **options: Any,
    ) -> tuple[Tensor, None]:
        if module in modules:
            visible = attention_mask
            if visible is None:  # plain causal attention
                length = query.shape[2]
                ones = torch.ones(length, length, dtype=torch.bool, device=query.device)
                visible = ones.tril()[None, None]
            observer(modules[module], Heads(query, key, value, visible, options["scaling"]))
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)

    before = model.config._attn_implementation
    AttentionInterface.register(OBSERVED, attention)
    AttentionMaskInterface.register(OBSERVED, sdpa_mask)
    model.config._attn_implementation = OBSERVED
    try:
        yield
    finally:
        model.config._attn_implementation = before


def score_difference(
    student: Tensor, teacher: Tensor, visible: Tensor, mask: Tensor | None, tokens: int
) -> Tensor:
    """Mean squared difference of attention scores: over the keys that a query sees, over heads, and
    over the queries that are tokens.

    Args:
        student: scores [batch, heads, sequence, sequence].
        teacher: scores [batch, heads, sequence, sequence], no gradient.
        visible: bool [batch or 1, 1, sequence, sequence].
        mask: bool [batch, sequence], false for padding; None for no padding.
        tokens: number of tokens to average over.
    """
    difference = (student - teacher).masked_fill(~visible, 0)
    by_query = difference.square().sum(-1) / visible.sum(-1).clamp_min(1)
    return _over_tokens(by_query, mask, tokens)


def relation_divergence(
    student: Tensor, teacher: Tensor, visible: Tensor, mask: Tensor | None, tokens: int
) -> Tensor:
    """KL(teacher || student) between the softmaxes of scores over the keys that a query sees: mean
    over heads and over the queries that are tokens.

    Args:
        student: scores [batch, heads, sequence, sequence].
        teacher: scores [batch, heads, sequence, sequence], no gradient.
        visible: bool [batch or 1, 1, sequence, sequence].
        mask: bool [batch, sequence], false for padding; None for no padding.
        tokens: number of tokens to average over.
    """
    # The floor is finite: a padded query may see no key, and infinities would give NaN gradients.
    floor = torch.finfo(student.dtype).min
    log_q = student.masked_fill(~visible, floor).log_softmax(-1)
    log_p = teacher.masked_fill(~visible, floor).log_softmax(-1)
    divergence = (log_p.exp() * (log_p - log_q)).masked_fill(~visible, 0).sum(-1)
    return _over_tokens(divergence, mask, tokens)


def _over_tokens(by_query: Tensor, mask: Tensor | None, tokens: int) -> Tensor:
    """Mean over heads and tokens of values [batch, heads, sequence]."""
    by_token = by_query.mean(1)
    if mask is not None:
        by_token = by_token.masked_fill(~mask, 0)
    return by_token.sum() / tokens
