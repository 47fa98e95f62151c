"""Options with a value that cannot be meant: refused in one sentence, never dropped."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from command_line import Command
from data_helpers import write_jsonl
from lrc.recipe import load_recipe
from lrc.recipe.choices import choices
from lrc.run import Run
from lrc.system.errors import UserError
from lrc.train import train
from tiny_runs import file_settings, save_teacher, tiny_recipe


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    save_teacher(tmp_path / "teacher")
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(file_settings(tmp_path, initialize={"method": "random"})))
    return path


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--hidden-size", 0), "hidden_size"),
        (("--teacher", ""), "--teacher is empty"),
        (("--text", ""), "--text is empty"),
        (("--method", ""), "--method is empty"),
        (("--set", "data.text=['']"), "A source of text is empty"),
        (("--set", "objective.temperature=1e-300"), "objective.temperature"),
        (
            ("--set", "train.learning_rate=1e-2", "--set", "train.release_learning_rate=1e-3"),
            "give one of them",
        ),
        (
            ("--set", "data.document_mask=true", "--set", "teacher.attention=flash_attention_2"),
            "the documents of a sequence would see each other",
        ),
    ],
    ids=str,
)
def test_train(
    recipe_file: Path, tmp_path: Path, lrc: Command, options: tuple[Any, ...], words: str
) -> None:
    assert words in lrc.refusal("train", recipe_file, *options, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("generate TEACHER w1 --seed 99999999999999999999", "--seed"),
        ("chat TEACHER --seed -1", "--seed"),
        ("data inspect TEACHER --seed -1", "--seed"),
        ("analyze neurons TEACHER --seed 99999999999999999999", "--seed"),
        ("analyze neurons TEACHER --share 0", "--share is 0"),
        ("prune TEACHER --ratio 0.2 --text TEXT --calibration-tokens 0", "calibration"),
        ("prune no-such-folder --ratio 0.2", "no-such-folder"),
        ("plan TEACHER --ratio 0.5 --choose 2", "give both"),
        ("plan TEACHER --params= --gpu h100", "--params"),
        ("plan TEACHER --memory= --gpu h100", "--memory"),
        ("plan TEACHER --ratio 0.5 --dtype q8_0", "--dtype goes with --memory"),
        (
            "plan TEACHER --ratio 0.5 --calibration-tokens 9",
            "--calibration-tokens goes with --probe",
        ),
        ("plan TEACHER --ratio 0.5 --text TEXT --out x.yaml", "give --tokens"),
        (
            "plan TEACHER --ratio 0.5 --tokens 9 --set train={micro_batch:4}",
            "--set train replaces all of 'train', also train.tokens (--tokens)",
        ),
        ("plan TEACHER --ratio 0.5 --tokens 1,5M", "--tokens is '1,5M'"),
        (
            "plan TEACHER --ratio 0.5 --tokens 9 --out x.yaml --set data.text_field=content",
            "Say which text",
        ),
        (
            "prune TEACHER --ratio 0.2 --text TEXT --set data.text=other.jsonl",
            "'data.text' is given more than once (--text and --set data.text)",
        ),
        (
            "prune TEACHER --ratio 0.2 --text TEXT --set method=scratch",
            "--set method replaces all of 'method', also method.ratio (--ratio)",
        ),
        ("info TEACHER --gpus 8", "--gpus goes with --memory"),
        ("info TEACHER --card-memory 8", "--card-memory goes with --memory"),
        ("export TEACHER out", "can only be written as GGUF"),
        ("sft TEACHER --data TEXT --set epochs=0", "'epochs' is 0: input should be greater"),
    ],
)
def test_other_commands(tmp_path: Path, lrc: Command, command: str, words: str) -> None:
    save_teacher(tmp_path / "teacher")
    names = {"TEACHER": tmp_path / "teacher", "TEXT": write_jsonl(tmp_path / "a.jsonl", ["w1 w2"])}
    arguments = [names.get(word, word) for word in command.split()]
    code, output, errors = lrc(*arguments)
    said = " ".join((output + errors).split())
    assert code == 2, said
    assert words in said
    assert "PydanticUndefined" not in said


def test_the_rate_that_is_announced_is_the_runs() -> None:
    start = {"initialize.method": "closed-form", "train.learning_rate": 1e-2}
    said = choices(tiny_recipe(start), 1000, 14)
    assert said is not None
    assert "learning rate 0.01." in said
    after = start | {"train.release_at": 0.5, "train.release_learning_rate": 1e-3}
    said = choices(tiny_recipe(after), 1000, 14)
    assert said is not None
    assert "learning rate 0.01, after the release 0.001" in said
    alone = {"initialize.method": "closed-form", "train.release_learning_rate": 1e-3}
    said = choices(tiny_recipe(alone), 1000, 14)
    assert said is not None
    assert "learning rate 0.001" in said


def test_a_diverged_run_names_the_rate_that_was_given(recipe_file: Path, tmp_path: Path) -> None:
    recipe = load_recipe(recipe_file, {"train.learning_rate": 1e30, "train.tokens": 2048})
    with pytest.raises(UserError, match=r"a lower train\.learning_rate"):
        train(Run.create(tmp_path / "run", recipe))


def test_a_folder_of_test_files_says_how_to_read_them(tmp_path: Path, lrc: Command) -> None:
    save_teacher(tmp_path / "teacher")
    folder = tmp_path / "text"
    folder.mkdir()
    write_jsonl(folder / "test.jsonl", ["w1 w2"])
    settings = file_settings(tmp_path)
    settings["data"]["text"] = [str(folder)]
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(settings))
    assert "such as test.jsonl: to read a file anyway, name it" in lrc.refusal("train", path)


def test_a_teacher_without_tokenizer_files(tmp_path: Path, lrc: Command) -> None:
    teacher = save_teacher(tmp_path / "teacher")
    for path in teacher.glob("tokenizer*"):
        path.unlink()
    said = lrc.refusal("generate", teacher, "w1")
    assert "has no tokenizer: add its tokenizer.json" in said


def test_generating_ends_with_the_context(tmp_path: Path, lrc: Command) -> None:
    teacher = save_teacher(tmp_path / "teacher")
    config = json.loads((teacher / "config.json").read_text())
    short = tmp_path / "short"
    shutil.copytree(teacher, short)
    (short / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 8}))
    code, output, errors = lrc("generate", short, "w1 w2 w3", "--max-new-tokens", 600)
    assert code == 0
    assert "context ends after" in output + errors
    assert "context is 8: shorten it" in lrc.refusal("generate", short, " ".join(["w1"] * 9))
