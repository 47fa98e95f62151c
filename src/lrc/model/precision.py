"""The precision of computations: at least float32 for long sums, less where it is enough."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def upcast_dtype(tensor: Tensor) -> torch.dtype:
    """The tensor's element type, or float32 if that is wider."""
    return torch.promote_types(tensor.dtype, torch.float32)


def upcast(tensor: Tensor) -> Tensor:
    """Convert a tensor to at least float32, for large-vocabulary softmax and long sums."""
    return tensor.to(upcast_dtype(tensor))


def store_parameters_as(model: nn.Module, dtype: torch.dtype) -> None:
    """Convert a model's parameters alone: buffers, such as rotary frequencies and the bias of a
    router, have the element type that they need."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def forward_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The element type of the forward passes' products.

    Args:
        precision: as in the recipe's `train`.
        device: where they run.
    """
    if precision == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    dtype: torch.dtype = getattr(torch, precision)
    return dtype


def product_dtype(tensor: Tensor) -> torch.dtype:
    """The element type in which products with a tensor are computed: autocast's, or its own."""
    device = tensor.device.type
    low = torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if low else tensor.dtype


@contextmanager
def tf32_products(enabled: bool) -> Iterator[None]:
    """Let CUDA compute float32 products in TF32 while the context is open."""
    settings = torch.backends.cuda.matmul
    before = settings.allow_tf32
    settings.allow_tf32 = before or enabled
    try:
        yield
    finally:
        settings.allow_tf32 = before
