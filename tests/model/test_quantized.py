"""Quantized weights that transformers turns back into plain numbers."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

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


CASES = {
    "fp8": ("qwen3", fp8, {"activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}),
    "mxfp4": ("gpt_oss", mxfp4, {}),
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
