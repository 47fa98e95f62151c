"""What a student of a shape costs: files, cache, decoding, training memory and GPU hours.

All figures come from models without weights.
"""

import copy
from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lrc.cloning.cost import step_flops, token_weights
from lrc.exporting.gguf_file import K_BLOCK
from lrc.exporting.gguf_sizes import QUANTIZATIONS, file_bytes, file_types
from lrc.model.families import family_of
from lrc.model.layout import layout_of
from lrc.model.shapes import attention_layers, head_dim_of, layers_differ, parameters_of
from lrc.planning.gpus import Gpu
from lrc.recipe import Recipe
from lrc.system.errors import UserError
from lrc.train.memory import largest_micro_batch, memory_of
from lrc.train.muon import orthogonal_flops, vocabulary_matrices

CACHE_BYTES = 2
"""Bytes of a number in the cache of keys and values: float16 or bfloat16."""

USABLE = 0.9
"""Share of a GPU's memory that a run may fill. The rest is for the allocator and CUDA."""

POINTS = 60
"""Points of a run at which its stage is looked up: what is cloned, and what is trained."""


@dataclass(frozen=True)
class Conditions:
    """Under which conditions figures hold."""

    gpu: Gpu
    gpus: int = 1
    mfu: float = 0.35
    """Share of the peak that training is assumed to reach. It is stated, not measured."""
    context: int = 4096
    """Tokens in the cache while decoding."""


@dataclass(frozen=True)
class Figures:
    """The figures of one model."""

    parameters: int
    file_bytes: dict[str, int]
    """By element type (`QUANTIZATIONS`). Only bf16, without llama.cpp."""
    k_quants: bool
    """Whether llama.cpp can store all matrices as K-quants, with no larger types instead."""
    cache_bytes: int
    """Bytes of keys and values for a token."""
    tokens_per_second: dict[str, float]
    """The bound on decoding one sequence that the memory's bandwidth sets, by element type."""


@dataclass(frozen=True)
class Training:
    """What training one student takes."""

    bytes: int
    """Memory of a GPU with the recipe's micro-batch, as `lrc.train.memory` counts it."""
    micro_batch: int
    """The largest number of sequences in a micro-batch that fits; 0: none."""
    gpu_hours: float
    """Hours of one GPU for all training tokens, by operations and the assumed MFU."""


def figures_of(model: PreTrainedModel, conditions: Conditions) -> Figures:
    """The figures of a model, which needs no weights."""
    files, cache, active = file_sizes(model), cache_bytes(model), active_share(model)
    moved = {kind: size * active + cache * conditions.context for kind, size in files.items()}
    return Figures(
        parameters_of(model),
        files,
        fits_k_quants(model),
        cache,
        {kind: conditions.gpu.bandwidth / size for kind, size in moved.items()},
    )


def training_of(
    teacher: PreTrainedModel, student: PreTrainedModel, recipe: Recipe, conditions: Conditions
) -> Training:
    """What training a student takes on GPUs.

    Args:
        teacher: the teacher, without weights.
        student: the student, without weights.
        recipe: its recipe.
        conditions: GPU and MFU.
    """
    memory = memory_of(recipe, conditions.gpus)
    return Training(
        memory.peak,
        largest_micro_batch(recipe, memory, USABLE * conditions.gpu.memory),
        gpu_hours(teacher, student, recipe, conditions),
    )


def file_sizes(model: PreTrainedModel) -> dict[str, int]:
    """Bytes of a file of a model by element type, as far as llama.cpp runs it."""
    try:
        return {kind: file_bytes(model, kind) for kind in QUANTIZATIONS}
    except UserError:
        return {"bf16": 2 * parameters_of(model)}


def fits_k_quants(model: PreTrainedModel) -> bool:
    """Whether all rows are multiples of 256."""
    try:
        shapes = [shape for shape, _ in file_types(model, "q8_0") if len(shape) > 1]
    except UserError:
        return False
    return all(shape[-1] % K_BLOCK == 0 for shape in shapes)


def cache_bytes(model: PreTrainedModel) -> int:
    """Bytes of keys and values that a token adds to the cache. Layers with a sliding window stop
    adding when it is full. Gated delta nets and Mamba layers add nothing."""
    layout, config = layout_of(model), model.config
    numbers = 0
    for layer in attention_layers(config):
        own = config.per_layer_config[layer] if layers_differ(config) else config
        readers = layout.branches[layer][0].readers
        if "kv_a" in readers:
            numbers += config.kv_lora_rank + config.qk_rope_head_dim
        else:
            numbers += 2 * own.num_key_value_heads * head_dim_of(own)
    return CACHE_BYTES * numbers


def active_share(model: PreTrainedModel) -> float:
    """The share of the parameters that decoding a token reads: all but an embedding that is not the
    head, and experts that do not see the token."""
    total = parameters_of(model)
    unread = 0.0
    if not model.config.tie_word_embeddings:
        unread += model.get_input_embeddings().weight.numel()
    for name, used in token_weights(model).items():
        unread += model.get_parameter(name).numel() - used
    return 1 - unread / total


def gpu_hours(
    teacher: PreTrainedModel, student: PreTrainedModel, recipe: Recipe, conditions: Conditions
) -> float:
    """Hours of one GPU for all training tokens: operations, over the assumed share of the peak."""
    tokens, sequence = recipe.step_tokens(), recipe.data.sequence_length
    clone, layout = recipe.objective.clone, layout_of(student)
    sites = [site for site in layout.observable() if clone.enables(site.name)]
    stages = Counter(
        (recipe.objective.clones_at(share), share >= recipe.train.release_at)
        for share in ((point + 0.5) / POINTS for point in range(POINTS))
    )
    operations, source = 0.0, _source(teacher, student)
    for (clones, released), points in stages.items():
        cloned = sites if clones else []
        parts = step_flops(
            teacher, student, tokens, sequence, recipe.objective, cloned, None, released, source
        )
        operations += sum(parts.values()) * points / POINTS
        if recipe.train.optimizer == "muon":
            matrices = _matrices(student) if released else _projections(teacher, student)
            operations += orthogonal_flops(matrices) * points / POINTS
    return operations * recipe.steps() / (conditions.mfu * conditions.gpu.peak) / 3600


def _source(teacher: PreTrainedModel, student: PreTrainedModel) -> PreTrainedModel:
    """What the student's weights are projected from, without weights: the teacher with the
    student's layers, heads, neurons and experts."""
    config = copy.deepcopy(student.config)
    family_of(config.model_type).set_hidden_size(config, teacher.config.hidden_size)
    with torch.device("meta"):
        return type(student)(config)


def _matrices(model: PreTrainedModel) -> list[Tensor]:
    """All matrices of a model but its embedding and head."""
    tokens = {id(value) for value in vocabulary_matrices(model)}
    return [v for v in model.parameters() if v.ndim > 1 and id(v) not in tokens]


def _projections(teacher: PreTrainedModel, student: PreTrainedModel) -> list[Tensor]:
    """The student's projections [d_T, d_S], without memory."""
    shape = teacher.config.hidden_size, student.config.hidden_size
    return [torch.empty(shape, device="meta") for _ in layout_of(student).projected(student)]
