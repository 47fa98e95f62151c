"""The exported student: plain transformers computes what training computed."""

import errno
import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from lrc.cloning.low_rank_clone import LowRankClone
from lrc.exporting.card import data_sets, model_card
from lrc.exporting.plain import export_student
from lrc.model.families import FAMILIES
from lrc.recipe import make_recipe
from lrc.run import Run
from lrc.system.errors import UserError
from tiny import (
    LLAMAS,
    TINY_CASES,
    Case,
    tiny_batch,
    tiny_method,
    tiny_teacher,
    tiny_tokens,
)

READER = """
import sys
sys.modules["lrc"] = None  # importing it fails
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, pipeline

root = Path(sys.argv[1])
tokens = torch.load(root / "tokens.pt")
logits = {}
for folder in sorted(path.parent for path in root.glob("*/config.json")):
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.eval()
    others = folder.name.startswith("others-")
    if others and hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # torch's grouped products take no float64
    with torch.no_grad():
        logits[folder.name] = (type(model).__name__, model(tokens).logits)
    if others:
        logits[folder.name] += ([],)
        continue
    # transformers takes Qwen2Tokenizer for every Qwen model, whatever class the folder names.
    own = PreTrainedTokenizerFast.from_pretrained(folder) if "qwen" in folder.name else None
    write = pipeline("text-generation", str(folder), tokenizer=own, device="cpu")
    (answer,) = write("w5 w9 w4", max_new_tokens=6, do_sample=False, return_tensors=True)
    logits[folder.name] += (answer["generated_token_ids"],)
assert not [name for name in sys.modules if name.startswith("lrc.")]
torch.save(logits, root / "logits.pt")
"""

OTHERS = [(f, tied) for f in FAMILIES if f not in LLAMAS for tied in (False, True)]
"""Families whose layers are not Llama's, untied and tied."""

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "folded": {"fold_gains": True},
    "apart": {"tie_projections": False},
    "shared": {"tie_projections": True},
}
"""The ways to parametrize a student, by name."""


def case_method(case: Case, settings: str = "plain") -> LowRankClone:
    family, tied, changes = case
    return tiny_method(tiny_teacher(family, tied, **changes), SETTINGS[settings])


@dataclass(frozen=True)
class Seen:
    """An export in another process that cannot import lrc, and the model in training."""

    class_name: str
    logits: Tensor
    written: list[int]
    """Token ids of a text-generation pipeline, the prompt's first."""
    trained_logits: Tensor
    trained_written: list[int]


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Seen]:
    """The export of every case, computed by another process."""
    root = tmp_path_factory.mktemp("exports")
    tokens = tiny_batch(rows=3, length=12, seed=5).input_ids
    torch.save(tokens, root / "tokens.pt")
    training = {}
    for case in TINY_CASES:
        for settings in SETTINGS:
            method = case_method(case.values[0], settings)
            method.begin_step(0)
            name = f"{case.id}-{settings}"
            logits = method.model(tokens).logits.detach()
            training[name] = (logits, greedy(method.model, [5, 9, 4], new=6))
            export_student(method.student(), method.teacher.tokenizer, "", root / name)
    for family, tied in OTHERS:
        method = case_method((family, tied, {}), "folded")
        name = f"others-{family}-{tied}"
        method.begin_step(0)
        training[name] = (method.model(tokens).logits.detach(), [])
        export_student(method.student(), method.teacher.tokenizer, "", root / name)
    script = root / "read.py"
    script.write_text(READER)
    environment = {**os.environ, "PYTHONPATH": "", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, script, root], check=True, env=environment, timeout=300)
    found = torch.load(root / "logits.pt")
    assert set(found) == set(training)
    return {name: Seen(*found[name], *training[name]) for name in found}


@torch.no_grad()
def greedy(model: PreTrainedModel, ids: list[int], new: int) -> list[int]:
    """The most likely tokens, up to an end-of-text token (1 or 2)."""
    for _ in range(new):
        ids = [*ids, int(model(torch.tensor([ids])).logits[0, -1].argmax())]
        if ids[-1] in (1, 2):
            break
    return ids


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("case", TINY_CASES)
def test_another_process_computes_the_same(
    elsewhere: dict[str, Seen], case: Case, settings: str, request: pytest.FixtureRequest
) -> None:
    name = request.node.callspec.id.removesuffix(f"-{settings}")
    seen = elsewhere[f"{name}-{settings}"]
    assert seen.class_name == type(case_method(case).model).__name__
    assert seen.logits.dtype == torch.float64
    assert seen.trained_logits.std() > 0.1
    torch.testing.assert_close(seen.logits, seen.trained_logits, rtol=0, atol=1e-10)
    assert seen.written == seen.trained_written


@pytest.mark.parametrize(("family", "tied"), OTHERS)
def test_another_process_computes_the_same_for_every_family(
    elsewhere: dict[str, Seen], family: str, tied: bool
) -> None:
    seen = elsewhere[f"others-{family}-{tied}"]
    assert seen.class_name == type(tiny_teacher(family, tied).model).__name__
    # Gemma keeps the scale of its embedding in the dtype in which the model was created, Hunyuan
    # creates its router in float32.
    tolerance = 1e-4 if family.startswith("gemma") or family == "hunyuan_v1_moe" else 1e-10
    torch.testing.assert_close(seen.logits, seen.trained_logits, rtol=0, atol=tolerance)


@pytest.fixture(params=TINY_CASES)
def exported(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[LowRankClone, Path]:
    method = case_method(request.param)
    export_student(method.student(), method.teacher.tokenizer, "a card", tmp_path / "student")
    return method, tmp_path / "student"


def test_files(exported: tuple[LowRankClone, Path]) -> None:
    _, folder = exported
    assert {path.name for path in folder.iterdir()} == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_config_names_nothing_from_lrc(exported: tuple[LowRankClone, Path], tmp_path: Path) -> None:
    method, folder = exported
    config = json.loads((folder / "config.json").read_text())
    method.teacher.model.save_pretrained(tmp_path / "teacher")
    original = json.loads((tmp_path / "teacher" / "config.json").read_text())
    rope = original["rope_parameters"]
    for_older = {"rope_theta": rope["rope_theta"], "rope_scaling": None}
    assert {**config, "hidden_size": 16} == {**original, "head_dim": 6, **for_older}
    assert (config["hidden_size"], config["head_dim"], config["dtype"]) == (8, 6, "float64")
    assert config["architectures"] == [type(method.teacher.model).__name__]
    for path in folder.glob("*.json"):
        assert "lrc" not in path.read_text()


def test_weights_are_the_plain_models(exported: tuple[LowRankClone, Path]) -> None:
    method, folder = exported
    names = {name for name, _ in method.teacher.model.named_parameters()}
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert set(file.keys()) == names
        assert file.metadata() == {"format": "pt"}
        for name in names:
            assert torch.equal(file.get_tensor(name), method.model.get_parameter(name))


def test_tokenizer_and_generation_config(exported: tuple[LowRankClone, Path]) -> None:
    method, folder = exported
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    assert tokenizer("w7 w32 nonsense w3")["input_ids"] == [7, 32, 2, 3]
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")
    generation = GenerationConfig.from_pretrained(folder)
    assert (generation.eos_token_id, generation.top_k, generation.do_sample) == ([1, 2], 7, True)
    assert method.model.can_generate()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    method = case_method(("qwen3", True, {}))
    student = method.student()
    export_student(student, method.teacher.tokenizer, "", tmp_path / "out", dtype)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == str(dtype).removeprefix("torch.")
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert len(weights) == len(list(student.named_parameters()))
    for name, value in weights.items():
        assert torch.equal(value, student.get_parameter(name).to(dtype))
    assert (
        student.dtype == student.config.dtype == torch.float64
    )  # the student itself does not change


def run_for(method: LowRankClone, folder: Path, **teacher: Any) -> Run:
    """A run whose recipe names the teacher's folder."""
    method.teacher.model.save_pretrained(folder / "teacher")
    method.teacher.tokenizer.save_pretrained(folder / "teacher")
    recipe = make_recipe(
        {
            "teacher": {"model": str(folder / "teacher"), **teacher},
            "student": {"hidden_size": 8},
            "data": {"text": ["stdlib-docs"]},
        }
    )
    return Run.create(folder / "run", recipe)


def read_card(folder: Path) -> tuple[dict[str, Any], str]:
    """Front matter and text of a model card."""
    empty, front, text = (folder / "README.md").read_text().split("---\n", 2)
    assert empty == ""
    return yaml.safe_load(front), text


def test_card_has_front_matter(tmp_path: Path) -> None:
    method = case_method(("llama", False, {}))
    run = run_for(method, tmp_path, license="mit")
    student = method.student()
    card = model_card(run, method.teacher, student, 0)
    export_student(student, method.teacher.tokenizer, card, tmp_path / "student")
    front, text = read_card(tmp_path / "student")
    assert front["library_name"] == "transformers"
    assert front["pipeline_tag"] == "text-generation"
    assert front["license"] == "mit"
    assert "low-rank-clone" in front["tags"]
    assert "base_model" not in front  # a folder of this machine is of no use to readers
    assert "| hidden size | 16 | 8 |" in text
    parameters = [sum(p.numel() for p in m.parameters()) for m in (method.teacher.model, student)]
    assert f"| parameters | {parameters[0]:,} | {parameters[1]:,} |" in text
    assert "hidden_size: 8" in text
    assert "with a smaller hidden size, made by" in text


def test_card_describes_the_weights_beside_it(tmp_path: Path) -> None:
    """A run that went on has the summary of its start, and may have metrics after a checkpoint."""
    method = case_method(("llama", False, {}))
    run = run_for(method, tmp_path)
    run.folder.mkdir()
    start = {"teacher_held_out_lm": 1.0, "student_held_out_lm": 9.0, "kl": 8.0, "tokens": 0}
    more = {"top1_agreement": 0.5, "held_out_labels": 100}
    run.summary_file.write_text(json.dumps({**start, **more}))
    lines = [
        {"step": 0, "tokens": 0, "held_out_lm": 9.0, "teacher_held_out_lm": 1.0},
        {"step": 2, "tokens": 20, "held_out_lm": 7.0},
        {"step": 4, "tokens": 40, "held_out_lm": 5.0},
    ]
    run.metrics_file.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def shown(tokens: int) -> str:
        return model_card(run, method.teacher, method.student(), tokens).partition("## Intended")[0]

    assert "| held-out LM loss of the student | 9.0000 |" in shown(0)
    assert "| KL(teacher, student) | 8.0000 |" in shown(0)
    card = shown(30)
    assert "| training tokens | 30 |" in card
    assert "| held-out LM loss of the student after 20 tokens | 7.0000 |" in card
    assert "KL" not in card
    assert "| held-out LM loss of the student | 5.0000 |" in shown(40)


def test_card_names_no_folder_of_this_machine(tmp_path: Path) -> None:
    method = case_method(("llama", False, {}))
    run = run_for(method, tmp_path)
    settings = {
        "data.text": [str(tmp_path / "a.txt")],
        "data.held_out": [str(tmp_path / "b.txt")],
        "data.also_held_out": {"chat": [str(tmp_path / "c.jsonl")]},
        "data.cache": str(tmp_path / "cache"),
        "train.evaluate": {"tasks": ["piqa"], "every_tokens": 9, "data": str(tmp_path / "rows")},
    }
    recipe = make_recipe(run.recipe.model_dump(), settings)
    card = model_card(replace(run, recipe=recipe), method.teacher, method.student(), 0)
    assert str(tmp_path) not in card
    assert all(name in card for name in ("a.txt", "b.txt", "c.jsonl", "data: rows"))


def test_an_invalid_generation_config_does_not_cost_the_student(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """transformers refuses to write sampling settings of a model that does not sample."""
    student = case_method(("llama", False, {})).student()
    student.generation_config = GenerationConfig(temperature=0.7, eos_token_id=[1, 2])
    export_student(student, tiny_teacher("llama").tokenizer, None, tmp_path / "student")
    assert "is not valid" in caplog.text
    assert GenerationConfig.from_pretrained(tmp_path / "student").eos_token_id == [1, 2]


def test_card_takes_the_teachers_license(tmp_path: Path) -> None:
    method = case_method(("llama", False, {}))
    run = run_for(method, tmp_path)
    assert "no license was found with the teacher" in model_card(
        run, method.teacher, method.student(), 0
    )
    readme = "---\nlicense: apache-2.0\n---\n\n# A teacher\n"
    (tmp_path / "teacher" / "README.md").write_text(readme)
    assert "license: apache-2.0" in model_card(run, method.teacher, method.student(), 0)


def test_card_names_data_sets_and_a_license_of_its_own(tmp_path: Path) -> None:
    """Data sets of the hub alone, from a stream or from shards; a license that is only linked."""
    method = case_method(("llama", False, {}))
    run = run_for(method, tmp_path)
    readme = "---\nlicense: other\nlicense_name: qwen\nlicense_link: https://x.org/l\n---\n"
    (tmp_path / "teacher" / "README.md").write_text(readme)
    settings = run.recipe.model_dump()
    del settings["data"]["text"]
    stream = {"stream": {"dataset": "HuggingFaceFW/fineweb-edu"}}
    named = make_recipe({**settings, "data": {**settings["data"], **stream}})
    card = model_card(replace(run, recipe=named), method.teacher, method.student(), 0)
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["datasets"] == ["HuggingFaceFW/fineweb-edu"]
    assert [front[f"license{part}"] for part in ("", "_name", "_link")] == [
        "other",
        "qwen",
        "https://x.org/l",
    ]
    assert "The teacher's license, qwen (https://x.org/l), applies" in card
    gone = {**settings["data"], "shards": [str(tmp_path / "gone")], "stream": None}
    assert data_sets(make_recipe({**settings, "data": gone})) == []


@pytest.mark.parametrize(
    ("family", "option"), [("llama", False), ("qwen2", True)], ids=["own", "transformers"]
)
def test_card_says_how_to_run_it_and_folds_the_recipe_away(
    tmp_path: Path, family: str, option: bool
) -> None:
    """vLLM's own Qwen2 takes no explicit head_dim."""
    method = case_method((family, False, {}))
    card = model_card(run_for(method, tmp_path), method.teacher, method.student(), 0)
    assert ("--model-impl transformers" in card) == option
    assert "ollama create" in card
    assert "## Intended use and limits" in card
    folded = card.partition("<details>")[2].partition("</details>")[0]
    assert "hidden_size: 8" in folded


FULL = [
    pytest.param(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), id="from-the-system"),
    pytest.param(
        SafetensorError(
            "Error while serializing: I/O error: No space left on device (os error 28)"
        ),
        id="from-safetensors",
    ),
]
"""Errors of a full disk."""


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("error", FULL)
def test_full_disk_keeps_the_older_export(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = case_method(("llama", True, {}))
    student, tokenizer, folder = method.student(), method.teacher.tokenizer, tmp_path / "student"
    export_student(student, tokenizer, "the older card", folder)
    before = contents(folder)
    save = PreTrainedModel.save_pretrained

    def fill_the_disk(self: PreTrainedModel, target: Path, **options: Any) -> None:
        save(self, target, **options)
        (Path(target) / "model.safetensors").write_bytes(b"half")
        raise error

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", fill_the_disk)
    with pytest.raises(UserError, match=r"disk is full.*free some space"):
        export_student(student, tokenizer, "the newer card", folder)
    assert contents(folder) == before
    assert [path.name for path in tmp_path.iterdir()] == ["student"]


def test_newer_export_replaces_the_older(tmp_path: Path) -> None:
    method = case_method(("llama", True, {}))
    tokenizer, folder = method.teacher.tokenizer, tmp_path / "student"
    export_student(method.student(), tokenizer, "the older card", folder)
    (folder / "left-over.txt").write_text("old")
    export_student(method.student(), tokenizer, "the newer card", folder)
    assert (folder / "README.md").read_text() == "the newer card"
    assert not (folder / "left-over.txt").exists()


def test_unwritable_place(tmp_path: Path) -> None:
    method = case_method(("llama", True, {}))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        export_student(method.student(), method.teacher.tokenizer, "", tmp_path / "file" / "out")


def test_settings_for_older_versions_of_layers_of_several_kinds(tmp_path: Path) -> None:
    """Gemma 3 and OLMo 3 have a rotary embedding for each kind of layer."""
    rope = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5},
        "sliding_attention": {"rope_type": "default", "rope_theta": 3e4},
    }
    teacher = tiny_teacher("gemma3_text", dtype=torch.float32, rope_parameters=rope)
    student = tiny_method(teacher).student()
    export_student(student, teacher.tokenizer, None, tmp_path / "student")
    found = json.loads((tmp_path / "student/config.json").read_text())
    assert (found["rope_theta"], found["rope_local_base_freq"]) == (5e5, 3e4)
    assert found["rope_scaling"] == {"rope_type": "linear", "factor": 8.0}
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    assert again.config.rope_parameters == rope
    ids = tiny_tokens(2)
    assert torch.equal(again(ids).logits, student(ids).logits)
