"""The command line: a whole run on a tiny teacher, and its answers to bad input."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

import lrc as package
from command_line import Command
from lrc.recipe import load_recipe
from lrc.recipe.shipped import shipped
from lrc.run import Run
from lrc.system.errors import UserError
from lrc.train import train
from tiny_runs import diverge_at, file_settings, save_teacher


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    save_teacher(folder / "teacher")
    train = {"tokens": 320, "micro_batch": 2, "eval_every": 4, "checkpoint_every": 3}
    file = folder / "tiny.yaml"
    file.write_text(yaml.safe_dump(file_settings(folder, teacher={"license": "mit"}, train=train)))
    return file


def run_lrc(*arguments: Any, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run the real command line in another process, without the hub."""
    code = "from lrc.cli import main; main()"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    offline = {"HF_HUB_OFFLINE": "1", "COLUMNS": "200", "PYTHONWARNINGS": "ignore"}
    return subprocess.run(
        command, capture_output=True, text=True, cwd=cwd, env=os.environ | offline, timeout=300
    )


def test_train_export_info_and_generate(recipe_file: Path, tmp_path: Path, lrc: Command) -> None:
    run = tmp_path / "run"
    trained = run_lrc("train", recipe_file, "--out", run)
    assert trained.returncode == 0, trained.stderr
    tokens = Run.open(run).summary()["calibration_tokens"]
    assert 1000 < tokens < 40 * 61, "more tokens than the text has"
    assert f"is short: the student is initialized from {tokens:,} tokens" in trained.stdout
    assert "same top-1 prediction" in trained.stdout
    for name in ("recipe.yaml", "environment.json", "curves.png", "summary.json"):
        assert (run / name).stat().st_size > 0
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(11))
    assert "teacher_held_out_lm" in lines[0]
    assert [line["step"] for line in lines if "held_out_lm" in line] == [0, 4, 8, 10]
    kept = sorted(folder.name for folder in (run / "checkpoints").iterdir())
    assert kept == ["step-00000009", "step-00000010"]

    card = (run / "student" / "README.md").read_text()
    assert "license: mit" in card
    assert "hidden size | 16 | 8" in card

    lrc.printed("export", run, tmp_path / "student", "--dtype", "bfloat16")
    ours = AutoModelForCausalLM.from_pretrained(run / "student", dtype="auto")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "student", dtype="auto")
    assert theirs.dtype == torch.bfloat16
    for (name, weight), other in zip(
        ours.state_dict().items(), theirs.state_dict().values(), strict=True
    ):
        assert torch.equal(weight.to(torch.bfloat16), other), name

    assert "smaller" in lrc.printed("info", run)
    said = lrc.printed("generate", run, "w3 w4", "--max-new-tokens", 4)
    tokenizer = AutoTokenizer.from_pretrained(run / "student")
    prompt = tokenizer("w3 w4", return_tensors="pt").input_ids
    written = ours.generate(prompt, max_new_tokens=4, do_sample=False, pad_token_id=1)[0, 2:]
    assert said.strip() == tokenizer.decode(written, skip_special_tokens=True).strip()


def test_compress_then_resume(recipe_file: Path, tmp_path: Path, lrc: Command) -> None:
    run = tmp_path / "run"
    start = ["--set", "initialize=closed-form", "--set", "initialize.calibration_tokens=256"]
    lrc.printed("compress", recipe_file, *start, "--out", run)
    opened = Run.open(run)
    assert opened.summary()["tokens"] == 0
    untrained = opened.student().state_dict()
    train(opened)
    assert [line["step"] for line in opened.metrics()] == list(range(11))
    assert opened.summary()["tokens"] == 320
    assert opened.summary()["calibration_tokens"] == 256
    assert opened.summary()["calibration_seconds"] == opened.metrics()[0]["calibration_seconds"] > 0
    trained = opened.student().state_dict()
    assert any(not torch.equal(untrained[name], trained[name]) for name in untrained)


def test_an_edited_recipe_of_a_run_is_refused(
    recipe_file: Path, tmp_path: Path, lrc: Command
) -> None:
    run = Run.create(tmp_path / "run", load_recipe(recipe_file))
    train(run)
    resolved = run.folder / "recipe.yaml"
    settings = yaml.safe_load(resolved.read_text())
    shutil.rmtree(run.student_folder)
    settings["train"]["learning_rate"] = 1.0
    resolved.write_text(yaml.safe_dump(settings))
    assert "belongs to a run with another recipe" in lrc.refusal("resume", run.folder)
    settings["train"]["token_grad_clip"] = -1.0
    resolved.write_text(yaml.safe_dump(settings))
    assert "train.token_grad_clip" in lrc.refusal("resume", run.folder)


def test_a_run_folder_is_never_overwritten(recipe_file: Path, tmp_path: Path, lrc: Command) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "precious").write_text("data")
    assert "already exists" in lrc.refusal("train", recipe_file, "--out", tmp_path / "taken")


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("train.learning_rat=1", "nearest: 'train.learning_rate'"),
        ("student.hidden_size=16", "choose a smaller one"),
        ("student.hidden_size=7", "even"),
        ("teacher.model=/no/such/folder", "/no/such/folder"),
        ("teacher.model=package:no-such-package", "pip install"),
        ("teacher.model=/no/such/file.gguf", "existing .gguf file"),
        ("data.text=[/no/such/text.txt]", "/no/such/text.txt"),
        ("data.sequence_length=100000", "sequence"),
        ("train.device=nonsense", "device"),
        ("train", "section.key=value"),
    ],
)
def test_bad_settings_are_refused_in_one_sentence(
    recipe_file: Path, tmp_path: Path, lrc: Command, setting: str, words: str
) -> None:
    assert words in lrc.refusal("train", recipe_file, "--set", setting, "--out", tmp_path / "run")


def test_empty_text_is_refused(recipe_file: Path, tmp_path: Path, lrc: Command) -> None:
    (tmp_path / "empty.txt").write_text("\n\n")
    setting = f"data.text=[{tmp_path / 'empty.txt'}]"
    lrc.refusal("train", recipe_file, "--set", setting, "--out", tmp_path / "run")


def test_an_unknown_family_is_refused_by_name(
    recipe_file: Path, tmp_path: Path, lrc: Command
) -> None:
    folder = tmp_path / "gpt2"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    setting = f"teacher.model={folder}"
    sentence = lrc.refusal("train", recipe_file, "--set", setting, "--out", tmp_path / "run")
    assert "gpt2" in sentence
    assert "llama" in sentence
    assert "qwen3_5_text" in sentence


def test_missing_inputs_are_named(tmp_path: Path, lrc: Command) -> None:
    assert "--hidden-size" in lrc.refusal("train", "--teacher", "x")
    assert "quickstart" in lrc.refusal("train", tmp_path / "no.yaml")
    assert "not a run's folder" in lrc.refusal("resume", tmp_path)


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    result = run_lrc("--debug", "resume", tmp_path)
    assert result.returncode != 0
    assert "Traceback" in result.stderr


def test_nan_stops_and_keeps_the_last_checkpoint(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run.create(tmp_path / "run", load_recipe(recipe_file, {"train.checkpoint_every": 1}))
    diverge_at(4, monkeypatch)
    with pytest.raises(UserError, match=r"step 4 .*step-00000003.*learning_rate"):
        train(run)
    kept = sorted(folder.name for folder in run.checkpoints.iterdir())
    assert kept == ["step-00000002", "step-00000003"]


def test_a_full_disk_keeps_the_checkpoint_before(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lrc.train import checkpoint

    save = checkpoint.save_file
    calls = []

    def full(tensors: dict[str, torch.Tensor], path: Path) -> None:
        calls.append(path)
        if len(calls) == 2:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", full)
    run = Run.create(tmp_path / "run", load_recipe(recipe_file))
    with pytest.raises(UserError, match="disk is full"):
        train(run)
    assert [folder.name for folder in run.checkpoints.iterdir()] == ["step-00000000"]


def test_python_interface(recipe_file: Path, tmp_path: Path) -> None:
    run = package.clone(
        str(recipe_file.parent / "teacher"),
        hidden_size=8,
        text=str(recipe_file.parent / "text.jsonl"),
        out=tmp_path / "run",
        settings={
            "train.tokens": 64,
            "train.micro_batch": 2,
            "data.sequence_length": 16,
            "data.held_out_fraction": 0.2,
            "data.cache": str(tmp_path / "cache"),
        },
    )
    assert run.student().config.hidden_size == 8
    assert run.summary()["tokens"] == 64


@pytest.mark.parametrize("name", shipped("recipe"))
def test_shipped_recipes_parse(name: str) -> None:
    assert load_recipe(name).steps() > 0


def test_element_types_of_exports_and_evaluations(
    recipe_file: Path, tmp_path: Path, lrc: Command
) -> None:
    """Each command accepts the names that it supports, and suggests what to do about others."""
    run = Run.create(tmp_path / "run", load_recipe(recipe_file))
    train(run)
    assert "exists only in GGUF" in lrc.refusal(
        "export", run.folder, tmp_path / "s", "--dtype", "q8_0"
    )
    named = tmp_path / "s.gguf"
    assert "leave out --format" in lrc.refusal(
        "export", run.folder, named, "--format", "safetensors"
    )
    assert not (tmp_path / "s").exists()


def test_ctrl_c_before_the_training_says_how_to_continue(
    recipe_file: Path, tmp_path: Path, lrc: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pressed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    folder = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr("lrc.cloning.low_rank_clone.LowRankClone.initialize", pressed)
        code, output, _ = lrc("train", recipe_file, "--out", folder)
    assert code == 130
    assert output.endswith(f"Stopped; continue with `lrc resume {folder}`.\n")
    assert "held-out perplexity" in lrc.printed("resume", folder)
    monkeypatch.setattr("lrc.model.shapes.shape_of", pressed)
    assert lrc("info", recipe_file) == (130, "", "Stopped.\n")
