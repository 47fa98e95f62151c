"""Every method through the real command line: training, its files, and resuming."""

from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from command_line import Command
from lrc.methods import METHODS
from lrc.report.curves import draw_curves
from lrc.run import Run
from lrc.train.setup import set_up
from tiny import in_turn, tiny_tokens
from tiny_runs import assert_same_run, copy_until, file_settings, save_teacher

STEPS = 12


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("methods")
    save_teacher(folder / "teacher")
    train = {
        "tokens": STEPS * 2 * 2 * 16,
        "micro_batch": 2,
        "accumulate": 2,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "eval_every": 4,
        "checkpoint_every": 4,
        "keep_checkpoints": 9,
    }
    file = folder / "tiny.yaml"
    file.write_text(
        yaml.safe_dump(
            file_settings(
                folder,
                initialize={"calibration_tokens": 256},
                data={"document_mask": True},
                train=train,
            )
        )
    )
    return file


@pytest.mark.parametrize("name", in_turn(list(METHODS)))
def test_train_and_resume(recipe_file: Path, tmp_path: Path, lrc: Command, name: str) -> None:
    whole = tmp_path / "whole"
    lrc.printed("train", recipe_file, "--method", name, "--out", whole)
    run = Run.open(whole)
    measured = [line["held_out_lm"] for line in run.metrics() if "held_out_lm" in line]
    assert len(set(measured)) == len(measured) == 4, "the loss does not change"
    assert run.summary()["method"] == run.recipe.method.name == name
    assert METHODS[name].title in (whole / "student" / "README.md").read_text()
    if name in ("lrc", "scratch"):  # with and without clone terms
        draw_curves(run, tmp_path / "curves.png")
        assert (tmp_path / "curves.png").stat().st_size > 10_000

    # In plain transformers, the export computes what the student in training computes.
    student = AutoModelForCausalLM.from_pretrained(whole / "student")
    setup = set_up(run)
    ids = tiny_tokens(2)
    with torch.no_grad():
        theirs = setup.method.student()(ids).logits
        torch.testing.assert_close(student(ids).logits, theirs, rtol=1e-5, atol=1e-5)

    # A run that was killed after step 4 and resumed is the whole run, bit for bit.
    part = copy_until(run, tmp_path / "part", 4)
    lrc.printed("resume", part.folder)
    assert_same_run(part, run)
    tensors = load_file(whole / "checkpoints" / f"step-{STEPS:08d}" / "state.safetensors")
    assert not any(key.startswith("parameter.teacher") for key in tensors)


def test_settings_without_effect_are_reported(
    recipe_file: Path, tmp_path: Path, lrc: Command
) -> None:
    options = ["--set", "initialize=pca", "--set", "train.tokens=64"]
    output = lrc.printed(
        "train", recipe_file, "--method", "scratch", *options, "--out", tmp_path / "run"
    )
    assert "No effect with method scratch: initialize.method, initialize.calib" in output


def test_options_of_a_method(recipe_file: Path, tmp_path: Path, lrc: Command) -> None:
    options = ["--method", "minilm", "--set", "method.relation_weight=2"]
    lrc.printed(
        "train", recipe_file, *options, "--set", "train.tokens=64", "--out", tmp_path / "run"
    )
    assert Run.open(tmp_path / "run").recipe.method.model_dump() == {
        "name": "minilm",
        "relation_weight": 2.0,
    }


def test_another_pruned_shape(recipe_file: Path, tmp_path: Path, lrc: Command) -> None:
    """Another size than LRC's is reported, trained and exported."""
    shape = ["--set", "method.layers=1", "--set", "method.intermediate_size=10"]
    run = tmp_path / "run"
    output = lrc.printed(
        "train", recipe_file, "--method", "minitron", *shape, "--set", "train.tokens=64",
        "--out", run,
    )  # fmt: skip
    student = AutoModelForCausalLM.from_pretrained(run / "student")
    assert (student.config.num_hidden_layers, student.config.intermediate_size) == (1, 10)
    size = sum(parameter.numel() for parameter in student.parameters())
    assert f"The student has {size:,} parameters, LRC's" in output
    assert "more than 3% apart." in output
    lrc.printed("export", run, tmp_path / "again")
    files = [folder / "model.safetensors" for folder in (run / "student", tmp_path / "again")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--method", "minlm"], "'method' is 'minlm': choose one of lrc, scratch, tinybert"),
        (["--set", "method={}"], "'method.name' is missing"),
        (
            ["--method", "minilm", "--set", "method.relation_wait=1"],
            "unknown key 'method.relation_wait' (nearest: 'method.relation_weight')",
        ),
        (["--set", "method.alpha=1"], "'method.name' is missing"),
        (
            ["--set", "method={name: tinybert, hidden_weight: -1}"],
            "'method.hidden_weight' is -1",
        ),
        (
            ["--method", "minitron", "--set", "method.layers=3"],
            "method.layers is 3, but the teacher's is 2: choose at most 2.",
        ),
        (
            ["--set", "objective.alignment=explicit", "--set", "objective.attn_out=teacher"],
            "attn_out to student",
        ),
    ],
)
def test_mistakes_are_refused_in_one_sentence(
    recipe_file: Path, tmp_path: Path, lrc: Command, options: list[str], words: str
) -> None:
    assert words in lrc.refusal("train", recipe_file, *options, "--out", tmp_path / "run")
