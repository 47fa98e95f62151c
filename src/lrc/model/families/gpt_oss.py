"""gpt-oss: attention with sinks, and experts that are stored transposed and have biases."""

from dataclasses import replace

from lrc.model.families.base import ATTENTION, EXPERTS, ROUTER, Experts, Family, always

GPT_OSS = Family(
    "gpt_oss",
    gguf="gpt-oss",
    branches=always(
        ATTENTION,
        replace(
            EXPERTS,
            readers={
                ROUTER: "mlp.router",
                "gate_up": Experts("mlp.experts.gate_up_proj", axis=-2),
            },
            writers={
                "down": Experts("mlp.experts.down_proj", axis=-1, bias="mlp.experts.down_proj_bias")
            },
        ),
    ),
    keeps_documents_apart=False,  # its masks ignore position ids
)
