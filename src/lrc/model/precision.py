"""Arithmetic that needs at least float32, whatever the element type of a model's weights."""

import torch
from torch import Tensor


def upcast_dtype(tensor: Tensor) -> torch.dtype:
    """The tensor's element type, or float32 if that is wider."""
    return torch.promote_types(tensor.dtype, torch.float32)


def upcast(tensor: Tensor) -> Tensor:
    """Convert a tensor to at least float32, for large-vocabulary softmax and long sums."""
    return tensor.to(upcast_dtype(tensor))
