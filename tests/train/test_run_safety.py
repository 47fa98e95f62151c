"""A run's folder: damaged, shared, killed at any moment, and continued with other inputs."""

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import lrc as package
from command_line import Command
from lrc.recipe import make_recipe
from lrc.report.curves import draw_curves
from lrc.run import Run
from lrc.system.errors import UserError
from lrc.system.files import hold
from lrc.system.metrics import keep_metrics_until
from lrc.train import closing, train
from lrc.train import session as session_module
from lrc.train.checkpoint import list_checkpoints, read_checkpoint
from lrc.train.export_run import export_run
from lrc.train.session import initialize_only
from model_files import SHORT, edit_json, edit_weights, save_model, save_text, short_run
from prepared import Prepared
from tiny import tiny_teacher
from tiny_runs import copy_until, go, new_run


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished run of ten steps, with checkpoints of steps 9 and 10."""
    run = new_run(tmp_path_factory.mktemp("ended"))
    go(run)
    return run


@pytest.fixture
def cut_off(ended: Run, tmp_path: Path) -> Run:
    """The same run as if it had been killed after the checkpoint of step 9."""
    return copy_until(ended, tmp_path / "run", 9)


def weights(run: Run) -> dict[str, torch.Tensor]:
    return load_file(run.student_folder / "model.safetensors")


def same(a: Run, b: Run) -> bool:
    return all(torch.equal(value, weights(b)[name]) for name, value in weights(a).items())


def content(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


# Checkpoints


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.floats(0, 1), st.integers(0, 7), st.sampled_from(["checkpoint.json", "state.safetensors"])
)
def test_any_flipped_bit_of_a_checkpoint_is_noticed(
    ended: Run, tmp_path: Path, place: float, bit: int, name: str
) -> None:
    source = ended.checkpoints / "step-00000010"
    folder = tmp_path / "step-00000010"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source, folder)
    data = bytearray((folder / name).read_bytes())
    data[int(place * (len(data) - 1))] ^= 1 << bit
    before = read_checkpoint(source, ended.recipe.fingerprint())[0]
    (folder / name).write_bytes(data)
    try:
        header = read_checkpoint(folder, ended.recipe.fingerprint())[0]
    except UserError:
        return
    # Changes of white space and equivalent escapes have no effect.
    assert header == before


def edit_header(run: Run, number: int, **changes: Any) -> None:
    edit_json(run.checkpoints / f"step-{number:08d}" / "checkpoint.json", **changes)


@pytest.mark.parametrize(
    "changes",
    [{"step": 3}, {"step": "x"}, {"scheduler": {}}, {"text": {"identity": "x"}}, {"format": ...},
     {"checksum": ...}, {"sha256": None}],
)  # fmt: skip
def test_an_edited_header_falls_back_to_the_checkpoint_before(
    ended: Run, tmp_path: Path, changes: dict[str, Any]
) -> None:
    folder = Path(shutil.copytree(ended.folder, tmp_path / "run"))
    shutil.rmtree(folder / "student")
    run = Run.open(folder)
    edit_header(run, 10, **changes)
    go(run)
    assert same(run, ended)


def test_a_run_without_a_usable_checkpoint_is_refused(ended: Run, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(ended.folder, tmp_path / "run"))
    (folder / "summary.json").unlink()
    run = Run.open(folder)
    for step in (9, 10):
        edit_header(run, step, step=1)
    with pytest.raises(UserError, match=r"No checkpoint of .* can be used"):
        go(run)
    (run.checkpoints / "step-junk").mkdir()
    (run.checkpoints / ".step-00000011.abcdefabcdef.tmp").mkdir()
    assert len(list_checkpoints(run.checkpoints)) == 2


def test_the_first_checkpoint_precedes_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So a kill in the first step does not lose the start, which may take long."""
    run = new_run(tmp_path)

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("lrc.train.loop.Loop._step", killed)
        with pytest.raises(KeyboardInterrupt):
            go(run)
    assert [path.name for path in run.checkpoints.iterdir()] == ["step-00000000"]
    with monkeypatch.context() as patch:
        patch.setattr(
            session_module, "start", lambda *_: pytest.fail("the start is computed again")
        )
        go(Run.open(run.folder))
    whole = new_run(tmp_path, name="whole")
    go(whole)
    assert same(run, whole)


def test_a_run_without_a_checkpoint_says_that_it_starts_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = new_run(tmp_path)
    go(run)
    shutil.rmtree(run.checkpoints)
    shutil.rmtree(run.student_folder)
    train(Run.open(run.folder), tiny_teacher("llama"))
    assert "has no checkpoint yet: it starts over" in caplog.text
    whole = new_run(tmp_path, name="whole")
    go(whole)
    assert same(run, whole)
    assert [line["step"] for line in run.metrics()] == list(range(11))


@pytest.mark.parametrize(("minutes", "kept"), [(1e-9, 11), (0, 2), (60, 2)])
def test_checkpoints_are_also_written_by_time(tmp_path: Path, minutes: float, kept: int) -> None:
    run = new_run(tmp_path, checkpoint_every=1000, keep_checkpoints=100, checkpoint_minutes=minutes)
    go(run)
    steps = [int(path.name[5:]) for path in list_checkpoints(run.checkpoints)]
    assert {0, 10} <= set(steps)
    assert len(steps) == kept


# Inputs


@pytest.fixture(scope="module")
def by_name(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run whose teacher is a folder, ended."""
    folder = tmp_path_factory.mktemp("by-name")
    save_model(folder / "teacher")
    return short_run(folder / "teacher")


def scaled(name: str) -> Callable[[Path], object]:
    return lambda teacher: edit_weights(
        teacher, lambda w: {n: v * (1.5 if n == name else 1) for n, v in w.items()}
    )


def retokenized(teacher: Path) -> None:
    description = json.loads((teacher / "tokenizer.json").read_text())
    description["model"]["merges"].pop()
    (teacher / "tokenizer.json").write_text(json.dumps(description))


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "weight": (scaled("model.layers.0.mlp.up_proj.weight"), "model.layers.0.mlp.up_proj.weight"),
    "configuration": (
        lambda teacher: edit_json(teacher / "config.json", rms_norm_eps=0.1),
        "the teacher's configuration",
    ),
    "tokenizer": (retokenized, "the tokenizer"),
    "text": (
        lambda teacher: (teacher.parent / "text.txt").write_text("Another text. " * 9000),
        "the text",
    ),
}


def moved(run: Run, folder: Path) -> Run:
    """A copy of a run, its teacher and its text in another folder, before the first checkpoint."""
    shutil.copytree(run.folder.parent, folder)
    for name in ("checkpoints", "student"):
        shutil.rmtree(folder / "run" / name)
    (folder / "run" / "summary.json").unlink()
    recipe = run.recipe.model_dump(mode="json")
    recipe["teacher"]["model"] = str(folder / "teacher")
    recipe["data"] |= {"text": [str(folder / "text.txt")], "cache": str(folder / "other-cache")}
    copy = Run(folder / "run", make_recipe(recipe))
    (copy.folder / "recipe.yaml").write_text(copy.recipe.to_yaml())
    return copy


@pytest.mark.parametrize("name", CHANGES)
def test_other_inputs_do_not_continue_a_run(by_name: Run, tmp_path: Path, name: str) -> None:
    change, words = CHANGES[name]
    run = moved(by_name, tmp_path / "all")
    change(tmp_path / "all" / "teacher")
    before = content(run.folder)
    with pytest.raises(UserError, match="began with other inputs") as error:
        train(run)
    assert words in str(error.value)
    assert content(run.folder) == before


def test_moved_and_touched_inputs_are_the_same(by_name: Run, tmp_path: Path) -> None:
    """Only their content matters, not their place or time."""
    run = moved(by_name, tmp_path / "all")
    os.utime(tmp_path / "all" / "text.txt", ns=(0, 0))
    train(run)
    assert same(run, by_name)


def test_a_changed_teacher_exports_nothing(by_name: Run, tmp_path: Path) -> None:
    teacher = Path(by_name.recipe.teacher.model)
    kept = tmp_path / "kept"
    shutil.copytree(teacher, kept)
    try:
        scaled("model.norm.weight")(teacher)
        with pytest.raises(UserError, match=r"the teacher's model\.norm\.weight"):
            export_run(by_name, tmp_path / "out")
        assert not (tmp_path / "out").exists()
    finally:
        shutil.rmtree(teacher)
        shutil.copytree(kept, teacher)
    export_run(by_name, tmp_path / "out")


def test_a_damaged_cache_is_built_again(by_name: Run, tmp_path: Path) -> None:
    cache = Path(str(by_name.recipe.data.cache))
    (file,) = cache.glob("*/train.bin")
    data = file.read_bytes()
    file.write_bytes(data[:50] + bytes([data[50] ^ 1]) + data[51:])
    shutil.rmtree(by_name.student_folder)
    train(Run.open(by_name.folder))
    assert file.read_bytes() == data


# One process at a time, and finished runs


def test_only_one_process_trains_a_run(cut_off: Run, lrc: Command) -> None:
    before = content(cut_off.folder)
    with hold(cut_off.folder, "held"):
        assert "Another process is working on" in lrc.refusal("resume", cut_off.folder)
    assert content(cut_off.folder) == before


def test_a_finished_run_does_not_change(ended: Run, lrc: Command) -> None:
    before = content(ended.folder)
    output = lrc.printed("resume", ended.folder)
    assert "has ended" in output
    assert content(ended.folder) == before


@pytest.mark.parametrize("damage", ["{}", "junk", "[]", '{"tokens": null}'])
def test_a_damaged_summary_is_written_again(ended: Run, tmp_path: Path, damage: str) -> None:
    folder = Path(shutil.copytree(ended.folder, tmp_path / "run"))
    (folder / "summary.json").write_text(damage)
    run = Run.open(folder)
    go(run)
    ours, theirs = run.summary(), ended.summary()
    assert ours["student_held_out_lm"] == theirs["student_held_out_lm"]
    assert same(run, ended)


# Metrics

NO_LINES = b"{", b"", b"\xff\xfe", b"[1]", b'{"x": 1}', b"[" * 9999


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.integers(0, 9), st.sampled_from([b"{", b"", b"\xff\xfe", b"[1]", b'{"x": 1}', b"[" * 9999])
)
def test_a_damaged_line_of_the_metrics_loses_only_that_line(
    ended: Run, tmp_path: Path, number: int, damage: bytes
) -> None:
    folder = tmp_path / "run"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(ended.folder, folder)
    run = Run.open(folder)
    lines = run.metrics_file.read_bytes().splitlines()
    lines[number] = damage
    whole = b"\n".join(lines) + b"\n"
    run.metrics_file.write_bytes(whole)
    kept = [line["step"] for line in run.metrics()]
    assert kept == [step for step in range(11) if step != number]
    keep_metrics_until(run.metrics_file, 9)
    assert [line["step"] for line in run.metrics()] == kept[:-1]
    keep_metrics_until(run.metrics_file, 9)
    assert [file.read_bytes() for file in folder.glob("metrics.damaged-*")] == [whole]


def test_the_last_line_may_be_incomplete(cut_off: Run) -> None:
    data = cut_off.metrics_file.read_bytes()
    cut_off.metrics_file.write_bytes(data[:-20])
    keep_metrics_until(cut_off.metrics_file, 10)
    assert not list(cut_off.folder.glob("metrics.damaged-*"))
    assert [line["step"] for line in cut_off.metrics()] == list(range(10))


def test_a_resumed_run_reports_dropped_lines(
    cut_off: Run, caplog: pytest.LogCaptureFixture
) -> None:
    lines = cut_off.metrics_file.read_text().splitlines()
    lines[4] = "{"
    cut_off.metrics_file.write_text("\n".join(lines) + "\n")
    train(cut_off, tiny_teacher("llama"))
    assert "metrics.damaged-1.jsonl" in caplog.text
    steps = [line["step"] for line in cut_off.metrics()]
    assert steps == [step for step in range(11) if step != 4]


# Folders


def test_a_refused_run_leaves_no_folder(tmp_path: Path, lrc: Command) -> None:
    """So the corrected command can use the same folder."""
    save_model(tmp_path / "teacher")
    text = save_text(tmp_path)
    out = tmp_path / "runs" / "mine"
    good = {"--teacher": tmp_path / "teacher", "--hidden-size": 8, "--text": text, "--out": out}
    more = [f"--set={key}={value}" for key, value in SHORT.items()]
    for change, command in (
        ({"--teacher": tmp_path / "none"}, "train"),
        ({"--hidden-size": 7}, "train"),
        ({"--hidden-size": 99}, "compress"),
        ({"--text": tmp_path / "none.txt"}, "train"),
        ({"--text": tmp_path / "teacher" / "config.json"}, "train"),
    ):
        arguments = [part for pair in (good | change).items() for part in pair]
        lrc.refusal(command, *arguments, *more)
        assert not out.exists()
    lrc.printed("train", *(p for pair in good.items() for p in pair), *more)


def test_the_folder_of_a_run_that_never_began_can_be_used(tmp_path: Path) -> None:
    """A kill between creating the folder and writing the recipe leaves such a folder."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "environment.json").write_text("{}")
    (folder / ".lock").touch()
    (folder / ".recipe.yaml.0123456789ab.tmp").write_text("half")
    go(new_run(tmp_path))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "precious").write_text("data")
    with pytest.raises(UserError, match="already exists"):
        new_run(tmp_path, name="other")


def test_a_run_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    run = new_run(tmp_path)
    monkeypatch.chdir(tmp_path / "here")
    here = Run.create(".", run.recipe)
    go(here)
    assert (tmp_path / "here" / "student" / "model.safetensors").is_file()


def test_a_run_created_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    first, second = new_run(tmp_path), new_run(tmp_path, seed=5)
    go(first)
    before = content(first.folder)
    with pytest.raises(UserError, match="already exists"):
        go(second)
    assert content(first.folder) == before


# A student survives every failure that does not concern its weights


@pytest.mark.parametrize("broken", ["model_card", "samples", "draw_curves"])
def test_other_failures_lose_no_student(
    ended: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("cannot")

    monkeypatch.setattr(closing, broken, fails)
    run = new_run(tmp_path)
    train(run, tiny_teacher("llama"))
    assert "(cannot); the student is complete" in caplog.text
    assert same(run, ended)
    assert run.summary()["student_held_out_lm"] == ended.summary()["student_held_out_lm"]
    package.Run.open(run.folder).student()


@pytest.mark.parametrize(
    "card", ["---\n: [\n---\n", "---\nlicense: [a]\n---\n", "\xff", "---\n- a\n---"]
)
def test_a_broken_readme_of_the_teacher_loses_no_student(tmp_path: Path, card: str) -> None:
    save_model(tmp_path / "teacher")
    (tmp_path / "teacher" / "README.md").write_bytes(card.encode("latin-1"))
    run = short_run(tmp_path / "teacher")
    assert run.student().config.hidden_size == 8
    assert export_run(run, tmp_path / "out") == 2


def test_the_card_contains_no_path_of_this_machine(by_name: Run) -> None:
    card = (by_name.student_folder / "README.md").read_text()
    assert str(by_name.folder.parent) not in card
    assert "# A smaller teacher" in card
    assert "text.txt" in card


def test_the_python_interface_prints_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    save_model(tmp_path / "teacher")
    capfd.readouterr()
    short_run(tmp_path / "teacher")
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_the_python_interface_accepts_strings_and_refuses_other_types(by_name: Run) -> None:
    assert Run.open(str(by_name.folder)).recipe == by_name.recipe
    teacher = package.load_teacher(by_name.recipe.teacher.model)
    assert teacher.hidden_size == 16
    with pytest.raises(UserError) as error:
        package.clone(object(), hidden_size=8)  # type: ignore[arg-type]
    assert "The teacher is a object" in str(error.value)
    assert len(str(error.value)) < 300
    assert {"__version__", "clone", "Run"} <= set(dir(package))
    assert package.__version__.count(".") >= 2


def test_sequences_beyond_the_teachers_positions_are_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = new_run(tmp_path)
    teacher = tiny_teacher("llama", max_position_embeddings=8)
    initialize_only(run, teacher)
    assert "max_position_embeddings is 8" in caplog.text


# Killed at any moment


@pytest.mark.parametrize(
    "seconds", [0.3, *(pytest.param(s, marks=pytest.mark.slow) for s in (0.05, 0.15, 0.5, 0.7))]
)
def test_a_run_killed_at_any_moment_can_continue(
    by_name: Run,
    tmp_path: Path,
    seconds: float,
    lrc: Command,
    monkeypatch: pytest.MonkeyPatch,
    prepared: Prepared,
) -> None:
    """The same command, or `lrc resume`, gives the student of an uninterrupted run."""
    out = tmp_path / "run"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(by_name.recipe.to_yaml())
    process = prepared.start("train", recipe, "--out", out)
    while process.poll() is None and "Checking the inputs" not in process.output.read_text():
        time.sleep(0.005)
    time.sleep(seconds)
    process.send_signal(signal.SIGKILL)
    process.wait()
    monkeypatch.setattr(closing, "draw_curves", draw_curves)  # as in the killed process
    begun = (out / "recipe.yaml").is_file()
    lrc.printed(*(("resume", out) if begun else ("train", recipe, "--out", out)))
    run = Run.open(out)
    ours, theirs = weights(run), weights(by_name)
    assert all(torch.allclose(value, theirs[name], atol=1e-6) for name, value in ours.items())
    assert [line["step"] for line in run.metrics()] == [0, 1, 2]
    assert not [path for path in out.rglob(".*.tmp")]
