"""GPUs by name, with the figures that plans need."""

from dataclasses import dataclass

from lrc.system.errors import UserError


@dataclass(frozen=True)
class Gpu:
    """A GPU, from its maker's data sheet."""

    name: str
    memory: float
    """Bytes."""
    bandwidth: float
    """Bytes a second that its memory delivers."""
    peak: float
    """bfloat16 operations a second of dense matrix products, accumulated in float32."""


_GPUS = (
    Gpu("b200", 180e9, 8.0e12, 2250e12),
    Gpu("h200", 141e9, 4.8e12, 989e12),
    Gpu("h100", 80e9, 3.35e12, 989e12),
    Gpu("a100-80gb", 80e9, 2.04e12, 312e12),
    Gpu("a100-40gb", 40e9, 1.56e12, 312e12),
    Gpu("l40s", 48e9, 0.864e12, 362e12),
    Gpu("l4", 24e9, 0.300e12, 121e12),
    Gpu("rtx-5090", 32e9, 1.79e12, 210e12),
    Gpu("rtx-4090", 24e9, 1.01e12, 165e12),
    Gpu("rtx-3090", 24e9, 0.936e12, 71e12),
)

GPUS = {gpu.name: gpu for gpu in _GPUS}


def find_gpu(name: str) -> Gpu:
    """A GPU by its name.

    Raises:
        UserError: if it is unknown; the message lists the known ones.
    """
    found = GPUS.get(name.lower().replace("_", "-"))
    if found is None:
        raise UserError(f"The GPU '{name}' is unknown: choose one of {', '.join(GPUS)}.")
    return found
