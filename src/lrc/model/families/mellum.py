"""Mellum 2: attention with norms on q and k inside it, and experts in most layers."""

from lrc.model.families.base import ATTENTION, EXPERTS, FFN, Family

FFNS = {"dense": FFN, "sparse": EXPERTS}

MELLUM = Family(
    "mellum", branches=lambda config, layer: (ATTENTION, FFNS[config.mlp_layer_types[layer]])
)
