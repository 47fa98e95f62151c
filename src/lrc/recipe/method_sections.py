"""The `method` section of a recipe: one class per method, with that method's own settings.

`method: scratch` is short for `method: {name: scratch}`. The methods themselves are in
`lrc.methods`.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import Field, model_validator

from lrc.recipe.sections import Section

Aggregation = Literal["mean", "l2"]
"""How several scores become one: the mean of their absolute values, or their L2 norm."""


class PrunedShapeSection(Section):
    """Base of the methods that cut the student out of the teacher.

    It sets the student's shape besides `student.hidden_size`. The default is LRC's shape, which
    keeps these sizes of the teacher.
    """

    layers: int | None = Field(None, gt=0)
    """Decoder layers. Empty: the teacher's."""

    kv_heads: int | None = Field(None, gt=0)
    """Key/value heads; each keeps all its query heads. Empty: the teacher's."""

    intermediate_size: int | None = Field(None, gt=0)
    """Neurons of an FFN. Empty: the teacher's."""


class LrcSection(Section):
    """Low-Rank Clone, with its settings in `student`, `initialize` and `objective`."""

    name: Literal["lrc"]


class ScratchSection(Section):
    """A random student of the same shape, trained on LM + KL."""

    name: Literal["scratch"]


class TinyBertSection(Section):
    """Match hidden states, by learned alignment, and attention maps, with LM + KL."""

    name: Literal["tinybert"]

    hidden_weight: float = Field(1.0, ge=0)
    """Weight of the mean squared differences of hidden states."""

    attention_weight: float = Field(1.0, ge=0)
    """Weight of the mean squared differences of attention scores."""


class MiniLmSection(Section):
    """Match relations between tokens in the last layer's attention, with LM."""

    name: Literal["minilm"]

    relation_weight: float = Field(1.0, ge=0)
    """Weight of the divergences of attention distributions and value relations."""


Taylor = Literal["vectorize", "param_first", "param_second", "param_mix"]
"""How LLM-Pruner expands the loss around a weight, named as in its official code."""

Grouping = Literal["sum", "prod", "max", "last"]
"""How LLM-Pruner combines the linear maps of a group."""


class LlmPrunerSection(Section):
    """Remove the teacher's heads and FFN neurons that matter least for the LM loss.

    Without a ratio, the student has as many parameters as LRC's student with
    `student.hidden_size`. The hidden size itself stays the teacher's.
    """

    name: Literal["llm-pruner"]

    ratio: float | None = Field(None, gt=0, lt=1)
    """Share of all parameters, embeddings included, to remove. `student.hidden_size` must then be
    the teacher's. Empty: as many as LRC removes."""

    importance: Taylor = "param_first"
    """Expansion of the loss: first order by weight (`param_first`) or by row (`vectorize`), second
    order (`param_second`), or both orders together (`param_mix`)."""

    grouping: Grouping = "sum"
    """How the importances of a group's linear maps are combined. `last` takes only the map that
    writes to the residual stream."""

    recovery: Literal["full", "lora"] = "full"
    """What training changes afterwards: all weights, or low-rank adapters on the linear maps
    (needs the extra `peft`)."""

    lora_rank: int = Field(8, gt=0)
    """Rank of the adapters."""

    lora_alpha: float = Field(16.0, gt=0)
    """Adapters are scaled by lora_alpha / lora_rank."""

    @model_validator(mode="after")
    def _adapters_of_lora(self) -> "LlmPrunerSection":
        fields = type(self).model_fields
        for name in ("lora_rank", "lora_alpha"):
            if self.recovery != "lora" and getattr(self, name) != fields[name].default:
                raise ValueError(f"{name} goes with recovery: lora")
        return self


class ActivationCloneSection(Section):
    """LRC without projections: a random student that clones activations."""

    name: Literal["activation-clone"]


class MinitronSection(PrunedShapeSection):
    """Keep the parts of the teacher with the largest activations, train on KL."""

    objective: ClassVar[Mapping[str, Any]] = {
        "kl_weight": 1.0,
        "temperature": 1.0,
        "lm_weight": 0.0,
    }
    """Defaults of the recipe's `objective` section with this method: the losses of its paper."""

    name: Literal["minitron"]

    over_tokens: Aggregation = "mean"
    """How the scores of a sequence's tokens are aggregated."""

    over_sequences: Aggregation = "l2"
    """How the scores of sequences are aggregated."""


class SliceGptSection(Section):
    """Keep the leading principal directions of the teacher's residual stream, train on KL + LM."""

    name: Literal["slicegpt"]


class ShearedLlamaSection(PrunedShapeSection):
    """Structured pruning by learned masks, then continued training."""

    name: Literal["sheared-llama"]

    pruning_share: float = Field(0.3, gt=0, lt=1)
    """Share of the training steps that learn the masks; the rest trains what is left."""

    mask_learning_rate: float = Field(1.0, gt=0)
    """Peak learning rate of the masks."""

    multiplier_learning_rate: float = Field(5.0, gt=0)
    """Peak learning rate of the constraints' multipliers."""

    open_at_first: float = Field(0.99, gt=0, lt=1)
    """Probability that a mask is open before training."""

    dynamic_loading: bool = True
    """Reweight the sources of the text after every held-out measurement, by how far the student is
    behind the teacher on each."""


MethodSection = Annotated[
    LrcSection
    | ScratchSection
    | TinyBertSection
    | MiniLmSection
    | ActivationCloneSection
    | LlmPrunerSection
    | MinitronSection
    | SliceGptSection
    | ShearedLlamaSection,
    Field(discriminator="name"),
]

METHOD_SECTIONS: dict[str, type[Section]] = {
    get_args(section.model_fields["name"].annotation)[0]: section
    for section in get_args(get_args(MethodSection)[0])
}
