"""Hunyuan with experts: the dense model's attention, and experts with a shared one."""

from dataclasses import replace

from lrc.model.families.base import ATTENTION, EXPERTS, ROUTER, Family, always, with_shared

HUNYUAN_V1_MOE = Family(
    "hunyuan_v1_moe",
    gguf="hunyuan-moe",
    numbers_by_layer=("moe_topk", "num_experts", "moe_intermediate_size", "num_shared_expert"),
    branches=always(
        ATTENTION,
        with_shared(
            replace(EXPERTS, readers={**EXPERTS.readers, ROUTER: "mlp.gate.wg"}), "mlp.shared_mlp"
        ),
    ),
)
