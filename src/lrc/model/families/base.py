"""The family adapter, and the layout that most families share."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

READERS = ("q", "k", "v", "gate", "up")
"""Linear maps that read the residual stream. Their input side is projected."""

WRITERS = ("o", "down")
"""Linear maps that write to the residual stream. Their output side is projected."""

LINEARS = ("q", "k", "v", "o", "gate", "up", "down")


@dataclass(frozen=True)
class Family:
    """Where the parts of a model of one `model_type` are; by default, Llama's layout.

    Names are module paths below the `...ForCausalLM` model, without the trailing `.weight`. Names
    in `linears` and `norms` are relative to a decoder layer.
    """

    model_type: str
    """`config.model_type` of the teachers that this family describes."""

    embedding: str = "model.embed_tokens"
    layers: str = "model.layers"
    final_norm: str = "model.norm"
    head: str = "lm_head"

    linears: Mapping[str, str] = field(
        default_factory=lambda: MappingProxyType(
            {
                "q": "self_attn.q_proj",
                "k": "self_attn.k_proj",
                "v": "self_attn.v_proj",
                "o": "self_attn.o_proj",
                "gate": "mlp.gate_proj",
                "up": "mlp.up_proj",
                "down": "mlp.down_proj",
            }
        )
    )
    """The seven projected linear maps of a layer. `o` produces the attention block's output, and
    `down` the FFN's."""

    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    """Every RMSNorm of a layer that is as wide as the hidden size. The student trains its own."""

    attention_norm: str = "input_layernorm"
    """The norm that q, k and v read."""

    ffn_norm: str = "post_attention_layernorm"
    """The norm that gate and up read."""

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

    def linear(self, layer: int, name: str) -> str:
        """Module path of linear map `name` (one of `LINEARS`) in layer `layer`."""
        return f"{self.layers}.{layer}.{self.linears[name]}"

    def attention(self, layer: int) -> str:
        """Module path of the attention block of layer `layer`."""
        return self.linear(layer, "o").rpartition(".")[0]

    def norm_read_by(self, layer: int, name: str) -> str:
        """Module path of the norm whose output the reader `name` reads in layer `layer`."""
        norm = self.attention_norm if name in ("q", "k", "v") else self.ffn_norm
        return f"{self.layers}.{layer}.{norm}"

    def stream_norms(self, num_layers: int) -> Iterator[str]:
        """Module paths of all norms that are as wide as the hidden size, the final one last."""
        for layer in range(num_layers):
            for norm in self.norms:
                yield f"{self.layers}.{layer}.{norm}"
        yield self.final_norm
