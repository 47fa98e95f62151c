"""Sheared LLaMA's two stages: losses and gradients in float64, then whole runs that are killed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from data_helpers import Document, write_jsonl, write_shards
from killing import Start, run_and_kill
from lrc.baselines.sheared_llama import ShearedLlama
from lrc.data.identity import tokenizer_identity
from lrc.methods import METHODS
from lrc.model.teacher import Teacher
from lrc.recipe import Recipe, make_recipe
from lrc.recipe.method_sections import METHOD_SECTIONS
from lrc.run import Run
from lrc.system.metrics import keep_metrics_until
from lrc.train import train
from lrc.train.batches import count
from lrc.train.setup import new_state, set_up
from prepared import Prepared
from tiny import gradients, tiny_batch, tiny_teacher, tiny_tokenizer, tiny_tokens
from tiny_runs import assert_same_run, copy_until, save_teacher, tiny_documents, tiny_recipe

SHAPE = {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
TARGET = {"layers": 2, "kv_heads": 1, "intermediate_size": 7}
KINDS = ("layers", "hidden", "groups", "neurons")


def recipe_of(method: dict[str, Any], **sections: dict[str, Any]) -> Recipe:
    settings = {
        "method": {"name": "sheared-llama", **method},
        "data": {"text": ["x"], "sequence_length": 9},
        "objective": {"chunk_tokens": 7, "temperature": 3.0, "kl_weight": 0.7, "lm_weight": 0.9},
        "train": {"tokens": 10 * 2 * 9, "micro_batch": 2, "token_grad_clip": 0},
    }
    return tiny_recipe(**settings | sections)


def built(recipe: Recipe, family: str = "qwen3") -> tuple[Teacher, ShearedLlama]:
    teacher = tiny_teacher(family, **SHAPE)
    method = METHODS["sheared-llama"].build(teacher, recipe)
    assert isinstance(method, ShearedLlama)
    return teacher, method


@pytest.mark.usefixtures("exact_norms")
def test_losses_and_gradients_of_stage_one() -> None:
    """The loss is KL + LM of the masked model and the Lagrangian. Multipliers ascend. Micro-batches
    of a step add up to the whole batch."""
    _, method = built(recipe_of({**TARGET, "pruning_share": 0.5}))
    with torch.no_grad():
        for number, multiplier in enumerate(method.masks.multipliers()):
            multiplier.fill_(0.1 + number)
    batches = [tiny_batch(seed=1, lengths=[9, 5]), tiny_batch(seed=2)]
    whole = tiny_batch(rows=4, seed=1, lengths=[9, 5, 9, 9])
    whole.input_ids.copy_(torch.cat([b.input_ids for b in batches]))
    sums, parts = gradients(method, *batches)  # type: ignore[arg-type]
    at_once, together = gradients(method, whole)  # type: ignore[arg-type]
    for name, value in sums.items():
        torch.testing.assert_close(value, at_once[name], rtol=1e-9, atol=1e-11)
    for name, value in parts.items():
        torch.testing.assert_close(value, together[name], rtol=1e-9, atol=1e-11)
    expected = 0.7 * sums["kl"] + 0.9 * sums["lm"] + sums["lagrangian"]
    assert sums["loss"].item() == pytest.approx(expected.item(), rel=1e-9)

    progress = 1 / (0.2 * 5)
    gaps = method.masks.gaps(min(progress, 1.0))
    for kind, gap in gaps.items():
        torch.testing.assert_close(parts[f"masks.{kind}.linear"], -gap)
        torch.testing.assert_close(parts[f"masks.{kind}.quadratic"], -gap.square())
        assert sums[f"{kind}_gap"].item() == pytest.approx(gap.mean().item())
    # The masks' gradient against finite differences of the loss.
    for kind, log_alpha in method.masks.log_alpha.items():
        flat, index = log_alpha.data.view(-1), 0
        values = []
        for change in (1e-5, -2e-5):
            flat[index] += change
            values.append(method.losses(whole, count([whole])).loss.item())
        flat[index] += 1e-5
        slope = (values[0] - values[1]) / 2e-5
        found = parts[f"masks.{kind}.log_alpha"].view(-1)[index].item()
        assert found == pytest.approx(slope, rel=1e-4, abs=1e-8), kind


def test_multipliers_ascend_with_their_own_rates() -> None:
    rates = {"mask_learning_rate": 0.5, "multiplier_learning_rate": 3.0}
    train = {"tokens": 180, "micro_batch": 2, "warmup_ratio": 0, "weight_decay": 0.1}
    train["learning_rate"] = 1e-3
    _, method = built(recipe_of({**TARGET, **rates}, train=train))
    state = new_state(method, method.recipe)
    groups = {id(p): group for group in state.optimizer.param_groups for p in group["params"]}
    for name, parameter in method.parameters().items():
        part = name.rpartition(".")[2] if name.startswith("masks.") else ""
        own = {"log_alpha": 0.5, "linear": 3.0, "quadratic": 3.0}
        group = groups[id(parameter)]
        assert group["lr"] == own.get(part, method.recipe.train.learning_rate), name
        decays = not part and parameter.ndim > 1
        assert group["weight_decay"] == (0.1 if decays else 0), name
    batch = tiny_batch()
    gradients(method, batch)  # type: ignore[arg-type]
    state.optimizer.step()
    for kind, gap in method.masks.gaps(1.0).items():
        assert (gap > 0).all()
        assert (method.masks.linear[kind] > 0).all(), (
            "too many are open, so the multiplier must grow"
        )


def test_what_stage_two_trains() -> None:
    """A plain model of the exact shape with the teacher's weights. Loading can undo the stage."""
    teacher, method = built(recipe_of({**TARGET, "pruning_share": 0.3}))
    assert method.stage_ends() == (3,)
    with torch.no_grad():
        for kind, log_alpha in method.masks.log_alpha.items():
            torch.nn.init.normal_(log_alpha, generator=torch.Generator().manual_seed(len(kind)))
    kept, before = method.masks.kept(), method.student()
    told = method.next_stage()
    units = {f"{kind}_{what}" for kind in KINDS for what in ("by_rank", "units")}
    assert set(told) == {"stage"} | units
    student = method.student()
    config = student.config
    assert (config.num_hidden_layers, config.hidden_size) == (2, 8)
    assert (config.num_key_value_heads, config.intermediate_size) == (1, 7)
    assert set(method.parameters()) == {name for name, _ in student.named_parameters()}
    assert all(p.requires_grad for p in method.parameters().values())
    assert method.own_learning_rates() == {}
    batch = tiny_batch()
    with torch.no_grad():
        assert torch.equal(student(batch.input_ids).logits, before(batch.input_ids).logits)
    theirs = teacher.model.get_submodule(f"model.layers.{kept.layers[1]}.mlp.up_proj").weight
    ours = student.get_submodule("model.layers.1.mlp.up_proj").weight
    assert torch.equal(ours, theirs[kept.neurons[1]][:, kept.hidden])

    state = json.loads(json.dumps(method.state()))
    _, other = built(method.recipe)
    first = json.loads(json.dumps(other.state()))
    other.load_state(state)
    shapes = [{n: p.shape for n, p in m.parameters().items()} for m in (method, other)]
    assert shapes[0] == shapes[1]
    assert other.student().config.to_dict() == config.to_dict()
    other.load_state(first)
    fresh = built(method.recipe)[1]
    assert list(other.parameters()) == list(fresh.parameters())
    for name, value in fresh.parameters().items():
        assert torch.equal(other.parameters()[name], value), name


def test_shares_of_sources() -> None:
    """w' is proportional to w exp(max(loss - reference, 0)): algorithm 1 of the paper."""
    _, method = built(recipe_of({}))
    shares = {"web": 0.5, "code": 0.3, "books": 0.2}
    found = method.source_shares(shares, {"web": 2.5, "code": 1.0}, {"web": 2.0, "code": 1.4})
    total = 0.5 * 2.718281828459045**0.5 + 0.3 + 0.2
    assert found == pytest.approx(
        {"web": 0.5 * 2.718281828459045**0.5 / total, "code": 0.3 / total, "books": 0.2 / total}
    )
    assert method.weighs_sources()
    assert not built(recipe_of({"dynamic_loading": False}))[1].weighs_sources()


# Whole runs.

STEPS, STAGE_ONE = 8, 4


def documents(source: str, first: int, number: int) -> list[Document]:
    """Documents whose words go up by one (web) or stay within three (code)."""
    web = source == "web"
    return [
        (source, [0, *(3 + ((d + j) % 30 if web else (d * j) % 3) for j in range(30)), 1])
        for d in range(first, first + number)
    ]


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sources, three layers to two, and a checkpoint after every step."""
    folder = tmp_path_factory.mktemp("sheared")
    save_teacher(folder / "teacher", **SHAPE)
    write_shards(
        folder / "shards",
        [
            ("train", documents("web", 0, 30) + documents("code", 0, 10)),
            ("held_out", documents("web", 300, 4) + documents("code", 400, 4)),
        ],
        tokenizer_identity(tiny_tokenizer()),
        ("web", "code"),
    )
    settings = {
        "method": {"name": "sheared-llama", **TARGET, "pruning_share": STAGE_ONE / STEPS},
        "teacher": {"model": str(folder / "teacher")},
        "student": {"hidden_size": 8},
        "data": {"shards": [str(folder / "shards")], "sequence_length": 16},
        "train": {
            "tokens": STEPS * 2 * 2 * 16,
            "micro_batch": 2,
            "accumulate": 2,
            "learning_rate": 1e-2,
            "weight_decay": 0.1,
            "eval_every": 2,
            "eval_sequences": 16,
            "checkpoint_every": 1,
            "keep_checkpoints": STEPS + 1,
        },
    }
    file = folder / "tiny.yaml"
    file.write_text(yaml.safe_dump(settings))
    return file


@pytest.fixture(scope="module")
def whole(recipe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The run without interruption."""
    recipe = make_recipe(yaml.safe_load(recipe_file.read_text()))
    run = Run.create(tmp_path_factory.mktemp("whole") / "run", recipe)
    train(run)
    return run


def test_a_whole_run(whole: Run) -> None:
    lines = whole.metrics()
    assert [line["step"] for line in lines if "lagrangian" in line] == [1, 2, 3, 4]
    changed = [line["step"] for line in lines if "hidden_by_rank" in line]
    assert changed == [STAGE_ONE]
    # The optimizer's schedule restarts: the rate falls to 0 twice.
    rates = [line["learning_rate"] for line in lines[1:]]
    assert rates[:STAGE_ONE] == rates[STAGE_ONE:]
    assert rates == sorted(rates[:STAGE_ONE], reverse=True) * 2 or rates[1] > rates[2]
    student = AutoModelForCausalLM.from_pretrained(whole.student_folder)
    assert type(student).__name__ == "Qwen3ForCausalLM"
    config = student.config
    assert (config.num_hidden_layers, config.hidden_size) == (2, 8)
    assert (config.num_key_value_heads, config.intermediate_size) == (1, 7)
    setup = set_up(whole)
    ids = tiny_tokens(2)
    with torch.no_grad():
        theirs = setup.method.student()(ids).logits
        torch.testing.assert_close(student(ids).logits, theirs, rtol=1e-5, atol=1e-5)


def test_sources_are_weighed_after_every_measurement(whole: Run) -> None:
    lines = whole.metrics()
    teacher = lines[0]["teacher_held_out_lm_by_source"]
    assert set(teacher) == {"web", "code"}
    by_step = {line["step"]: line for line in lines}
    shares: dict[str, float] | None = None
    for step in range(0, STEPS + 1, 2):
        line = by_step[step]
        if shares is not None:
            losses = line["held_out_lm_by_source"]
            grown = {
                name: share * 2.718281828459045 ** max(losses[name] - teacher[name], 0)
                for name, share in shares.items()
            }
            expected = {name: value / sum(grown.values()) for name, value in grown.items()}
            assert line["source_shares"] == pytest.approx(expected)
        shares = line.get("source_shares", shares)
    assert shares is not None
    assert shares != {"web": 0.75, "code": 0.25}
    # The sequences are drawn by these shares, to within one.
    header = json.loads((max(whole.checkpoints.iterdir()) / "checkpoint.json").read_text())
    place = header["text"]["by_source"]
    assert place["position"] == sum(place["taken"]) == STEPS * 4
    first = next(line["source_shares"] for line in lines if "source_shares" in line)
    assert first.keys() == {"web", "code"}


def test_killed_in_both_stages_and_at_the_boundary(
    recipe_file: Path, whole: Run, tmp_path: Path, prepared: Prepared
) -> None:
    """A run that is killed several times equals the uninterrupted run, bit for bit."""
    part = tmp_path / "part"
    starts: list[Start] = [
        ("stepping", 2, "train", recipe_file, "--out", part),
        ("saving", STAGE_ONE, "resume", part),  # pruned, but its checkpoint is not written yet
        ("stepping", STAGE_ONE, "resume", part),
        ("saving", 7, "resume", part),
    ]
    assert run_and_kill(prepared, part, starts) == [2, STAGE_ONE - 1, STAGE_ONE, 6]
    train(Run.open(part))
    assert_same_run(Run.open(part), whole)


def test_a_run_without_a_checkpoint_starts_over(whole: Run, tmp_path: Path) -> None:
    """Killed after the first measurement, it does not measure again, but uses its shares."""
    run = copy_until(whole, tmp_path / "run", -1)
    keep_metrics_until(run.metrics_file, 0)
    train(run)
    assert_same_run(run, whole)


def test_a_damaged_checkpoint_of_stage_two_leads_back_to_stage_one(
    whole: Run, tmp_path: Path
) -> None:
    run = copy_until(whole, tmp_path / "run", STEPS)
    for step in range(STAGE_ONE, STEPS + 1):
        file = run.checkpoints / f"step-{step:08d}" / "state.safetensors"
        file.write_bytes(file.read_bytes()[:-1] + b"x")
    setup = set_up(run)
    assert setup.state.step == STAGE_ONE - 1
    assert "masks.hidden.log_alpha" in setup.state.parameters
    assert setup.method.student().config.num_hidden_layers == 2


def test_text_without_sources_is_read_in_its_order(
    recipe_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text = write_jsonl(tmp_path / "text.jsonl", tiny_documents())
    settings = yaml.safe_load(recipe_file.read_text())
    changes = {"data.text": [str(text)], "data.cache": str(tmp_path / "cache"), "train.tokens": 256}
    run = Run.create(tmp_path / "run", make_recipe(settings, changes))
    train(run)
    assert caplog.text.count("no sources to weigh") == 1
    assert not any("source_shares" in line for line in run.metrics())


def test_every_method_has_a_section() -> None:
    assert METHODS.keys() == METHOD_SECTIONS.keys()
