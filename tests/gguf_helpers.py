"""Tiny students with a byte-level BPE tokenizer, and stories260K's clone, to be written as GGUF."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lrc.cloning.low_rank_clone import LowRankClone
from lrc.model.families import FAMILIES
from lrc.model.teacher import load_teacher
from lrc.recipe.sections import ObjectiveSection, StudentSection, TeacherSection
from tiny import initialize_from_text, tiny_method, tiny_teacher

PADDING_ROWS = 3
"""Rows of the embedding beyond the tokens."""

CHAT_TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0}
DYNAMIC_ROPE = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 6.0}
LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 3,
    "long_factor": [2.0] * 3,
    "original_max_position_embeddings": 16,
}
BIASES = {"attention_bias": True, "mlp_bias": True}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
MSCALES = {"mscale": 0.7, "mscale_all_dim": 0.7}
PARTIAL_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
QWEN3_5 = {
    "rope_parameters": {**PARTIAL_ROPE, "mrope_section": [1, 1, 0]},
    "linear_value_head_dim": 4,
}

EXPORTED = tuple(name for name, family in FAMILIES.items() if family.gguf)
"""Families that can be written as GGUF."""

GGUF_QUIRKS: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": None},
    "ministral": {"sliding_window": 60},
    "ministral3": {
        "rope_parameters": {
            **YARN,
            "beta_fast": 8.0,
            "beta_slow": 0.5,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.3,
        }
    },
    "qwen3_moe": {"norm_topk_prob": True},
    "qwen3_next": {"linear_value_head_dim": 4},
    "qwen3_5_text": QWEN3_5,
    "qwen3_5_moe_text": QWEN3_5,
    "gemma2": {"query_pre_attn_scalar": 10},
    "gemma3_text": {"query_pre_attn_scalar": 10},
    "gemma4_text": {"num_key_value_heads": 2},
    "gpt_oss": {"rope_parameters": YARN},
    "smollm3": {"num_hidden_layers": 4, "no_rope_layers": None},
    "glm4": {"head_dim": 8},
    "glm4_moe": {"head_dim": 8, "use_qk_norm": True, "routed_scaling_factor": 1.5},
    "cwm": {"sliding_window": 60},
    "glm4_moe_lite": {"rms_norm_eps": 1e-6},
    "granitemoehybrid": {"mamba_expand": 1, "mamba_d_head": "auto"},
    "nemotron_h": {"layer_types": ["linear_attention", "moe", "full_attention"]},
    "dots1": {"num_key_value_heads": 2},
    "afmoe": {"num_hidden_layers": 4, "layer_types": None},
}
"""What llama.cpp needs besides `tiny.QUIRKS`: no window that it does not compute, and an even
number of rotated rows."""

TEXTS = (
    "Once upon a time, there was a little girl named Lily.",
    "It's 1,234.5 o'clock -- don't you'LL see?",
    "  two spaces, a\ttab,\n\nand lines \n",
    "Ödön's café, naïve 北京 🦙 … x² ≠ y",
    "def f(x):\n    return x**2  # code",
    "trailing space ",
    "a" * 50,
    "!!!???...;;;   '''",
)
"""Texts on which tokenizers differ."""


def byte_level_bpe(splits: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """A small byte-level BPE tokenizer with a chat template; it splits text as GPT-2's, or by
    regular expressions."""
    tokenizer = Tokenizer(models.BPE())
    own = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not splits)
    rules = [pre_tokenizers.Split(Regex(rule), "isolated") for rule in splits]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*rules, own]) if splits else own
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>", "<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", chat_template=CHAT_TEMPLATE
    )
    fast.add_tokens(["<think>"])
    return fast


def tiny_student(
    model_type: str,
    tokenizer: PreTrainedTokenizerBase,
    tied: bool = False,
    student_size: int = 8,
    **changes: Any,
) -> PreTrainedModel:
    """A random student in float64 whose head_dim is not hidden_size / heads."""
    rows = len(tokenizer) + PADDING_ROWS
    teacher = tiny_teacher(model_type, tied, vocab_size=rows, **changes)
    return tiny_method(teacher, {"hidden_size": student_size}).student()


def stories_clone(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """stories260K at half its hidden size, started from text that it wrote, and its tokenizer."""
    teacher = load_teacher(TeacherSection(model=str(folder)))
    torch.manual_seed(0)
    start = torch.full((16, 1), teacher.tokenizer.bos_token_id)
    stories = teacher.model.generate(start, max_length=64, do_sample=True, pad_token_id=0)
    method = LowRankClone(
        teacher, StudentSection(hidden_size=32, fold_gains=True), ObjectiveSection()
    )
    initialize_from_text(method, "closed-form", stories)
    return method.student(), teacher.tokenizer


def read_fields(path: Path) -> dict[str, Any]:
    """The metadata of a GGUF file."""
    return {name: field.contents() for name, field in GGUFReader(path).fields.items()}
