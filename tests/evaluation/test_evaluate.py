"""`lrc eval` as a whole: results, tables, kept results, and refusals."""

import importlib
import json
import shutil
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

pytest.importorskip("lm_eval")

from benchmarks_data import ROWS, save_byte_model
from command_line import Command
from data_helpers import write_rows
from lrc.cli.console import TextConsole
from lrc.data import open_text
from lrc.evaluation import evaluation as evaluation_module
from lrc.evaluation.agreement import pack
from lrc.evaluation.evaluation import EvaluationSettings, evaluate, results_folder
from lrc.evaluation.published import published
from lrc.evaluation.results import Evaluation, KeptResults, ModelResult, Score, TaskResult
from lrc.evaluation.subject import find_subjects, fingerprint_of
from lrc.evaluation.tables import average, markdown, notes, short_count
from lrc.model.teacher import load_model
from lrc.recipe import load_recipe, make_recipe
from lrc.recipe.sections import DataSection
from lrc.run import Run
from lrc.system.errors import UserError
from lrc.train.session import initialize_only
from prepared import Prepared

cli_module = importlib.import_module("lrc.cli.evaluate")  # `lrc.cli` has a function of that name


@pytest.fixture(autouse=True)
def wide_console(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli_module, "console", TextConsole(width=200))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    for name, make in ROWS.items():
        write_rows(folder / f"{name}.jsonl", make(6))
    return folder


@pytest.fixture(scope="module")
def run(byte_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run with an untrained student."""
    folder = tmp_path_factory.mktemp("run")
    texts = [
        {"text": f"Animal {i} is a cow, and cow {i + 1} is an animal. " * 3} for i in range(40)
    ]
    recipe = {
        "teacher": {"model": str(byte_model), "license": "mit"},
        "student": {"hidden_size": 8},
        "data": {
            "text": [str(write_rows(folder / "text.jsonl", texts))],
            "held_out_fraction": 0.2,
            "sequence_length": 32,
            "cache": str(folder / "cache"),
        },
        "train": {"micro_batch": 2, "eval_sequences": 5},
    }
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    run = Run.create(folder / "mine", load_recipe(file))
    initialize_only(run)
    return run


def test_published_averages_are_means() -> None:
    tables = published()
    assert len(tables.tasks) == 9
    assert len(tables.models) == 12
    for row in tables.models:
        assert sum(row.accuracy) / 9 == pytest.approx(row.average, abs=0.006), row.model
    row = {row.model: row for row in tables.models}["LRC-1.7B"]
    assert (row.teacher, row.tokens, row.accuracy[-1]) == ("Qwen2.5-3B", "20B", 54.93)


def test_published_results_are_listed(lrc: Command) -> None:
    printed = lrc.printed("eval", "--published")
    assert all(
        row.model in printed and f"{row.average:.2f}" in printed for row in published().models
    )


def test_command_line(
    byte_model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lrc: Command
) -> None:
    other = save_byte_model(tmp_path / "other", seed=1)
    out = tmp_path / "out"
    command = ["eval", byte_model, "--tasks", "piqa,winogrande", "--data", rows]
    compared = ["--limit", 4, "--compare", other, "--out", out]
    printed = lrc.printed(*command, *compared)
    assert "tiny - other" in printed
    assert "Limited to the first 4 rows" in printed
    assert "4 of 1,838" in printed
    found = Evaluation.model_validate_json((out / "results.json").read_text())
    assert [model.label for model in found.models] == ["tiny", "other"]
    assert found.settings["limit"] == 4
    assert found.environment["packages"]["lm_eval"]
    ours, theirs = (model.tasks["piqa"] for model in found.models)
    assert set(ours.metrics) == {"acc", "acc_norm"}
    assert (ours.rows, ours.rows_in_all) == (4, 6)
    assert ours.metrics["acc"].stderr is not None
    text = (out / "results.md").read_text()
    assert "| LRC-1.5B | Llama-3.2-3B | 10B |" in text
    assert "| **tiny** (acc_norm, else acc) |" in text
    difference = 100 * (ours.metrics["acc"].value - theirs.metrics["acc"].value)
    assert f"| {difference:+.2f} | 4 of 1,838 |" in text

    def unneeded(*_: Any) -> None:
        raise AssertionError("all results are kept, so no model must be loaded")

    monkeypatch.setattr(evaluation_module, "load_model", unneeded)
    before = (out / "results.json").read_text()
    lrc.printed(*command, *compared)
    assert json.loads(before)["models"] == json.loads((out / "results.json").read_text())["models"]
    # With another limit, nothing is reused.
    code, _, errors = lrc(*command, "--limit", 5, "--out", out)
    assert code == 1
    assert "a bug in lrc" in errors


def test_a_killed_evaluation_continues(
    byte_model: Path, rows: Path, tmp_path: Path, prepared: Prepared
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    write_rows(data / "piqa.jsonl", ROWS["piqa"](4))
    write_rows(data / "sciq.jsonl", ROWS["sciq"](3000))
    out = tmp_path / "out"
    command = ["eval", byte_model, "--tasks", "piqa,sciq", "--data", data, "--out", out]
    process = prepared.start(*command, "--batch-size", 1)
    deadline = time.monotonic() + 280
    while not (kept := list(out.glob("tasks/piqa-*.json"))):
        assert process.poll() is None, process.errors.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    assert process.wait()[0] == -signal.SIGKILL
    assert not list(out.glob("tasks/sciq-*.json"))
    assert not (out / "results.json").exists()

    written = kept[0].stat().st_mtime_ns
    write_rows(data / "sciq.jsonl", ROWS["sciq"](5))  # changes the key of this task only
    settings = EvaluationSettings(("piqa", "sciq"), data=data)
    found = evaluate(str(byte_model), [], settings, out).models[0]
    assert kept[0].stat().st_mtime_ns == written
    assert [result.rows for result in found.tasks.values()] == [4, 5]
    fresh = evaluate(str(byte_model), [], settings, tmp_path / "fresh").models[0]
    for name, result in fresh.tasks.items():
        assert found.tasks[name].metrics == result.metrics


def test_models_of_the_hub_are_told_apart_by_their_commit(
    byte_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commits = {"main": "0" * 40, "v1": "1" * 40}
    store = tmp_path / "models--org--name"
    (store / "refs").mkdir(parents=True)
    for seed, (revision, commit) in enumerate(commits.items()):
        (store / "refs" / revision).write_text(commit)
        save_byte_model(store / "snapshots" / commit, seed)
    download = partial(huggingface_hub.snapshot_download, cache_dir=tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr("lrc.system.hub.hub_problem", lambda: "there is none")
    assert fingerprint_of("org/name") == commits["main"]
    assert fingerprint_of("org/name", "v1") == commits["v1"]
    models = [load_model("org/name", revision=revision)[0] for revision in (None, "v1")]
    weights = [model.get_input_embeddings().weight for model in models]
    assert not torch.equal(*weights)
    recipe = {
        "teacher": {"model": "org/name", "revision": "v1"},
        "student": {"hidden_size": 8},
        "data": {"text": ["stdlib-docs"]},
    }
    run = Run.create(tmp_path / "run", make_recipe(recipe))
    run.begin()
    shutil.copytree(byte_model, run.student_folder)
    _, teacher = find_subjects(str(run.folder), ["teacher"])
    assert (teacher.source, teacher.fingerprint()) == ("org/name", commits["v1"])


def test_a_run_s_student_has_its_results_in_the_run(run: Run) -> None:
    places = run.folder, run.student_folder
    found = [results_folder(str(path), "evaluation", "evaluations") for path in places]
    assert found == [run.folder / "evaluation"] * 2
    assert results_folder("org/name", "evaluation", "evaluations") == Path("evaluations/name")


def test_models_of_one_last_name_keep_their_results_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a/m", "b/m"):
        Path(name).mkdir(parents=True)
    Path("evaluations/m").mkdir(parents=True)
    Path("evaluations/m/results.json").write_text('{"models": [{"model": "./a/m"}]}')
    found = [results_folder(name, "evaluation", "evaluations") for name in ("a/m", "b/m", "org/m")]
    assert found == [Path("evaluations") / name for name in ("m", "b-m", "org-m")]


def test_kept_results_depend_on_all_settings(byte_model: Path, tmp_path: Path) -> None:
    kept = KeptResults(tmp_path)
    key = {"task": "piqa", "limit": 3, "model": fingerprint_of(str(byte_model))}
    result = TaskResult(task="piqa", metrics={"acc": Score(value=0.5)}, rows=3, rows_in_all=9)
    kept.save(key, result)
    assert kept.load(dict(key)) == result
    assert kept.load({**key, "limit": None}) is None
    (file,) = tmp_path.iterdir()
    file.write_text(file.read_text()[:-20])
    assert kept.load(key) is None
    other = save_byte_model(tmp_path / "model", seed=1)
    first = fingerprint_of(str(other))
    save_byte_model(other, seed=2)
    assert fingerprint_of(str(other)) != first
    (other / "README.md").write_text("a model card is not the model")
    assert fingerprint_of(str(other)) == fingerprint_of(str(other))


def test_held_out_losses_of_a_run_are_those_of_its_closing_table(run: Run, lrc: Command) -> None:
    printed = lrc.printed("eval", run.folder, "--tasks", "heldout", "--compare", "teacher")
    assert "same top-1 prediction" in printed
    results = run.folder / "evaluation" / "results.json"
    found = Evaluation.model_validate_json(results.read_text())
    student, teacher = (
        {m: s.value for m, s in model.tasks["heldout"].metrics.items()} for model in found.models
    )
    summary = run.summary()
    assert student["lm_loss"] == pytest.approx(summary["student_held_out_lm"], rel=1e-5)
    assert student["teacher_lm_loss"] == pytest.approx(summary["teacher_held_out_lm"], rel=1e-5)
    assert student["perplexity"] == pytest.approx(summary["student_perplexity"], rel=1e-4)
    assert student["kl"] == pytest.approx(summary["kl"], rel=1e-4)
    assert student["top1"] == pytest.approx(summary["top1_agreement"])
    assert teacher["lm_loss"] == pytest.approx(summary["teacher_held_out_lm"], rel=1e-5)
    assert teacher["kl"] == pytest.approx(0, abs=1e-6)
    assert teacher["top1"] == 1
    assert found.models[0].tasks["heldout"].rows == 5
    assert found.models[0].tokens == 0
    assert "## Held-out text" in (run.folder / "evaluation" / "results.md").read_text()


def test_held_out_of_a_plain_model(run: Run, byte_model: Path, tmp_path: Path) -> None:
    """A student's folder with teacher and text as arguments, against naive losses."""
    text = tmp_path / "own.txt"
    text.write_text("A cow is an animal.\n\nA hen is an animal too. " * 40)
    settings = EvaluationSettings(("heldout",), limit=2, teacher=str(byte_model), text=(str(text),))
    found = evaluate(str(run.student_folder), [], settings, tmp_path / "out")
    metrics = found.models[0].tasks["heldout"].metrics
    tokenizer = AutoTokenizer.from_pretrained(byte_model)
    ids = torch.tensor(list(pack(DataSection(text=[str(text)]), tokenizer))[:2])
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(folder)(ids).logits[:, :-1].log_softmax(-1).detach()
        for folder in (run.student_folder, byte_model)
    )
    lm = -student.gather(2, ids[:, 1:, None]).mean()
    kl = (teacher.exp() * (teacher - student)).sum(-1).mean()
    assert metrics["lm_loss"].value == pytest.approx(float(lm), rel=1e-4)
    assert metrics["kl"].value == pytest.approx(float(kl), rel=1e-3)
    same = (student.argmax(-1) == teacher.argmax(-1)).double().mean()
    assert metrics["top1"].value == pytest.approx(float(same))


def test_held_out_text_is_packed_as_for_training(run: Run) -> None:
    data = run.recipe.data
    tokenizer = run.tokenizer()
    packed = open_text(run.recipe, tokenizer)
    ours = list(pack(data.model_copy(update={"sequence_length": 8}), tokenizer))
    flat = [token for row in ours for token in row]
    # The recipe's split removes whole documents. The first remaining one is packed the same way.
    start = packed.training_batch(0, 1).input_ids[0].tolist()
    assert any(flat[i : i + len(start)] == start for i in range(len(flat)))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--tasks", "arc_eazy", "--data", "."], "no task 'arc_eazy' (nearest: arc_easy"),
        (["--tasks", "piqa,mmlu"], "has no file for the task 'mmlu'"),
        (["--tasks", ","], "Give --tasks some tasks"),
        (["--tasks", "heldout"], "give --teacher and --text"),
        (["--tasks", "piqa", "--teacher", "x"], "belong to the task heldout"),
        (["--compare", "teacher"], "is not a run, so name the teacher"),
        (["--device", "cuda:99"], "The device 'cuda:99' is not on this machine"),
    ],
)
def test_refusals(
    arguments: list[str],
    says: str,
    byte_model: Path,
    rows: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    lrc: Command,
) -> None:
    command = ["eval", byte_model, "--out", tmp_path / "out", "--data", rows, *arguments]
    if "arc_eazy" in arguments:  # the nearest name is found without all 14,000 tasks
        folder = evaluation_module.open_tasks(["arc_easy"])
        monkeypatch.setattr(evaluation_module, "open_tasks", lambda names: folder)
    assert says in lrc.refusal(*command)
    assert not (tmp_path / "out").exists()


def test_other_refusals(
    run: Run, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = save_byte_model(tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["A"], vocabulary["B"] = vocabulary["B"], vocabulary["A"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UserError, match="different vocabularies"):
        evaluate(str(run.folder), [str(other)], EvaluationSettings(("heldout",)), tmp_path / "out")
    settings = EvaluationSettings(("heldout",), data=rows)
    with pytest.raises(UserError, match="--data applies only to benchmarks"):
        evaluate(str(run.folder), [], settings, tmp_path / "out")

    def missing(name: str) -> str:
        raise evaluation_module.harness_version.__globals__["metadata"].PackageNotFoundError

    monkeypatch.setattr("lrc.evaluation.harness.metadata.version", missing)
    with pytest.raises(UserError, match=r"pip install 'low-rank-clone\[eval\]'"):
        evaluate(str(run.folder), [], EvaluationSettings(), tmp_path / "out")


def result_of(task: str, accuracy: float, norm: float | None, rows: int) -> TaskResult:
    metrics = {"acc": Score(value=accuracy, stderr=0.01)}
    if norm is not None:
        metrics["acc_norm"] = Score(value=norm, stderr=0.02)
    return TaskResult(task=task, metrics=metrics, rows=rows, rows_in_all=rows)


def test_a_whole_evaluation_is_compared_with_published_rows() -> None:
    tasks = {
        name: result_of(name, 0.5, None if i % 2 else 0.6, benchmark.rows)
        for i, (name, benchmark) in enumerate(published().tasks.items())
    }
    model = ModelResult(model="runs/mine", label="mine", teacher="T-3B", tokens=10**10, tasks=tasks)
    settings = {"limit": None, "dtype": "auto", "device": "cpu"}
    whole = Evaluation(settings=settings, environment={"packages": {}}, models=(model,))
    assert average(model, norm=False) == pytest.approx(50)
    assert average(model, norm=True) == pytest.approx((5 * 60 + 4 * 50) / 9)
    assert notes(whole) == []
    lines = markdown(whole).splitlines()
    row = ["60.00", "50.00"] * 4 + ["60.00", "55.56"]
    assert f"| **mine** (acc_norm, else acc) | T-3B | 10B | {' | '.join(row)} |" in lines
    assert "| arc_easy | acc | 50.00 ± 1.00 | 2,376 |" in lines

    sample = {**tasks, "mmlu": result_of("mmlu", 0.5, None, 2000)}
    part = whole.model_copy(update={"models": (model.model_copy(update={"tasks": sample}),)})
    assert notes(part) == [
        "mmlu: 2,000 of its 14,042 rows: not comparable with results on all rows, nor with the "
        "published ones."
    ]
    few = {"piqa": tasks["piqa"]}
    partly = whole.model_copy(update={"models": (model.model_copy(update={"tasks": few}),)})
    assert average(partly.models[0], norm=False) is None
    assert "average of the nine" not in markdown(partly)

    group = TaskResult(
        task="both", metrics={}, rows=5, rows_in_all=5, members={"one": {"acc": Score(value=0.25)}}
    )
    meanless = model.model_copy(update={"tasks": {"both": group}})
    assert "| one | acc | 25.00 | 5 |" in markdown(whole.model_copy(update={"models": (meanless,)}))


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0"), (999, "999"), (81_920, "81.9K"), (20 * 10**9, "20B"), (36 * 10**12, "36T")],
)
def test_short_counts(count: int, text: str) -> None:
    assert short_count(count) == text


def test_a_run_stands_for_its_student(run: Run, byte_model: Path) -> None:
    first, second = find_subjects(str(run.folder), ["teacher", str(byte_model)])
    assert first.source == str(run.student_folder)
    assert first.label == "mine"
    assert second.source == str(byte_model)
