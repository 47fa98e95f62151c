"""`lrc info --memory`: what a recipe's training takes, against what it took."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from test_distributed import launch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from command_line import Command
from data_helpers import write_jsonl
from lrc.cloning.low_rank_clone import LowRankClone
from lrc.recipe import Recipe, load_recipe
from lrc.system.distributed import World
from lrc.train.memory import Memory, largest_micro_batch, memory_of
from tiny import tiny_teacher

WORDS = 16_000
SHAPE = {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": WORDS,
    "max_position_embeddings": 512,
}


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe of a teacher with 30 million parameters, whose steps take more than a gigabyte."""
    folder = tmp_path_factory.mktemp("memory")
    teacher = tiny_teacher("llama", dtype=torch.float32, **SHAPE)
    teacher.model.save_pretrained(folder / "teacher")
    vocabulary = {"<s>": 0, "</s>": 1, "<unk>": 2} | {f"w{i}": i for i in range(3, WORDS)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.save_pretrained(folder / "teacher")
    documents = [
        " ".join(f"w{3 + (97 * d + i * i) % 15000}" for i in range(900)) for d in range(80)
    ]
    settings = {
        "teacher": {"model": str(folder / "teacher")},
        "student": {"hidden_size": 256},
        "data": {
            "text": [str(write_jsonl(folder / "text.jsonl", documents))],
            "held_out_fraction": 0.1,
            "sequence_length": 256,
            "cache": str(folder / "cache"),
        },
        "initialize": {"calibration_tokens": 2048},
        "train": {
            "device": "cpu",
            "micro_batch": 8,
            "accumulate": 4,
            "tokens": 4 * 8 * 256,
            "eval_sequences": 2,
        },
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(settings))
    return folder / "recipe.yaml"


def table(printed: str) -> dict[str, list[float]]:
    """The numbers of a table by the first cell of their row."""
    rows = re.findall(r"^[|│] (\S[^|│]*?) +[|│](.*)[|│]$", printed, flags=re.MULTILINE)
    found = {}
    for name, cells in rows:
        numbers = [cell.strip() for cell in re.split("[|│]", cells)]
        if all(re.fullmatch(r"[\d.]+", number) for number in numbers):
            found[name] = [float(number) for number in numbers]
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("start", "release", "shard"),
    [("random", 1, False), ("closed-form", 0, False), ("random", 1, True)],
)
def test_two_processes_take_what_is_computed(
    recipe_file: Path, start: str, release: int, shard: bool
) -> None:
    changes = ["--set", f"initialize.method={start}", "--set", f"train.release_at={release}"]
    changes += ["--set", f"teacher.shard={str(shard).lower()}"]
    info = [sys.executable, "-m", "lrc", "info", "--memory", str(recipe_file), "--gpus", "1,2"]
    done = subprocess.run([*info, *changes], capture_output=True, text=True, check=True)
    shown = table(done.stdout)
    computed = max(shown["together, in a step"][1], shown["start, on the first GPU"][1])
    out = recipe_file.parent / f"{start}-{release}-{shard}"
    done = launch(2, ["train", str(recipe_file), *changes, "--out", str(out)])
    assert done.returncode == 0, done.stderr[-3000:]
    peaks = [int(kib) / 2**20 for kib in re.findall(r"^peak (\d+) KiB$", done.stdout, re.MULTILINE)]
    assert len(peaks) == 2
    assert max(peaks) == pytest.approx(computed, rel=0.15)


# A tiny teacher: every part against what a real method holds.


@pytest.fixture
def tiny_recipe(tmp_path: Path) -> Any:
    teacher = tiny_teacher("qwen2")
    teacher.model.config.to_json_file(tmp_path / "config.json")

    def recipe(**changes: Any) -> Recipe:
        settings = {
            "teacher.model": str(tmp_path),
            "student": {"hidden_size": 8},
            "objective.alpha": 0.2,
            "initialize.method": "random",
            "train.release_at": 1,
            "train.optimizer": "adamw",
        }
        settings |= {"train.device": "cpu", "data.sequence_length": 32, "train.micro_batch": 3}
        settings["train.accumulate"] = 2
        return load_recipe("quickstart", settings | changes)

    return recipe


@pytest.mark.parametrize("release", [0, 1])
@pytest.mark.parametrize("processes", [1, 2])
def test_parts_are_those_of_a_real_method(tiny_recipe: Any, release: int, processes: int) -> None:
    recipe = tiny_recipe(**{"train.release_at": release, "train.token_grad_clip": 0})
    method = LowRankClone.build(tiny_teacher("qwen2", dtype=torch.float32), recipe)
    if release == 0:
        method._release()
    method.share_work(World(0, processes))
    trained = method.parameters()
    memory = memory_of(recipe, processes)
    parts = memory.parts
    assert parts["teacher"] == held_by(method.teacher.model)
    assert parts["student"] == held_by(method.model)
    assert parts["projections"] == bytes_of(method.projections.values.values())
    owned = [
        2 * bytes_of(value for name, value in trained.items() if method.owners[name] == rank)
        for rank in range(processes)
    ]
    assert parts["optimizer"] == max(owned)
    if processes == 1:
        assert memory.moved == 0
    elif release == 0:
        assert memory.moved == 2 * bytes_of(trained.values())
    else:  # gradients and weights of the student, gains, and of the writers also P and its gradient
        writers = [v for key, v in method.projections.values.items() if key.endswith(("o", "down"))]
        gains = [value for value in trained.values() if value.ndim == 1]
        projected = {weight.name for weight in method.projections.weights}
        leaves = [method.model.get_parameter(name) for name in projected]
        assert memory.moved == 2 * sum(map(bytes_of, (writers, gains, leaves)))


def test_solved_writers_count_before_the_release(tiny_recipe: Any) -> None:
    changes = {"student.hidden_size": None, "student.intermediate_size": 8, "train.release_at": 1}
    recipe = tiny_recipe(**changes)
    method = LowRankClone.build(tiny_teacher("qwen2", dtype=torch.float32), recipe)
    assert method.source.writers
    held = [*method.projections.values.values(), *method.source.writers.values()]
    parts = memory_of(recipe, 1).parts
    assert parts["projections"] == bytes_of(held)
    assert parts["optimizer"] == 2 * bytes_of(method.parameters().values())


def test_experts_are_counted(tiny_recipe: Any, tmp_path: Path) -> None:
    teacher = tiny_teacher("qwen3_moe", dtype=torch.float32)
    teacher.model.config.to_json_file(tmp_path / "config.json")
    recipe = tiny_recipe(**{"train.release_at": 0})
    method = LowRankClone.build(teacher, recipe)
    parts = memory_of(recipe, 1).parts
    assert parts["student"] == held_by(method.model)
    assert parts["gradients"] == bytes_of(method.model.parameters())


@pytest.mark.parametrize("release", [0, 1])
def test_a_divided_teacher(tiny_recipe: Any, release: int) -> None:
    """Three processes have a third of the rows each, rounded up, and the owners of projections
    together all layers once more. While the teacher runs there are two layers."""
    settings = {"train.release_at": release, "student.fold_gains": False, "train.accumulate": 6}
    whole = memory_of(tiny_recipe(**settings), 3)
    ours = memory_of(tiny_recipe(**settings, **{"teacher.shard": True}), 3)
    model = tiny_teacher("qwen2", dtype=torch.float32).model
    layers = [list(layer.parameters()) for layer in model.model.layers]
    thirds = [math.ceil(len(value) / 3) * value[0].nbytes for layer in layers for value in layer]
    running = 2 * bytes_of(layers[0])
    least = whole.parts["teacher"] - sum(map(bytes_of, layers)) + sum(thirds) + running
    if release == 0:
        assert ours.parts["teacher"] == least
    else:
        multiplied = sum(bytes_of(v for v in layer if v.ndim > 1) for layer in layers)
        kept = ours.parts["teacher"] - least
        assert multiplied / 6 < kept < multiplied / 2
    for part in whole.parts.keys() - {"program", "teacher", "kept free"}:
        assert ours.parts[part] == whole.parts[part], part
    assert ours.moved - whole.moved == 2 * sum(map(bytes_of, layers))


def bytes_of(values: Any) -> int:
    return sum(value.nbytes for value in values)


def held_by(model: torch.nn.Module) -> int:
    return bytes_of([*model.parameters(), *model.buffers()])


def test_activations_grow_with_the_micro_batch(tiny_recipe: Any) -> None:
    whole = memory_of(tiny_recipe(), 1)
    recipe = tiny_recipe(**{"train.micro_batch": 12})
    more = memory_of(recipe, 1)
    assert peak(more) - peak(whole) == pytest.approx(9 * whole.sequence, rel=0.05)
    card = sum(more.parts.values()) + whole.sequence / 2
    assert largest_micro_batch(recipe, more, card) == 12
    assert largest_micro_batch(recipe, more, more.parts["program"]) == 0
    again = memory_of(tiny_recipe(**{"train.gradient_checkpointing": True}), 1)
    assert again.parts["activations"] < 0.6 * whole.parts["activations"]
    assert peak(again) < peak(whole)
    double = memory_of(tiny_recipe(**{"train.micro_batch": 6}), 1)
    assert peak(double) - peak(whole) == 3 * whole.sequence


def peak(memory: Memory) -> int:
    """The peak of a step but for the program, whose size changes."""
    return sum(memory.parts.values()) - memory.parts["program"]


def test_a_gpu_holds_the_weights_in_bfloat16(tiny_recipe: Any) -> None:
    settings = {"train.device": "cuda", "train.release_at": 1}
    low, full = (
        memory_of(tiny_recipe(**settings, **{"train.precision": p, "train.kernels": k}), 1)
        for p, k in (("bfloat16", "auto"), ("float32", "torch"))
    )
    assert low.parts["teacher"] == full.parts["teacher"]  # bfloat16, as teacher.dtype says
    assert low.parts["student"] < 0.6 * full.parts["student"]
    assert low.parts["activations"] < 0.8 * full.parts["activations"]


def test_what_the_command_says(tiny_recipe: Any, lrc: Command) -> None:
    teacher = tiny_recipe().teacher.model
    settings = ["quickstart", "--set", f"teacher.model={teacher}"]
    settings += ["--set", "student={hidden_size: 8}"]
    shown = lrc.printed("info", "--memory", *settings, "--gpus", "1,2", "--card-memory", "24")
    assert "train.accumulate is 1, which 2 processes cannot divide: set it to 2." in shown
    assert table(shown)["largest micro-batch in 24 GiB"][0] > 100
    [found] = json.loads(lrc.printed("info", "--memory", *settings, "--json"))["memory"]
    assert found["peak"] == max(sum(found["parts"].values()), found["start"])
    assert "give numbers of GPUs" in lrc.refusal("info", "--memory", *settings, "--gpus", "1,x")
    assert "goes with a recipe" in lrc.refusal("info", "--memory", teacher)
