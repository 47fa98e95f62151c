"""`lrc prune` through the real command line, on a run and on a model folder."""

import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from command_line import Command
from lrc.recipe import load_recipe
from lrc.run import Run
from lrc.train import train
from tiny_runs import assert_same_run, copy_until, file_settings, save_teacher


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher, a text, and a recipe of an LRC run."""
    folder = tmp_path_factory.mktemp("prune")
    wide = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 40}
    save_teacher(folder / "teacher", **wide)
    (folder / "short.txt").write_text("w3 w4 w5")
    train = {"tokens": 128, "micro_batch": 2, "learning_rate": 1e-2, "eval_sequences": 5}
    settings = file_settings(folder, teacher={"license": "mit"}, train=train)
    (folder / "tiny.yaml").write_text(yaml.safe_dump(settings))
    return folder


@pytest.fixture(scope="module")
def clone(folder: Path) -> Path:
    """A finished LRC run."""
    run = Run.create(folder / "clone", load_recipe(folder / "tiny.yaml"))
    train(run)
    return run.folder


def test_prune_a_run(clone: Path, tmp_path: Path, lrc: Command) -> None:
    out = tmp_path / "pruned"
    output = lrc.printed("prune", clone, "--ratio", 0.25, "--calibration-tokens", 64, "--out", out)
    run, before = Run.open(out), Run.open(clone).summary()
    summary = run.summary()
    assert run.recipe.data == Run.open(clone).recipe.data
    assert run.recipe.train.eval_sequences == 5
    assert summary["tokens"] == 0
    assert summary["calibration_tokens"] == 64
    # The text is that of the run, so the pruned model has the held-out loss of the run's end.
    assert summary["teacher_held_out_lm"] == pytest.approx(before["student_held_out_lm"], rel=1e-6)
    assert summary["teacher_parameters"] == before["student_parameters"]
    share = summary["student_parameters"] / summary["teacher_parameters"]
    assert share == pytest.approx(0.75, abs=0.02)
    for value in (summary["teacher_parameters"], summary["student_parameters"]):
        assert f"{value:,}" in output
    assert "FFN width" in output
    assert "license: mit" in (out / "student" / "README.md").read_text()

    # Plain transformers loads it. Its weights are slices of those before.
    student = AutoModelForCausalLM.from_pretrained(out / "student")
    tokenizer = AutoTokenizer.from_pretrained(out / "student")
    ids = tokenizer("w3 w4 w5", return_tensors="pt").input_ids
    assert student(ids).logits.isfinite().all()
    theirs, ours = (load_file(f / "student" / "model.safetensors") for f in (clone, out))
    gate = "model.layers.1.mlp.gate_proj.weight"
    rows = [row.tolist() for row in theirs[gate]]
    places = [rows.index(row.tolist()) for row in ours[gate]]
    assert places == sorted(set(places))
    assert len(places) < len(rows)
    down = gate.replace("gate", "down")
    assert torch.equal(ours[down], theirs[down][:, places])

    lrc.printed("export", out, tmp_path / "exported")
    again = load_file(tmp_path / "exported" / "model.safetensors")
    assert all(torch.equal(again[name], value) for name, value in ours.items())


@pytest.mark.parametrize("way", ["lora", "full"])
def test_recover_and_resume(folder: Path, tmp_path: Path, lrc: Command, way: str) -> None:
    if way == "lora":
        pytest.importorskip("peft")
    whole = tmp_path / "whole"
    options = ["--text", folder / "text.jsonl", "--recover", way, "--tokens", 384]
    given = {
        "data.sequence_length": 16,
        "data.held_out_fraction": 0.2,
        "data.cache": str(folder / "cache"),
        "train.micro_batch": 2,
        "train.accumulate": 2,
        "train.learning_rate": 1e-2,
        "train.weight_decay": 0.1,
        "train.eval_every": 2,
        "train.checkpoint_every": 2,
        "train.keep_checkpoints": 9,
        "method.grouping": "max",
        "initialize.calibration_tokens": 64,
    }
    for key, value in given.items():
        options += ["--set", f"{key}={value}"]
    lrc.printed(
        "prune", folder / "teacher", "--ratio", 0.3, "--importance", "param_mix", *options,
        "--out", whole,
    )  # fmt: skip
    run = Run.open(whole)
    method = run.recipe.method.model_dump()
    assert (method["recovery"], method["importance"], method["grouping"]) == (
        way, "param_mix", "max",
    )  # fmt: skip
    assert run.recipe.train.optimizer == ("adamw" if way == "lora" else "muon")
    measured = [line["held_out_lm"] for line in run.metrics() if "held_out_lm" in line]
    assert len(set(measured)) == 4
    assert measured[-1] < measured[0]
    assert run.summary()["student_held_out_lm"] == pytest.approx(measured[-1], rel=1e-5)

    tensors = load_file(whole / "student" / "model.safetensors")
    assert not any("lora" in name or "base_layer" in name for name in tensors)

    part = copy_until(run, tmp_path / "part", 2)
    lrc.printed("resume", part.folder)
    assert_same_run(part, run)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["teacher", "--ratio", "1.5", "--text", "text.jsonl"], "'method.ratio' is 1.5"),
        (["teacher", "--ratio", "0", "--text", "text.jsonl"], "'method.ratio' is 0"),
        (["teacher", "--ratio", "0.99", "--text", "text.jsonl"], "choose a ratio of at most"),
        (["teacher", "--ratio", "0.2"], "teacher is not a run, so pruning needs text"),
        (["teacher", "--ratio", "0.2", "--text", "short.txt"], "text"),
        (["missing/run/here", "--ratio", "0.2", "--text", "text.jsonl"], "There is no folder"),
        (["teacher", "--ratio", "0.2", "--text", "text.jsonl", "--recover", "lora"], "--tokens"),
        (["teacher", "--ratio", "0.2", "--text", "text.jsonl", "--tokens", "9"], "--recover"),
    ],
)
def test_mistakes_are_refused_in_one_sentence(
    folder: Path,
    tmp_path: Path,
    lrc: Command,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    words: str,
) -> None:
    monkeypatch.chdir(folder)
    assert words in lrc.refusal("prune", *arguments, "--out", tmp_path / "run")


def test_a_run_without_a_student(clone: Path, tmp_path: Path, lrc: Command) -> None:
    unfinished = tmp_path / "clone"
    shutil.copytree(clone, unfinished)
    shutil.rmtree(unfinished / "student")
    assert "has no student yet" in lrc.refusal(
        "prune", unfinished, "--ratio", 0.2, "--out", tmp_path / "run"
    )
