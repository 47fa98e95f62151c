"""KL(teacher || student) and LM of a chunk of logits, in one Triton kernel.

A program has one row. It reads the logits of both models once for all sums, and once more for the
gradient, which it writes over the student's logits. Memory traffic in bytes a logit, with elements
of b bytes: two reads of two logits and one write, 5 b, which is 10 with bfloat16; 3 b without a
divergence. Rows add 24 bytes each. All arithmetic is float32.

The formulas are those of `lrc.cloning.objective.kl`. d must be centered before e^d - 1 is summed,
and one read does not know the mean in advance. So each block of the vocabulary centers d by its own
mean, and blocks are merged like the partial variances of Chan et al. (1979): with weights w that
sum to Z, and R = sum w (e^d - 1 - d) about the mean, moving the mean by x changes R to
e^-x R + Z (e^-x - 1 + x). No term is negative, so nothing cancels. At the end, r = R / Z.

Rows that differ too much for e^d ("far" rows) use q - p from the sums of exponentials instead,
inside the same kernel.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lrc.cloning.objective.divergence import LARGEST_EXPM1_ARGUMENT

BLOCK = 4096
"""Largest number of logits of a row that a program holds at once."""

EXPM1_LIMIT = tl.constexpr(LARGEST_EXPM1_ARGUMENT)
LARGEST_EXPONENT = tl.constexpr(60.0)
"""Rows with a block that reaches it are far, and e^d stays finite in float32."""


def losses_in_place(
    logits: Tensor,
    scaled_teacher: Tensor | None,
    labels: Tensor,
    mask: Tensor | None,
    *,
    kl_weight: float,
    lm_weight: float,
    temperature: float,
    tokens: int,
    label_count: int,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """KL and LM of each token of a chunk. Overwrites its logits with the gradient of
    kl_weight * T^2 * KL / tokens + lm_weight * LM / label_count, both summed over tokens.

    Args:
        logits: the student's, s, before the softcap, [chunk, vocab], up to float32.
        scaled_teacher: the teacher's, t / T, before the softcap, [chunk, vocab]; None: no KL.
        labels: int64 [chunk]; negative for tokens without one.
        mask: bool [chunk], false for tokens that the KL ignores; None: use all.
        kl_weight: weight of T^2 * KL.
        lm_weight: weight of LM.
        temperature: T.
        tokens: number of tokens to average KL over.
        label_count: number of labels to average LM over.
        softcap: c if the logits of both models are c tanh(logits / c).

    Returns:
        KL and LM of each token in nats, float32 [chunk]; 0 for masked tokens or without a label.
    """
    chunk, vocab = logits.shape
    kl, lm = (torch.zeros(chunk, dtype=torch.float32, device=logits.device) for _ in range(2))
    teacher = logits if scaled_teacher is None else scaled_teacher
    block = min(BLOCK, triton.next_power_of_2(vocab))
    if not chunk:
        return kl, lm
    with torch.cuda.device_of(logits):
        _kl_lm_kernel[(chunk,)](
            logits,
            teacher,
            labels.contiguous(),
            labels if mask is None else mask.contiguous(),
            kl,
            lm,
            logits.stride(0),
            teacher.stride(0),
            vocab,
            1 / temperature,
            kl_weight * temperature / tokens,
            lm_weight / label_count,
            softcap or 1.0,
            HAS_KL=scaled_teacher is not None,
            HAS_MASK=mask is not None,
            HAS_CAP=softcap is not None,
            BLOCK=block,
            num_warps=8 if block > 1024 else 4,
        )
    return kl, lm


@triton.jit
def _excess(d):
    """e^d - 1 - d. The series is exact to a float32's last digits below 1/2."""
    series = 1 + d / 5 * (1 + d / 6 * (1 + d / 7 * (1 + d / 8)))
    series = 0.5 * d * d * (1 + d / 3 * (1 + d / 4 * series))
    return tl.where(tl.abs(d) < 0.5, series, tl.exp(d) - 1 - d)


@triton.jit
def _tanh(x):
    """tanh(x) = e / (e + 2) with e = e^2x - 1, on the positive side."""
    positive = tl.minimum(tl.abs(x), 10.0)
    e = _excess(2 * positive) + 2 * positive
    return tl.where(x < 0, -1.0, 1.0) * e / (e + 2)


@triton.jit
def _capped(x, cap, HAS_CAP: tl.constexpr):
    if HAS_CAP:
        x = cap * _tanh(x / cap)
    return x


@triton.jit
def _kl_lm_kernel(
    logits,
    teacher,
    labels,
    mask,
    kl,
    lm,
    stride,
    teacher_stride,
    vocab,
    inverse_t,
    kl_factor,
    lm_factor,
    cap,
    HAS_KL: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_CAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    teacher += row * teacher_stride
    label = tl.load(labels + row)
    # Read before any logit is overwritten. The reductions below order this among the threads.
    right = tl.load(logits + tl.maximum(label, 0)).to(tl.float32)
    right = _capped(right, cap, HAS_CAP)
    columns = tl.arange(0, BLOCK)

    s_max = float("-inf")  # of s, for LM; s / T is largest at the same place
    s_total = 0.0
    q_total = 0.0  # of e^(s / T)
    t_max = float("-inf")
    z = 0.0  # of w = e^(t / T)
    mean = 0.0  # of (s - t) / T by w
    excess = 0.0  # R
    d_max = float("-inf")  # of (s - t) / T
    clipped = 0.0
    for start in range(0, vocab, BLOCK):
        inside = start + columns < vocab
        s = tl.load(logits + start + columns, mask=inside, other=0.0).to(tl.float32)
        s = tl.where(inside, _capped(s, cap, HAS_CAP), float("-inf"))
        new_s_max = tl.maximum(s_max, tl.max(s, 0))
        s_total = s_total * tl.exp(s_max - new_s_max) + tl.sum(tl.exp(s - new_s_max), 0)
        if HAS_KL:
            t = tl.load(teacher + start + columns, mask=inside, other=0.0).to(tl.float32)
            t = tl.where(inside, _capped(t, cap * inverse_t, HAS_CAP), float("-inf"))
            q_total *= tl.exp((s_max - new_s_max) * inverse_t)
            q_total += tl.sum(tl.exp((s - new_s_max) * inverse_t), 0)
            block_max = tl.max(t, 0)
            w = tl.exp(t - block_max)
            d = tl.where(inside, s * inverse_t - t, 0.0)
            block_z = tl.sum(w, 0)
            block_mean = tl.sum(w * d, 0) / block_z
            largest = tl.max(tl.where(inside, d, float("-inf")), 0)
            clipped = tl.where(largest - block_mean > LARGEST_EXPONENT, 1.0, clipped)
            d = tl.minimum(d - block_mean, LARGEST_EXPONENT)
            block_excess = tl.sum(w * _excess(d), 0)
            d_max = tl.maximum(d_max, largest)
            # Merge the block with the blocks before it.
            new_t_max = tl.maximum(t_max, block_max)
            before = tl.exp(t_max - new_t_max)
            now = tl.exp(block_max - new_t_max)
            z *= before
            block_z *= now
            gap = (block_mean - mean) / (z + block_z)
            mean += gap * block_z
            # A mean that falls this far leaves a larger d above it, so the row is far.
            move = tl.maximum(gap * block_z, -LARGEST_EXPONENT)
            back = tl.maximum(-gap * z, -LARGEST_EXPONENT)
            excess = excess * before * tl.exp(-move) + z * _excess(-move)
            excess += block_excess * now * tl.exp(-back) + block_z * _excess(-back)
            z += block_z
            t_max = new_t_max
        s_max = new_s_max

    learned = label >= 0
    tl.store(lm + row, tl.where(learned, tl.log(s_total) + s_max - right, 0.0))
    lm_factor = tl.where(learned, lm_factor, 0.0)
    r = 0.0
    far = False
    if HAS_KL:
        used = 1.0
        if HAS_MASK:
            used = tl.load(mask + row).to(tl.float32)
        kl_factor *= used
        far = (d_max - mean > EXPM1_LIMIT) | (clipped > 0)
        r = excess / z
        # log(1 + r) without losing a small r
        small = r * (1 - r / 2 * (1 - r / 1.5 * (1 - r / (4 / 3) * (1 - r / 1.25))))
        near = tl.where(r < 0.03, small, tl.log(1 + r))
        distant = tl.log(q_total) + s_max * inverse_t - tl.log(z) - t_max - mean
        tl.store(kl + row, used * tl.where(far, distant, near))
    for start in range(0, vocab, BLOCK):
        inside = start + columns < vocab
        raw = tl.load(logits + start + columns, mask=inside, other=0.0).to(tl.float32)
        s = _capped(raw, cap, HAS_CAP)
        gradient = lm_factor * tl.exp(s - s_max) / s_total
        gradient -= tl.where(start + columns == label, lm_factor, 0.0)
        if HAS_KL:
            t = tl.load(teacher + start + columns, mask=inside, other=0.0).to(tl.float32)
            t = _capped(t, cap * inverse_t, HAS_CAP)
            p = tl.exp(t - t_max) / z
            if far:
                gradient += kl_factor * (tl.exp((s - s_max) * inverse_t) / q_total - p)
            else:
                d = s * inverse_t - t - mean
                gradient += kl_factor * p * (_excess(d) + d - r) / (1 + r)
        if HAS_CAP:
            gradient *= 1 - (s / cap) * (s / cap)
        tl.store(logits + start + columns, gradient, mask=inside)
