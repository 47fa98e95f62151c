"""Read GGUF files, and check them against the model that transformers makes of them.

transformers reads the tensors and settings of a GGUF file that it has names for. It silently
ignores the rest: biases, scaled rotary frequencies, experts. A file is refused if something ignored
changes what the model computes; the message names it.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend
from tokenizers import pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.integrations.gguf.gguf_tokenizer_mapping import (
    GGUF_PRE_TOKENIZER_SPLITS,
    convert_gguf_tokenizer,
    get_gguf_tokenizer,
)
from transformers.integrations.gguf.reader import GgufHeader, read_gguf_metadata
from transformers.modeling_gguf_pytorch_utils import (
    GGUF_TO_TRANSFORMERS_MAPPING,
    TENSOR_PROCESSORS,
    TensorProcessor,
    get_gguf_hf_weights_map,
)

from lrc.model.settings import size_problems
from lrc.model.stored import StoredTensor
from lrc.system.errors import UserError
from lrc.system.files import reading

ADVICE = "give a whole GGUF file that llama.cpp opens, or the model's safetensors folder"

SIZES = {
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "feed_forward_length": "intermediate_size",
    "attention.key_length": "head_dim",
    "context_length": "max_position_embeddings",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
}
"""Settings of a file, and their names in transformers."""

NEEDED = (
    "embedding_length",
    "block_count",
    "attention.head_count",
    "feed_forward_length",
    "attention.layer_norm_rms_epsilon",
)
"""Required settings, if transformers reads them at all: it would use its own defaults instead."""

NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "rope.scaling.type": ("none", ""),
    "rope.scaling.factor": (0.0, 1.0),
    "rope.scaling.attn_factor": (0.0, 1.0),
    "rope.scaling.finetuned": (True, False),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "use_parallel_residual": (False,),
    "logit_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "embedding_scale": (0.0, 1.0),
    "attention.scale": (0.0,),
    "attn_logit_softcapping": (0.0,),
    "final_logit_softcapping": (0.0,),
}
"""Settings that transformers does not read, and the values that change nothing."""

UNREAD = ("vocab_size", "tensor_data_layout", "rope.dimension_count", "attention.value_length")
"""Settings that other checks compare with the tensors."""


def read_header(path: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Read the settings and tensor names of a GGUF file, and check its sizes.

    Raises:
        UserError: if it is not a GGUF file, is cut off, is one part of a split file, holds no
            tensors, or has impossible sizes.
    """
    with reading(path, ADVICE):
        settings, names = read_gguf_metadata(str(path))
    _refuse_cut(path)
    parts = settings.get("split.count", 0)
    if parts and parts > 1:
        raise UserError(
            f"{path} is one of {parts} parts of a split file: join them with llama.cpp's "
            "`llama-gguf-split --merge FIRST.gguf WHOLE.gguf` and give the whole file."
        )
    if not names:
        raise UserError(f"{path} holds no tensors, only a header: {ADVICE}.")
    architecture = settings["general.architecture"]
    sizes = {ours: settings.get(f"{architecture}.{theirs}") for theirs, ours in SIZES.items()}
    vocabulary = settings.get("tokenizer.ggml.tokens")
    if vocabulary is None:
        raise UserError(f"{path} holds no vocabulary (tokenizer.ggml.tokens): {ADVICE}.")
    problems = list(size_problems({**sizes, "vocab_size": vocabulary}))
    if problems:
        raise UserError(f"{path} is not a valid model ({'; '.join(problems)}): {ADVICE}.")
    return settings, names


def _refuse_cut(path: Path) -> None:
    """Refuse a file that ends before its tensors do.

    Raises:
        UserError: if it does.
    """
    try:
        header = GgufHeader.from_file(str(path))
    except Exception:
        return  # transformers does not know an element type's size: reading reports the error
    ends = {t.name: header.data_start + t.offset + t.nbytes for t in header.tensors}
    beyond = [name for name, end in ends.items() if end > path.stat().st_size]
    if beyond:
        raise UserError(f"{path} is cut off: it ends before its tensor {beyond[0]} does; {ADVICE}.")


def complete(config: Any, settings: Mapping[str, Any]) -> None:
    """Copy a file's head width into a configuration.

    transformers does not read it for all architectures.
    """
    width = settings.get(f"{settings['general.architecture']}.attention.key_length")
    if width and hasattr(config, "head_dim"):
        config.head_dim = int(width)


def check_settings(path: Path, settings: Mapping[str, Any], config: Any) -> None:
    """Refuse a file with settings that change the model but that transformers ignored.

    Args:
        path: the file, for the message.
        settings: settings from `read_header`.
        config: the configuration that transformers made of them.

    Raises:
        UserError: if it has such settings, or lacks required ones.
    """
    architecture = settings["general.architecture"]
    mapping = GGUF_TO_TRANSFORMERS_MAPPING["config"].get(config.model_type, {})
    taken = {name for name, ours in mapping.items() if ours} | set(UNREAD) | set(SIZES)
    lacking = [
        f"{architecture}.{name}"
        for name in NEEDED
        if name in mapping and f"{architecture}.{name}" not in settings
    ]
    if lacking:
        raise UserError(f"{path} lacks the settings {', '.join(lacking)}: {ADVICE}.")
    left_out = []
    for key, value in settings.items():
        name = key.removeprefix(f"{architecture}.")
        if name == key or name in taken:
            continue
        if name == "attention.sliding_window" and _is_wide(value, config):
            continue
        if name not in NEUTRAL or value not in NEUTRAL[name]:
            left_out.append(f"{key} = {value}")
    head_dim = getattr(config, "head_dim", None) or (
        config.hidden_size // config.num_attention_heads
    )
    for name in ("rope.dimension_count", "attention.key_length", "attention.value_length"):
        value = settings.get(f"{architecture}.{name}")
        if value is not None and value != head_dim:
            left_out.append(f"{architecture}.{name} = {value}")
    if left_out:
        raise UserError(
            f"{path} has settings that transformers does not read from GGUF, so the model would be "
            f"wrong ({', '.join(left_out)}): give the model's safetensors folder."
        )


def _is_wide(window: Any, config: Any) -> bool:
    """Whether a sliding window spans the whole context, or equals the model's."""
    own = getattr(config, "sliding_window", None)
    return window == own or not window or window >= config.max_position_embeddings


def check_tensors(
    path: Path, stored: Mapping[str, StoredTensor], skeleton: PreTrainedModel
) -> tuple[list[str], list[str], list[str]]:
    """Compare a file's tensors with those of the model.

    Args:
        path: the file.
        stored: its tensors.
        skeleton: the model without weights.

    Returns:
        Names missing from the file (transformers' names), names without a place in the model (the
        file's names), and tensors whose shapes differ.
    """
    config = skeleton.config
    kind = TENSOR_PROCESSORS.get(config.model_type, TensorProcessor)
    with reading(path, ADVICE):
        places = get_gguf_hf_weights_map(skeleton, kind(config=config.to_dict()))
    expected = {name: tuple(value.shape) for name, value in skeleton.state_dict().items()}
    filled = {places[name] for name in stored if name in places}
    tied = config.tie_word_embeddings
    missing = sorted(
        name for name in expected if name not in filled and not (tied and name == "lm_head.weight")
    )
    surplus = sorted(name for name in stored if name not in places)
    mismatched = sorted(
        f"{name} {list(tensor.shape)} for {list(expected[places[name]])}"
        for name, tensor in stored.items()
        if name in places and expected[places[name]] != tensor.shape
    )
    return missing, surplus, mismatched


DIGITS_APART = ("smollm", "starcoder", "refact", "command-r", "codeshell")
"""Names of a splitting rule that transformers lacks: digits one by one, then like GPT-2."""

AS_GPT2 = ("gpt-2", "phi-2", "olmo", "mpt")
"""Names of GPT-2's splitting rule, which transformers uses for every rule it does not know."""


def read_tokenizer(path: Path) -> Tokenizer:
    """Build the tokenizer of a GGUF file from its own vocabulary and splitting rule.

    Raises:
        UserError: if the file's splitting rule is unknown, or its tokenizer cannot be built.
    """
    with reading(path, ADVICE):
        architecture, described, settings = get_gguf_tokenizer(str(path))
        rule = described.get("pre_tokenizer_type")
        backend, _ = convert_gguf_tokenizer(architecture, described)
    byte_level = described.get("tokenizer_type") == "gpt2"
    known = rule in (*GGUF_PRE_TOKENIZER_SPLITS, *DIGITS_APART, *AS_GPT2)
    if byte_level and not known and architecture != "gpt2":
        what = "does not say how it splits text (tokenizer.ggml.pre)"
        if rule:
            what = f"splits text by the rule '{rule}', which transformers does not support"
        raise UserError(
            f"{path} {what}, so its tokens would be wrong: give the model's safetensors folder "
            "with its tokenizer.json."
        )
    with reading(path, ADVICE):
        backend = _own_vocabulary(backend, len(described["tokens"]))
        if rule in DIGITS_APART:
            backend.pre_tokenizer = pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Digits(individual_digits=True),
                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
                ]
            )
        return PreTrainedTokenizerFast(tokenizer_object=backend, **_named(settings))


def _own_vocabulary(backend: Backend, size: int) -> Backend:
    """Remove the tokens that a tokenizer's class added to those of the file."""
    described = json.loads(backend.to_str())
    kept = [token for token in described["added_tokens"] if token["id"] < size]
    if len(kept) == len(described["added_tokens"]):
        return backend
    described["added_tokens"] = kept
    model = described["model"]
    if model.get("unk_token") not in model["vocab"]:
        model["unk_token"] = None
    return Backend.from_str(json.dumps(described))


def _named(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The tokenizer settings that a file gives."""
    return {name: value for name, value in settings.items() if value is not None}
