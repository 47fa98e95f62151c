"""Tiny random teachers of every family, batches, and the formulas of the student's weights.

Everything is float64, so tests can require equality to a dozen digits. All widths differ:
head_dim is not hidden / heads, the tokenizer has fewer tokens than the embedding has rows, and
keys and values have fewer heads than queries.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast

from lrc.cloning.low_rank_clone import LowRankClone
from lrc.cloning.projection import Projections
from lrc.cloning.start import initialize
from lrc.cloning.start.random import random_start
from lrc.data.batch import Batch
from lrc.model.families import FAMILIES
from lrc.model.teacher import Teacher, as_teacher
from lrc.recipe.sections import InitializeSection, ObjectiveSection, StudentSection
from lrc.train.batches import count

HIDDEN, STUDENT_HIDDEN = 16, 8
LAYERS, HEADS, KV_HEADS, HEAD_DIM, FFN = 2, 2, 1, 6, 20
ROWS, TOKENS = 37, 33
"""Rows of the embedding, and tokens in use."""

SHAPE = {
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "vocab_size": ROWS,
    "max_position_embeddings": 64,
}

WIDE: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
}
"""Sizes of a Llama that leave room for students of many shapes."""

UNTIED = ("nemotron_h",)
"""Families whose embedding is never the head. Their teachers are untied even where a test asks for
tied ones."""

DROPOUTS = {
    "phi3": ("attention_dropout", "resid_pdrop", "embd_pdrop"),
    "seed_oss": ("attention_dropout", "residual_dropout"),
}
"""Settings for dropout in a family's configuration, if there are more than attention_dropout."""

LLAMAS = ("llama", "mistral", "qwen2", "qwen3")
"""Families whose layers are Llama's, as the formulas below have them."""

KINDS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 5}
GRANITE = {
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.4,
    "logits_scaling": 2.0,
    "attention_multiplier": 0.3,
}
DELTA_NET = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 4,
    "linear_value_head_dim": 3,
    "linear_conv_kernel_dim": 3,
    "head_dim": 8,
}
LATENT = {
    "q_lora_rank": 6,
    "kv_lora_rank": 5,
    "qk_nope_head_dim": 5,
    "qk_rope_head_dim": 4,
    "v_head_dim": 3,
    "num_key_value_heads": 2,
    "head_dim": None,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 12}
DENSE_FIRST = {**EXPERTS, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1}
SHARED = {**EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 7}
GEMMA = {**KINDS, "query_pre_attn_scalar": 6, "final_logit_softcapping": 3.0}

QUIRKS: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 5},
    "ministral": KINDS,
    "qwen2_moe": SHARED,
    "qwen3_moe": {**EXPERTS, "num_experts": 4},
    "qwen3_next": {**DELTA_NET, **SHARED},
    "qwen3_5_text": DELTA_NET,
    "qwen3_5_moe_text": {**DELTA_NET, **SHARED},
    "gemma2": {**GEMMA, "attn_logit_softcapping": 4.0},
    "gemma3_text": GEMMA,
    "gemma4_text": {
        **GEMMA,
        "hidden_size_per_layer_input": 0,
        "attention_k_eq_v": True,
        "global_head_dim": 8,
        "num_global_key_value_heads": 1,
    },
    "gemma4_unified_text": {
        **GEMMA,
        "attention_k_eq_v": True,
        "global_head_dim": 8,
        "num_global_key_value_heads": 1,
    },
    "gpt_oss": {**KINDS, "num_experts_per_tok": 2, "num_local_experts": 4},
    "smollm3": {"no_rope_layers": [1, 0]},
    "olmo3": KINDS,
    "olmo_hybrid": DELTA_NET,
    "granite": GRANITE,
    "granite_swa": {**GRANITE, **KINDS},
    "granitemoehybrid": {
        **GRANITE,
        "layer_types": ["linear_attention", "full_attention"],
        "num_local_experts": 0,
        "shared_intermediate_size": FFN,
        "position_embedding_type": "rope",
        "mamba_n_heads": 4,
        "mamba_n_groups": 2,
        "mamba_d_state": 5,
        "mamba_d_conv": 3,
        "mamba_chunk_size": 4,
    },
    "mixtral": {"num_experts_per_tok": 2, "num_local_experts": 4},
    "deepseek_v3": {**LATENT, **DENSE_FIRST, "n_group": 2, "topk_group": 1},
    "deepseek_v2": {**LATENT, **DENSE_FIRST, "qk_nope_head_dim": 6, "kv_lora_rank": 6},
    "youtu": LATENT,
    "dots1": {**DENSE_FIRST, "n_group": 1, "topk_group": 1},
    "solar_open": {**DENSE_FIRST, "first_k_dense_replace": None, "intermediate_size": None},
    "afmoe": {
        **KINDS,
        **EXPERTS,
        "num_experts": 4,
        "num_shared_experts": 1,
        "num_dense_layers": 1,
        "mup_enabled": True,
    },
    "exaone_moe": {**KINDS, **EXPERTS, "num_experts": 4, "first_k_dense_replace": 1},
    "hy_v3": {**EXPERTS, "num_experts": 4},
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2},
    "minimax_m2": {"num_experts_per_tok": 2, "num_local_experts": 4},
    "mellum": {
        **KINDS,
        **EXPERTS,
        "num_experts": 4,
        "mlp_layer_types": ["dense", "sparse"],
    },
    "granitemoe": {**GRANITE, "num_experts_per_tok": 2, "num_local_experts": 4},
    "granitemoeshared": {
        **GRANITE,
        "num_experts_per_tok": 2,
        "num_local_experts": 4,
        "shared_intermediate_size": 7,
    },
    "falcon_h1": {
        "mamba_d_ssm": 12,
        "mamba_n_heads": 4,
        "mamba_d_head": 3,
        "mamba_n_groups": 2,
        "mamba_d_state": 5,
        "mamba_d_conv": 3,
        "mamba_chunk_size": 4,
        "embedding_multiplier": 3.0,
        "lm_head_multiplier": 0.5,
        "mlp_multipliers": [1.2, 0.8],
        "key_multiplier": 0.7,
        "attention_in_multiplier": 1.1,
        "attention_out_multiplier": 0.6,
        "ssm_multipliers": [0.75, 1.25, 0.5, 1.5, 0.875],
        "ssm_in_multiplier": 1.3,
        "ssm_out_multiplier": 0.9,
    },
    "glm4_moe": {**DENSE_FIRST, "n_group": 1, "topk_group": 1},
    "glm4_moe_lite": {
        **LATENT,
        **EXPERTS,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "mlp_layer_types": ["dense", "sparse"],
    },
    "hyperclovax": {**GRANITE, "logits_scaling": 0.5},
    "ernie4_5_moe": {
        "moe_intermediate_size": 12,
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_num_shared_experts": 1,
    },
    "exaone4": KINDS,
    "cwm": KINDS,
    "nemotron_h": {
        **EXPERTS,
        "layer_types": ["linear_attention", "mlp", "full_attention", "moe"],
        "num_hidden_layers": None,
        "n_routed_experts": 4,
        "moe_shared_expert_intermediate_size": 7,
        "mamba_num_heads": 4,
        "mamba_head_dim": 3,
        "n_groups": 2,
        "ssm_state_size": 5,
        "conv_kernel": 3,
        "chunk_size": 4,
    },
}
"""Settings of a family's configuration in addition to `SHAPE`."""

TERMS = ("q", "k", "v", "o", "gate", "up", "down")
READERS = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj"}
READERS |= {"gate": "mlp.gate_proj", "up": "mlp.up_proj"}
WRITERS = {"o": "self_attn.o_proj", "down": "mlp.down_proj"}
NORM_BEFORE = dict.fromkeys("qkv", "input_layernorm")
NORM_BEFORE |= dict.fromkeys(("gate", "up"), "post_attention_layernorm")

TINY_CASES = [
    pytest.param((family, tied, {}), id=f"{family}-{'tied' if tied else 'untied'}")
    for family in LLAMAS
    for tied in (False, True)
]
"""Every family of `LLAMAS`, tied and untied, and Llama with biases on all linear maps."""
TINY_CASES.append(
    pytest.param(("llama", False, {"attention_bias": True, "mlp_bias": True}), id="llama-biases")
)

Case = tuple[str, bool, dict[str, Any]]


def in_turn(*axes: Sequence[Any]) -> list[Any]:
    """Parameters for all combinations of some axes. Every second one is slow, so that each value of
    an axis runs by default with every second value of another."""
    found = []
    for numbered in product(*(list(enumerate(axis)) for axis in axes)):
        numbers, values = zip(*numbered, strict=True)
        slow = pytest.mark.slow if sum(numbers) % 2 else ()
        found.append(pytest.param(*values, marks=slow))
    return found


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Words `w3` to `w32` and three special tokens."""
    words = ["<s>", "</s>", "<unk>", *(f"w{i}" for i in range(3, TOKENS))]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def tiny_teacher(
    model_type: str,
    tied: bool = False,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    **changes: Any,
) -> Teacher:
    """A random teacher; `changes` go to its configuration (None removes a setting)."""
    tied = tied and model_type not in UNTIED
    settings = {**SHAPE, **QUIRKS.get(model_type, {}), "tie_word_embeddings": tied, **changes}
    settings = {name: value for name, value in settings.items() if value is not None}
    config = CONFIG_MAPPING[model_type](
        **{"pad_token_id": None, **settings}, bos_token_id=0, eos_token_id=1
    )
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the others do not support float64
    offset = FAMILIES[model_type].gain_offset
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            mean = 1.0 - offset if "norm" in name else 0.0
            parameter.data = (mean + 0.3 * noise).to(dtype)  # some routers are born in float32
    model.generation_config.update(eos_token_id=[1, 2], top_k=7, do_sample=True)
    return as_teacher(model, tiny_tokenizer(), "tiny")


def tiny_method(
    teacher: Teacher,
    student: Mapping[str, Any] | None = None,
    objective: Mapping[str, Any] | None = None,
    seed: int = 1,
    gradient_checkpointing: bool = False,
    **settings: Any,
) -> LowRankClone:
    """A clone of the teacher whose projections and gains are random and far from zero, with the
    paper's clone loss; gains are folded only where `student` says so. `settings` go to
    `LowRankClone`."""
    method = LowRankClone(
        teacher,
        StudentSection.model_validate(
            {"hidden_size": STUDENT_HIDDEN, "fold_gains": False, **(student or {})}
        ),
        ObjectiveSection.model_validate(
            {"chunk_tokens": 7, "clone_scale": "none", **(objective or {})}
        ),
        gradient_checkpointing,
        **settings,
    )
    randomize(method.parameters(), seed)
    return method


def clone_of(
    case: Case, objective: Mapping[str, Any] | None = None, **student: Any
) -> LowRankClone:
    """`tiny_method` of a case's teacher."""
    family, tied, changes = case
    return tiny_method(tiny_teacher(family, tied, **changes), student, objective)


def randomize(parameters: Mapping[str, nn.Parameter], seed: int) -> None:
    """Draw projections around 0 and gains around 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in parameters.items():
            noise = torch.randn(value.shape, generator=generator, dtype=torch.float64)
            value.copy_(0.3 * noise if value.ndim == 2 else 1 + 0.2 * noise)
            assert ("norm" in name) == (value.ndim == 1)


def tiny_tokens(sequences: int, length: int = 12, seed: int = 1) -> Tensor:
    """Random tokens in use, int64 [sequences, length]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, TOKENS, (sequences, length), generator=generator)


def tiny_batch(
    rows: int = 2,
    length: int = 9,
    seed: int = 0,
    lengths: list[int] | None = None,
    documents: list[list[int]] | None = None,
) -> Batch:
    """Random tokens in use.

    Args:
        rows: number of sequences.
        length: tokens of each.
        seed: seed of the tokens.
        lengths: tokens of each row that are not padding on the right; None: no padding.
        documents: lengths of the documents of each row; None: one document over the whole row.
    """
    mask = positions = None
    if lengths is not None:
        mask = (torch.arange(length) < torch.tensor(lengths)[:, None]).long()
    if documents is not None:
        restarts = [torch.cat([torch.arange(n) for n in row]) for row in documents]
        positions = torch.stack(restarts)
    return Batch(tiny_tokens(rows, length, seed), positions, mask)


def gradients(method: LowRankClone, *batches: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Losses and gradients of one optimizer step over micro-batches, computed as in the loop."""
    counts = count(batches)
    for value in method.parameters().values():
        value.grad = None
    method.begin_step(0)
    sums: dict[str, Tensor] = {}
    for batch in batches:
        losses = method.losses(batch, counts)
        losses.loss.backward()
        found = losses.scalars()
        if losses.clone_layers is not None:
            found["clone_layers"] = torch.stack(list(losses.clone_layers.values()), 1)
        for name, value in found.items():
            sums[name] = sums.get(name, torch.zeros(())) + value
    method.end_step()
    return sums, {name: p.grad.clone() for name, p in method.parameters().items()}


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    """The logits [batch, length, vocabulary] of a model."""
    with torch.no_grad():
        found: Tensor = model(ids, use_cache=False).logits
    return found


def relative_error(found: Tensor, expected: Tensor) -> float:
    """The largest difference, in units of the largest expected value."""
    return float((found - expected).abs().max() / expected.abs().max())


def assert_finite_differences(method: LowRankClone, batch: Batch, step: int) -> None:
    """The gradients of a training step equal finite differences of its loss, at some entries of
    every parameter."""
    counts = count([batch])
    _, grads = gradients(method, batch)
    width = 1e-5
    generator = torch.Generator().manual_seed(0)
    for name, parameter in method.parameters().items():
        flat = parameter.detach().view(-1)
        for index in torch.randint(len(flat), (3,), generator=generator).tolist():
            around = []
            for shift in (width, -2 * width):
                flat[index] += shift
                with torch.no_grad():
                    method.begin_step(step)
                    around.append(method.losses(batch, counts).loss.item())
            flat[index] += width
            difference = (around[0] - around[1]) / (2 * width)
            assert grads[name].view(-1)[index].item() == pytest.approx(
                difference, rel=1e-6, abs=1e-7
            ), f"{name}[{index}]"


def linear_path(layer: int, name: str) -> str:
    """Module path of a linear map in the layout that all families here share."""
    return f"model.layers.{layer}.{ {**READERS, **WRITERS}[name] }"


def stream_norms(layers: int = LAYERS) -> Iterator[str]:
    """Paths of the norms whose gains the student trains."""
    for layer in range(layers):
        yield f"model.layers.{layer}.input_layernorm"
        yield f"model.layers.{layer}.post_attention_layernorm"
    yield "model.norm"


def expected_weights(
    teacher: Teacher,
    values: Mapping[str, Tensor],
    fold_gains: bool = False,
    tie_projections: bool | None = None,
) -> dict[str, Tensor]:
    """The student's projected weights, straight from the paper's formulas.

    `values` holds the projections by key. The LM head is left out if it is the embedding.
    """
    weights = dict(teacher.model.named_parameters())
    layers = teacher.config.num_hidden_layers

    def reads(path: str, key: str, norm: str | None) -> Tensor:
        gain = weights[f"{norm}.weight"] if fold_gains and norm else torch.ones(())
        return (weights[f"{path}.weight"] * gain) @ values[key]

    student = {"model.embed_tokens.weight": reads("model.embed_tokens", "embedding", None)}
    for i in range(layers):
        for name in READERS:
            path = linear_path(i, name)
            norm = f"model.layers.{i}.{NORM_BEFORE[name]}"
            student[f"{path}.weight"] = reads(path, f"layers.{i}.{name}", norm)
        for name in WRITERS:
            path, p = linear_path(i, name), values[f"layers.{i}.{name}"]
            student[f"{path}.weight"] = p.T @ weights[f"{path}.weight"]
            if f"{path}.bias" in weights:
                student[f"{path}.bias"] = p.T @ weights[f"{path}.bias"]
    tied = teacher.config.tie_word_embeddings
    shared = tied if tie_projections is None else tie_projections
    if tied and shared:
        return student
    head = weights["model.embed_tokens.weight" if tied else "lm_head.weight"]
    if shared:
        student["lm_head.weight"] = head @ values["embedding"]
    else:
        gain = weights["model.norm.weight"] if fold_gains else torch.ones(())
        student["lm_head.weight"] = (head * gain) @ values["head"]
    return student


def watch(
    model: nn.Module, paths: Mapping[Any, str]
) -> tuple[dict[Any, Tensor], Callable[[], None]]:
    """Outputs of modules in forward passes, by key, and a function that removes the hooks."""
    seen: dict[Any, Tensor] = {}

    def hook(key: Any) -> Callable[[nn.Module, Any, Tensor], None]:
        return lambda _module, _inputs, output: seen.__setitem__(key, output)

    handles = [
        model.get_submodule(path).register_forward_hook(hook(k)) for k, path in paths.items()
    ]

    def end() -> None:
        for handle in handles:
            handle.remove()

    return seen, end


def initialize_from_text(
    method: Any,
    way: str,
    ids: Tensor,
    progress: Callable[[int, int], None] | None = None,
    refine_epochs: int = 0,
) -> None:
    """Compute a method's projections from calibration tokens."""
    section = InitializeSection.model_validate({"method": way, "refine_epochs": refine_epochs})
    initialize(method, section, ids, progress)


def initialize_random(projections: Projections, std: float, seed: int) -> None:
    """Draw projections from normal(0, std)."""
    section = InitializeSection(method="random", std=std, seed=seed)
    start = random_start(projections, section, torch.empty(0, 0), None)
    with torch.no_grad():
        for key, value in projections.values.items():
            value.copy_(start.projections[key])
