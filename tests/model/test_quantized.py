"""Quantized weights that transformers turns back into plain numbers."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_multimodal import wrapped
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from lrc.model.settings import DEQUANTIZED
from lrc.model.teacher import load_teacher
from lrc.preflight import check_recipe
from lrc.recipe import make_recipe
from lrc.recipe.sections import TeacherSection
from lrc.system.errors import UserError
from tiny import tiny_teacher, tiny_tokenizer

BLOCK = 128


def fp8(name: str, value: Tensor) -> tuple[dict[str, Tensor], Tensor] | None:
    """A weight in fp8 with its scale, and its value."""
    if "_proj" not in name:
        return None
    scale = value.float().abs().max() / 448
    stored = (value.float() / scale).to(torch.float8_e4m3fn)
    scales = torch.full([-(-size // BLOCK) for size in value.shape], float(scale))
    return {name: stored, f"{name}_scale_inv": scales}, stored.float() * scale


def mxfp4(name: str, value: Tensor) -> tuple[dict[str, Tensor], Tensor] | None:
    """Random experts in mxfp4, as gpt-oss stores them, and their values."""
    if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
        return None
    experts, read, written = value.shape
    blocks = torch.randint(0, 256, (experts, written, read // 32, 16), dtype=torch.uint8)
    scales = torch.randint(122, 126, (experts, written, read // 32), dtype=torch.uint8)
    stored = {f"{name}_blocks": blocks, f"{name}_scales": scales}
    return stored, convert_moe_packed_tensors(blocks, scales).float()


def channels(name: str, value: Tensor) -> tuple[dict[str, Tensor], Tensor] | None:
    """A weight in fp8 with a scale for each row, as compressed-tensors stores it, and its value."""
    if "_proj" not in name:
        return None
    scale = (value.float().abs().amax(1, keepdim=True) / 448).bfloat16()
    stored = (value.float() / scale).to(torch.float8_e4m3fn)
    return {name: stored, f"{name}_scale": scale}, (stored.bfloat16() * scale).float()


FP8_ROWS = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}

CASES = {
    "fp8": ("qwen3", fp8, {"activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}),
    "mxfp4": ("gpt_oss", mxfp4, {}),
    "compressed-tensors": (
        "qwen3",
        channels,
        {
            "format": "float-quantized",
            "quantization_status": "compressed",
            "ignore": ["lm_head"],
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": FP8_ROWS}},
        },
    ),
}


def quantized(kind: str, folder: Path) -> dict[str, Tensor]:
    """Save a quantized model; return the values of its weights."""
    family, quantize, settings = CASES[kind]
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 32}
    tiny_teacher(family, dtype=torch.bfloat16, **sizes).model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    torch.manual_seed(0)
    stored, meant = {}, {}
    for name, value in load_file(folder / "model.safetensors").items():
        found = quantize(name, value)
        if found is None:
            stored[name] = value
        else:
            stored |= found[0]
            meant[name] = found[1]
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": kind, **settings}
    (folder / "config.json").write_text(json.dumps(config))
    return meant


@pytest.mark.parametrize("kind", CASES)
def test_quantized_weights_are_read_as_their_values(kind: str, tmp_path: Path) -> None:
    if package := DEQUANTIZED[kind]:
        pytest.importorskip(package)
    meant = quantized(kind, tmp_path / "model")
    assert meant
    check_recipe(
        make_recipe(
            {
                "teacher": {"model": str(tmp_path / "model")},
                "student": {"hidden_size": 32},
                "data": {"text": ["stdlib-docs"]},
            }
        )
    )
    teacher = load_teacher(TeacherSection(model=str(tmp_path / "model"), dtype="float32"))
    for name, value in meant.items():
        torch.testing.assert_close(teacher.parameter(name), value, rtol=0, atol=0)
    assert {p.dtype for p in teacher.model.parameters()} == {torch.float32}


@pytest.mark.parametrize("bits", [4, 8])
def test_bitsandbytes_weights_are_read_as_plain_numbers(bits: int, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 32}
    plain = tiny_teacher("qwen3", dtype=torch.bfloat16, **sizes).model
    plain.save_pretrained(tmp_path / "plain")
    how = BitsAndBytesConfig(
        load_in_4bit=bits == 4, load_in_8bit=bits == 8, bnb_4bit_quant_type="nf4"
    )
    packed = AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", quantization_config=how, device_map="cpu", dtype=torch.bfloat16
    )
    packed.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    teacher = load_teacher(TeacherSection(model=str(tmp_path / "model"), dtype="float32"))
    for name, value in plain.named_parameters():
        found = teacher.parameter(name)
        assert (found.dtype, found.shape) == (torch.float32, value.shape)
        assert (found - value).norm() < {4: 0.12, 8: 0.01}[bits] * value.norm()
    assert not hasattr(teacher.config, "quantization_config")
    path = tmp_path / "model" / "model.safetensors"
    mark = {4: ".absmax", 8: ".SCB"}[bits]
    kept = {name: value for name, value in load_file(path).items() if not name.endswith(mark)}
    save_file(kept, path, metadata={"format": "pt"})
    with pytest.raises(UserError):
        load_teacher(TeacherSection(model=str(tmp_path / "model")))


@pytest.mark.parametrize("kind", [kind for kind, package in DEQUANTIZED.items() if package])
def test_a_missing_package_for_quantized_weights_is_named(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_teacher("qwen3").model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": kind}
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(UserError, match=f"pip install {kind}`"):
        load_teacher(str(tmp_path))


@pytest.mark.parametrize("outer", ["mistral3", "qwen3_5"])
@pytest.mark.parametrize("static", [False, True])
def test_the_quantized_text_model_of_a_multimodal_one(
    outer: str, static: bool, tmp_path: Path
) -> None:
    """With scales by block, or one for each weight and one for its inputs, as Ministral 3."""
    wrapped(outer, {"mistral3": "ministral3", "qwen3_5": "qwen3_5_text"}[outer], tmp_path)
    before = load_teacher(str(tmp_path))
    stored = {}
    for name, value in load_file(tmp_path / "model.safetensors").items():
        found = fp8(name, value) if "language_model" in name else None
        stored |= {name: value} if found is None else found[0]
        if found is not None and static:
            linear = name.removesuffix(".weight")
            stored[f"{name}_scale_inv"] = stored[f"{name}_scale_inv"][0, 0].clone()
            stored[f"{linear}.activation_scale"] = torch.tensor(0.5)
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    blocks = None if static else [BLOCK, BLOCK]
    scheme = "static" if static else "dynamic"
    how = {"quant_method": "fp8", "activation_scheme": scheme, "weight_block_size": blocks}
    config["quantization_config"] = how
    (tmp_path / "config.json").write_text(json.dumps(config))
    teacher = load_teacher(TeacherSection(model=str(tmp_path), dtype="float32"))
    for name, value in before.model.named_parameters():
        difference = (teacher.parameter(name) - value).norm()
        assert 0 < difference < 0.05 * value.norm() if "_proj" in name else difference == 0, name


def test_quantized_layers_cannot_stay_on_the_disk(tmp_path: Path) -> None:
    quantized("fp8", tmp_path / "model")
    with pytest.raises(UserError, match=r"quantized \(fp8\).*teacher\.load to full"):
        load_teacher(TeacherSection(model=str(tmp_path / "model"), load="layers"))


@pytest.mark.parametrize(("kind", "end"), [("fp8", "_scale_inv"), ("mxfp4", "_scales")])
def test_quantized_weights_without_scales_are_refused(kind: str, end: str, tmp_path: Path) -> None:
    quantized(kind, tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    gone = next(name for name in tensors if name.endswith(end))
    kept = {name: value.clone() for name, value in tensors.items() if name != gone}
    save_file(kept, path, metadata={"format": "pt"})
    with pytest.raises(UserError):
        load_teacher(TeacherSection(model=str(tmp_path / "model")))
