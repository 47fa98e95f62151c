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

from lrc.errors import UserError
from lrc.families import Family


def compile_small_modules(model: PreTrainedModel, family: Family) -> None:
    """Compile a model's RMSNorms and activation functions, for any batch and sequence length.

    Args:
        model: a model of the family, changed in place. Compilation happens at its first passes.
        family: where its parts live.

    Raises:
        UserError: torch.compile does not work on this machine.
    """
    check_compiler(model.device)
    for module in small_modules(model, family):
        module.compile(dynamic=True)


def small_modules(model: PreTrainedModel, family: Family) -> Iterator[nn.Module]:
    """Modules of the decoder layers that hold no other and no matrix, and the final norm."""
    layers = model.get_submodule(family.layers)
    for path, module in layers.named_modules():
        linear = path.partition(".")[2] in family.linears.values()
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
