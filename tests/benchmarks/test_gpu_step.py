"""`benchmarks/gpu_step.py`, tiny, where there is no GPU, and what it does with a GPU's answers."""

import json
import sys
import warnings
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from lrc.cloning import token_clipping
from lrc.train import cuda_graph

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_step.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = spec_from_file_location("gpu_step", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules["gpu_step"] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


def test_every_part_is_measured(
    tmp_path: Path, script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the command line."""
    out = tmp_path / "found.json"
    monkeypatch.setattr(script, "GPU", False)
    monkeypatch.setattr(script, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(sys, "argv", ["gpu_step.py", "--tiny", "--out", str(out)])
    script.main()
    found = json.loads(out.read_text())
    kinds = [f"{kind}, micro-batch 1" for kind in ("projected", "released", "distilled")]
    parts = ["KL and LM, chunk 4", "clone term and clipping, width 16", *kinds, "floor, eager"]
    for part in parts:
        value = found[f"tiny: {part}, torch"]
        assert isinstance(value, dict), value
        assert all(number > 0 for number in value.values())
    kernels = found["tiny: kernels of projected, torch"]
    assert {"elementwise", "product", "attention"} <= set(kernels)


def test_a_graph_is_recorded_before_its_steps_are_timed(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    did: list[str] = []

    class Recorder:
        """Does at once what it should record."""

        def __init__(self, _device: torch.device) -> None: ...

        def warm(self, work: Any) -> Any:
            did.append("warm")
            return work()

        def record(self, work: Any) -> Any:
            did.append("record")
            return lambda: did.append("replay"), work()

    monkeypatch.setattr(script, "GPU", False)
    monkeypatch.setattr(script, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(cuda_graph, "CudaRecorder", Recorder)
    monkeypatch.setattr(cuda_graph, "obstacle", lambda *_: None)
    benchmark = script.Benchmark("tiny", script.TINY, script.Report(None, 8.0), 1e12, 1e10, 2)
    found = benchmark.steps("torch", 1, "projected", graph=True)
    assert found["ms"] > 0
    # The passes and the projections after them, then those before them.
    recorded = ["record", "replay"] * 3 + ["replay"] * 2
    assert did == ["warm"] * cuda_graph.WARM_UP + recorded + ["replay"] * 6


@pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")
def test_the_kernels_are_measured(script: ModuleType) -> None:
    """Their parts alone: whole steps take too long in Triton's interpreter."""
    report = script.Report(None, 8.0)
    script.Benchmark("tiny", script.TINY, report, 1e12, 1e10, 1).parts("triton")
    assert len(report.found) == 3
    assert all(isinstance(value, dict) for value in report.found.values()), report.found


def test_nothing_starts_in_the_last_minute(
    tmp_path: Path, script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "found.json"
    arguments = ["gpu_step.py", "--tiny", "--kernels", "torch", "--minutes", "1", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", arguments)
    script.main()
    found = json.loads(out.read_text())
    skipped = [name for name, value in found.items() if value == "not measured: no time left"]
    assert len(skipped) == len(found) - 2  # all but the machine and the seconds


def test_what_is_measured_can_be_chosen(script: ModuleType) -> None:
    report = script.Report(None, 8.0, "projected|floor")
    for name in ("tiny: projected, torch", "tiny: released, torch", "tiny: floor, compiled"):
        report.measure(name, lambda: {"ms": 1})
    assert list(report.found) == ["tiny: projected, torch", "tiny: floor, compiled"]


def test_a_part_that_fails_stops_no_other(script: ModuleType, tmp_path: Path) -> None:
    report = script.Report(tmp_path / "out.json", 8.0)
    report.measure("wrong", lambda: 1 / 0)
    report.measure("right", lambda: {"ms": 2})
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["wrong"].startswith("failed: ZeroDivisionError")
    assert found["right"] == {"ms": 2}


def test_kernels_by_kind(script: ModuleType) -> None:
    rows = [
        ("_kl_lm_kernel", 12, 3000.0),
        ("_clone_backward", 196, 500.0),
        ("nvjet_tst_128x256_64x4_2x1_v_bz_NNT", 400, 9000.0),
        ("void at::native::vectorized_elementwise_kernel<4, ...>", 10, 100.0),
        ("_rms_norm_forward_kernel", 57, 40.0),
    ]
    assert script.by_kind(iter(rows)) == {
        "product": {"launches": 400, "ms": 9.0},
        "triton": {"launches": 208, "ms": 3.5},
        "elementwise": {"launches": 10, "ms": 0.1},
        "liger": {"launches": 57, "ms": 0.04},
    }


def test_warnings_are_counted_by_our_line(script: ModuleType) -> None:
    """Whoever warns, the line of the package that led there is named."""

    class Warns(torch.Tensor):
        @classmethod
        def __torch_function__(cls, *arguments: object, **named: object) -> object:
            warnings.warn("called a synchronizing operation", stacklevel=2)
            return super().__torch_function__(*arguments, **named)

    gradient = torch.ones(1, 3, 2).as_subclass(Warns)
    with script.count_warnings() as places:
        token_clipping.clip_tokens(gradient, torch.zeros(1, 3, dtype=torch.bool), 2.0)
    places = {place.partition(":")[0] for place in places}
    assert places == {"cloning/token_clipping.py", "model/precision.py"}


def test_it_refuses_a_machine_without_a_gpu(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(script, "GPU", False)
    monkeypatch.setattr(sys, "argv", ["gpu_step.py"])
    with pytest.raises(SystemExit):
        script.main()
    assert "no CUDA GPU" in capsys.readouterr().err
