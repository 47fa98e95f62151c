"""The Python interface: what the command line does, with objects instead of names."""

import gc
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import lrc
from data_helpers import write_jsonl
from lrc.system.errors import UserError
from lrc.tuning.settings import SETTINGS as TUNING
from tiny import tiny_teacher
from tiny_runs import file_settings, save_teacher, tiny_documents

SETTINGS = {
    "train.tokens": 96,
    "train.micro_batch": 2,
    "train.eval_sequences": 4,
    "data.sequence_length": 16,
    "data.held_out_fraction": 0.2,
    "initialize.calibration_tokens": 64,
}


@pytest.fixture
def parts() -> dict[str, Any]:
    """A loaded transformers model, its tokenizer, and the other arguments of a clone."""
    teacher = tiny_teacher("llama", dtype=torch.float32)
    return {
        "teacher": teacher.model,
        "tokenizer": teacher.tokenizer,
        "hidden_size": 8,
        "settings": SETTINGS,
    }


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in the test's own folder, not in the checkout."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LRC_CACHE", str(tmp_path / "cache"))


def as_generator() -> Iterator[str]:
    yield from tiny_documents()


TEXTS: dict[str, Any] = {
    "generator": as_generator,
    "dataset": lambda: datasets.Dataset.from_dict({"text": tiny_documents()}),
    "iterable-dataset": lambda: datasets.Dataset.from_dict(
        {"text": tiny_documents()}
    ).to_iterable_dataset(),
}


@pytest.mark.parametrize("kind", TEXTS)
def test_texts_as_objects(parts: dict[str, Any], kind: str, tmp_path: Path) -> None:
    """The run equals that of a file with the same documents."""
    file = write_jsonl(tmp_path / "text.jsonl", tiny_documents())
    by_file = lrc.clone(**parts, text=file, out=tmp_path / "by-file")
    by_object = lrc.clone(**parts, text=TEXTS[kind](), out=tmp_path / "by-object")
    assert by_file.student().state_dict().keys() == by_object.student().state_dict().keys()
    for name, value in by_file.student().state_dict().items():
        assert torch.equal(by_object.student().state_dict()[name], value)
    [kept] = by_object.recipe.data.text
    assert Path(kept).parent == tmp_path / "cache" / "texts"
    assert Path(kept).read_text() == file.read_text()


def test_an_endless_text_is_read_only_as_far_as_needed(parts: dict[str, Any]) -> None:
    read = []

    def endless() -> Iterator[str]:
        while True:
            read.append(1)
            yield tiny_documents()[len(read) % 40]

    run = lrc.clone(**parts, text=endless(), out="run")
    assert run.summary()["tokens"] == 96
    assert 1_000_000 / 240 < len(read) < 1_000_000 / 100


@pytest.mark.parametrize(
    ("text", "words"),
    [([1], "a int"), ([{"body": "x"}], "a dict"), ([None], "a NoneType")],
)
def test_texts_of_the_wrong_type(parts: dict[str, Any], text: list[Any], words: str) -> None:
    with pytest.raises(UserError, match=f"The text holds {words}.*data.text_field"):
        lrc.clone(**parts, text=iter(text), out="run")
    assert not Path("run").exists()


def test_rows_of_a_list_and_empty_ones(parts: dict[str, Any]) -> None:
    rows = [{"text": document} for document in tiny_documents()]
    run = lrc.compress(**parts, text=[*rows, {"text": None}], out="run")
    assert len(Path(run.recipe.data.text[0]).read_text().splitlines()) == len(rows) + 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ({"train": ["w3"], "test": ["w4"]}, r"several parts \(train, test\): give one"),
        (["a.jsonl", 3], "a int: give paths, or documents alone"),
    ],
)
def test_texts_that_are_no_documents(parts: dict[str, Any], text: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        lrc.clone(**parts, text=text, out="run")


def test_a_text_that_fails_is_not_a_file_that_fails(parts: dict[str, Any]) -> None:
    def broken() -> Iterator[str]:
        yield "w3 w4"
        raise ConnectionError("the hub went away")

    with pytest.raises(UserError, match=r"The text cannot be read \(the hub went away\)"):
        lrc.clone(**parts, text=broken(), out="run")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"student": {"kv_heads": 1}}, r"replaces all of 'student'.*\(hidden_size\)"),
        ({"data": {"text": "b.jsonl"}}, r"replaces all of 'data', also data.text \(text\)"),
        ({"data.text": "b.jsonl"}, "given more than once"),
    ],
)
def test_settings_do_not_replace_arguments(
    parts: dict[str, Any], settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        lrc.clone(**{**parts, "settings": settings}, text=as_generator(), out="run")
    with pytest.raises(UserError, match="given more than once"):
        lrc.prune("no-run", ratio=0.2, settings={"method.ratio": 0.1})


def test_a_loaded_teacher_is_as_it_was_loaded(parts: dict[str, Any]) -> None:
    settings = {**SETTINGS, "teacher.tie_head": True, "teacher.dtype": "bfloat16"}
    words = r"so teacher\.dtype, teacher\.tie_head would have no effect"
    with pytest.raises(UserError, match=words):
        lrc.clone(**{**parts, "settings": settings}, text=as_generator(), out="run")
    settings = {**SETTINGS, "teacher.attention": "sdpa", "teacher.dtype": "float32"}
    lrc.compress(**{**parts, "settings": settings}, text=as_generator(), out="run")


def test_arguments_that_nothing_could_use(tmp_path: Path) -> None:
    teacher = save_teacher(tmp_path / "teacher")
    for arguments, words in (
        ({"gpus": 0}, "--gpus is 0"),
        ({"context": -1}, "--context -1"),
        ({"tokens": 0}, "train.tokens"),
    ):
        with pytest.raises(UserError, match=words):
            lrc.plan(teacher, ratio=0.5, **arguments)
    for arguments, words in (
        ({"limit": 0}, "The limit is 0"),
        ({"batch_size": 0}, "the batch size 0"),
        ({"dtype": "float99"}, "'float99' is not an element type"),
    ):
        with pytest.raises(UserError, match=words):
            lrc.evaluate(teacher, tasks="heldout", teacher=str(teacher), **arguments)
    with pytest.raises(UserError, match="The tokenizer goes with a loaded teacher"):
        lrc.clone(teacher, tokenizer=tiny_teacher("llama").tokenizer, hidden_size=8)


def test_a_tuning_goes_on_by_its_own_function(tmp_path: Path) -> None:
    (tmp_path / "tuning").mkdir()
    (tmp_path / "tuning" / TUNING).write_text("model: x\n")
    with pytest.raises(UserError, match=r"is a tuning: call lrc\.sft again"):
        lrc.resume(tmp_path / "tuning")


def test_teachers_that_cannot_be_used(parts: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="needs its tokenizer"):
        lrc.clone(**{**parts, "tokenizer": None}, text=as_generator())
    with pytest.raises(UserError, match="The teacher is a int"):
        lrc.clone(**{**parts, "teacher": 3}, text=as_generator())


def test_on_step_and_resume(parts: dict[str, Any], tmp_path: Path) -> None:
    seen: list[int] = []

    def stop(line: dict[str, Any]) -> None:
        seen.append(line["step"])
        assert line["loss"] > 0
        if line["step"] == 2:
            raise KeyboardInterrupt

    settings = {**SETTINGS, "train.checkpoint_every": 1}
    with pytest.raises(KeyboardInterrupt):
        lrc.clone(**{**parts, "settings": settings}, text=as_generator(), out="part", on_step=stop)
    assert seen == [1, 2]
    again: list[int] = []
    run = lrc.resume(
        "part",
        teacher=parts["teacher"],
        tokenizer=parts["tokenizer"],
        on_step=lambda line: again.append(line["step"]),
    )
    assert again == [2, 3]
    whole = lrc.clone(**{**parts, "settings": settings}, text=as_generator(), out="whole")
    for name, value in whole.student().state_dict().items():
        assert torch.equal(run.student().state_dict()[name], value)


def test_compress_export_prune_and_evaluate(parts: dict[str, Any], tmp_path: Path) -> None:
    del parts["tokenizer"]
    teacher = save_teacher(tmp_path / "teacher")
    run = lrc.compress(**{**parts, "teacher": teacher}, text=as_generator(), out="start")
    assert run.summary()["tokens"] == 0
    out = lrc.export(run, "student", dtype="bf16")
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    with pytest.raises(UserError, match="dtype is 'int3': choose one of float32"):
        lrc.export(run, "other", dtype="int3")
    with pytest.raises(UserError, match="format is 'onnx'"):
        lrc.export(run, "other", format="onnx")
    smaller = lrc.prune(run, ratio=0.05, out="pruned")
    assert smaller.student().num_parameters() < run.student().num_parameters()
    found = lrc.evaluate(run, tasks="heldout", limit=2)
    assert found.models[0].tasks.keys() == {"heldout"}
    assert (run.folder / "evaluation" / "results.json").is_file()


def test_a_call_leaves_no_trace(parts: dict[str, Any]) -> None:
    """Random numbers, and the loaded teacher."""
    model = parts["teacher"].train().requires_grad_(True)
    model.model.norm.eval().requires_grad_(False)
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    gc.disable()
    try:
        run = lrc.compress(**parts, text=as_generator(), out="run")
        lrc.resume(run, teacher=model, tokenizer=parts["tokenizer"])
    finally:
        gc.enable()
    assert torch.equal(torch.rand(3), expected)
    for module in model.modules():
        assert module.training == (module is not model.model.norm)
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    frozen = [name for name, value in model.named_parameters() if not value.requires_grad]
    assert frozen == ["model.norm.weight"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_changed_loaded_teacher_is_not_its_files(
    parts: dict[str, Any], tmp_path: Path, dtype: torch.dtype
) -> None:
    """A run that begins with a loaded model goes on from its files only if they have its values, in
    whatever element type."""
    save_teacher(tmp_path / "teacher")
    teacher = AutoModelForCausalLM.from_pretrained(tmp_path / "teacher", dtype=dtype)
    given = {**parts, "teacher": teacher}
    same = lrc.compress(**given, text=as_generator(), out="same")
    lrc.export(same, "one")
    with torch.no_grad():
        teacher.model.layers[1].mlp.up_proj.weight.mul_(1.5)
    changed = lrc.compress(**given, text=as_generator(), out="changed")
    message = r"the teacher's model\.layers\.1\.mlp\.up_proj\.weight\).*Pass the loaded teacher"
    with pytest.raises(UserError, match=message):
        lrc.export(changed, "two")
    with pytest.raises(UserError, match="began with other inputs"):
        lrc.resume(changed)
    lrc.export(changed, "two", teacher=teacher, tokenizer=parts["tokenizer"])
    exported = load_file("two/model.safetensors")
    for name, value in load_file(changed.student_folder / "model.safetensors").items():
        assert torch.equal(exported[name], value)


def test_plan_and_the_recipe_that_it_writes(tmp_path: Path) -> None:
    teacher = save_teacher(tmp_path / "teacher", hidden_size=32, num_hidden_layers=2)
    text = write_jsonl(tmp_path / "text.jsonl", tiny_documents())
    given: dict[str, Any] = {"text": text, "settings": SETTINGS, "out": "recipe.yaml"}
    plan = lrc.plan(teacher, ratio=0.6, gpu="l4", choose=2, **given)
    assert plan.rows[1].training.bytes > 0
    with pytest.raises(UserError, match="exists: choose another name"):
        lrc.plan(teacher, ratio=0.6, **given)
    with pytest.raises(UserError, match="Give one of --params"):
        lrc.plan(teacher)
    run = lrc.compress(recipe="recipe.yaml", out="run")
    assert run.student().num_parameters() == plan.rows[1].figures.parameters
    assert list(run.recipe.data.text) == [str(text)]
    other = lrc.compress(recipe="recipe.yaml", settings={"initialize.method": "random"}, out="two")
    assert other.recipe.initialize.method == "random"
    page = lrc.write_report([run, "two"], out="page.html")
    with pytest.raises(lrc.UserError, match="no run to report"):
        lrc.write_report([])
    assert "two" in page.read_text()


def test_build_shards(tmp_path: Path) -> None:
    teacher = save_teacher(tmp_path / "teacher")
    write_jsonl(tmp_path / "text.jsonl", tiny_documents())
    mix = {"sources": {"own": {"files": ["text.jsonl"]}}, "held_out_fraction": 0.2}
    Path("mix.yaml").write_text(yaml.safe_dump({**mix, "deduplicate": False}))
    given: dict[str, Any] = {"teacher": str(teacher), "root": tmp_path, "workers": 1}
    shards = lrc.build_shards("mix.yaml", "shards", **given)
    settings = {**SETTINGS, "data.shards": str(shards)}
    del settings["data.held_out_fraction"]  # the shards' own
    run = lrc.compress(teacher, hidden_size=8, settings=settings, out="run")
    assert run.summary()["tokens"] == 0


def test_compare(tmp_path: Path) -> None:
    save_teacher(tmp_path / "teacher")
    train = {"micro_batch": 2, "eval_sequences": 4}
    plan = {
        "recipe": file_settings(tmp_path, initialize={"calibration_tokens": 64}, train=train),
        "tokens": 64,
        "grid": {"learning_rates": [1e-3], "tokens": 32},
        "entries": [{"name": "lrc"}, {"name": "scratch", "set": {"method": "scratch"}}],
    }
    Path("plan.yaml").write_text(yaml.safe_dump(plan))
    results = lrc.compare("plan.yaml", out="compared", only=["lrc"])
    assert [entry.name for entry in results.entries if entry.runs] == ["lrc"]
    assert Path("compared", "comparison.md").is_file()


def test_public_names_are_not_hidden_by_packages() -> None:
    import lrc.cloning
    import lrc.comparison
    import lrc.evaluation
    import lrc.exporting

    for name in (
        "clone",
        "compress",
        "resume",
        "export",
        "evaluate",
        "prune",
        "sft",
        "push",
        "compare",
        "plan",
        "write_report",
        "build_shards",
    ):
        assert callable(getattr(lrc, name))
        assert name in lrc.__all__


def test_what_a_clone_does_is_logged(
    parts: dict[str, Any], caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.INFO, "lrc")
    lrc.clone(**parts, text=as_generator(), out="logged")
    assert "held-out LM loss" in caplog.text
    assert "Initializing the student" in caplog.text
    assert capsys.readouterr().out == ""
