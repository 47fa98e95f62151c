"""`train.compile`: run the small modules of teacher and student through torch.compile.

Norms and activation functions are what a compiler can fuse here. Whole layers cannot be compiled,
because the clone terms hook into their linear maps, and the rest of attention is a single kernel.
Modules are compiled in place. This changes neither parameter names nor the export.
"""

from collections.abc import Iterator

import torch
from torch import nn
from torch._dynamo.exc import TorchDynamoException
from transformers import PreTrainedModel

from lrc.model.layout import layout_of
from lrc.system.errors import UserError

VARIANTS = 64
"""Largest number of compiled variants of a module class, by grad mode and by rank and width of the
input. Qwen3's norms need 14; torch's default limit is 8."""


def compile_small_modules(model: PreTrainedModel) -> None:
    """Compile a model's RMSNorms and activation functions, for any batch and sequence length.

    Args:
        model: the model, changed in place. It compiles during its first passes.
    """
    limits = torch._dynamo.config  # only recent versions have an argument for it
    limits.recompile_limit = max(limits.recompile_limit, VARIANTS)
    for module in small_modules(model):
        module.compile(dynamic=True)


def small_modules(model: PreTrainedModel) -> Iterator[nn.Module]:
    """The final norm, and the leaf modules of the decoder layers that are not linear maps."""
    layout = layout_of(model)
    linears = tuple(f"{layout.linear(site)}." for site in layout.sites())  # and adapters inside
    for path, module in model.named_modules():
        inside = path.startswith(f"{layout.family.layers}.")
        linear = f"{path}.".startswith(linears)
        if inside and not linear and next(module.children(), None) is None:
            yield module
    yield model.get_submodule(layout.family.final_norm)


def check_compiler(device: torch.device) -> None:
    """Compile and run a trivial function.

    Raises:
        UserError: if that fails.
    """
    try:
        torch.compile(torch.sin)(torch.zeros(2, device=device))
    except TorchDynamoException as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"train.compile is set, but torch.compile fails on this machine ({reason}). Install a "
            "C++ compiler, or set train.compile to false."
        ) from error
