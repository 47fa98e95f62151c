"""The benchmark of the rules for learning rate and alpha, on a tiny teacher."""

from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForCausalLM

from lrc.comparison import load_comparison
from lrc.recipe.learning_rate import learning_rate
from prepared import Prepared
from short_closing import SHORT_CLOSING
from tiny_runs import file_settings, save_teacher

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "learning_rate.py"


def test_table(tmp_path: Path, prepared: Prepared) -> None:
    save_teacher(tmp_path / "teacher")
    settings = file_settings(tmp_path, initialize={"calibration_tokens": 128})
    settings["train"] = {"micro_batch": 2, "eval_sequences": 4}
    base = {"recipe": settings, "tokens": 64, "grid": {"learning_rates": [1e-3], "tokens": 32}}
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump({**base, "entries": [{"name": "lrc"}]}))
    command = [path, tmp_path / "out", "--steps", 2]
    command += ["--factors", 4, "--alphas", 0]
    program = f"{SHORT_CLOSING}import runpy; runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    code, _, errors = prepared.run(*command, code=program, cwd=tmp_path)
    assert code == 0, errors
    lines = (tmp_path / "out" / "README.md").read_text().splitlines()
    assert lines[0] == "| steps | rate of auto | rate-x1 | rate-x4 | alpha-0 |"
    told = [float(cell) for cell in lines[2].strip("|").split("|")]
    run = tmp_path / "out" / "steps-2"
    comparison = load_comparison(run / "comparison.yaml")
    [rule] = [entry for entry in comparison.entries if entry.name == "rate-x1"]
    recipe = comparison.run_recipe(rule, 1e-3, 0)
    assert recipe.steps() == told[0] == 2
    student = AutoModelForCausalLM.from_pretrained(run / "runs" / "rate-x1-seed0" / "student")
    auto = recipe.train.model_copy(update={"learning_rate": "auto"})
    parameters = sum(value.numel() for value in student.parameters())
    expected = learning_rate(recipe.model_copy(update={"train": auto}), parameters)
    assert told[1] == pytest.approx(expected, rel=0.06)  # two digits
    assert len(set(told[2:])) == 3
