"""Arithmetic that needs float32 at least, whatever the element type of a model's weights."""

import torch
from torch import Tensor


def upcast_dtype(tensor: Tensor) -> torch.dtype:
    """The tensor's element type, or float32 where that is wider."""
    return torch.promote_types(tensor.dtype, torch.float32)


def upcast(tensor: Tensor) -> Tensor:
    """A tensor in float32 at least: softmax over a large vocabulary and long sums need it."""
    return tensor.to(upcast_dtype(tensor))
