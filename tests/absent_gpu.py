"""A GPU that does not exist, and a note of every place where the CPU would wait for it.

Tensors on the meta device have shapes but no values, so the code does what it does on a GPU. A
dispatch mode sees every operation, including those of the backward pass and of transformers, and
notes those for which CUDA makes the CPU wait.
"""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lrc
from lrc.model import teacher
from lrc.train import setup
from lrc.train.muon import Muon

ABSENT = torch.device("meta")

NEEDS_VALUES = ("nonzero", "masked_select", "equal", "bincount", "repeat_interleave")
NEEDS_VALUES += ("_unique2", "unique_consecutive", "unique_dim", "median", "nanmedian")
"""Operations whose result the CPU reads, or whose size depends on values. Medians along a dimension
do not wait."""

MASKS = (torch.bool, torch.uint8)


class Waits(TorchDispatchMode):
    """Notes in `places` where the CPU would wait. The values that it gets there are 0.5 or 1.

    Raises:
        AssertionError: where the result has no shape without the values.
    """

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        absent = any(isinstance(t, Tensor) and t.is_meta for t in tree_leaves((args, kwargs)))
        if name == "_to_copy" and self._crosses(args[0], kwargs.get("device"), kwargs):
            self._note(name)
            if args[0].is_meta:
                return torch.full(args[0].shape, 0.5, dtype=kwargs.get("dtype") or args[0].dtype)
        elif name == "copy_" and self._crosses(args[1], args[0].device, kwargs, *args[2:]):
            self._note(name)
        elif name == "_local_scalar_dense" and absent:
            self._note(name)
            return 0.5 if args[0].is_floating_point() else 1
        elif absent and self._needs_values(name, func._overloadname, args):
            self._note(name)
            raise AssertionError(f"{self.places[-1]} waits for the GPU")
        return func(*args, **kwargs)

    @staticmethod
    def _needs_values(name: str, overload: str, args: Any) -> bool:
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            masked = any(index is not None and index.dtype in MASKS for index in args[1])
            return masked and (name == "index" or args[2].numel() > 1)
        return name in NEEDS_VALUES and overload not in ("dim", "self_int")

    @staticmethod
    def _crosses(
        source: Tensor, to: torch.device | None, kwargs: dict[str, Any], *rest: bool
    ) -> bool:
        """Whether a copy goes to or from the GPU, and is waited for."""
        crosses = to is not None and source.is_meta != (to.type == ABSENT.type)
        return crosses and not (kwargs.get("non_blocking") or any(rest))

    def _note(self, name: str) -> None:
        root = Path(lrc.__file__).parent
        ours = [f for f in traceback.extract_stack() if Path(f.filename).is_relative_to(root)]
        where = f"{Path(ours[-1].filename).relative_to(root)}:{ours[-1].lineno}" if ours else "?"
        self.places.append(f"{name} at {where}")


class _NoKernel:
    """A Triton kernel whose launch does nothing."""

    def __getitem__(self, _programs: object) -> Any:
        return lambda *_, **__: None


@contextmanager
def an_absent_gpu() -> Iterator[None]:
    """Let autocast, AdamW, teachers and Triton accept the device."""
    autocast, adamw = torch.autocast, torch.optim.AdamW
    enabled = torch.is_autocast_enabled

    def fused_nowhere(*groups: Any, fused: bool, **named: Any) -> torch.optim.Optimizer:
        assert fused  # torch's own, which does not wait
        return adamw(*groups, capturable=False, **named)

    def muon(*groups: Any, fused: bool, **named: Any) -> torch.optim.Optimizer:
        assert fused
        return Muon(*groups, capturable=False, **named)

    make = torch.tensor
    with torch.device("cpu"):  # torch lists its constructors once, which must be its own
        torch.empty(0)

    def made_on_the_cpu(data: Any, *, device: Any = None, **named: Any) -> Tensor:
        return make(data, **named).to(device)  # as CUDA does it, which the meta device hides

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "tensor", made_on_the_cpu)
        patch.setattr(torch, "autocast", lambda kind, *a, **k: autocast("cpu", *a, **k))
        patch.setattr(torch, "is_autocast_enabled", lambda kind: kind != "meta" and enabled(kind))
        patch.setattr(torch.optim, "AdamW", fused_nowhere)
        patch.setattr(setup, "Muon", muon)
        patch.setattr(
            teacher, "load_offloaded_parameter", lambda model, name: model.get_parameter(name)
        )
        try:
            from lrc.cloning.kernels import clipping, clone, vocabulary
        except ImportError:
            pass
        else:
            patch.setattr(vocabulary, "_kl_lm_kernel", _NoKernel())
            for name in ("_clone_forward", "_clone_backward", "_weights_and_loss"):
                patch.setattr(clone, name, _NoKernel())
            for name in ("_token_norms", "_clip_factors", "_scale_tokens"):
                patch.setattr(clipping, name, _NoKernel())
        yield
