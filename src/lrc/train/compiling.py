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

from lrc.model.families import Family
from lrc.system.errors import UserError

VARIANTS = 64
"""Largest number of compiled variants of a module class, by grad mode and by rank and width of the
input. Qwen3's norms need 14; torch's default limit is 8."""


def compile_small_modules(model: PreTrainedModel, family: Family) -> None:
    """Compile a model's RMSNorms and activation functions, for any batch and sequence length.

    Args:
        model: a model of the family, changed in place. It compiles during its first passes.
        family: the paths of its parts.
    """
    limits = torch._dynamo.config  # only recent versions have an argument for it
    limits.recompile_limit = max(limits.recompile_limit, VARIANTS)
    for module in small_modules(model, family):
        module.compile(dynamic=True)


def small_modules(model: PreTrainedModel, family: Family) -> Iterator[nn.Module]:
    """The final norm, and the leaf modules of the decoder layers that are not linear maps."""
    layers = model.get_submodule(family.layers)
    linears = tuple(f"{name}." for name in family.linears.values())  # and adapters inside them
    for path, module in layers.named_modules():
        linear = f"{path.partition('.')[2]}.".startswith(linears)
        if not linear and next(module.children(), None) is None:
            yield module
    yield model.get_submodule(family.final_norm)


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
