"""Triton kernels for the passes over memory that dominate a step on CUDA, behind `train.kernels`.

`vocabulary` has KL + LM, `clone` the clone term, `liger` the modules that liger-kernel replaces.
Today's torch code is their reference, and the only way on CPUs. Nothing imports triton or
liger-kernel (`pip install 'low-rank-clone[cuda]'`) before `use_triton` says so.
"""

import torch

from lrc.recipe.sections import Kernels
from lrc.system.errors import UserError
from lrc.system.installed import is_installed


def use_triton(kernels: Kernels, device: torch.device) -> bool:
    """Whether a recipe's `train.kernels` means the Triton kernels on a device.

    Raises:
        UserError: if it asks for them where they cannot run.
    """
    if kernels == "torch" or (kernels == "auto" and device.type != "cuda"):
        return False
    if not is_installed("triton"):
        if kernels == "auto":
            return False
        raise UserError(
            "train.kernels is triton, which is not installed: run "
            "`pip install 'low-rank-clone[cuda]'`, or set it to auto."
        )
    if device.type != "cuda" and not _interprets():
        raise UserError(
            f"train.kernels is triton, which needs a CUDA device instead of {device.type}: "
            "set it to auto."
        )
    return True


def _interprets() -> bool:
    """Whether Triton's interpreter runs kernels on the CPU (TRITON_INTERPRET=1)."""
    from triton import knobs

    return bool(knobs.runtime.interpret)
