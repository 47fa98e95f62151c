"""A family's description: the branches of its decoder layers, and its quirks.

A decoder layer adds the output of each of its branches to the residual stream x:

    x <- x + scale * after(block(norm(x)))

`norm` or `after` may be absent, and the scale is 1 in most families. The linear maps inside a block
that read norm(x) are its readers, those that write its output are its writers. Only they have an
axis as long as the hidden size, so only they are projected.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Experts:
    """The stacked weights of a layer's experts, one parameter. All experts share a projection."""

    path: str
    """Path of the parameter, relative to the layer."""

    axis: int
    """Its axis as long as the hidden size, -1 or -2."""

    bias: str | None = None
    """Path of a writer's bias, [experts, hidden size]."""

    @property
    def module(self) -> str:
        """Path of the module that the parameter belongs to."""
        return self.path.rpartition(".")[0]


LinearMap = str | Experts
"""A linear map's module path, relative to the layer, or its experts."""


def module_of(linear: LinearMap) -> str:
    """Path of the module of a linear map, relative to the layer."""
    return linear.module if isinstance(linear, Experts) else linear


@dataclass(frozen=True)
class Branch:
    """A branch of a decoder layer. All paths are relative to the layer."""

    block: str
    """Path of the module that maps norm(x) to what is added to x."""

    readers: Mapping[str, LinearMap]
    """The linear maps that read norm(x), by name."""

    writers: Mapping[str, LinearMap]
    """The linear maps that write the block's output, by name."""

    norm: str | None
    """Path of the RMSNorm before the block; None: the block reads x."""

    after: str | None = None
    """Path of an RMSNorm after the block."""

    input_scale: float = 1.0
    """Factor of norm(x) before the block."""

    output_scale: float = 1.0
    """Factor of the block's output."""

    writer_scale: float = 1.0
    """Factor of its writer's output inside the block."""

    other: "Branch | None" = None
    """A second block that reads norm(x), and whose output is added to the first one's. The readers
    and writers of both are this branch's."""

    @property
    def linears(self) -> dict[str, LinearMap]:
        """Readers and writers."""
        return {**self.readers, **self.writers}

    @property
    def has_experts(self) -> bool:
        """Whether some linear maps are stacked experts."""
        return any(isinstance(linear, Experts) for linear in self.linears.values())


def side_by_side(branch: Branch, other: Branch) -> Branch:
    """A branch of two blocks, which read the same norm(x) and whose outputs are added."""
    return replace(
        branch,
        readers={**branch.readers, **other.readers},
        writers={**branch.writers, **other.writers},
        other=other,
    )


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


def latent_attention(config: Any) -> Branch:
    """Multi-head latent attention, which reads the stream through two narrow linear maps."""
    query = {"q": "self_attn.q_proj"}
    if config.q_lora_rank is not None:
        query = {"q_a": "self_attn.q_a_proj"}
    return replace(ATTENTION, readers={**query, "kv_a": "self_attn.kv_a_proj_with_mqa"})


ROUTER = "router"
"""The name of the linear map whose outputs choose the experts, one for each."""

EXPERTS = Branch(
    "mlp",
    {ROUTER: "mlp.gate", "gate_up": Experts("mlp.experts.gate_up_proj", axis=-1)},
    {"down": Experts("mlp.experts.down_proj", axis=-2)},
    FFN.norm,
)
"""A mixture of experts."""


def with_shared(branch: Branch, path: str, router: str | None = None) -> Branch:
    """A mixture of experts beside an FFN that sees every token.

    Args:
        branch: the mixture.
        path: path of the FFN.
        router: path of the linear map that weighs its output, if there is one.
    """
    readers = {"shared_gate": f"{path}.gate_proj", "shared_up": f"{path}.up_proj"}
    weigher = {} if router is None else {"shared_router": router}
    return replace(
        branch,
        readers={**branch.readers, **readers, **weigher},
        writers={**branch.writers, "shared_down": f"{path}.down_proj"},
    )


def llama_branches(_config: Any, _layer: int) -> tuple[Branch, ...]:
    """The branches of Llama's layers."""
    return ATTENTION, FFN


Branches = Callable[[Any, int], tuple[Branch, ...]]
"""The branches of a layer, in their order, from the model's configuration and the layer's index."""


LINEAR = "linear_attention"
"""The kind of a layer with a delta net or Mamba, in a configuration's `layer_types`."""


def is_linear(config: Any, layer: int) -> bool:
    """Whether a layer of a hybrid has a delta net or Mamba."""
    return bool(config.layer_types[layer] == LINEAR)


def always(*branches: Branch) -> Branches:
    """The same branches in every layer."""
    return lambda _config, _layer: branches


def one(_config: Any) -> float:
    """The scale of families that do not scale."""
    return 1.0


def softcap(config: Any) -> float | None:
    """The bound of the logits, as Gemma's configurations name it."""
    return getattr(config, "final_logit_softcapping", None)


def only_hidden_size(config: Any, size: int) -> None:
    """Set the hidden size where no other setting depends on it."""
    config.hidden_size = size


@dataclass(frozen=True)
class Family:
    """Where the parts of a model of one `model_type` are; by default, Llama's layout.

    Names are module paths below the `...ForCausalLM` model, without the trailing `.weight`.
    """

    model_type: str
    """`config.model_type` of the teachers that this family describes."""

    branches: Branches = llama_branches
    """The branches of a layer."""

    embedding: str = "model.embed_tokens"
    layers: str = "model.layers"
    final_norm: str = "model.norm"
    head: str = "lm_head"

    gain_offset: float = 0.0
    """What the norm adds to its stored weight to get the gain (1 if the weight is stored around
    zero, as in Gemma)."""

    norm_eps: str = "rms_norm_eps"
    """The norms' epsilon in the configuration."""

    embedding_scale: Callable[[Any], float] = one
    """Factor of the embedding, from the configuration."""

    residual_scale: Callable[[Any], float] = one
    """Factor of what a branch adds to the residual stream, from the configuration."""

    layer_scale: str | None = None
    """Name of a layer's buffer by which it multiplies the stream at its end."""

    logit_scale: Callable[[Any], float] = one
    """Factor of the logits, from the configuration."""

    logit_softcap: Callable[[Any], float | None] = softcap
    """c if the logits are c tanh(logits / c), from the configuration; None if they are not."""

    needs_bos: bool = False
    """Whether the models fail on sequences that do not start with BOS. Every training sequence then
    does, wherever its text was cut."""

    keeps_documents_apart: bool = True
    """Whether the model, given position ids that restart, computes packed documents as if each
    were alone."""

    neurons: str | None = "intermediate_size"
    """The number of neurons of a dense FFN in the configuration; None: it has no such setting."""

    hidden_sizes: Callable[[Any], list[int] | None] = lambda _config: None
    """The hidden sizes that a configuration can have, in ascending order, because its Mamba layers
    are a whole multiple as wide; None: any."""

    set_hidden_size: Callable[[Any, int], None] = only_hidden_size
    """Give a configuration another hidden size, and change nothing else of the model."""

    divides_by_heads: bool = False
    """Whether the family's config refuses a hidden size that is not a multiple of the number of
    attention heads, even if head_dim is explicit."""

    gguf: str | None = None
    """llama.cpp's architecture name, for GGUF files; None: none can be written."""

    numbers_by_layer: tuple[str, ...] = ()
    """Settings that may have a number for each layer, in models whose layers all have the same."""

    unsupported: Callable[[Any], str | None] = lambda _config: None
    """What a configuration has that cannot be cloned, as the end of a sentence; None: nothing."""

    vllm: bool | None = None
    """Whether vLLM's own class for this family takes an explicit head_dim; None: not checked."""
