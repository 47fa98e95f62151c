"""`--quiet` and `--json`: what programs get from the commands."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

from command_line import Command
from lrc.cli import app
from lrc.cli.console import console
from tiny_runs import file_settings, save_teacher

WITHOUT_RESULTS = {"export", "push", "report", "generate", "chat"}
"""Commands that print no table."""


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    save_teacher(tmp_path / "teacher")
    train = {"tokens": 64, "micro_batch": 2, "eval_sequences": 4}
    settings = file_settings(tmp_path, initialize={"calibration_tokens": 64}, train=train)
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(settings))
    return file


def test_every_command_with_a_table_has_both_options() -> None:
    root = get_command(app)
    commands = dict(root.commands)  # type: ignore[attr-defined]
    for group in ("data", "analyze"):
        commands |= commands.pop(group).commands
    for name, command in commands.items():
        options = {option for parameter in command.params for option in parameter.opts}
        assert ({"--quiet", "--json"} <= options) == (name not in WITHOUT_RESULTS), name


def test_a_run_as_json(recipe_file: Path, tmp_path: Path, lrc: Command) -> None:
    code, output, errors = lrc("train", recipe_file, "--out", tmp_path / "run", "--json")
    assert code == 0
    found = json.loads(output)
    assert found["folder"] == str(tmp_path / "run")
    assert found["tokens"] == 64
    assert found["student_perplexity"] > 1
    assert "held-out LM loss" in errors, "the log is not on standard error"
    quiet = lrc("resume", tmp_path / "run", "--json", "--quiet")
    assert json.loads(quiet[1])["student_held_out_lm"] == found["student_held_out_lm"]
    shapes = json.loads(lrc.printed("info", tmp_path / "run", "--json"))["models"]
    assert [shape["hidden_size"] for shape in shapes] == [16, 8]
    assert shapes[1]["parameters"] == found["student_parameters"]
    pruned = ["prune", tmp_path / "run", "--ratio", "0.05", "--out", tmp_path / "pruned"]
    smaller = json.loads(lrc.printed(*pruned, "--json"))
    assert smaller["student_parameters"] < found["student_parameters"]


def test_a_recipe_as_json(recipe_file: Path, lrc: Command) -> None:
    found = json.loads(lrc.printed("info", recipe_file, "--json"))
    assert found["tokens"] == 64
    assert found["models"][0]["parameters"] > found["models"][1]["parameters"]


def test_what_libraries_print_is_not_between_the_results(
    recipe_file: Path, lrc: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lrc.model import shapes

    def noisy(model: Any) -> shapes.Shape:
        print("Downloaded something.")
        return quiet(model)

    quiet = shapes.shape_of
    monkeypatch.setattr(shapes, "shape_of", noisy)
    code, output, errors = lrc("info", recipe_file, "--json")
    assert code == 0
    assert json.loads(output)["tokens"] == 64
    assert "Downloaded something." in errors
    assert "Downloaded something." in lrc.printed("info", recipe_file)


def test_quiet_prints_only_the_results(
    recipe_file: Path, tmp_path: Path, lrc: Command, caplog: pytest.LogCaptureFixture
) -> None:
    loud = lrc.printed("compress", recipe_file, "--out", tmp_path / "loud")
    code, quiet, errors = lrc("compress", recipe_file, "--out", tmp_path / "quiet", "--quiet")
    assert (code, errors) == (0, "")
    assert "held-out perplexity" in quiet
    assert len(quiet.splitlines()) < len(loud.splitlines())
    assert "Initializing the student" in loud
    assert "Initializing the student" not in quiet
    logging.getLogger("lrc").warning("A warning.")
    assert "A warning." in lrc.capsys.readouterr().out


def test_an_error_with_json_leaves_standard_output_empty(tmp_path: Path, lrc: Command) -> None:
    code, output, errors = lrc("resume", tmp_path, "--json")
    assert (code, output) == (2, "")
    assert errors.startswith("Error: ")


def test_published_results_and_environment_as_json(lrc: Command) -> None:
    paper = json.loads(lrc.printed("eval", "--published", "--json"))
    assert any("LRC" in model["model"] for model in paper["models"])
    found = json.loads(lrc.printed("env", "--json"))
    assert found["packages"]["torch"]
    for name, version in found["packages"].items():
        assert f"| {name}" in lrc.printed("env")
        assert version is None or version in lrc.printed("env")
    assert not console.as_json, "the last command had no --json"


def test_shell_completion(lrc: Command) -> None:
    """Typer's own, which knows our commands."""
    assert "--install-completion" in lrc.printed("--help")
    lrc.monkeypatch.setenv("_LRC_COMPLETE", "complete_bash")
    lrc.monkeypatch.setenv("COMP_WORDS", "lrc comp")
    lrc.monkeypatch.setenv("COMP_CWORD", "1")
    assert lrc()[1].split() == ["compress", "compare"]
