"""liger-kernel's RMSNorm, gated FFNs and rotary embedding in a model, by its own apply functions.

They are exact for the clone terms, which hook the linear maps around them, with two exceptions that
are dealt with here:

* liger-kernel rotates queries and keys in place. The teacher's are kept for the clone terms as they
  were before, so this rotates copies.
* It also replaces classes and functions of transformers' modules, for all models of the process,
  whatever their device. Here only the given model changes.
"""

import inspect
import logging
import sys
from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from lrc.system.installed import is_installed

ROTARY = "apply_rotary_pos_emb"

FAMILIES = frozenset(
    {
        "exaone4",
        "gemma",
        "gemma2",
        "gemma3_text",
        "gemma4_text",
        "glm4",
        "gpt_oss",
        "granite",
        "hunyuan_v1_dense",
        "llama",
        "ministral",
        "mistral",
        "olmo2",
        "olmo3",
        "phi3",
        "qwen2",
        "qwen3",
        "qwen3_5_text",
        "smollm3",
    }
)
"""Model types whose losses and gradients are tested to stay the same. liger-kernel has others, with
kernels for experts that only a GPU runs."""


def apply_liger(*models: PreTrainedModel) -> str | None:
    """Let models of one of the `FAMILIES`, up to float32, run liger-kernel's modules from now on.

    Returns:
        A note for the user if they stay as they are.
    """
    kind = models[0].config.model_type
    if kind not in FAMILIES:
        return f"liger-kernel is not used: it is not tested with {kind} models."
    if not is_installed("liger_kernel"):
        return (
            "liger-kernel is not installed, so norms, FFNs and rotary embedding run in plain "
            "torch: `pip install 'low-rank-clone[cuda]'` makes them faster."
        )
    # It warns of each of its kernels for other hardware.
    logging.getLogger("liger_kernel.backends.registry").setLevel(logging.ERROR)
    for model in models:
        if model.dtype.itemsize <= 4:
            _apply(model)
    return None


def _apply(model: PreTrainedModel) -> None:
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    names = vars(sys.modules[type(model).__module__])
    before = dict(names)
    try:
        MODEL_TYPE_TO_APPLY_LIGER_FN[model.config.model_type](
            cross_entropy=False, fused_linear_cross_entropy=False, model=model
        )
        rotary = names[ROTARY]
    finally:
        names.update(before)
    if rotary is not names[ROTARY]:
        for module in model.modules():
            _rotate_by(module, rotary)


def _rotate_by(module: Any, rotary: Callable[..., tuple[Tensor, Tensor]]) -> None:
    """Let an attention module rotate copies of its queries and keys by another function."""
    forward = inspect.unwrap(type(module).forward)
    if ROTARY not in forward.__code__.co_names:
        return

    def on_copies(q: Tensor, k: Tensor, *rest: Any, **named: Any) -> tuple[Tensor, Tensor]:
        return rotary(q.clone(), k.clone(), *rest, **named)

    names = {**forward.__globals__, ROTARY: on_copies}
    own = FunctionType(
        forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__
    )
    own.__kwdefaults__ = forward.__kwdefaults__
    module.forward = MethodType(own, module)
