"""The `method` section of a recipe: one class a method, with that method's own settings.

`method: scratch` is short for `method: {name: scratch}`. The methods themselves are in
`lrc.methods`.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from lrc.sections import Section

Aggregation = Literal["mean", "l2"]
"""How many scores become one: the mean of their absolute values, or their L2 norm."""


class PrunedShapeSection(Section):
    """Base of the methods that cut the student out of the teacher: its shape besides
    `student.hidden_size`. By default it is LRC's, which keeps these sizes of the teacher."""

    layers: int | None = Field(None, gt=0)
    """Decoder layers. Empty: the teacher's."""

    kv_heads: int | None = Field(None, gt=0)
    """Key/value heads; each keeps all its query heads. Empty: the teacher's."""

    intermediate_size: int | None = Field(None, gt=0)
    """Neurons of an FFN. Empty: the teacher's."""


class LrcSection(Section):
    """Low-Rank Clone; its settings are in `student`, `initialise` and `objective`."""

    name: Literal["lrc"]


class ScratchSection(Section):
    """A random student of the same shape, trained on LM + KL."""

    name: Literal["scratch"]


class TinyBertSection(Section):
    """Hidden states by learned alignment and attention maps, with LM + KL."""

    name: Literal["tinybert"]

    hidden_weight: float = Field(1.0, ge=0)
    """Weight of the mean squared differences of hidden states."""

    attention_weight: float = Field(1.0, ge=0)
    """Weight of the mean squared differences of attention scores."""


class MiniLmSection(Section):
    """Relations between tokens in the last layer's attention, with LM."""

    name: Literal["minilm"]

    relation_weight: float = Field(1.0, ge=0)
    """Weight of the divergences of attention distributions and value relations."""


class ActivationCloneSection(Section):
    """LRC without its projections: a random student that clones activations."""

    name: Literal["activation-clone"]


class MinitronSection(PrunedShapeSection):
    """The parts of the teacher with the largest activations, trained on KL."""

    objective: ClassVar[Mapping[str, Any]] = {
        "kl_weight": 1.0,
        "temperature": 1.0,
        "lm_weight": 0.0,
    }
    """Defaults of the recipe's section of that name with this method: its paper's losses."""

    name: Literal["minitron"]

    over_tokens: Aggregation = "mean"
    """How the scores of a sequence's tokens are aggregated."""

    over_sequences: Aggregation = "l2"
    """How the scores of sequences are aggregated."""


class SliceGptSection(Section):
    """The leading principal directions of the teacher's residual stream, trained on KL + LM."""

    name: Literal["slicegpt"]


class ShearedLlamaSection(PrunedShapeSection):
    """Structured pruning by learned masks, then continued training."""

    name: Literal["sheared-llama"]

    pruning_share: float = Field(0.3, gt=0, lt=1)
    """Share of the training steps in which masks are learned; the rest trains what is left."""

    mask_learning_rate: float = Field(1.0, gt=0)
    """Peak learning rate of the masks."""

    multiplier_learning_rate: float = Field(5.0, gt=0)
    """Peak learning rate of the constraints' multipliers."""

    open_at_first: float = Field(0.99, gt=0, lt=1)
    """Probability that a mask is open before training."""

    dynamic_loading: bool = True
    """Weigh the sources of the text after every held-out measurement, by how far the student is
    behind the teacher on each."""


MethodSection = Annotated[
    LrcSection
    | ScratchSection
    | TinyBertSection
    | MiniLmSection
    | ActivationCloneSection
    | MinitronSection
    | SliceGptSection
    | ShearedLlamaSection,
    Field(discriminator="name"),
]

METHOD_SECTIONS: dict[str, type[Section]] = {
    "lrc": LrcSection,
    "scratch": ScratchSection,
    "tinybert": TinyBertSection,
    "minilm": MiniLmSection,
    "activation-clone": ActivationCloneSection,
    "minitron": MinitronSection,
    "slicegpt": SliceGptSection,
    "sheared-llama": ShearedLlamaSection,
}
