"""Nemotron-H and Nemotron 3: every layer is one branch, which is Mamba 2, attention, an FFN without
a gate or experts without one."""

from typing import Any

from lrc.model.families.base import ROUTER, Branch, Experts, Family, LinearMap

NORM = "norm"
BLOCK = "mixer"

MAMBA = Branch(BLOCK, {"in_proj": "mixer.in_proj"}, {"o": "mixer.out_proj"}, NORM)
ATTENTION = Branch(
    BLOCK, {name: f"mixer.{name}_proj" for name in "qkv"}, {"o": "mixer.o_proj"}, NORM
)
FFN = Branch(BLOCK, {"up": "mixer.up_proj"}, {"down": "mixer.down_proj"}, NORM)


def experts(config: Any) -> Branch:
    """The experts, which read the stream itself or a narrow latent of it."""
    shared = "mixer.shared_experts"
    reader: dict[str, LinearMap] = {"up": Experts("mixer.experts.up_proj", axis=-1)}
    writer: dict[str, LinearMap] = {"down": Experts("mixer.experts.down_proj", axis=-2)}
    if config.moe_latent_size is not None:
        reader = {"latent_in": "mixer.fc1_latent_proj"}
        writer = {"latent_out": "mixer.fc2_latent_proj"}
    return Branch(
        BLOCK,
        {ROUTER: "mixer.gate", **reader, "shared_up": f"{shared}.up_proj"},
        {**writer, "shared_down": f"{shared}.down_proj"},
        NORM,
    )


def branches(config: Any, layer: int) -> tuple[Branch]:
    """The branch of a layer."""
    kinds = {"linear_attention": MAMBA, "full_attention": ATTENTION, "mlp": FFN}
    kind = config.layer_types[layer]
    return (experts(config) if kind == "moe" else kinds[kind],)


NEMOTRON_H = Family(
    "nemotron_h",
    gguf="nemotron_h",
    branches=branches,
    embedding="model.embeddings",
    final_norm="model.norm_f",
    norm_eps="layer_norm_epsilon",
    unsupported=lambda config: (
        "tied embeddings, which its class ignores" if config.tie_word_embeddings else None
    ),
    keeps_documents_apart=False,
)
