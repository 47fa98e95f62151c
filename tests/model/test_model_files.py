"""A model's files must match the model that they describe, or loading is refused."""

import hashlib
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import lrc
from command_line import Command
from gguf_helpers import LLAMA3_ROPE, byte_level_bpe
from lrc.exporting.gguf_file import convert_to_gguf
from lrc.model import tokenizer as tokenizers_of_ours
from lrc.model.locate import locate
from lrc.model.teacher import load_model, load_skeleton, load_teacher, load_tokenizer
from lrc.model.tokenizer import PROBES, chat_text, plain_ids
from lrc.recipe.sections import TeacherSection
from lrc.system.errors import UserError
from model_files import (
    SHORT,
    WEIGHTS,
    Weights,
    edit_json,
    edit_weights,
    rewrite_gguf,
    save_model,
    save_text,
)
from tiny import LAYERS


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("untied") / "model")


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("tied") / "model", tied=True)


@pytest.fixture(scope="module")
def good_gguf(untied: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "good.gguf"
    convert_to_gguf(str(untied), path)
    return path


def copied(folder: Path, place: Path) -> Path:
    return Path(shutil.copytree(folder, place / "model"))


def refusals(folder: Path) -> list[str]:
    """The refusals of every way to load a model."""
    ways: list[Callable[[], Any]] = [
        lambda: load_teacher(str(folder)),
        lambda: load_teacher(TeacherSection(model=str(folder), load="layers")),
        lambda: load_model(str(folder)),
        lambda: load_skeleton(str(folder)),
    ]
    found = []
    for way in ways:
        with pytest.raises(UserError) as error:
            way()
        assert "\n" not in str(error.value)
        found.append(str(error.value))
    return found


def without(*parts: str) -> Callable[[Weights], Weights]:
    return lambda weights: {n: v for n, v in weights.items() if not any(p in n for p in parts)}


LAST = f"layers.{LAYERS - 1}."

UNFIT: dict[str, tuple[Callable[[Weights], Weights], dict[str, Any], str]] = {
    "prefix": (lambda w: {f"x.{n}": v for n, v in w.items()}, {}, "lm_head.weight"),
    "head": (without("lm_head"), {}, "lm_head.weight missing"),
    "base": (
        lambda w: {n.removeprefix("model."): v for n, v in w.items() if "lm_head" not in n},
        {},
        "lm_head.weight missing",
    ),
    "layer": (without(LAST), {}, f"model.{LAST}input_layernorm.weight"),
    "one": (without(f"{LAST}mlp.up"), {}, f"model.{LAST}mlp.up_proj.weight missing"),
    "more-layers": (dict, {"num_hidden_layers": LAYERS + 1}, f"layers.{LAYERS}.input_layernorm"),
    "fewer-layers": (dict, {"num_hidden_layers": LAYERS - 1}, "without a place in the model"),
    "wider": (dict, {"intermediate_size": 24}, "[20, 16] for [24, 16]"),
    "bias": (
        lambda w: {**w, "model.layers.0.self_attn.q_proj.bias": torch.ones(12)},
        {},
        "q_proj.bias without a place",
    ),
    "adapter": (
        lambda w: {**w, "model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(2, 16)},
        {},
        "lora_A.weight without a place",
    ),
    "nothing": (lambda w: {}, {}, "model.embed_tokens.weight"),
}
"""Changes of the weights and the configuration, and what the refusal names."""


@pytest.mark.parametrize("name", UNFIT)
def test_files_that_do_not_match_the_model_are_refused(
    untied: Path, tmp_path: Path, name: str
) -> None:
    change, config, words = UNFIT[name]
    folder = edit_weights(copied(untied, tmp_path), change)
    edit_json(folder / "config.json", **config)
    for refusal in refusals(folder):
        assert words in refusal
        assert "do not fill its model" in refusal


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_missing_renamed_and_cut_tensors_are_named(
    untied: Path, tmp_path: Path, data: st.DataObject
) -> None:
    shutil.rmtree(tmp_path / "model", ignore_errors=True)
    folder = copied(untied, tmp_path)
    weights = load_file(folder / WEIGHTS)
    name = data.draw(st.sampled_from(sorted(weights)))
    kind = data.draw(st.sampled_from(["gone", "renamed", "cut"]))
    value = weights.pop(name)
    if kind == "renamed":
        weights[f"{name}_"] = value
    elif kind == "cut":
        weights[name] = value[:-1]
    save_file(weights, folder / WEIGHTS, {"format": "pt"})
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        load_teacher(str(folder))


def test_every_command_refuses_such_files(untied: Path, tmp_path: Path, lrc: Command) -> None:
    folder = edit_weights(copied(untied, tmp_path), without(LAST))
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time. " * 500)
    out = tmp_path / "out"
    shape = ["--teacher", folder, "--hidden-size", 8, "--text", text, "--out", out]
    for command in (
        ("train", *shape),
        ("compress", *shape, "--set", "teacher.load=layers"),
        ("info", folder),
        ("generate", folder, "Once"),
        ("eval", folder, "--tasks", "heldout", "--teacher", folder, "--text", text, "--out", out),
        ("prune", folder, "--ratio", 0.2, "--text", text, "--out", out),
        ("export", folder, tmp_path / "model.gguf"),
    ):
        assert f"model.{LAST}" in lrc.refusal(*command), command
        assert not out.exists(), command
    assert not (tmp_path / "model.gguf").exists()


def test_a_tied_head_may_be_missing(tied: Path, tmp_path: Path) -> None:
    """So may the embedding, if the head is there. Then a base model is complete too."""
    ids = torch.arange(9)[None]
    expected = load_teacher(str(tied)).model(ids).logits
    changes: list[Callable[[Weights], Weights]] = [
        lambda w: {n.removeprefix("model."): v for n, v in w.items()},
        lambda w: {n.replace("model.embed_tokens", "lm_head"): v for n, v in w.items()},
        lambda w: {**w, "lm_head.weight": w["model.embed_tokens.weight"].clone()},
        lambda w: {**w, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(3)},
    ]
    for number, change in enumerate(changes):
        folder = edit_weights(copied(tied, tmp_path / str(number)), change)
        teacher = load_teacher(str(folder))
        assert teacher.config.tie_word_embeddings
        assert teacher.model.lm_head.weight is teacher.model.model.embed_tokens.weight
        assert torch.equal(teacher.model(ids).logits, expected)
        assert load_skeleton(str(folder)).config.tie_word_embeddings


def test_a_separate_head_is_kept(untied: Path, tmp_path: Path) -> None:
    folder = copied(untied, tmp_path)
    expected = load_teacher(str(folder))
    edit_json(folder / "config.json", tie_word_embeddings=True)
    teacher = load_teacher(str(folder))
    assert not teacher.config.tie_word_embeddings
    assert "two matrices that differ: both are used" in teacher.notes[0]
    ids = torch.arange(9)[None]
    assert torch.equal(teacher.model(ids).logits, expected.model(ids).logits)
    assert not load_skeleton(str(folder)).config.tie_word_embeddings
    student = lrc.clone(
        teacher, hidden_size=8, text=str(save_text(tmp_path)), out=tmp_path / "run",
        settings=SHORT | {"data.cache": str(tmp_path / "cache")},
    ).student()  # fmt: skip
    assert not student.config.tie_word_embeddings


def test_a_head_that_is_the_rounded_embedding_can_be_tied(untied: Path, tmp_path: Path) -> None:
    def rounded(weights: Weights) -> Weights:
        embedding = weights["model.embed_tokens.weight"]
        noise = torch.randn(embedding.shape, generator=torch.Generator().manual_seed(0))
        return {**weights, "lm_head.weight": embedding + 0.005 * noise}

    folder = edit_weights(copied(untied, tmp_path), rounded)
    teacher = load_teacher(str(folder))
    assert "up to rounding (1." in teacher.notes[0]
    assert "teacher.tie_head: true" in teacher.notes[0]
    assert not teacher.config.tie_word_embeddings
    both = load_teacher(TeacherSection(model=str(folder), tie_head=True))
    assert both.config.tie_word_embeddings
    assert both.model.lm_head.weight is both.model.model.embed_tokens.weight
    assert not both.notes
    assert not load_teacher(str(untied)).notes


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "int8", "uint8", "int32"])
@pytest.mark.parametrize("pickled", [False, True])
def test_weights_that_need_scales_are_refused(
    untied: Path, tmp_path: Path, dtype: str, pickled: bool
) -> None:
    """Whatever the configuration says."""
    folder = copied(untied, tmp_path)
    name = "model.layers.1.mlp.up_proj.weight"
    weights = load_file(folder / WEIGHTS)
    weights[name] = weights[name].to(getattr(torch, dtype))
    if pickled:
        (folder / WEIGHTS).unlink()
        torch.save(weights, folder / "pytorch_model.bin")
    else:
        save_file(weights, folder / WEIGHTS, {"format": "pt"})
    with pytest.raises(UserError, match=rf"are quantized \({name}"):
        load_teacher(str(folder))


@pytest.mark.parametrize(
    "described",
    [
        {"quantization_config": {"quant_method": "modelopt", "quant_algo": "FP8"}},
        {"quantization_config": {"quant_method": "something-new"}},
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        {"quantization_config": {"quant_method": "awq", "bits": 4}},
        {"compression_config": {"format": "int-quantized"}},
        {"quantization_config": "yes"},
    ],
)
def test_quantized_models_are_refused_by_their_configuration(
    untied: Path, tmp_path: Path, described: dict[str, Any]
) -> None:
    folder = copied(untied, tmp_path)
    edit_json(folder / "config.json", **described)
    for refusal in refusals(folder):
        assert "are quantized" in refusal


@pytest.mark.parametrize("name", ["hf_quant_config.json", "quantize_config.json"])
def test_quantized_models_are_refused_by_their_quantization_file(
    untied: Path, tmp_path: Path, name: str
) -> None:
    folder = copied(untied, tmp_path)
    (folder / name).write_text(json.dumps({"quantization": {"quant_algo": "FP8"}}))
    for refusal in refusals(folder):
        assert f"see {name}" in refusal


def test_a_lora_adapter_beside_the_weights_is_refused(untied: Path, tmp_path: Path) -> None:
    folder = copied(untied, tmp_path)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    for refusal in refusals(folder):
        assert "merge it first" in refusal


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(
    untied: Path, tmp_path: Path, value: float
) -> None:
    def poisoned(weights: Weights) -> Weights:
        weights["model.norm.weight"][3] = value
        return weights

    folder = edit_weights(copied(untied, tmp_path), poisoned)
    with pytest.raises(UserError, match=r"not finite \(in model\.norm\.weight\)"):
        load_teacher(str(folder))


IMPOSSIBLE = st.one_of(
    st.sampled_from([None, True, "16", [], {}, 1.5, float("nan")]),
    st.integers(max_value=0),
    st.integers(min_value=10**8, max_value=10**30),
)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.sampled_from(
        ["hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
         "vocab_size"]
    ),
    IMPOSSIBLE,
)  # fmt: skip
def test_impossible_sizes_are_refused_before_anything_is_built(
    untied: Path, tmp_path: Path, name: str, value: Any
) -> None:
    shutil.rmtree(tmp_path / "model", ignore_errors=True)
    folder = copied(untied, tmp_path)
    edit_json(folder / "config.json", **{name: value})
    with pytest.raises(UserError, match=name):
        load_skeleton(str(folder))


# GGUF


def test_a_gguf_file_gives_the_model_of_its_folder(untied: Path, good_gguf: Path) -> None:
    ids = torch.arange(12)[None]
    theirs, ours = (load_teacher(str(path)).model(ids).logits for path in (untied, good_gguf))
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)
    tokens = [load_tokenizer(str(path))(list(PROBES))["input_ids"] for path in (untied, good_gguf)]
    assert tokens[0] == tokens[1]


def test_heads_of_another_width_are_read_from_gguf(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "qwen3")
    convert_to_gguf(str(folder), tmp_path / "model.gguf")
    ids = torch.arange(12)[None]
    theirs, ours = (
        load_teacher(str(p)).model(ids).logits for p in (folder, tmp_path / "model.gguf")
    )
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)


CHANGED_GGUF: dict[str, tuple[dict[str, Any], str]] = {
    "no head, though two are asked for": ({"without": ["blk.1.ffn_up.weight"]}, "up_proj.weight"),
    "bias": ({"tensors": {"blk.0.attn_q.bias": [0.1] * 12}}, "blk.0.attn_q.bias"),
    "rotary factors": ({"tensors": {"rope_freqs.weight": [1.0] * 3}}, "rope_freqs.weight"),
    "another layer": ({"tensors": {"blk.2.ffn_norm.weight": [1.0] * 16}}, "blk.2.ffn_norm.weight"),
    "one part of two": ({"settings": {"split.count": 2}}, "one of 2 parts"),
    "scaling": (
        {"settings": {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}},
        "llama.rope.scaling.type = yarn",
    ),
    "experts": ({"settings": {"llama.expert_count": 8}}, "llama.expert_count = 8"),
    "half the rotation": ({"settings": {"llama.rope.dimension_count": 4}}, "rope.dimension_count"),
    "logits": ({"settings": {"llama.logit_scale": 0.5}}, "llama.logit_scale = 0.5"),
    "endless layers": ({"settings": {"llama.block_count": 10**9}}, "num_hidden_layers"),
    "no epsilon": (
        {"without": ["llama.attention.layer_norm_rms_epsilon"]},
        "lacks the settings llama.attention.layer_norm_rms_epsilon",
    ),
}


@pytest.mark.parametrize("name", CHANGED_GGUF)
def test_gguf_files_that_would_give_another_model_are_refused(
    good_gguf: Path, tmp_path: Path, name: str
) -> None:
    changes, words = CHANGED_GGUF[name]
    path = rewrite_gguf(good_gguf, tmp_path / "changed.gguf", **changes)
    for load in (load_teacher, load_skeleton, load_model):
        with pytest.raises(UserError) as error:
            load(str(path))
        assert words in str(error.value)


def test_a_qwen2_gguf_that_would_lose_its_biases_is_refused(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "qwen2")
    convert_to_gguf(str(folder), tmp_path / "model.gguf")
    with pytest.raises(UserError, match=r"blk\.0\.attn_k\.bias"):
        load_model(str(tmp_path / "model.gguf"))
    scaled = save_model(tmp_path / "scaled", rope_parameters=dict(LLAMA3_ROPE))
    convert_to_gguf(str(scaled), tmp_path / "scaled.gguf")
    with pytest.raises(UserError, match=r"rope_freqs\.weight"):
        load_model(str(tmp_path / "scaled.gguf"))


PADDING = 32
"""A GGUF file ends with less padding than this."""


@settings(max_examples=60, deadline=None)
@given(st.floats(0, 1), st.integers(0, 7))
def test_damaged_gguf_headers_are_refused(good_gguf: Path, place: float, bit: int) -> None:
    data = bytearray(good_gguf.read_bytes())
    path = good_gguf.with_name("case.gguf")
    path.write_bytes(data[: int(place * (len(data) - PADDING))])
    with pytest.raises(UserError):
        load_skeleton(str(path))
    data[int(place * 4000)] ^= 1 << bit
    path.write_bytes(data)
    with suppress(UserError):
        load_skeleton(str(path))


def test_a_gguf_vocabulary_is_that_of_the_file(good_gguf: Path, tmp_path: Path) -> None:
    """Without the token that transformers adds to every byte-level vocabulary."""
    fields = byte_level_bpe()
    names = fields.convert_ids_to_tokens(range(len(fields) + 3))
    renamed = ["<|other|>" if name == "<|endoftext|>" else name for name in names[: len(fields)]]
    tokens = [*renamed, "[P0]", "[P1]", "[P2]"]
    path = rewrite_gguf(good_gguf, tmp_path / "renamed.gguf", {"tokenizer.ggml.tokens": tokens})
    teacher = load_teacher(str(path))
    assert "<|endoftext|>" not in teacher.tokenizer.get_vocab()
    assert max(teacher.tokenizer.get_vocab().values()) < teacher.model.lm_head.weight.shape[0]
    texts = [text for text in PROBES if "endoftext" not in text]
    assert teacher.tokenizer(texts)["input_ids"] == fields(texts)["input_ids"]


@pytest.mark.parametrize("rule", ["smollm", "starcoder"])
def test_digits_are_split_as_the_gguf_file_says(good_gguf: Path, tmp_path: Path, rule: str) -> None:
    path = rewrite_gguf(good_gguf, tmp_path / "a.gguf", {"tokenizer.ggml.pre": rule})
    tokenizer = load_tokenizer(str(path))
    pieces = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("in 1234 days")
    assert [piece for piece, _ in pieces] == ["in", "Ġ", "1", "2", "3", "4", "Ġdays"]


@pytest.mark.parametrize("change", [{"settings": {"tokenizer.ggml.pre": "deepseek-llm"}},
                                    {"without": ["tokenizer.ggml.pre"]}])  # fmt: skip
def test_an_unknown_pre_tokenizer_is_refused(
    good_gguf: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    path = rewrite_gguf(good_gguf, tmp_path / "a.gguf", **change)
    with pytest.raises(UserError, match=r"its tokens would be wrong"):
        load_tokenizer(str(path))


# Tokenizers


def test_a_tokenizer_is_that_of_the_file_even_if_transformers_rewrites_it(
    untied: Path, tmp_path: Path
) -> None:
    """A folder of type Qwen2 whose tokenizer.json, unlike Qwen2's, keeps digits together."""
    folder = copied(untied, tmp_path)
    edit_json(folder / "tokenizer_config.json", tokenizer_class="Qwen2Tokenizer")
    description = json.loads((folder / "tokenizer.json").read_text())
    description["model"]["merges"].append(["1", "2"])
    description["model"]["vocab"]["12"] = twelve = len(byte_level_bpe())
    (folder / "tokenizer.json").write_text(json.dumps(description))
    text = "in 1212 days"
    assert twelve not in AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
    tokenizer = load_tokenizer(str(folder))
    assert tokenizer(text)["input_ids"].count(twelve) == 2
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")
    assert tokenizer.chat_template


def test_a_tokenizer_that_differs_from_its_file_is_refused(
    untied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizers_of_ours, "_agree", lambda *_: False)
    with pytest.raises(UserError, match="as the file describes it"):
        load_tokenizer(str(untied))


def test_prompts_begin_with_bos_and_do_not_end_with_eos(untied: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = load_tokenizer(str(untied))
    bare = tokenizer("Once upon", add_special_tokens=False)["input_ids"]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    assert tokenizer("Once upon")["input_ids"] == [0, *bare, 1]
    assert plain_ids(tokenizer, "Once upon") == [0, *bare]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    assert plain_ids(tokenizer, "Once upon") == bare


MESSAGES = [{"role": "user", "content": "Hello"}]


def test_a_chat_template_that_does_not_end_is_stopped(
    untied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lrc.model.tokenizer.TEMPLATE_SECONDS", 1)
    tokenizer = load_tokenizer(str(untied))
    ring = "{% for a in range(90000) %}" * 3 + "{% endfor %}" * 3
    for endless in (
        ring,
        "{{ 'a' * 90000000000 }}",
        "{% set x = 'a' * 2000000000 %}{{ x }}{{ x }}",
    ):
        tokenizer.chat_template = endless
        with pytest.raises(UserError, match=r"needs more than 1 s or 1 GiB"):
            chat_text(tokenizer, MESSAGES)


@pytest.mark.parametrize(
    "template",
    ["{{ raise_exception('no system turn') }}", "{% for %}", "{{ messages[7]['role'] }}",
     "{{ 1 / 0 }}", "{{ ''.__class__.__mro__ }}"],
)  # fmt: skip
def test_a_chat_template_that_fails_is_reported_in_one_line(untied: Path, template: str) -> None:
    tokenizer = load_tokenizer(str(untied))
    tokenizer.chat_template = template
    with pytest.raises(UserError) as error:
        chat_text(tokenizer, MESSAGES)
    assert "\n" not in str(error.value)


def test_several_chat_templates_need_a_default(untied: Path, tmp_path: Path, lrc: Command) -> None:
    folder = copied(untied, tmp_path)
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    more = folder / "additional_chat_templates"
    more.mkdir()
    (more / "tools.jinja").write_text(template)
    assert "several chat templates (tools) and none called 'default'" in lrc.refusal(
        "generate", folder, "Once", "--chat", "--max-new-tokens", 2
    )


# Where models are found


def test_no_code_of_a_model_folder_is_run(
    untied: Path, tmp_path: Path, lrc: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    marker = tmp_path / "ran"
    folder = copied(untied, tmp_path)
    for name in ("configuration_x.py", "modeling_x.py", "tokenization_x.py"):
        code = f"open({str(marker)!r}, 'w')\nclass A: pass\n"
        (folder / name).write_text(code)
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(f"open({str(marker)!r}, 'w')\n")
    auto = {
        "AutoConfig": "configuration_x.A",
        "AutoModelForCausalLM": "modeling_x.A",
        "AutoTokenizer": ["tokenization_x.A", None],
    }
    edit_json(folder / "config.json", auto_map=auto)
    edit_json(
        folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization_x.A", None]}
    )
    ids = torch.arange(5)[None]
    ours = load_teacher(str(folder)).model(ids).logits
    assert torch.equal(ours, load_teacher(str(untied)).model(ids).logits)
    edit_json(folder / "config.json", model_type="x")
    for command in (("info", folder), ("generate", folder, "x"), ("eval", folder)):
        lrc.refusal(*command)
    assert not marker.exists()


def test_a_package_is_found_without_being_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "my_model"
    (package / "inner").mkdir(parents=True)
    for folder in (package, package / "inner"):
        (folder / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "inner" / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert locate("package:my-model").gguf_path == package / "inner" / "model.gguf"
    for name in ("my_model.inner", "my_model.inner.x", "..my_model", "no-such", ""):
        with pytest.raises(UserError, match="is not installed"):
            locate(f"package:{name}")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("models/mistyped", "There is no folder 'models/mistyped'"),
        ("models/deep/er", "There is no folder"),
        ("./x", "There is no folder"),
        ("~/no/such", "There is no folder"),
        ("a b", "There is no folder"),
        ("", "is empty"),
        ("models/file", "is a file, but not a model"),
        ("models", "holds no config.json"),
        ("x.gguf", "There is no file 'x.gguf'"),
    ],
)
def test_mistyped_paths_are_not_looked_up_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, words: str
) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "file").write_text("x")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lrc.system.hub.hub_problem", lambda: pytest.fail("the hub was asked"))
    with pytest.raises(UserError) as error:
        locate(name)
    assert words in str(error.value)


def test_hub_models_come_from_the_cache(
    untied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub is not asked about what is in the cache."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    store = tmp_path / "models--org--name"
    (store / "refs").mkdir(parents=True)
    (store / "refs" / "main").write_text(commit)
    shutil.copytree(untied, store / "snapshots" / commit)
    download = partial(huggingface_hub.snapshot_download, cache_dir=tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr("lrc.system.hub.hub_problem", lambda: "there is none")
    files = locate("org/name")
    assert (files.folder.name, files.commit) == (commit, commit)
    ids = torch.arange(5)[None]
    ours = load_teacher("org/name").model(ids).logits
    assert torch.equal(ours, load_teacher(str(untied)).model(ids).logits)
    with pytest.raises(UserError, match=r"no model 'org/other' on this machine and the hub cannot"):
        locate("org/other")


@pytest.fixture
def hub(
    untied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Path, list[str]]]:
    """A hub on this machine with one model, org/name: its folder, and what was downloaded."""
    folder = copied(untied, tmp_path)
    commit, asked = "0" * 40, []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            content = b""
            _, _, name = self.path.partition(f"/resolve/{commit}/")
            if name:
                content = (folder / name).read_bytes()
            elif self.path.startswith("/api/models/org/name"):
                paths = sorted(path.name for path in folder.iterdir())
                tree = [{"type": "file", "path": p, "size": 1, "oid": p} for p in paths]
                files = [{"rfilename": p} for p in paths]
                about = {"id": "org/name", "sha": commit, "siblings": files}
                content = json.dumps(tree if "/tree/" in self.path else about).encode()
            if name and self.command == "GET":
                asked.append(name)
            self.send_response(200)
            self.send_header("X-Repo-Commit", commit)
            self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", address)
    template = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("lrc.system.hub.hub_problem", lambda: None)
    download = partial(
        huggingface_hub.snapshot_download, cache_dir=tmp_path / "cache", endpoint=address
    )
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(huggingface_hub, "HfApi", partial(huggingface_hub.HfApi, endpoint=address))
    yield folder, asked
    server.shutdown()
    thread.join()


REFUSED = {
    "are quantized (awq)": {"quantization_config": {"quant_method": "awq", "bits": 4}},
    "are quantized (gptq)": {"quantization_config": {"quant_method": "gptq", "bits": 4}},
    "'gpt2' are not supported": {"model_type": "gpt2"},
}


@pytest.mark.parametrize("words", REFUSED)
def test_a_hub_model_is_refused_by_its_configuration_alone(
    hub: tuple[Path, list[str]], words: str
) -> None:
    folder, asked = hub
    edit_json(folder / "config.json", **REFUSED[words])
    with pytest.raises(UserError) as error:
        load_teacher("org/name")
    assert words in str(error.value)
    assert asked == ["config.json"]


def test_a_hub_model_is_downloaded_once(hub: tuple[Path, list[str]], untied: Path) -> None:
    folder, asked = hub
    (folder / "pytorch_model.bin").write_bytes(b"the same again")
    teacher = load_teacher("org/name")
    load_teacher("org/name")
    assert torch.equal(teacher.model.lm_head.weight, load_teacher(str(untied)).model.lm_head.weight)
    assert sorted(asked) == sorted({path.name for path in untied.iterdir()})


def test_git_lfs_pointers_are_reported(untied: Path, tmp_path: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 5\n"
    for name in (WEIGHTS, "config.json", "tokenizer.json"):
        folder = copied(untied, tmp_path / name)
        (folder / name).write_text(pointer)
        with pytest.raises(UserError, match=r"git lfs pull"):
            load_teacher(str(folder))


def test_pickled_weights_are_read_without_running_code(untied: Path, tmp_path: Path) -> None:
    folder = copied(untied, tmp_path)
    weights = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    ids = torch.arange(5)[None]
    ours = load_teacher(str(folder)).model(ids).logits
    assert torch.equal(ours, load_teacher(str(untied)).model(ids).logits)
    marker = tmp_path / "ran"

    class Evil:
        def __reduce__(self) -> Any:
            return open, (str(marker), "w")

    torch.save({"x": Evil()}, folder / "pytorch_model.bin")
    with pytest.raises(UserError):
        load_teacher(str(folder))
    assert not marker.exists()


def test_a_sound_folder_loads_as_in_transformers(untied: Path) -> None:
    ids = torch.arange(9)[None]
    plain = AutoModelForCausalLM.from_pretrained(untied)
    assert torch.equal(load_teacher(str(untied)).model(ids).logits, plain(ids).logits)
