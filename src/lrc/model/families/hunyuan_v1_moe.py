"""Hunyuan with experts: the dense model's attention, and experts with a shared one."""

from dataclasses import replace
from typing import Any

from lrc.model.families.base import ATTENTION, EXPERTS, ROUTER, Family, always, with_shared


def unsupported(config: Any) -> str | None:
    """Numbers of experts that differ between layers, of which none can be read."""
    by_layer = isinstance(config.moe_topk, list) or isinstance(config.num_experts, list)
    return "other numbers of experts in every layer" if by_layer else None


HUNYUAN_V1_MOE = Family(
    "hunyuan_v1_moe",
    gguf="hunyuan-moe",
    unsupported=unsupported,
    branches=always(
        ATTENTION,
        with_shared(
            replace(EXPERTS, readers={**EXPERTS.readers, ROUTER: "mlp.gate.wg"}), "mlp.shared_mlp"
        ),
    ),
)
