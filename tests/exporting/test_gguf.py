"""GGUF files, read back by the gguf package and by transformers."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFReader
from gguf.quants import dequantize
from torch import Tensor
from transformers import AutoModelForCausalLM

import lrc
from gguf_helpers import (
    BIASES,
    CHAT_TEMPLATE,
    DYNAMIC_ROPE,
    EXPORTED,
    GGUF_QUIRKS,
    LINEAR_ROPE,
    LLAMA3_ROPE,
    LONG_ROPE,
    PADDING_ROWS,
    PARTIAL_ROPE,
    TEXTS,
    YARN,
    byte_level_bpe,
    read_fields,
    tiny_student,
)
from lrc.cli import main
from lrc.exporting import gguf_file
from lrc.exporting.gguf_file import About, convert_to_gguf, write_gguf
from lrc.model.families import FAMILIES
from lrc.system.errors import UserError
from tiny import FFN, HEAD_DIM, HEADS, KV_HEADS, LAYERS, LLAMAS, tiny_teacher, tiny_tokenizer

PARTS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
"""llama.cpp's names of the parts of a layer, written out."""

NO_FFN = GGUF_QUIRKS["nemotron_h"]
PARTIAL = {"rope_parameters": PARTIAL_ROPE, "head_dim": 8}

ABOUT = About("tiny", "mit", "maker/teacher", ("low-rank-clone",))

CASES = [
    pytest.param(family, tied, changes, id=f"{family}-{'tied' if tied else 'untied'}{name}")
    for family, tied, changes, name in [
        *((family, tied, {}, "") for family in LLAMAS for tied in (False, True)),
        ("llama", False, BIASES, "-biases"),
    ]
]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_level_bpe()


def expected_name(path: str) -> str:
    """llama.cpp's name of a parameter."""
    whole = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    module, _, kind = path.rpartition(".")
    if module in whole:
        return f"{whole[module]}.{kind}"
    _, _, layer, part = module.split(".", 3)
    return f"blk.{layer}.{PARTS[part]}.{kind}"


def neighbors(weight: Tensor, heads: int) -> Tensor:
    """Rows of q or k in llama.cpp's order, one by one."""
    rows = torch.empty_like(weight)
    for head in range(heads):
        for i in range(HEAD_DIM // 2):
            first = head * HEAD_DIM
            rows[first + 2 * i] = weight[first + i]
            rows[first + 2 * i + 1] = weight[first + i + HEAD_DIM // 2]
    return rows


def read_tensors(path: Path) -> dict[str, tuple[Kind, np.ndarray[Any, Any]]]:
    return {
        tensor.name: (tensor.tensor_type, dequantize(tensor.data, tensor.tensor_type))
        for tensor in GGUFReader(path).tensors
    }


@pytest.mark.parametrize(("family", "tied", "changes"), CASES)
def test_every_tensor_is_in_its_place(
    family: str, tied: bool, changes: dict[str, Any], tokenizer: Any, tmp_path: Path
) -> None:
    student = tiny_student(family, tokenizer, tied, **changes)
    write_gguf(student, tokenizer, tmp_path / "f32.gguf", Kind.F32, ABOUT)
    found = read_tensors(tmp_path / "f32.gguf")
    expected = {}
    for path, value in student.named_parameters():
        if family != "qwen3" and ".q_proj" in path:
            value = neighbors(value, HEADS)
        if family != "qwen3" and ".k_proj" in path:
            value = neighbors(value, KV_HEADS)
        expected[expected_name(path)] = value.detach().float().numpy()
    assert set(found) == set(expected)
    assert ("output.weight" in found) != tied
    for name, value in expected.items():
        kind, stored = found[name]
        assert kind == Kind.F32
        np.testing.assert_array_equal(stored, value, err_msg=name)


@pytest.mark.parametrize("family", LLAMAS)
def test_the_shape_is_explicit(family: str, tokenizer: Any, tmp_path: Path) -> None:
    student = tiny_student(family, tokenizer)
    write_gguf(student, tokenizer, tmp_path / "tiny.gguf", Kind.F16, ABOUT)
    fields = read_fields(tmp_path / "tiny.gguf")
    architecture = "qwen3" if family == "qwen3" else "llama"
    assert fields["general.architecture"] == architecture
    shape = {
        "embedding_length": 8,
        "block_count": LAYERS,
        "feed_forward_length": FFN,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "attention.key_length": HEAD_DIM,
        "attention.value_length": HEAD_DIM,
        "rope.dimension_count": HEAD_DIM,
        "rope.freq_base": 10000.0,
        "context_length": 64,
        "vocab_size": len(tokenizer) + PADDING_ROWS,
    }
    assert {name: fields[f"{architecture}.{name}"] for name in shape} == shape
    assert fields[f"{architecture}.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-6)


def test_it_describes_the_model(tokenizer: Any, tmp_path: Path) -> None:
    student = tiny_student("llama", tokenizer)
    write_gguf(student, tokenizer, tmp_path / "tiny.gguf", Kind.F16, ABOUT)
    fields = read_fields(tmp_path / "tiny.gguf")
    assert fields["general.type"] == "model"
    assert fields["general.name"] == "tiny"
    assert fields["general.license"] == "mit"
    assert fields["general.tags"] == ["low-rank-clone"]
    assert fields["general.base_model.count"] == 1
    assert fields["general.base_model.0.name"] == "teacher"
    assert fields["general.base_model.0.organization"] == "maker"
    assert fields["general.base_model.0.repo_url"] == "https://huggingface.co/maker/teacher"
    assert fields["general.file_type"] == 1
    assert fields["general.sampling.top_k"] == 7
    assert fields["tokenizer.chat_template"] == CHAT_TEMPLATE


@pytest.mark.parametrize("family", LLAMAS)
def test_transformers_reads_the_same_model(family: str, tokenizer: Any, tmp_path: Path) -> None:
    student = tiny_student(family, tokenizer, tied=True)
    write_gguf(student, tokenizer, tmp_path / "f32.gguf", Kind.F32, ABOUT)
    # transformers reads neither biases nor Qwen3's head_dim out of a GGUF file's metadata, and has
    # no Mistral in it: what it lacks comes from the configuration.
    options = {} if family == "mistral" else {"config": student.config}
    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="f32.gguf", **options)
    ids = torch.arange(4)[None]  # within Mistral's window
    with torch.no_grad():
        theirs, ours = read(ids).logits, student(ids).logits
    assert ours.std() > 0.1
    torch.testing.assert_close(theirs.double(), ours, rtol=0, atol=1e-4)


ERRORS = {Kind.F16: 2**-11, Kind.BF16: 2**-8, Kind.Q8_0: 1 / 127}
"""Largest error of a stored number, of its own size; for q8_0 of the largest in its block of 32."""


@pytest.mark.parametrize("kind", ERRORS)
def test_rounded_weights_are_near(kind: Kind, tokenizer: Any, tmp_path: Path) -> None:
    student = tiny_student(
        "llama", tokenizer, student_size=32, hidden_size=48, intermediate_size=64
    )
    notes = write_gguf(student, tokenizer, tmp_path / "t.gguf", kind, ABOUT)
    weights = {expected_name(path): value.detach() for path, value in student.named_parameters()}
    narrow = "attn_output"  # heads * head_dim = 12 does not fill a block
    for name, (stored, values) in read_tensors(tmp_path / "t.gguf").items():
        if weights[name].ndim == 1:
            assert stored == Kind.F32
            continue
        assert stored == (Kind.F16 if kind == Kind.Q8_0 and narrow in name else kind), name
        expected = weights[name]
        if "attn_q." in name or "attn_k." in name:
            expected = neighbors(expected, HEADS if "attn_q." in name else KV_HEADS)
        size = expected.abs()
        if stored == Kind.Q8_0:
            size = size.view(len(size), -1, 32).amax(-1, keepdim=True).expand(-1, -1, 32)
            size = size.reshape(expected.shape)
        error = (torch.from_numpy(values.copy()) - expected).abs()
        assert (error <= ERRORS[stored] * size + 1e-7).all(), name
        assert error.max() > 0
    assert any("2 of 16 matrices are f16" in note for note in notes) == (kind == Kind.Q8_0)
    assert any("256" in note for note in notes)


@pytest.mark.parametrize("kind", ERRORS)
def test_rounded_models_predict_nearly_the_same(
    kind: Kind, tmp_path: Path, clone: tuple[Any, Any]
) -> None:
    student, tokenizer = clone
    write_gguf(student, tokenizer, tmp_path / "t.gguf", kind, ABOUT)
    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="t.gguf", dtype=torch.float32)
    ids = torch.tensor([tokenizer.encode(TEXTS[0])])
    with torch.no_grad():
        theirs, ours = read(ids).logits, student(ids).logits
    assert (theirs - ours).abs().max() < 0.05 * ours.std()
    assert not torch.equal(theirs, ours)


def test_llama3_rotary_factors(tokenizer: Any, tmp_path: Path) -> None:
    student = tiny_student("llama", tokenizer, rope_parameters=LLAMA3_ROPE)
    write_gguf(student, tokenizer, tmp_path / "t.gguf", Kind.F16, ABOUT)
    kind, factors = read_tensors(tmp_path / "t.gguf")["rope_freqs.weight"]
    assert kind == Kind.F32
    expected = []
    for i in range(HEAD_DIM // 2):
        wavelength = 2 * np.pi * 10000.0 ** (2 * i / HEAD_DIM)
        if wavelength < 16 / 4:
            expected.append(1.0)
        elif wavelength > 16 / 1:
            expected.append(8.0)
        else:
            smooth = (16 / wavelength - 1) / (4 - 1)
            expected.append(1 / ((1 - smooth) / 8 + smooth))
    assert len(set(expected)) > 1
    np.testing.assert_allclose(factors, expected, rtol=1e-5)


def test_linear_rotary_scaling(tokenizer: Any, tmp_path: Path) -> None:
    student = tiny_student("llama", tokenizer, rope_parameters=LINEAR_ROPE)
    write_gguf(student, tokenizer, tmp_path / "t.gguf", Kind.F16, ABOUT)
    fields = read_fields(tmp_path / "t.gguf")
    assert fields["llama.rope.scaling.type"] == "linear"
    assert fields["llama.rope.scaling.factor"] == 3.0


def test_dynamic_rotary_scaling_begins_after_the_context(tokenizer: Any, tmp_path: Path) -> None:
    """Within the context there is none, so the file has none. The export says what differs."""
    changes = {"rope_parameters": DYNAMIC_ROPE, "max_position_embeddings": 32}
    student = tiny_student("llama", tokenizer, tied=True, **changes)
    notes = write_gguf(student, tokenizer, tmp_path / "t.gguf", Kind.F32, ABOUT)
    assert any("beyond 32 tokens" in note for note in notes)
    fields = read_fields(tmp_path / "t.gguf")
    assert fields["llama.context_length"] == 32
    assert not any("rope.scaling" in name for name in fields)
    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="t.gguf")
    ids = torch.arange(64)[None] % student.config.vocab_size
    with torch.no_grad():
        for length, same in ((32, True), (64, False)):
            theirs, ours = (model(ids[:, :length]).logits for model in (read, student))
            assert torch.allclose(theirs.double(), ours, rtol=0, atol=1e-4) == same


def test_a_sliding_window_is_reported(tokenizer: Any, tmp_path: Path) -> None:
    student = tiny_student("mistral", tokenizer)
    notes = write_gguf(student, tokenizer, tmp_path / "t.gguf", Kind.F16, ABOUT)
    assert any("window of 5 tokens" in note for note in notes)


@pytest.mark.parametrize("family", EXPORTED)
def test_every_number_of_every_family_is_written_once(
    family: str, tokenizer: Any, tmp_path: Path
) -> None:
    """tests/exporting/test_llama_cpp.py shows that they are in the right places."""
    student = tiny_student(family, tokenizer, tied=True, **GGUF_QUIRKS.get(family, {}))
    write_gguf(student, tokenizer, tmp_path / "t.gguf", Kind.F32, ABOUT)
    values = {n: v for n, (_, v) in read_tensors(tmp_path / "t.gguf").items() if "freqs" not in n}
    copies = ("lm_head.weight", "act_fn.")  # the embedding again; settings
    stored = [v for n, v in student.state_dict().items() if not any(c in n for c in copies)]
    written = sum(v.size for n, v in values.items() if n != "output.weight")
    assert written == sum(v.numel() for v in stored)
    fields = read_fields(tmp_path / "t.gguf")
    architecture = fields["general.architecture"]
    assert architecture.removesuffix("_moe") == FAMILIES[family].gguf
    assert fields[f"{architecture}.attention.key_length"] != 8 // HEADS


def test_a_part_of_each_head_is_rotated(tokenizer: Any, tmp_path: Path) -> None:
    """As a whole head some of whose frequencies are nearly zero."""
    student = tiny_student("phi3", tokenizer, rope_parameters=PARTIAL_ROPE, head_dim=8)
    write_gguf(student, tokenizer, tmp_path / "t.gguf", Kind.F32, ABOUT)
    found = read_tensors(tmp_path / "t.gguf")
    rows = student.model.layers[0].self_attn.qkv_proj.weight.detach().float().numpy()
    order = [0, 2, 1, 3, 4, 5, 6, 7]
    np.testing.assert_array_equal(found["blk.0.attn_q.weight"][1][:8], rows[order])
    angles = 10000.0 ** -(np.arange(0, 8, 2) / 8) / found["rope_freqs.weight"][1]
    np.testing.assert_allclose(angles, [1, 0.01, 0, 0], rtol=1e-5, atol=1e-20)


# ------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - set(EXPORTED)))
def test_families_that_llama_cpp_cannot_take(family: str, tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"{family} .*transformers"):
        write_gguf(tiny_student(family, tokenizer), tokenizer, tmp_path / "t.gguf", Kind.F32, ABOUT)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("gemma", {}, "tie_projections"),
        ("gemma2", {}, "tie_projections"),
        ("gemma2", {"attn_logit_softcapping": 0.0, "tied": True}, "capped"),
        ("gemma3_text", {"layer_types": ["full_attention"] * 2}, "window"),
        ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, "dense layers"),
        ("qwen3_next", {"linear_value_head_dim": 4, "mlp_only_layers": [1]}, "dense layers"),
        ("qwen3_5_text", {}, "width"),
        ("qwen3_5_text", {"layer_types": ["full_attention", "linear_attention"]}, "irregular"),
        ("smollm3", {}, "unusual layers"),
        ("deepseek_v3", {"rope_interleave": False}, "rope_interleave"),
        ("deepseek_v3", {"num_hidden_layers": 26}, "q_lora_rank"),
        ("deepseek_v3", {"rope_parameters": YARN}, "mscale"),
        ("deepseek_v2", {"topk_method": "group_limited_greedy"}, "groups of the best one"),
        ("dots1", {}, "fewer heads"),
        ("exaone_moe", {"mlp_layer_types": ["sparse", "dense"]}, "dense layers between"),
        ("ernie4_5_moe", {"num_hidden_layers": 3, "moe_layer_interval": 2}, "dense layers between"),
        ("afmoe", {}, "all but every fourth"),
        ("afmoe", {**GGUF_QUIRKS["afmoe"], "mup_enabled": False}, "without a scale"),
        ("granitemoehybrid", {}, "twice the hidden size"),
        (
            "granitemoehybrid",
            {
                "layer_types": ["full_attention"] * 2,
                "num_local_experts": 4,
                "num_experts_per_tok": 2,
                "position_embedding_type": None,
            },
            "no rotary embedding",
        ),
        ("nemotron_h", {"layer_types": ["full_attention", "mlp"]}, "no Mamba layer"),
        ("falcon_h1", {"time_step_limit": (0.0, 0.1)}, "bounded"),
        ("falcon_h1", {"mamba_rms_norm": True}, "before the gate"),
        ("nemotron_h", {}, "dense layers beside"),
        ("nemotron_h", {**NO_FFN, "moe_latent_size": 5}, "latent"),
        ("granite_swa", {"layer_rope_theta": [10000.0, 5000.0]}, "several bases"),
        ("qwen3", {"rope_parameters": {**YARN, "beta_fast": 16}}, "beta_fast"),
        ("qwen3", {"rope_parameters": LLAMA3_ROPE}, "llama3"),
        ("smollm3", {"num_hidden_layers": 4, "no_rope_layers": None, **PARTIAL}, "part of a head"),
    ],
)
def test_models_that_their_architecture_cannot_take(
    family: str, changes: dict[str, Any], words: str, tokenizer: Any, tmp_path: Path
) -> None:
    student = tiny_student(family, tokenizer, **changes)
    with pytest.raises(UserError, match=words):
        write_gguf(student, tokenizer, tmp_path / "t.gguf", Kind.F32, ABOUT)
    assert not list(tmp_path.iterdir())


def test_a_bound_of_time_steps_is_told(tokenizer: Any, tmp_path: Path) -> None:
    student = tiny_student("nemotron_h", tokenizer, **NO_FFN)
    notes = write_gguf(student, tokenizer, tmp_path / "t.gguf", Kind.F16, ABOUT)
    assert any("time steps" in note for note in notes)


def test_the_epsilon_of_latents_is_told(tokenizer: Any, tmp_path: Path) -> None:
    student = tiny_student("glm4_moe_lite", tokenizer, rms_norm_eps=1e-5)
    notes = write_gguf(student, tokenizer, tmp_path / "t.gguf", Kind.F16, ABOUT)
    assert any("epsilon 1e-05" in note for note in notes)


def test_the_ramp_of_yarn_is_told(tokenizer: Any, tmp_path: Path) -> None:
    rope = {**YARN, "truncate": False}
    student = tiny_student("gpt_oss", tokenizer, rope_parameters=rope)
    notes = write_gguf(student, tokenizer, tmp_path / "t.gguf", Kind.F16, ABOUT)
    assert any("YaRN" in note for note in notes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rope_parameters": LONG_ROPE}, "longrope"),
        ({"hidden_act": "gelu"}, "gelu"),
    ],
)
def test_what_llama_cpp_does_not_compute(
    changes: dict[str, Any], words: str, tokenizer: Any, tmp_path: Path
) -> None:
    student = tiny_student("llama", tokenizer, **changes)
    with pytest.raises(UserError, match=words):
        write_gguf(student, tokenizer, tmp_path / "t.gguf", Kind.F32, ABOUT)
    assert not list(tmp_path.iterdir())


def test_biases_without_a_place(tokenizer: Any, tmp_path: Path) -> None:
    student = tiny_student("qwen3", tokenizer, attention_bias=True)
    with pytest.raises(UserError, match=r"no place for .*bias"):
        write_gguf(student, tokenizer, tmp_path / "t.gguf", Kind.F32, ABOUT)


def test_other_tokenizers(tokenizer: Any, tmp_path: Path) -> None:
    student = tiny_student("llama", tokenizer)
    with pytest.raises(UserError, match="WordLevel"):
        write_gguf(student, tiny_tokenizer(), tmp_path / "t.gguf", Kind.F32, ABOUT)
    student = tiny_student("llama", tiny_tokenizer())
    with pytest.raises(UserError, match="embeds"):
        write_gguf(student, tokenizer, tmp_path / "t.gguf", Kind.F32, ABOUT)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_keeps_the_older_file(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, path = tiny_student("llama", tokenizer), tmp_path / "t.gguf"
    path.write_bytes(b"the older file")
    quantize, calls = gguf_file.quantize, []

    def full(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return quantize(*arguments)

    monkeypatch.setattr(gguf_file, "quantize", full)
    with pytest.raises(UserError, match="disk is full"):
        write_gguf(student, tokenizer, path, Kind.F32, ABOUT)
    assert path.read_bytes() == b"the older file"
    assert [file.name for file in tmp_path.iterdir()] == ["t.gguf"]


# ----------------------------------------------------------------------------- whole models


def test_a_plain_folder(tokenizer: Any, tmp_path: Path) -> None:
    student = tiny_student("llama", tokenizer).to(torch.bfloat16)
    folder = tmp_path / "My Student"
    student.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    front = {
        "license": "other",
        "license_name": "qwen",
        "license_link": "https://x.org/l",
        "base_model": "org/Teacher-1B",
        "tags": ["distillation"],
        "language": "en",
    }
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump(front)}---\n")
    convert_to_gguf(str(folder), tmp_path / "t.gguf")
    fields = read_fields(tmp_path / "t.gguf")
    assert fields["general.name"] == "My Student"
    assert fields["general.license"] == "other"
    assert fields["general.license.name"] == "qwen"
    assert fields["general.license.link"] == "https://x.org/l"
    assert fields["general.base_model.0.name"] == "Teacher-1B"
    assert fields["general.base_model.0.organization"] == "org"
    assert fields["general.tags"] == ["distillation"]
    assert fields["general.languages"] == ["en"]
    assert read_tensors(tmp_path / "t.gguf")["token_embd.weight"][0] == Kind.BF16
    # and back, from the GGUF file itself
    convert_to_gguf(str(tmp_path / "t.gguf"), tmp_path / "again.gguf", Kind.F32)
    for name, (_, values) in read_tensors(tmp_path / "again.gguf").items():
        np.testing.assert_array_equal(values, read_tensors(tmp_path / "t.gguf")[name][1])
    assert read_fields(tmp_path / "again.gguf")["general.license"] == "other"
    convert_to_gguf(str(folder), tmp_path / "named.gguf", title="small")
    assert read_fields(tmp_path / "named.gguf")["general.name"] == "small"


def call(monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> int:
    monkeypatch.setattr("sys.argv", ["lrc", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        main()
    return int(end.value.code or 0)


def test_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer, teacher = byte_level_bpe(), tmp_path / "Teacher-1B"
    rows = len(tokenizer) + PADDING_ROWS
    tiny_teacher("llama", dtype=torch.float32, vocab_size=rows).model.save_pretrained(teacher)
    tokenizer.save_pretrained(teacher)
    (tmp_path / "text.txt").write_text("\n".join(TEXTS) * 40)
    (tmp_path / "held-out.txt").write_text("\n".join(TEXTS[1:]) * 20)
    settings = {
        "teacher.license": "mit",
        "train.tokens": 64,
        "train.micro_batch": 2,
        "data.sequence_length": 16,
        "data.held_out": [str(tmp_path / "held-out.txt")],
        "data.cache": str(tmp_path / "cache"),
    }
    run = lrc.clone(
        str(teacher),
        hidden_size=8,
        text=str(tmp_path / "text.txt"),
        out=tmp_path / "run",
        settings=settings,
    )
    out = tmp_path / "student.gguf"
    assert call(monkeypatch, "export", run.folder, out, "--format", "gguf", "--dtype", "f16") == 0
    assert "K-quants" in capsys.readouterr().out
    fields, tensors = read_fields(out), read_tensors(out)
    assert fields["general.name"] == "Teacher-1B-lrc-8"
    assert fields["general.license"] == "mit"
    assert "low-rank-clone" in fields["general.tags"]
    kind, values = tensors["token_embd.weight"]
    assert kind == Kind.F16
    embedding = run.student().get_input_embeddings().weight.detach().numpy()
    np.testing.assert_array_equal(values, embedding.astype(np.float16))

    template = "{% for m in messages %}{{ m.content | lower }}{% endfor %}"
    (teacher / "chat_template.jinja").write_text(template)
    refused = tmp_path / "refused.gguf"
    assert call(monkeypatch, "export", run.folder, refused, "--modelfile") == 2
    assert "changes what is said" in capsys.readouterr().err
    assert not refused.exists()

    before = out.read_bytes()
    for arguments in (
        (run.folder, out, "--format", "gguf"),  # it is there already
        (run.folder, tmp_path / "other", "--format", "gguf"),
        (run.folder, tmp_path / "other.gguf", "--format", "safetensors"),
        (run.folder, tmp_path / "other", "--dtype", "q8_0"),
    ):
        assert call(monkeypatch, "export", *arguments) == 2
    assert out.read_bytes() == before
    assert not (tmp_path / "other").exists()
    assert call(monkeypatch, "export", run.folder, tmp_path / "other", "--dtype", "bf16") == 0
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
