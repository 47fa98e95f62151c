"""Steps and runs with the Triton kernels and liger-kernel's modules, against plain torch."""

import copy
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

pytest.importorskip("triton")
pytest.importorskip("liger_kernel")

import triton
import triton.language as tl
from liger_kernel.ops import geglu, rms_norm
from triton.runtime import interpreter

from lrc.baselines.plain import PlainStudent
from lrc.cloning.activations import observe
from lrc.cloning.kernels import liger, vocabulary
from lrc.cloning.kernels.liger import FAMILIES, apply_liger
from lrc.cloning.low_rank_clone import LowRankClone
from lrc.methods import METHODS
from lrc.model.families import FAMILIES as KNOWN
from lrc.model.student import plain_view
from lrc.model.teacher import Teacher
from lrc.recipe.sections import ObjectiveSection, StudentSection
from lrc.train import train
from tiny import STUDENT_HIDDEN, gradients, randomize, tiny_batch, tiny_teacher
from tiny_runs import new_run

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")


@triton.jit
def _rsqrt(x):
    return 1 / tl.sqrt(x)


@pytest.fixture(autouse=True)
def interpretable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give Triton's interpreter what it lacks for liger-kernel's kernels: functions of CUDA's
    libdevice, and float arguments that are tensors."""
    if GPU:
        return
    monkeypatch.setattr(rms_norm, "rsqrt", _rsqrt)
    monkeypatch.setattr(geglu, "tanh", vocabulary._tanh)
    convert = interpreter._implicit_cvt

    def converted(argument: object) -> object:
        if not isinstance(argument, float):
            return convert(argument)
        value = interpreter.TensorHandle(np.array([argument], dtype=np.float32), tl.float32)
        return tl.tensor(value, tl.float32)

    monkeypatch.setattr(interpreter, "_implicit_cvt", converted)


def placed_teacher(family: str) -> Teacher:
    """A tiny teacher where Triton's kernels can run."""
    teacher = tiny_teacher(family, dtype=torch.float32)
    teacher.model.to(DEVICE)
    return teacher


def step(
    family: str, kernels: str, checkpointing: bool = False, clip: float = 5.0
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Losses and gradients of a step of two micro-batches, one of them padded."""
    teacher = placed_teacher(family)
    method = LowRankClone(
        teacher,
        StudentSection(hidden_size=STUDENT_HIDDEN),
        ObjectiveSection(chunk_tokens=7, temperature=2.0),
        checkpointing,
        token_grad_clip=clip,
        kernels="triton" if kernels == "triton" else "torch",
    )
    randomize(method.projections.values, 1)
    if kernels == "triton":
        assert apply_liger(teacher.model, method.model) is None
    device = teacher.model.device
    batches = tiny_batch(1, 5).to(device), tiny_batch(2, 4, seed=4, lengths=[4, 2]).to(device)
    return gradients(method, *batches)


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert set(ours) == set(theirs)
    for name, value in theirs.items():
        distance = (ours[name] - value).nan_to_num().norm() / value.nan_to_num().norm()
        assert distance < 1e-5, name


QUICK = "gemma2"
"""Differs most; the interpreter takes seconds for each."""


@pytest.mark.parametrize(
    "family",
    [pytest.param(f, marks=() if f == QUICK else pytest.mark.slow) for f in sorted(FAMILIES)],
)
def test_a_step_is_the_same(family: str) -> None:
    """With all clone terms and clipping, which the kernels work around."""
    for ours, theirs in zip(step(family, "triton"), step(family, "torch"), strict=True):
        assert_close(ours, theirs)


@pytest.mark.parametrize("clip", [pytest.param(0.0, marks=pytest.mark.slow), 1.0])
def test_a_step_that_runs_layers_again_is_the_same(clip: float) -> None:
    pairs = zip(
        step("qwen3", "triton", True, clip), step("qwen3", "torch", True, clip), strict=True
    )
    for ours, theirs in pairs:
        assert_close(ours, theirs)


def test_every_family_is_known() -> None:
    assert set(KNOWN) >= FAMILIES


def test_only_the_given_model_changes() -> None:
    """Neither others of its class nor transformers' module."""
    model = tiny_teacher("llama", dtype=torch.float32).model
    names = vars(sys.modules[type(model).__module__])
    before = dict(names)
    apply_liger(model)
    assert names == before
    assert "Liger" in repr(model)
    other = tiny_teacher("llama", dtype=torch.float64).model
    assert "Liger" not in repr(other)
    assert other(tiny_batch().input_ids).logits.dtype == torch.float64


def test_queries_and_keys_stay_as_they_are() -> None:
    """liger-kernel's rotary embedding would overwrite what the clone terms keep."""
    teacher = placed_teacher("llama")
    apply_liger(teacher.model)
    kept: list[tuple[Tensor, Tensor]] = []
    sites = [site for site in teacher.layout.observable() if site.name in "qk"]

    def keep(_site: object, _inputs: Tensor, output: Tensor) -> Tensor:
        kept.append((output, output.clone()))
        return output

    with torch.no_grad(), observe(teacher.model, teacher.layout, sites, keep):
        teacher.model(tiny_batch().input_ids.to(DEVICE))
    assert len(kept) == len(sites)
    assert all(torch.equal(output, before) for output, before in kept)


def test_a_plain_view_is_without_it() -> None:
    """So the student is measured as it is exported, and a copy may move to a CPU."""
    model = placed_teacher("qwen3").model
    plain = copy.deepcopy(model)
    apply_liger(model)
    ids = tiny_batch().input_ids.to(DEVICE)
    assert torch.equal(plain_view(model)(ids).logits, plain(ids).logits)
    assert not torch.equal(model(ids).logits, plain(ids).logits)


def test_float64_models_stay_as_they_are() -> None:
    model = tiny_teacher("llama").model
    assert apply_liger(model) is None
    assert "Liger" not in repr(model)


def test_a_note_says_where_it_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "mixtral" in str(apply_liger(tiny_teacher("mixtral").model))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "low-rank-clone[cuda]" in str(apply_liger(tiny_teacher("llama").model))


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"release_at": 0.5}, {"precision": "bfloat16"}])
def test_a_run_is_the_same(
    tmp_path: Path, settings: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a few steps, from the recipe's switch on."""
    exact = "precision" not in settings
    if not (exact or GPU):  # the interpreter cannot multiply bfloat16, which liger-kernel does
        monkeypatch.setattr(liger, "FAMILIES", frozenset())
    losses, students = {}, {}
    calls: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        kernel = vocabulary.losses_in_place
        patch.setattr(
            vocabulary,
            "losses_in_place",
            lambda *args, **named: calls.append(str(args[0].dtype)) or kernel(*args, **named),
        )
        for kernels in ("torch", "triton"):
            short = {"tokens": 64, "eval_sequences": 1, "precision": "float32", **settings}
            run = new_run(tmp_path, name=kernels, kernels=kernels, **short)
            teacher = tiny_teacher("llama", dtype=torch.float32)
            train(run, teacher)
            lines = map(json.loads, run.metrics_file.read_text().splitlines())
            losses[kernels] = [line["loss"] for line in lines if "loss" in line]
            students[kernels] = load_file(run.folder / "student" / "model.safetensors")
            dtype = "torch.bfloat16" if "precision" in settings else "torch.float32"
            assert set(calls) == ({dtype} if kernels == "triton" else set())
    assert len(losses["triton"]) == 2
    assert losses["triton"] == pytest.approx(losses["torch"], rel=1e-5 if exact else 1e-2)
    if exact:
        for name, value in students["torch"].items():
            torch.testing.assert_close(students["triton"][name], value, rtol=1e-3, atol=1e-5)


def test_other_methods_use_the_switch(tmp_path: Path) -> None:
    run = new_run(tmp_path, kernels="triton")
    teacher = placed_teacher("llama")
    method = METHODS["scratch"].build(teacher, run.recipe)
    assert isinstance(method, PlainStudent)
    assert method.distill.triton
