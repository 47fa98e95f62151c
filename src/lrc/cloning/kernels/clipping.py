"""Token clipping in Triton kernels, and the median by token that it shares with the clone term.

What has one number a token (norms, weights, factors) is worked on by one program, which holds up to
`TOKENS` of them in registers. The median is selected bit by bit: floats that are not negative have
the order of their bits. So it is exact, and costs no sort. Bytes an element of b bytes, for a
gradient whose norms are not known yet: read for the norms, then read and written, 3 b.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096
"""Largest number of elements of a token that a program holds at once."""

TOKENS = 16384
"""Largest number of tokens that a program holds at once."""


def clip_tokens(gradient: Tensor, norms: Tensor | None, spared: Tensor, limit: float) -> Tensor:
    """`lrc.cloning.token_clipping.clip_tokens`, up to float32.

    Args:
        gradient: [batch, sequence, width].
        norms: the norms of its tokens, float32 [batch, sequence], if nothing else refers to the
            gradient's memory: it is clipped in place. None: they are computed, and the result is a
            new tensor.
        spared: as there.
        limit: as there.
    """
    source = gradient.contiguous()
    out = source if norms is not None else torch.empty_like(source)
    if norms is None:
        norms = torch.empty(source.shape[:-1], dtype=torch.float32, device=source.device)
        by_token(_token_norms, source, norms)
    factors = torch.empty_like(norms)
    over_tokens(_clip_factors, norms, spared.contiguous(), factors, limit=limit)
    by_token(_scale_tokens, source, out, factors, IN_PLACE=out is source)
    return out


def by_token(kernel: Any, *tensors: Tensor, **constants: Any) -> None:
    """Run a kernel with a program for every token of the first tensor, [..., width]."""
    width = tensors[0].shape[-1]
    block = min(BLOCK, triton.next_power_of_2(width))
    if tensors[0].numel():
        programs = (tensors[0].numel() // width,)
        warps = 8 if block > 2048 else 4
        with torch.cuda.device_of(tensors[0]):
            kernel[programs](*tensors, width, **constants, BLOCK=block, num_warps=warps)


def over_tokens(kernel: Any, *tensors: Tensor, **constants: Any) -> None:
    """Run one program of a kernel for all tokens of the first tensor."""
    tokens = tensors[0].numel()
    block = min(TOKENS, triton.next_power_of_2(max(tokens, 1)))
    warps = max(4, min(16, block // 512))
    with torch.cuda.device_of(tensors[0]):
        kernel[(1,)](*tensors, tokens=tokens, **constants, BLOCK=block, num_warps=warps)


@triton.jit
def load_counted(values, mask, at, tokens, divisor, POSITIVE: tl.constexpr, MASKED: tl.constexpr):
    """Values divided by a number, and whether the median counts them."""
    inside = at < tokens
    value = tl.load(values + at, mask=inside, other=0.0) / divisor
    counted = inside & (value == value)
    if POSITIVE:
        counted = counted & (value > 0)
    if MASKED:
        counted = counted & (tl.load(mask + at, mask=inside, other=0) != 0)
    return value, counted


@triton.jit
def median(
    values,
    mask,
    tokens,
    divisor,
    POSITIVE: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The lower median of the values that count, as `torch.nanmedian` has it; NaN if none does."""
    at = tl.arange(0, BLOCK)
    value, counted = load_counted(values, mask, at, tokens, divisor, POSITIVE, MASKED)
    bits = value.to(tl.int32, bitcast=True)
    total = tl.sum(counted.to(tl.int32), 0)
    for start in range(BLOCK, tokens, BLOCK):
        value, more = load_counted(values, mask, start + at, tokens, divisor, POSITIVE, MASKED)
        total += tl.sum(more.to(tl.int32), 0)
    rank = (total - 1) // 2
    found = total * 0
    for place in range(31):
        candidate = found | (1 << (30 - place))
        below = tl.sum((counted & (bits < candidate)).to(tl.int32), 0)
        for start in range(BLOCK, tokens, BLOCK):
            value, more = load_counted(values, mask, start + at, tokens, divisor, POSITIVE, MASKED)
            smaller = value.to(tl.int32, bitcast=True) < candidate
            below += tl.sum((more & smaller).to(tl.int32), 0)
        found = tl.where(below <= rank, candidate, found)
    return tl.where(total > 0, found.to(tl.float32, bitcast=True), float("nan"))


@triton.jit
def _token_norms(gradient, norms, width, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    square = 0.0
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        at = gradient + token * width + columns
        g = tl.load(at, mask=columns < width, other=0.0).to(tl.float32)
        square += tl.sum(g * g, 0)
    tl.store(norms + token, tl.sqrt(square))


@triton.jit
def _clip_factors(norms, spared, factors, tokens, limit, BLOCK: tl.constexpr):
    largest = limit * median(norms, norms, tokens, 1.0, True, False, BLOCK)
    for start in range(0, tokens, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < tokens
        norm = tl.load(norms + at, mask=inside, other=0.0)
        over = (norm > largest) & (tl.load(spared + at, mask=inside, other=1) == 0)
        tl.store(factors + at, tl.where(over, largest / norm, 1.0), mask=inside)


@triton.jit
def _scale_tokens(gradient, out, factors, width, IN_PLACE: tl.constexpr, BLOCK: tl.constexpr):
    """Tokens with factor 1 cost nothing in place."""
    token = tl.program_id(0).to(tl.int64)
    factor = tl.load(factors + token)
    if (not IN_PLACE) or (factor != 1.0):
        for start in range(0, width, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            inside = columns < width
            at = token * width + columns
            scaled = tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32) * factor
            tl.store(out + at, scaled, mask=inside)
