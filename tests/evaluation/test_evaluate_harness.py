"""The harness through lrc: the same prompts, targets, metrics and answers as without it."""

import copy
import dataclasses
import functools
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

pytest.importorskip("lm_eval")

import datasets
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from benchmarks_data import ROWS, SUBJECTS_ROWS, mmlu_rows
from data_helpers import write_rows
from lrc.evaluation import harness
from lrc.evaluation.harness import (
    evaluate_rows,
    evaluate_task,
    find_tasks,
    harness_model,
    load_task,
    open_tasks,
    prompts,
    quiet_harness,
)
from lrc.evaluation.local_data import use_folder
from lrc.evaluation.published import published
from lrc.system.errors import UserError
from tiny import tiny_teacher

HUB_ROWS = 5


@pytest.fixture(scope="session")
def task_index() -> TaskManager:
    """The harness's tasks of the paper."""
    return open_tasks(list(published().tasks))


@pytest.fixture
def manager(task_index: TaskManager) -> TaskManager:
    """A copy with entries that a test may replace."""
    own = copy.copy(task_index)
    own._index = dict(task_index._index)
    return own


@pytest.fixture(scope="module")
def lm(byte_model: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(byte_model)
    return harness_model(model, AutoTokenizer.from_pretrained(byte_model), batch_size=3)


@pytest.fixture(scope="session")
def subjects(task_index: TaskManager) -> list[str]:
    """The subjects of mmlu as named in its data."""
    entries = task_index.task_index.values()
    return [
        e.cfg["dataset_name"]
        for e in entries
        if e.name.startswith("mmlu_") and e.cfg and "description" in e.cfg
    ]


def stock(manager: TaskManager, name: str, rows: list[dict[str, Any]], patch: Any) -> Any:
    """The harness's own task with given rows instead of downloaded ones."""

    def load_dataset(path: str, name: str | None = None, **_: Any) -> datasets.DatasetDict:
        own = [row for row in rows if row.get("subject", name) == name] if "mmlu" in path else rows
        data = datasets.Dataset.from_list(own)
        return datasets.DatasetDict(dict.fromkeys(("train", "validation", "test", "dev"), data))

    with patch.context() as context:
        context.setattr("lm_eval.api.task.datasets.load_dataset", load_dataset)
        return load_task(manager, name)


def contents(task: Any) -> dict[str, Any]:
    """All prompts of the harness and how they are scored, by task."""
    tasks = task.get_all_tasks() if hasattr(task, "get_all_tasks") else [task]
    found = {}
    for member in tasks:
        member.set_config("num_fewshot", 0)
        member.build_all_requests(rank=0, world_size=1)
        found[member.task_name] = {
            "requests": [(i.request_type, i.doc_id, i.idx, i.args) for i in member.instances],
            "targets": [member.doc_to_target(doc) for doc in member.eval_docs],
            "metrics": list(member._metric_fn_list.items()),
            "aggregation": member.aggregation(),
            "better": member.higher_is_better(),
            "version": member.VERSION,
        }
    return found


@pytest.mark.parametrize("name", list(published().tasks))
def test_local_rows_give_the_prompts_and_scores_of_the_hubs(
    name: str,
    task_index: TaskManager,
    manager: TaskManager,
    subjects: list[str],
    lm: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = mmlu_rows(subjects) if name == "mmlu" else ROWS[name](HUB_ROWS)
    write_rows(tmp_path / f"{name}.jsonl", rows)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    use_folder(manager, [name], tmp_path, limited=False, scratch=scratch)
    ours = load_task(manager, name)
    theirs = stock(task_index, name, rows, monkeypatch)
    questions = contents(theirs)
    assert contents(ours) == questions
    assert len(questions) == (57 if name == "mmlu" else 1)
    first = next(iter(questions.values()))["requests"][0][3][0]
    assert ("multiple choice questions (with answers) about" in first) == (name == "mmlu")

    with quiet_harness():
        expected = simple_evaluate(lm, tasks=[theirs], task_manager=task_index, log_samples=False)
    result = evaluate_task(lm, manager, name, limit=None)
    assert result.rows == result.rows_in_all == len(rows)
    for metric, score in result.metrics.items():
        assert score.value == expected["results"][name][f"{metric},none"]
        error = expected["results"][name][f"{metric}_stderr,none"]
        assert score.stderr == (None if error == "N/A" else error)
    assert set(result.metrics) == {
        key.split(",")[0]
        for key in expected["results"][name]
        if ",none" in key and "std" not in key
    }
    assert result.truncated == 0
    if name == "mmlu":
        mean = sum(member["acc"].value for member in result.members.values()) / 57
        assert result.metrics["acc"].value == pytest.approx(mean)
        assert len(result.members) == 57


def test_limit_takes_the_first_rows_of_each_task(
    manager: TaskManager, subjects: list[str], lm: Any, tmp_path: Path
) -> None:
    write_rows(tmp_path / "mmlu.jsonl.gz", mmlu_rows(subjects))
    use_folder(manager, ["mmlu"], tmp_path, limited=True, scratch=tmp_path)
    answers = []
    result = evaluate_task(lm, manager, "mmlu", 1, lambda *done: answers.append(done))
    assert (result.rows, result.rows_in_all) == (57, 57 * SUBJECTS_ROWS)
    assert answers == [(i + 1, 57 * 4) for i in range(57 * 4)]


TOKENS = st.lists(st.integers(0, 40), min_size=1, max_size=12)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(TOKENS, TOKENS), min_size=1, max_size=9), st.integers(1, 4))
def test_answers_equal_one_forward_pass_each(
    requests: list[tuple[list[int], list[int]]], batch_size: int
) -> None:
    """Against a loop without batches, padding or shared prefixes. Token 0, which is also the
    padding, occurs in the text."""
    lm = _exact_model(batch_size)
    asked = [(("", ""), context, continuation) for context, continuation in requests]
    answers = lm._loglikelihood_tokens(asked, disable_tqdm=True)
    for (context, continuation), (loglikelihood, greedy) in zip(requests, answers, strict=True):
        with torch.no_grad():
            logits = lm.model(torch.tensor([context + continuation])).logits[0].log_softmax(-1)
        steps = logits[len(context) - 1 : -1]
        expected = sum(step[token].item() for step, token in zip(steps, continuation, strict=True))
        assert loglikelihood == pytest.approx(expected, abs=1e-9)
        assert greedy == (steps.argmax(-1).tolist() == continuation)


def test_only_scored_positions_get_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = _exact_model(8)
    kept = []
    forward = lm.model.forward

    def watched(*args: Any, **options: Any) -> Any:
        output = forward(*args, **options)
        kept.append(output.logits.shape[1])
        return output

    watched.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    monkeypatch.setattr(lm.model, "forward", watched)
    lm._loglikelihood_tokens([(("", ""), [5] * 30, [6, 7]), (("", ""), [5] * 28, [6])])
    assert kept == [2 + 3]  # the longest continuation, and the padding of the shorter prompt


def test_equals_the_harness_own_model(
    lm: Any,
    byte_model: Path,
    manager: TaskManager,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_rows(tmp_path / "logiqa.jsonl", ROWS["logiqa"](12))
    use_folder(manager, ["logiqa"], tmp_path, limited=False, scratch=tmp_path)
    monkeypatch.setattr(HFLM, "get_model_info", lambda self: {})  # asks the hub
    plain = HFLM(
        pretrained=AutoModelForCausalLM.from_pretrained(byte_model),
        tokenizer=AutoTokenizer.from_pretrained(byte_model),
        batch_size=5,
    )
    expected = simple_evaluate(
        plain, tasks=[load_task(manager, "logiqa")], task_manager=manager, log_samples=False
    )
    found = evaluate_task(lm, manager, "logiqa", None)
    for metric in ("acc", "acc_norm"):
        assert found.metrics[metric].value == expected["results"]["logiqa"][f"{metric},none"]


def test_prompts_beyond_the_context_are_counted(
    lm: Any, manager: TaskManager, tmp_path: Path
) -> None:
    rows = ROWS["boolq"](3)
    rows[1]["passage"] *= 20
    write_rows(tmp_path / "boolq.jsonl", rows)
    use_folder(manager, ["boolq"], tmp_path, limited=False, scratch=tmp_path)
    assert (
        evaluate_task(lm, manager, "boolq", None).truncated == 2
    )  # two answers to the same question


def test_names_tags_and_patterns(task_index: TaskManager) -> None:
    assert find_tasks(task_index, ["sciq", "mmlu", "sciq"]) == ["sciq", "mmlu"]
    assert find_tasks(task_index, ["ai2_arc"]) == ["arc_challenge", "arc_easy"]
    assert "mmlu_anatomy" in find_tasks(task_index, ["mmlu_*"])
    with pytest.raises(UserError, match=r"no task 'arc_eazy' \(nearest: arc_easy"):
        find_tasks(task_index, ["arc_eazy"])
    with pytest.raises(UserError, match="no task 'zzz_\\*'"):
        find_tasks(task_index, ["zzz_*"])


def test_whole_sets_are_preferred_to_samples_unless_limited(
    task_index: TaskManager, tmp_path: Path
) -> None:
    write_rows(tmp_path / "piqa_full.jsonl.gz", ROWS["piqa"](7))
    write_rows(tmp_path / "piqa.jsonl", ROWS["piqa"](3))
    for limited, file, rows in ((False, "piqa_full.jsonl.gz", 7), (True, "piqa.jsonl", 3)):
        manager = copy.copy(task_index)
        manager._index = dict(task_index._index)
        scratch = tmp_path / str(limited)
        scratch.mkdir()
        used = use_folder(manager, ["piqa"], tmp_path, limited, scratch)
        assert list(used["piqa"]) == [file]
        assert len(load_task(manager, "piqa").eval_docs) == rows


@pytest.mark.parametrize(
    ("name", "rows", "says"),
    [
        ("arc_easy", [{"question": "?", "answerKey": "A"}], "lacks a field.*choices"),
        ("piqa", [{"goal": "g", "sol1": "a", "sol2": "b"}], "lacks the field 'label'"),
        ("winogrande", [{"sentence": "a _ b", "option1": "x", "option2": "y"}], "lacks a field"),
        ("sciq", [{"question": "a"}, {"q": "b"}], r"Line 2 of .*sciq.jsonl does not have"),
        ("logiqa", [], "has no rows"),
        ("mmlu", [{"question": "?", "choices": list("abcd"), "answer": 0}], "lack the field 'sub"),
        (
            "mmlu",
            [{"subject": "anatomy", "question": "?", "choices": list("abcd"), "answer": 0}],
            "no rows whose subject is",
        ),
    ],
)
def test_unfit_rows_are_refused(
    name: str, rows: list[dict[str, Any]], says: str, manager: TaskManager, tmp_path: Path
) -> None:
    write_rows(tmp_path / f"{name}.jsonl", rows)

    def read() -> None:
        use_folder(manager, [name], tmp_path, limited=False, scratch=tmp_path)
        load_task(manager, name)

    with pytest.raises(UserError, match=says):
        read()


def test_unfit_folders_are_refused(manager: TaskManager, tmp_path: Path) -> None:
    def refused(name: str, folder: Path = tmp_path) -> str:
        with pytest.raises(UserError) as error:
            use_folder(manager, [name], folder, limited=False, scratch=tmp_path)
        return str(error.value)

    assert "no folder" in refused("piqa", tmp_path / "none")
    assert "no file for the task 'piqa': add piqa.jsonl" in refused("piqa")
    (tmp_path / "piqa.jsonl").write_text('{"goal": ')
    assert "piqa.jsonl:1 is not valid JSON" in refused("piqa")
    entry = manager.task_index["sciq"]
    shown = dataclasses.replace(entry, cfg={**entry.cfg, "num_fewshot": 5})
    manager.task_index["sciq"] = shown
    write_rows(tmp_path / "sciq.jsonl", ROWS["sciq"](2))
    assert "is written in Python or shows solved examples" in refused("sciq")


def test_a_missing_hub_is_reported_in_one_sentence(
    manager: TaskManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*_: Any, **__: Any) -> None:
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr("lm_eval.api.task.datasets.load_dataset", offline)
    monkeypatch.setattr(harness, "cache_alone_if_unreachable", lambda: None)
    with pytest.raises(UserError, match=r"'sciq' cannot be loaded .*Hub.*--data"):
        load_task(manager, "sciq")


def _exact_model(batch_size: int) -> Any:
    """A harness model in float64 over tokens 0 to 40."""
    lm = _exact_harness_model()
    lm.batch_size_per_gpu = batch_size
    return lm


@functools.cache
def _exact_harness_model() -> Any:
    teacher = tiny_teacher("llama", vocab_size=41)
    return harness_model(teacher.model, teacher.tokenizer, batch_size=1)


def test_git_does_not_complain_on_the_terminal(
    lm: Any,
    manager: TaskManager,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The harness asks git for the commit of the current folder, which may have none."""
    write_rows(tmp_path / "piqa.jsonl", ROWS["piqa"](2))
    (tmp_path / "scratch").mkdir()
    use_folder(manager, ["piqa"], tmp_path, limited=False, scratch=tmp_path / "scratch")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.chdir(tmp_path)
    evaluate_task(lm, manager, "piqa", limit=None)
    written = capfd.readouterr()
    assert "fatal" not in written.err + written.out


def test_accuracies_of_rows(lm: Any, manager: TaskManager, tmp_path: Path) -> None:
    write_rows(tmp_path / "sciq.jsonl", ROWS["sciq"](9))
    (tmp_path / "scratch").mkdir()
    use_folder(manager, ["sciq"], tmp_path, limited=False, scratch=tmp_path / "scratch")
    rows = evaluate_rows(lm, manager, load_task(manager, "sciq"), limit=7)
    assert len(rows) == 7
    assert set(rows) <= {0.0, 1.0}
    assert sum(rows) / 7 == evaluate_task(lm, manager, "sciq", limit=7).metrics["acc"].value


def test_prompts_of_rows(lm: Any, manager: TaskManager, tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    for name in ("sciq", "winogrande"):
        write_rows(tmp_path / f"{name}.jsonl", ROWS[name](3))
    use_folder(manager, ["sciq", "winogrande"], tmp_path, limited=False, scratch=scratch)
    tokens = prompts(lm, load_task(manager, "sciq"), limit=2)
    texts = [[lm.tokenizer.decode(ids) for ids in row] for row in tokens]
    assert texts == [
        ["\nQuestion: What melts at 0 degrees?\nAnswer:"],
        ["Ice is water that froze.\nQuestion: What melts at 1 degrees?\nAnswer:"],
    ]
    tokens = prompts(lm, load_task(manager, "winogrande"), limit=None)
    texts = [[lm.tokenizer.decode(ids) for ids in row] for row in tokens]
    assert texts[2] == ["Ann gave Bea 2 apples because Ann", "Ann gave Bea 2 apples because Bea"]


def test_no_prompt_ends_with_an_end_of_text(byte_model: Path) -> None:
    """Some tokenizers put one after every text; an answer would then start a new text."""
    tokenizer = AutoTokenizer.from_pretrained(byte_model)
    end = (tokenizer.eos_token, tokenizer.eos_token_id)
    processor = TemplateProcessing(f"$A {end[0]}", special_tokens=[end])
    tokenizer.backend_tokenizer.post_processor = processor
    assert tokenizer("ab")["input_ids"][-1] == end[1]
    lm = harness_model(AutoModelForCausalLM.from_pretrained(byte_model), tokenizer, 2)
    ids, mask = lm.tok_batch_encode(["ab", "abcd"])
    found = [row[kept.bool()].tolist() for row, kept in zip(ids, mask, strict=True)]
    assert found == [lm.tok_encode("ab"), lm.tok_encode("abcd")]
    assert all(end[1] not in row for row in found)
