"""A family's description: the branches of its decoder layers, and its quirks.

A decoder layer adds the output of each of its branches to the residual stream x:

    x <- x + after(block(norm(x)))

The linear maps inside a block that read norm(x) are its readers, those that write its output are
its writers. Only they have an axis as long as the hidden size, so only they are projected.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Branch:
    """A branch of a decoder layer. All paths are relative to the layer."""

    block: str
    """Path of the module that maps norm(x) to what is added to x."""

    readers: Mapping[str, str]
    """Module paths, by name, of the linear maps that read norm(x)."""

    writers: Mapping[str, str]
    """Module paths, by name, of the linear maps that write the block's output."""

    norm: str
    """Path of the RMSNorm before the block."""


ATTENTION = Branch(
    "self_attn",
    {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj"},
    {"o": "self_attn.o_proj"},
    "input_layernorm",
)
FFN = Branch(
    "mlp",
    {"gate": "mlp.gate_proj", "up": "mlp.up_proj"},
    {"down": "mlp.down_proj"},
    "post_attention_layernorm",
)


def llama_branches(_config: Any, _layer: int) -> tuple[Branch, ...]:
    """The branches of Llama's layers."""
    return ATTENTION, FFN


@dataclass(frozen=True)
class Family:
    """Where the parts of a model of one `model_type` are; by default, Llama's layout.

    Names are module paths below the `...ForCausalLM` model, without the trailing `.weight`.
    """

    model_type: str
    """`config.model_type` of the teachers that this family describes."""

    branches: Callable[[Any, int], tuple[Branch, ...]] = llama_branches
    """The branches of a layer, in their order, from the model's configuration and the layer's
    index."""

    embedding: str = "model.embed_tokens"
    layers: str = "model.layers"
    final_norm: str = "model.norm"
    head: str = "lm_head"

    gain_offset: float = 0.0
    """What the norm adds to its stored weight to get the gain (1 if the weight is stored around
    zero, as in Gemma)."""

    divides_by_heads: bool = False
    """Whether the family's config refuses a hidden size that is not a multiple of the number of
    attention heads, even if head_dim is explicit."""

    gguf: str | None = None
    """llama.cpp's architecture name, for GGUF files; None if none fits."""

    gguf_neighbors: bool = False
    """Whether llama.cpp rotates neighboring rows of q and k together in this architecture.
    transformers rotates row i of a head with row i + head_dim / 2."""
