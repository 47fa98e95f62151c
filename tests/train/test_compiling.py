"""`train.compile`: the same run with torch.compile."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch._inductor import config as inductor

from lrc.baselines.lora import add_adapters
from lrc.system.errors import UserError
from lrc.train.compiling import check_compiler, small_modules
from tiny import LLAMAS, tiny_teacher
from tiny_runs import go, new_run


@pytest.mark.parametrize("family", LLAMAS)
def test_the_small_modules_are_norms_and_activation_functions(family: str) -> None:
    teacher = tiny_teacher(family)
    paths = {module: path for path, module in teacher.model.named_modules()}
    found = [paths[module] for module in small_modules(teacher.model)]
    inside = {"input_layernorm", "post_attention_layernorm", "mlp.act_fn"}
    if family == "qwen3":
        inside |= {"self_attn.q_norm", "self_attn.k_norm"}
    expected = {f"model.layers.{i}.{name}" for i in range(teacher.num_layers) for name in inside}
    assert set(found) == expected | {"model.norm"}
    assert len(found) == len(set(found))


def test_a_compiled_run_is_the_same(tmp_path: Path) -> None:
    family = "qwen3"  # its norms have two ranks
    plain, compiled = new_run(tmp_path), new_run(tmp_path, name="compiled", compile=True)
    counters = torch._dynamo.utils.counters
    torch._dynamo.reset()
    counters.clear()
    go(plain, family)
    assert not counters["stats"]["unique_graphs"]
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        go(compiled, family)
    assert counters["stats"]["unique_graphs"] > 0
    assert not counters["graph_break"]

    def losses(run: Path) -> list[float]:
        lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        return [line["loss"] for line in lines if "loss" in line]

    assert len(losses(compiled.folder)) == 10
    assert losses(compiled.folder) == pytest.approx(losses(plain.folder), rel=1e-5)
    ours, theirs = (
        load_file(run.folder / "student" / "model.safetensors") for run in (compiled, plain)
    )
    assert set(ours) == set(theirs)
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-6)


def test_adapters_are_not_small_modules() -> None:
    pytest.importorskip("peft")
    teacher = tiny_teacher("llama")
    before = list(small_modules(teacher.model))
    add_adapters(teacher.model, rank=2, alpha=4.0, seed=0)
    after = list(small_modules(teacher.model))
    assert len(after) == len(before)
    assert all(one is other for one, other in zip(after, before, strict=True))


def test_compiling_is_refused_with_gradient_checkpointing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be used together"):
        new_run(tmp_path, compile=True, gradient_checkpointing=True)


def test_a_missing_compiler_is_reported() -> None:
    torch._dynamo.reset()
    missing = {"cpp.cxx": (None, "/no/such/compiler"), "force_disable_caches": True}
    with inductor.patch(missing), pytest.raises(UserError, match=r"Install a C\+\+ compiler"):
        check_compiler(torch.device("cpu"))
