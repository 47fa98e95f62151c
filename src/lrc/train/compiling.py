"""`train.compile`: the small modules of teacher and student through torch.compile.

Norms and activation functions are what a compiler can fuse here. Whole layers cannot be compiled:
the clone terms hook into their linear maps, and what is left between two of them is attention's own
kernel. Modules are compiled in place, which changes neither parameters' names nor what is exported.
"""

from collections.abc import Iterator

import torch
from torch import nn
from torch._dynamo.exc import TorchDynamoException
from transformers import PreTrainedModel

from lrc.model.families import Family
from lrc.system.errors import UserError

VARIANTS = 64
"""Compiled variants that a class of modules may have, by grad mode, rank and width of what it is
given. Qwen3's norms come to 14; torch would stop at 8."""


def compile_small_modules(model: PreTrainedModel, family: Family) -> None:
    """Compile a model's RMSNorms and activation functions, for any batch and sequence length.

    Args:
        model: a model of the family, changed in place. Compilation happens at its first passes.
        family: where its parts live.
    """
    limits = torch._dynamo.config  # an argument of torch.compile only in late versions
    limits.recompile_limit = max(limits.recompile_limit, VARIANTS)
    for module in small_modules(model, family):
        module.compile(dynamic=True)


def small_modules(model: PreTrainedModel, family: Family) -> Iterator[nn.Module]:
    """Modules of the decoder layers that hold no other and no matrix, and the final norm."""
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
        UserError: that fails.
    """
    try:
        torch.compile(torch.sin)(torch.zeros(2, device=device))
    except TorchDynamoException as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"train.compile is set, but torch.compile fails on this machine ({reason}): install a "
            "C++ compiler, or set train.compile to false."
        ) from error
