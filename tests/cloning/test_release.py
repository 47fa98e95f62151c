"""The release: from some step on, the student's own weights are trained instead of projections."""

import json
import math
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch.nn import functional
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoModelForCausalLM

from command_line import Command
from data_helpers import write_jsonl
from flops import counted_step
from killing import Start, run_and_kill
from lrc.cloning.cost import mixing, step_flops
from lrc.cloning.low_rank_clone import LowRankClone
from lrc.cloning.objective import relative_weight
from lrc.data.batch import Batch
from lrc.recipe import make_recipe
from lrc.recipe.sections import ObjectiveSection, StudentSection, TrainSection
from lrc.report.curves import draw_curves, stage_marks
from lrc.report.runs import read_runs
from lrc.run import Run
from lrc.system.errors import UserError
from lrc.train import train
from lrc.train.batches import count
from lrc.train.checkpoint import list_checkpoints
from lrc.train.export_run import export_run
from lrc.train.setup import schedule, set_up, stretch
from prepared import Prepared
from tiny import (
    LAYERS,
    LLAMAS,
    TERMS,
    WRITERS,
    Case,
    assert_finite_differences,
    gradients,
    linear_path,
    randomize,
    tiny_batch,
    tiny_method,
    tiny_teacher,
    tiny_tokens,
    watch,
)
from tiny_runs import (
    assert_same_run,
    copy_until,
    file_settings,
    go,
    new_run,
    save_teacher,
    tiny_documents,
    tiny_recipe,
)

CASES = [
    pytest.param(("llama", True, {}), {}, {}, id="llama-tied"),
    pytest.param(("qwen3", False, {}), {"fold_gains": True}, {}, id="qwen3-untied-folded"),
    pytest.param(("qwen2", False, {}), {}, {"clone_scale": "relative"}, id="qwen2-relative"),
    pytest.param(
        ("llama", False, {"attention_bias": True, "mlp_bias": True}),
        {"tie_projections": True},
        {"attn_out": "teacher"},
        id="llama-biases-teacher-space",
    ),
    pytest.param(("mistral", False, {}), {}, {"alignment": "explicit"}, id="mistral-explicit"),
]


def releasing(
    case: Case, student: dict[str, Any], objective: dict[str, Any], **changes: Any
) -> LowRankClone:
    """A method with everything random; it releases after the first of two steps."""
    family, tied, settings = case
    objective = {"alpha_schedule": "constant", **objective}
    method = tiny_method(tiny_teacher(family, tied, **settings), student, objective, **changes)
    method.steps, method.release_at = 2, 0.5
    return method


# Losses and gradients


@pytest.mark.usefixtures("exact_norms")
@pytest.mark.parametrize(("case", "student", "objective"), CASES)
def test_the_release_changes_only_what_is_trained(
    case: Case, student: dict[str, Any], objective: dict[str, Any]
) -> None:
    method = releasing(case, student, objective)
    batch = tiny_batch(lengths=[9, 5])
    before, before_grads = gradients(method, batch)
    logits = method.student()(batch.input_ids).logits
    assert method.stage_ends() == (1,)
    assert method.next_stage() == {"stage": "released"}
    own = dict(method.model.named_parameters())
    assert method.parameters().keys() == own.keys() | method.alignment.keys()
    assert all(p.requires_grad for p in method.parameters().values())
    assert all(p.grad is None for p in own.values())
    assert torch.equal(method.student()(batch.input_ids).logits, logits)
    after, after_grads = gradients(method, batch)
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=1e-12, atol=1e-12)
    # Parameters trained before and after have the same gradients.
    shared = before_grads.keys() & after_grads.keys()
    assert {name for name in shared if "norm" in name} == {
        name for name in before_grads if "norm" in name
    }
    for name in shared:
        torch.testing.assert_close(after_grads[name], before_grads[name], rtol=1e-9, atol=1e-11)


@pytest.mark.usefixtures("exact_norms")
@pytest.mark.parametrize(("case", "student", "objective"), CASES)
def test_gradients_are_finite_differences(
    case: Case,
    student: dict[str, Any],
    objective: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    keep_weights(monkeypatch)
    method = releasing(case, student, {"temperature": 2.0, **objective})
    method.next_stage()
    randomize_around(method.parameters())
    batch = tiny_batch(length=6, lengths=[6, 4])
    assert_finite_differences(method, batch, step=1)


def keep_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of tokens are constants for the gradient: those of the first pass stay."""
    known: dict[bytes, torch.Tensor] = {}

    def first(student: torch.Tensor, target: torch.Tensor, mask: Any) -> torch.Tensor:
        key = target.detach().numpy().tobytes()
        return known.setdefault(key, relative_weight(student, target, mask))

    monkeypatch.setattr("lrc.cloning.objective.clone.relative_weight", first)


def randomize_around(parameters: dict[str, torch.nn.Parameter]) -> None:
    """Move the weights away from those of the projections."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for value in parameters.values():
            value += 0.1 * torch.randn(value.shape, generator=generator, dtype=torch.float64)


@pytest.mark.usefixtures("exact_norms")
@pytest.mark.parametrize("family", LLAMAS)
def test_clone_terms_of_moved_weights(family: str) -> None:
    """Readers are compared directly, writers through the projections of the release."""
    method = releasing((family, False, {}), {}, {})
    frozen = {k: v.detach().clone() for k, v in method.projections.values.items()}
    method.begin_step(0)
    method.next_stage()
    randomize_around(method.parameters())
    batch = tiny_batch(lengths=[9, 4])
    losses, _ = gradients(method, batch)
    paths = {(i, name): linear_path(i, name) for i in range(LAYERS) for name in TERMS}
    taken = []
    for model in (method.student(), method.teacher.model):
        seen, end = watch(model, paths)
        with torch.no_grad():
            model(batch.input_ids, attention_mask=batch.attention_mask)
        end()
        taken.append(seen)
    ours, theirs = taken
    kept = batch.token_mask()
    assert kept is not None
    expected = torch.zeros(LAYERS, len(TERMS), dtype=torch.float64)
    for (i, name), student in ours.items():
        target = theirs[i, name]
        if name in WRITERS:
            target = target @ frozen[f"layers.{i}.{name}"]
        expected[i, TERMS.index(name)] = functional.mse_loss(student[kept], target[kept])
    torch.testing.assert_close(losses["clone_layers"], expected, rtol=1e-10, atol=1e-12)
    assert method.buffers().keys() == {
        f"projections.layers.{i}.{name}" for i in range(LAYERS) for name in WRITERS
    }
    for name, value in method.buffers().items():
        assert torch.equal(value, frozen[name.removeprefix("projections.")])


@pytest.mark.parametrize(
    ("objective", "kept"),
    [
        ({}, {"o", "down"}),
        ({"alpha": 0.0}, set()),
        ({"attn_out": "teacher"}, {"down"}),
        ({"clone": {"down": False}}, {"o"}),
        ({"alignment": "explicit"}, set()),
        ({"alpha_schedule": "linear", "alpha_zero_at": 0.5}, set()),
        ({"alpha_schedule": "linear", "alpha_zero_at": 0.6}, {"o", "down"}),
    ],
)
def test_which_projections_are_kept(objective: dict[str, Any], kept: set[str]) -> None:
    """Those of remaining clone terms; the memory of the others is freed."""
    method = releasing(("llama", False, {}), {}, objective)
    method.next_stage()
    assert {name.rpartition(".")[2] for name in method.projections.values} == kept
    assert len(method.buffers()) == LAYERS * len(kept)
    assert not any(value.requires_grad for value in method.projections.values.values())


@pytest.mark.parametrize("objective", [{}, {"alpha": 0.0}])
def test_gradient_checkpointing_changes_nothing(objective: dict[str, Any]) -> None:
    found = []
    for how in (False, True):
        method = releasing(("llama", False, {}), {}, objective, gradient_checkpointing=how)
        method.next_stage()
        found.append(gradients(method, tiny_batch(), tiny_batch(seed=4)))
    for ours, theirs in zip(*found, strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            torch.testing.assert_close(theirs[name], value, rtol=1e-12, atol=1e-13)


@pytest.mark.usefixtures("exact_norms")
def test_micro_batches_add_up() -> None:
    method = releasing(("qwen3", False, {}), {}, {})
    method.next_stage()
    whole = tiny_batch(rows=4)
    parts = [whole.rows(slice(0, 2)), whole.rows(slice(2, 4))]
    for ours, theirs in zip(gradients(method, whole), gradients(method, *parts), strict=True):
        for name, value in ours.items():
            torch.testing.assert_close(theirs[name], value, rtol=1e-9, atol=1e-11)


# alpha


@pytest.mark.parametrize("until", [1.0, 0.25, None])
def test_alpha_by_its_schedule(until: float | None) -> None:
    constant = ObjectiveSection(alpha=0.4, alpha_schedule="constant")
    linear, cosine = (
        ObjectiveSection(alpha=0.4, alpha_schedule=kind, alpha_zero_at=until)  # type: ignore[arg-type]
        for kind in ("linear", "cosine")
    )
    assert constant.alpha_left(0) == constant.alpha_left(1) == 1
    until = until or 1 / 3
    for section in (linear, cosine):
        assert section.alpha_left(0) == 1
        assert section.alpha_left(until / 2) == pytest.approx(0.5)
        assert section.alpha_left(until) == 0
        assert section.alpha_left(1) == 0
    assert linear.alpha_left(until / 4) == pytest.approx(0.75)
    assert cosine.alpha_left(until / 4) == pytest.approx((1 + math.cos(math.pi / 4)) / 2)


@pytest.mark.parametrize("name", ["lrc", "activation-clone"])
def test_nothing_is_cloned_once_alpha_is_zero(tmp_path: Path, name: str) -> None:
    run = new_run(tmp_path, release_at=0.7, learning_rate=1e-9, log_every=1)
    recipe = run.recipe.model_dump(mode="json")
    recipe["method"] = {"name": name}
    recipe["objective"] |= {"alpha": 0.3, "alpha_schedule": "linear", "alpha_zero_at": 0.5}
    if name != "lrc":
        recipe["train"]["release_at"] = 1.0
    run = Run(run.folder, make_recipe(recipe))
    go(run)
    lines = run.metrics()[1:]
    assert [line["step"] for line in lines if "clone" in line] == [1, 2, 3, 4, 5]
    for line in lines:
        alpha = max(0.0, 0.3 * (1 - (line["step"] - 1) / 5))
        total = line["kl"] + line["lm"] + alpha * line.get("clone", 0.0)
        assert line["loss"] == pytest.approx(total, rel=1e-5)


def test_the_teacher_runs_only_if_a_loss_needs_it() -> None:
    method = releasing(
        ("llama", False, {}),
        {},
        {"kl_weight": 0.0, "alpha_schedule": "linear", "alpha_zero_at": 0.5},
    )
    passes: list[int] = []
    method.teacher.model.model.norm.register_forward_hook(lambda *_: passes.append(1))
    gradients(method, tiny_batch())
    assert len(passes) == 1
    method.next_stage()
    method.begin_step(1)
    losses = method.losses(tiny_batch(), count([tiny_batch()]))
    assert len(passes) == 1
    assert losses.scalars().keys() == {"loss", "lm"}
    assert losses.clone_layers is None


# Settings


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"train.release_at": 1.1}, "less than or equal to 1"),
        ({"train.release_at": -0.1}, "greater than or equal to 0"),
        ({"train.release_learning_rate": 0}, "greater than 0"),
        (
            {"objective.alpha_schedule": "constant", "objective.alpha_zero_at": 0.3},
            "alpha_zero_at goes with alpha_schedule",
        ),
        ({"objective.alpha_schedule": "stepwise"}, "'constant', 'linear' or 'cosine'"),
        (
            {
                "objective.alpha_schedule": "linear",
                "objective.kl_weight": 0,
                "objective.lm_weight": 0,
            },
            "every loss is off",
        ),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        tiny_recipe(settings)


@pytest.mark.parametrize(
    ("share", "steps", "ends"),
    [(0, 10, (0,)), (0.3, 10, (3,)), (1, 10, ()), (0.001, 10, (0,)), (0.999, 10, ()), (0.9, 1, ())],
)
def test_the_step_of_the_release(share: float, steps: int, ends: tuple[int, ...]) -> None:
    teacher = tiny_teacher("llama")
    section = StudentSection(hidden_size=8)
    method = LowRankClone(teacher, section, ObjectiveSection(), steps=steps, release_at=share)
    assert method.stage_ends() == ends


@pytest.mark.parametrize("steps", [7, 10, 100])
@pytest.mark.parametrize("share", [0.3, 0.33, 0.34, 0.36, 0.5])
def test_clone_terms_after_the_release_have_their_projections(steps: int, share: float) -> None:
    """However the release is rounded to a step, before or after alpha is zero."""
    method = tiny_method(tiny_teacher("llama"), objective={"alpha_schedule": "linear"})
    method.steps, method.release_at = steps, share
    [release] = method.stage_ends()
    method.next_stage()
    for step in range(release, steps):
        method.begin_step(step)
        losses = method.losses(tiny_batch(), count([tiny_batch()]))
        assert ("clone" in losses.terms) == (step / steps < 1 / 3)


def test_methods_without_projections_report_that_it_has_no_effect(
    tmp_path: Path, lrc: Command
) -> None:
    teacher = save_teacher(tmp_path / "teacher")
    text = write_jsonl(tmp_path / "text.jsonl", tiny_documents())
    arguments = ["--teacher", teacher, "--hidden-size", 8, "--text", text]
    arguments += ["--set", "train.tokens=32", "--set", "data.sequence_length=16"]
    arguments += ["--set", "train.micro_batch=2", "--set", "data.held_out_fraction=0.2"]
    arguments += ["--set", "train.release_at=0.5", "--out", tmp_path / "run"]
    output = lrc.printed("train", *arguments, "--method", "scratch")
    assert "No effect with method scratch: train.release_at." in " ".join(output.split())


# The schedule


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("begin", [0, 4, 19])
def test_one_schedule_with_two_warm_ups(kind: Any, begin: int) -> None:
    train_section = TrainSection(schedule=kind, warmup_ratio=0.1)
    whole = schedule(train_section, 20)
    after = stretch(whole, begin, 2)
    for done in range(20 - begin):
        warm = min(1.0, done / 2) if begin else 1.0
        assert after(done) == warm * whole(begin + done)
    parameter = torch.nn.Parameter(torch.zeros(1))
    scheduler = LambdaLR(SGD([parameter], lr=0.3), after)
    assert scheduler.get_last_lr() == [0.3 * after(0)]


# Whole runs

STEPS, RELEASE = 8, 4


def settings_of(folder: Path, release: float, **objective: Any) -> dict[str, Any]:
    return file_settings(
        folder,
        initialize={"method": "pca", "calibration_tokens": 64},
        objective=objective,
        train={
            "tokens": STEPS * 2 * 2 * 16,
            "micro_batch": 2,
            "accumulate": 2,
            **({"learning_rate": 1e-2} if release else {}),
            "release_at": release,
            "release_learning_rate": 2e-3,
            "warmup_ratio": 0.25,
            "weight_decay": 0.1,
            "eval_every": 2,
            "checkpoint_every": 1,
            "keep_checkpoints": STEPS + 1,
        },
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("release")
    save_teacher(folder / "teacher")
    return folder


@pytest.fixture(scope="module")
def whole(folder: Path) -> Run:
    """An uninterrupted run with the release half-way."""
    recipe = make_recipe(settings_of(folder, RELEASE / STEPS, alpha_schedule="constant"))
    run = Run.create(folder / "whole", recipe)
    train(run)
    return run


@pytest.fixture(scope="module")
def at_once(folder: Path) -> Run:
    """A run with the release before the first step, without a clone loss."""
    run = Run.create(folder / "at-once", make_recipe(settings_of(folder, 0.0, alpha=0.0)))
    train(run)
    return run


def test_a_whole_run(whole: Run) -> None:
    lines = whole.metrics()
    assert [line["step"] for line in lines if "stage" in line] == [RELEASE]
    factors = [0, 0.5, 1, 5 / 6, 0, 0.5 * 3 / 6, 2 / 6, 1 / 6]
    peaks = [1e-2] * RELEASE + [2e-3] * (STEPS - RELEASE)
    rates = [line["learning_rate"] for line in lines[1:]]
    assert rates == pytest.approx([f * p for f, p in zip(factors, peaks, strict=True)])
    assert all("clone" in line for line in lines[1:])
    student = AutoModelForCausalLM.from_pretrained(whole.student_folder)
    assert type(student).__name__ == "Qwen3ForCausalLM"
    ids = tiny_tokens(2)
    method = set_up(whole).method
    with torch.no_grad():
        theirs = method.student()(ids).logits
        torch.testing.assert_close(student(ids).logits, theirs, rtol=1e-5, atol=1e-5)


def test_steps_after_the_release_train_all_weights(whole: Run) -> None:
    """Adam starts from empty moments; matrices decay; inner norms and gains are trained too."""
    before, after = (
        load_file(whole.checkpoints / f"step-{step:08d}" / "state.safetensors")
        for step in (RELEASE, STEPS)
    )
    weights = {n: t for n, t in after.items() if n.startswith("parameter.")}
    assert weights.keys() == {n for n in before if n.startswith("parameter.")}
    assert not any("projections" in name for name in weights)
    assert not any(name.startswith("optimizer.") for name in before)
    for name, value in weights.items():
        assert not torch.equal(value, before[name]), name
        key = name.removeprefix("parameter.")
        assert after[f"optimizer.{key}.step"].item() == STEPS - RELEASE
    assert any("q_norm" in name for name in weights)
    frozen = {n: t for n, t in before.items() if n.startswith("buffer.")}
    assert len(frozen) == 2 * LAYERS
    for name, value in frozen.items():
        assert torch.equal(after[name], value)


def test_the_first_step_is_that_of_adam(folder: Path, tmp_path: Path) -> None:
    """Against torch's Adam on gradients of the released model that are computed by hand."""
    settings = settings_of(folder, 0.0, alpha_schedule="constant")
    settings["train"] |= {"optimizer": "adamw", "warmup_ratio": 0, "weight_decay": 0}
    settings["train"] |= {"grad_clip": 0, "token_grad_clip": 0, "tokens": 2 * 2 * 16}
    run = Run.create(tmp_path / "run", make_recipe(settings))
    train(run)
    first, last = (
        load_file(path / "state.safetensors") for path in list_checkpoints(run.checkpoints)[::-1]
    )
    (run.checkpoints / "step-00000001").rename(tmp_path / "aside")
    loop_setup = set_up(run)
    method = loop_setup.method
    for name, value in method.parameters().items():
        assert torch.equal(value, first[f"parameter.{name}"])
    from lrc.data import open_text

    text = open_text(run.recipe, loop_setup.teacher.tokenizer)
    batches = [text.training_batch(4 + 2 * i, 2) for i in range(2)]
    _, grads = gradients(method, *batches)  # type: ignore[arg-type]
    for name, value in method.parameters().items():
        value.grad = grads[name]
    Adam(method.parameters().values(), lr=2e-3).step()
    for name, value in method.parameters().items():
        moved = last[f"parameter.{name}"]
        torch.testing.assert_close(value.detach(), moved, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["whole", "at_once"])
def test_killed_before_at_and_after_the_release(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path, prepared: Prepared
) -> None:
    """A run that is killed several times equals the uninterrupted run, bit for bit."""
    run: Run = request.getfixturevalue(kind)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(run.recipe.to_yaml())
    part = tmp_path / "part"
    starts: list[Start]
    if kind == "whole":
        starts = [
            ("stepping", 2, "train", recipe, "--out", part),
            ("saving", RELEASE, "resume", part),  # released, but its checkpoint is not written
            ("stepping", RELEASE, "resume", part),
            ("saving", 7, "resume", part),
        ]
        left = [2, RELEASE - 1, RELEASE, 6]
    else:
        starts = [
            ("saving", 0, "train", recipe, "--out", part),
            ("stepping", 0, "resume", part),
            ("stepping", 5, "resume", part),
        ]
        left = [None, 0, 5]  # type: ignore[list-item]
    assert run_and_kill(prepared, part, starts) == left
    train(Run.open(part))
    assert_same_run(Run.open(part), run)


def test_a_damaged_checkpoint_leads_back_before_the_release(whole: Run, tmp_path: Path) -> None:
    run = copy_until(whole, tmp_path / "run", STEPS)
    for step in range(RELEASE, STEPS + 1):
        file = run.checkpoints / f"step-{step:08d}" / "state.safetensors"
        if step == STEPS:
            # Intact, but with other parameters, which shows after the change of the stage.
            lose_a_tensor(file)
        else:
            file.write_bytes(file.read_bytes()[:-1] + b"x")
    setup = set_up(run)
    assert setup.state.step == RELEASE - 1
    assert "projections.embedding" in setup.state.parameters
    assert not setup.state.buffers
    train(run)
    assert_same_run(run, whole)


def lose_a_tensor(file: Path) -> None:
    """Remove a tensor from a checkpoint and update the checksums."""
    from safetensors.torch import save_file

    from lrc.system.checksums import file_sha256, json_sha256

    tensors = load_file(file)
    del tensors["parameter.model.norm.weight"]
    save_file(tensors, file)
    header = json.loads((file.parent / "checkpoint.json").read_text())
    header["sha256"] = file_sha256(file)
    del header["checksum"]
    header["checksum"] = json_sha256(header)
    (file.parent / "checkpoint.json").write_text(json.dumps(header))


@pytest.mark.parametrize("step", [RELEASE - 1, RELEASE, STEPS - 1])
def test_export_of_any_checkpoint(whole: Run, tmp_path: Path, step: int) -> None:
    run = copy_until(whole, tmp_path / "run", step)
    assert export_run(run, tmp_path / "student") == step
    method = set_up(run).method
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    for name, value in method.student().state_dict().items():
        assert torch.equal(student.state_dict()[name], value), name


@pytest.mark.parametrize(
    ("release_at", "said"),
    [
        (RELEASE / STEPS, [f"step {RELEASE} of {STEPS}: released; now training the student's own"]),
        (0.0, []),
    ],
)
def test_what_is_said_of_a_release(
    folder: Path, tmp_path: Path, lrc: Command, release_at: float, said: list[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(settings_of(folder, release_at)))
    printed = lrc.printed("train", recipe, "--out", tmp_path / "run")
    found = [line for line in printed.splitlines() if "released" in line]
    assert [line[: len(words)] for line, words in zip(found, said, strict=True)] == said


def test_a_released_student_is_pruned(whole: Run, tmp_path: Path, lrc: Command) -> None:
    lrc.printed("prune", whole.folder, "--ratio", 0.1, "--out", tmp_path / "pruned")
    assert Run.open(tmp_path / "pruned").student().config.hidden_size == 8


def test_release_at_once_shares_the_start(at_once: Run, whole: Run) -> None:
    """Both have the same first losses. The header says that the weights are trained."""
    ours, theirs = at_once.metrics(), whole.metrics()
    assert ours[0]["stage"] == "released"
    assert "stage" not in theirs[0]
    assert ours[0]["held_out_lm"] == theirs[0]["held_out_lm"]
    assert ours[1]["lm"] == theirs[1]["lm"]
    assert not any("clone" in line for line in ours)
    header = json.loads((at_once.checkpoints / "step-00000000" / "checkpoint.json").read_text())
    assert header["method"] == {"released": True}
    tensors = load_file(at_once.checkpoints / "step-00000000" / "state.safetensors")
    assert not any("projections" in name for name in tensors)


def test_plots_mark_the_release(whole: Run, at_once: Run, tmp_path: Path, lrc: Command) -> None:
    released, from_the_start = read_runs([whole, at_once])
    tokens = RELEASE * 2 * 2 * 16
    assert stage_marks(released) == [(tokens, "released")]
    [(seconds, _)] = stage_marks(released, "seconds")
    assert 0 < seconds < released.seconds
    assert stage_marks(from_the_start) == []  # it is released from the beginning
    drawn: list[float] = []
    with mock.patch("matplotlib.axes.Axes.axvline", lambda _, at, **k: drawn.append(at)):
        draw_curves(whole, tmp_path / "a.png")
    assert set(drawn) == {tokens}
    lrc.printed("report", whole.folder, at_once.folder, "--out", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert page.count(">released</text>") >= 8  # in every chart, over tokens and over time


def test_a_diverged_run_names_the_rate_of_its_stage(folder: Path, tmp_path: Path) -> None:
    settings = settings_of(folder, 0.5, alpha=0.0)
    settings["train"]["release_learning_rate"] = 1e30
    run = Run.create(tmp_path / "run", make_recipe(settings))
    with pytest.raises(Exception, match=r"a lower train\.release_learning_rate"):
        train(run)


# Cost


@pytest.mark.parametrize(
    "objective",
    [
        ObjectiveSection(),
        ObjectiveSection(attn_out="teacher"),
        ObjectiveSection(alpha=0),
        ObjectiveSection(alpha=0, kl_weight=0),
        ObjectiveSection(alpha_schedule="linear", alpha_zero_at=0.5),
    ],
)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_matrix_products_of_a_released_step(family: str, objective: ObjectiveSection) -> None:
    teacher = tiny_teacher(family, dtype=torch.float32)
    teacher.model.set_attn_implementation("eager")
    method = LowRankClone(
        teacher, StudentSection(hidden_size=8), objective, steps=2, release_at=0.5
    )
    randomize({n: p for n, p in method.parameters().items() if p.ndim == 2}, 1)
    method.next_stage()
    batches = [Batch(torch.randint(3, 30, (2, 24))) for _ in range(2)]
    counts = count(batches)
    counted = counted_step(method, batches, step=1)
    expected = step_flops(
        teacher.model,
        method.model,
        counts.tokens,
        24,
        objective,
        method.distill.sites if objective.clones_at(0.5) else (),
        teacher.vocab_size,
        released=True,
    )
    # Plain products of whole matrices, which the student's backward pass does not compute again.
    theirs, ours = (mixing(model, 24)[0] for model in (teacher.model, method.model))
    eager = theirs * (expected["teacher"] > 0) + (6 - 3.5) * ours
    assert counted == pytest.approx(sum(expected.values()) + counts.tokens * eager, rel=1e-9)
    flops = method.step_flops(1, counts.tokens, 1)
    assert flops is not None
    before = method.step_flops(0, counts.tokens, 1)
    assert before is not None
    assert flops < before
