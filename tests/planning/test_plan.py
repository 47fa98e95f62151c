"""`lrc plan` through the real command line, on tiny teachers."""

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from gguf import GGMLQuantizationType as Kind
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
)

from command_line import Command
from lrc.cloning.low_rank_clone import LowRankClone
from lrc.exporting import gguf_file
from lrc.exporting.gguf_sizes import file_bytes, file_types
from lrc.model.pruned_shape import PrunedShape
from lrc.model.teacher import load_teacher
from lrc.planning.expected import Expected, measured_runs
from lrc.planning.figures import Conditions, cache_bytes, gpu_hours
from lrc.planning.gpus import find_gpu
from lrc.planning.shapes import section_of, student_without_weights
from lrc.recipe import Recipe, make_recipe
from lrc.train.memory import memory_of
from lrc.train.muon import orthogonal_flops, orthogonal_parameters
from tiny import LLAMAS, ROWS, WIDE, in_turn, tiny_teacher, tiny_tokens

GPU = ("--tokens", "1M", "--gpu", "rtx-3090", "--gpus", 2)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the teacher's configuration alone."""
    folder = tmp_path_factory.mktemp("config")
    tiny_teacher("llama", True, **WIDE).model.config.to_json_file(folder / "config.json")
    return folder


def data_of(folder: Path) -> list[str]:
    """Options for the text and its cache."""
    settings = ("sequence_length=16", "held_out_fraction=0.2", f"cache={folder / 'cache'}")
    options = ["--text", str(folder / "text.jsonl")]
    return options + [part for value in settings for part in ("--set", f"data.{value}")]


def options_of(settings: dict[str, Any]) -> list[str]:
    return [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]


def weights_by_hand(shape: dict[str, int]) -> int:
    """Parameters of a tied Llama with heads of width 6, two for each key/value head."""
    queries, keys = 2 * shape["kv_heads"] * 6, shape["kv_heads"] * 6
    layer = shape["hidden"] * (2 * queries + 2 * keys + 3 * shape["neurons"] + 2)
    return shape["layers"] * layer + shape["hidden"] * (ROWS + 1)


def recipe_of(row: dict[str, Any], **changes: Any) -> Recipe:
    base = {"teacher": {"model": "tiny"}, "student": row["student"], "data": {"text": ["x"]}}
    return make_recipe(base, changes)


def test_candidates_have_the_parameters_of_the_built_model(
    config: Path, folder: Path, lrc: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the configuration alone; within 3% of the budget, and each shape once. The memory of
    each, with all micro-batches, comes from one step."""
    steps, begin = [], LowRankClone.begin_step
    monkeypatch.setattr(
        LowRankClone, "begin_step", lambda *step: (steps.append(step), begin(*step))
    )
    plan = json.loads(lrc.printed("plan", config, "--ratio", 0.5, *GPU, "--json"))
    assert len(steps) == len(plan["candidates"])
    whole = {"layers": 3, "hidden": 32, "kv_heads": 2, "neurons": 96, "experts": 0}
    assert plan["teacher"]["parameters"] == weights_by_hand(whole)
    teacher = load_teacher(str(folder / "teacher"))
    seen = set()
    for row in plan["candidates"]:
        built = LowRankClone.build(teacher, recipe_of(row)).model
        number = sum(value.numel() for value in built.parameters())
        assert row["parameters"] == number == weights_by_hand(row["shape"])
        assert number == pytest.approx(plan["teacher"]["parameters"] / 2, rel=0.03)
        assert row["file_bytes"]["bf16"] == pytest.approx(2 * number, rel=0.05)  # float32 norms
        smaller = {axis for axis, size in row["shape"].items() if size < whole[axis]}
        assert {axis.replace("kv_", "") for axis in smaller} == set(row["kind"].split("-")) or (
            row["kind"] == "layers" and smaller == {"layers", "neurons"}
        )
        seen.add(tuple(row["shape"].values()))
    assert len(seen) == len(plan["candidates"]) >= 7
    assert plan["candidates"][0]["kind"] == "hidden-neurons"
    assert "a rule" in plan["ranked_by"]
    row = plan["candidates"][1]  # its memory is what `lrc info --memory` counts
    changes = {"train.accumulate": 2, "train.precision": "bfloat16"}
    memory = memory_of(recipe_of(row, **{"teacher.model": str(config), **changes}), 2)
    assert row["training"]["bytes"] == memory.peak
    free = 0.9 * 24e9 - sum(memory.parts.values())
    assert row["training"]["micro_batch"] == 8 + free // memory.sequence


def test_the_chosen_recipe_runs(folder: Path, tmp_path: Path, lrc: Command) -> None:
    recipe, run = tmp_path / "recipe.yaml", tmp_path / "run"
    options = ("--params", "20K", *data_of(folder), "--out", recipe, "--choose", 2)
    output = lrc.printed("plan", folder / "teacher", *options, *GPU)
    assert f"lrc train {recipe}" in output
    assert recipe.read_text().startswith("# hidden-heads-neurons: ")
    assert yaml.safe_load(recipe.read_text())["train"] == {"tokens": 1_000_000, "accumulate": 2}
    lrc.printed("compress", recipe, "--out", run)
    student = AutoModelForCausalLM.from_pretrained(run / "student")
    (row,) = [line for line in output.splitlines() if line.startswith("| 2 ")]
    assert f" {sum(value.numel() for value in student.parameters()):,} " in row
    assert "exists" in lrc.refusal("plan", folder / "teacher", *options, *GPU)
    recipe.unlink()
    options = (*options[:-1], 99, *GPU)
    assert "There is no candidate 99" in lrc.refusal("plan", folder / "teacher", *options)


def test_a_probe_ranks_by_what_runs_measure(folder: Path, tmp_path: Path, lrc: Command) -> None:
    settings = {"initialize.refine_epochs": 0, "train.learning_rate": 0.01}
    options = (*data_of(folder), *options_of(settings), "--json")
    probe = ("--probe", "--probe-tokens", 512, "--calibration-tokens", 128)
    plan = json.loads(lrc.printed("plan", folder / "teacher", "--ratio", 0.5, *probe, *options))
    measured = [row["measured"] for row in plan["candidates"]]
    assert measured == sorted(measured)
    assert len(set(measured)) == len(measured) >= 7
    for row in (plan["candidates"][0], plan["candidates"][-1]):
        own = {f"student.{name}": value for name, value in row["student"].items()}
        own |= {"train.tokens": 512, "initialize.calibration_tokens": 128}
        out = tmp_path / row["kind"]
        teacher = ("--teacher", folder / "teacher")
        run = json.loads(lrc.printed("train", *teacher, *options_of(own), "--out", out, *options))
        assert run["student_held_out_lm"] == row["measured"]
        assert run["teacher_held_out_lm"] == plan["teacher_held_out_lm"]


@pytest.mark.parametrize(("dtype", "limit"), [("bf16", 60_000), ("q8_0", 36_000)])
def test_memory_is_used_up(
    dtype: str, limit: int, folder: Path, tmp_path: Path, lrc: Command
) -> None:
    """The tensors of a file and the cache fit the memory, and leave no more than 3% of it."""
    recipe = tmp_path / "recipe.yaml"
    options = ("--memory", f"{limit / 1000}KB", "--dtype", dtype, "--context", 16, *data_of(folder))
    options += ("--out", recipe, "--tokens", "1M", "--set", "initialize=random", "--json")
    plan = json.loads(lrc.printed("plan", folder / "teacher", *options))
    for row in plan["candidates"]:
        taken = row["file_bytes"][dtype] + 16 * row["cache_bytes"]
        assert 0.97 * limit <= taken <= limit
    lrc.printed("compress", recipe, "--out", tmp_path / "run")
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "student")
    assert sum(v.numel() for v in student.parameters()) == plan["candidates"][0]["parameters"]


def test_memory_of_a_family_that_llama_cpp_does_not_run(tmp_path: Path, lrc: Command) -> None:
    tiny_teacher("glm", True, **WIDE).model.config.to_json_file(tmp_path / "config.json")
    memory = ("--memory", "60KB", "--context", 16)
    plan = json.loads(lrc.printed("plan", tmp_path, *memory, "--dtype", "bf16", "--json"))
    assert all(row["file_bytes"].keys() == {"bf16"} for row in plan["candidates"])
    assert "llama.cpp" in lrc.refusal("plan", tmp_path, *memory)


def test_a_teacher_whose_head_is_tied_by_the_recipe(tmp_path: Path, lrc: Command) -> None:
    """A plan and a run count the same matrices."""
    tiny_teacher("llama", False, **WIDE).model.config.to_json_file(tmp_path / "config.json")
    found = {}
    for tie in (False, True):
        options = ("--ratio", 0.5, *GPU, "--set", f"teacher.tie_head={tie}", "--json")
        found[tie] = json.loads(lrc.printed("plan", tmp_path, *options))["teacher"]["parameters"]
    assert found[False] - found[True] == WIDE["hidden_size"] * ROWS


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "gemma3_text"])
@pytest.mark.parametrize("dtype", ["bf16", "q8_0"])
def test_file_sizes_are_those_of_written_files(dtype: str, family: str, tmp_path: Path) -> None:
    changes = {"norm_topk_prob": True} if family == "qwen3_moe" else {}
    model = tiny_teacher(family, True, dtype=torch.float32, hidden_size=64, **changes).model
    places = dict(gguf_file._tensors(model, Kind[dtype.upper()])).values()
    assert file_bytes(model, dtype) == sum(place.stored().nbytes for place in places)


def test_q4_k_m_is_as_large_as_published_files() -> None:
    """Llama 3.2 1B in Q4_K_M is published in 807,694,464 bytes, of which almost 8 MB are the
    vocabulary."""
    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        vocab_size=128256,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    assert file_bytes(model, "q4_k_m") == pytest.approx(807_694_464 - 7_800_000, rel=1e-3)
    assert {kind.name for _, kind in file_types(model, "q4_k_m")} == {"Q4_K", "Q6_K", "F32"}


def test_k_quants_fall_back_where_rows_do_not_fit() -> None:
    """Types that llama-quantize takes for rows that are multiples of 32, and of less."""
    for neurons, expected in ((96, {"Q5_0", "Q8_0"}), (40, {"Q5_0", "Q8_0", "F16"})):
        sizes = {**WIDE, "head_dim": 32, "intermediate_size": neurons}
        model = tiny_teacher("llama", True, **sizes).model
        assert {kind.name for _, kind in file_types(model, "q4_k_m")} == {*expected, "F32"}


@pytest.mark.parametrize(
    "family",
    [
        *LLAMAS,
        "phi3",
        "olmo2",
        "gpt_oss",
        "olmo_hybrid",
        "granitemoehybrid",
        "nemotron_h",
        "falcon_h1",
    ],
)
def test_cache_is_that_of_transformers(family: str) -> None:
    model = tiny_teacher(family).model
    cache = DynamicCache(config=model.config)
    model(tiny_tokens(1, length=4), past_key_values=cache, use_cache=True)
    attending = [layer for layer in cache.layers if getattr(layer, "keys", None) is not None]
    numbers = sum(layer.keys.numel() + layer.values.numel() for layer in attending)
    assert 4 * cache_bytes(model) == 2 * numbers


@pytest.mark.parametrize("shape", [(3, 16, 2, 96), (3, 32, 1, 48), (2, 32, 2, 96)])
def test_gpu_hours_are_those_of_the_methods_operations(
    folder: Path, shape: tuple[int, int, int, int]
) -> None:
    teacher = load_teacher(str(folder / "teacher"))
    teacher.__dict__["vocab_size"] = ROWS  # without a tokenizer, padding rows are unknown
    student = section_of(teacher, PrunedShape(*shape)).model_dump(exclude_none=True)
    changes = {"train.release_at": 0.5, "objective.alpha_zero_at": 0.25}
    recipe = recipe_of({"student": student}, **{"train.tokens": 1_000_000, **changes})
    method = LowRankClone.build(teacher, recipe)
    counted = 0.0
    for step in range(recipe.steps()):
        if step == method.stage_ends()[0]:
            method.released = True
        counted += method.step_flops(step, recipe.step_tokens(), 256) or 0.0
        counted += orthogonal_flops(orthogonal_parameters(method).values())
    small = student_without_weights(teacher, PrunedShape(*shape))
    under = Conditions(find_gpu("rtx-3090"), mfu=0.5)
    found = gpu_hours(teacher.model, small, recipe, under)
    assert found == pytest.approx(counted / (0.5 * 71e12) / 3600, rel=0.01)


@pytest.mark.parametrize("family", in_turn(["deepseek_v3", "mixtral"]))
def test_a_teacher_with_experts_may_keep_fewer(family: str, tmp_path: Path, lrc: Command) -> None:
    """As many of each group of the router. What no layer has is not among the kinds."""
    number = "num_local_experts" if family == "mixtral" else "n_routed_experts"
    more = {number: 64, "hidden_size": 64, "num_hidden_layers": 4}
    teacher = tiny_teacher(family, True, **more)
    teacher.model.config.to_json_file(tmp_path / "config.json")
    plan = json.loads(lrc.printed("plan", tmp_path, "--ratio", 0.6, *GPU, "--json"))
    found = {row["kind"]: row for row in plan["candidates"]}
    assert {"experts", "hidden-experts", "layers-experts"} <= found.keys()
    kinds = found.keys() | plan["left_out"].keys()
    assert any("neurons" in kind for kind in kinds) == (family == "deepseek_v3")
    for row in found.values():
        built = LowRankClone.build(teacher, recipe_of(row)).model
        assert row["parameters"] == sum(value.numel() for value in built.parameters())
        assert row["shape"]["experts"] % (2 if family == "deepseek_v3" else 1) == 0
    assert found["experts"]["shape"]["experts"] < 64
    if family == "mixtral":
        table = lrc.printed("plan", tmp_path, "--ratio", 0.6, *GPU)
        assert "| layers | experts | parameters |" in table


def test_layers_of_several_kinds(tmp_path: Path, lrc: Command) -> None:
    """A removed layer may move the others, and with them their linear maps."""
    kinds = ["linear_attention", "mlp", "moe", "full_attention", "mlp", "moe"]
    teacher = tiny_teacher("nemotron_h", layer_types=kinds, hidden_size=64, intermediate_size=256)
    teacher.model.config.to_json_file(tmp_path / "config.json")
    plan = json.loads(lrc.printed("plan", tmp_path, "--ratio", 0.6, *GPU, "--json"))
    found = {row["kind"]: row for row in plan["candidates"]}
    assert found["layers-neurons"]["shape"]["layers"] < len(kinds)


def test_hidden_sizes_that_divide_the_width_of_mamba(tmp_path: Path, lrc: Command) -> None:
    wide = {"hidden_size": 48, "mamba_d_head": 24, "shared_intermediate_size": 512}
    tiny_teacher("granitemoehybrid", **wide).model.config.to_json_file(tmp_path / "config.json")
    plan = json.loads(lrc.printed("plan", tmp_path, "--ratio", 0.6, *GPU, "--json"))
    found = {row["kind"]: row["shape"] for row in plan["candidates"]}
    assert found["hidden-neurons"]["hidden"] == 32  # of 38.4, a divisor of 96
    assert found["hidden-neurons"]["neurons"] < 512


@pytest.mark.parametrize(
    ("family", "reason"),
    [("olmo2", "heads or neurons that can be removed"), ("qwen3_moe", "no size of it fits")],
)
def test_shapes_that_a_family_does_not_take_are_left_out(
    family: str, reason: str, tmp_path: Path, lrc: Command
) -> None:
    teacher = tiny_teacher(family, True, **{**WIDE, "hidden_size": 256})
    teacher.model.config.to_json_file(tmp_path / "config.json")
    plan = json.loads(lrc.printed("plan", tmp_path, "--ratio", 0.6, *GPU, "--json"))
    kinds = {row["kind"] for row in plan["candidates"]}
    assert "hidden" in kinds
    assert any(reason in why for why in plan["left_out"].values())
    assert not kinds & set(plan["left_out"])
    assert any("vLLM" in note for note in plan["notes"])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ((), "one of --params, --ratio and --memory"),
        (("--params", "1B", "--ratio", 0.5), "one of --params, --ratio and --memory"),
        (("--params", "1B"), "no larger than this"),
        (("--params", "much"), "one of the units K, M"),
        (("--memory", "1X"), "one of the units B, KB"),
        (("--ratio", 1.5), "between 0 and 1"),
        (("--ratio", 0.001), "fits (no size of it fits the budget): choose a larger budget."),
        (("--memory", "1KB"), "(no size of it fits the budget): choose a larger --memory or less"),
        (("--ratio", 0.5, "--gpu", "abacus"), "choose one of b200"),
        (("--memory", "9KB", "--dtype", "q2_k"), "choose one of bf16"),
        (("--ratio", 0.5, "--mfu", 35), "between 0 and 1"),
        (("--ratio", 0.5, "--probe"), "give --text"),
        (("--ratio", 0.5, "--probe-tokens", 9), "goes with --probe"),
        (("--ratio", 0.5, "--tokens", "1M", "--out", "recipe.yaml"), "give --text"),
        (("--ratio", 0.5, "--set", "student.hidden_size=8"), "leave student"),
        (("--ratio", 0.5, "--set", "method=minitron"), "leave method"),
    ],
)
def test_mistakes_are_one_sentence(
    options: tuple[Any, ...], expected: str, config: Path, lrc: Command
) -> None:
    assert expected in lrc.refusal("plan", config, *options)


def test_finished_runs_become_rows_of_the_table(
    folder: Path, tmp_path: Path, lrc: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two seeds of one shape give one row; the plan of this teacher then quotes it."""
    script = Path(__file__).parents[2] / "scripts" / "measured_shapes.py"
    table = tmp_path / "measured.json"
    table.write_text('{"runs": []}')
    options = ("--teacher", folder / "teacher", "--hidden-size", 16, *data_of(folder), "--json")
    losses = []
    for seed in (0, 1):
        settings = {"train.seed": seed, "initialize.method": "random", "train.tokens": 256}
        run = tmp_path / f"run-{seed}"
        found = json.loads(lrc.printed("train", *options, *options_of(settings), "--out", run))
        losses.append(found["student_held_out_lm"])
    runs = [str(tmp_path / f"run-{seed}") for seed in (0, 1)]
    arguments = [str(script), *runs, "--source", "here", "--table", str(table)]
    monkeypatch.setattr("sys.argv", arguments)
    for _ in range(2):  # a second time replaces the row
        runpy.run_path(str(script), run_name="__main__")
    config = AutoConfig.from_pretrained(folder / "teacher")
    (row,) = measured_runs(config, table.read_text())
    assert row.shape == PrunedShape(3, 16, 2, 96)
    assert row.loss == pytest.approx(sum(losses) / 2, abs=1e-4)
    assert row.parameters == weights_by_hand(vars(row.shape))
    assert Expected([row]).of(row.shape, row.parameters, 256).loss == row.loss
