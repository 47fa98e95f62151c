"""Chat tuning: what is learned, the loss with a teacher, resuming, and the exported folder."""

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from gguf import GGMLQuantizationType
from tokenizers import Tokenizer as Backend
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
)

from command_line import Command
from gguf_helpers import byte_level_bpe, tiny_student
from lrc import api
from lrc.exporting.card import PLACE
from lrc.exporting.gguf_file import convert_to_gguf
from lrc.recipe.shipped import shipped
from lrc.system.errors import DivergedError, UserError
from lrc.train.session import Interrupted
from lrc.train.signals import StopRequest
from lrc.tuning.conversations import Encoder, encode_all, read_conversations
from lrc.tuning.settings import Tuning, load_tuning
from lrc.tuning.sft import sft
from lrc.tuning.trainers import HeldOutLoss, Reporter, make_trainer
from pages import Tables
from prepared import CLI, EXACT, Prepared, places
from tiny import tiny_teacher, tiny_tokenizer

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %} {{ 'w3' if m.role == 'user' else 'w4' }}"
    " {{ m.content }} {{ eos_token }}{% endfor %}{% if add_generation_prompt %} w4{% endif %}"
)
MARKED = TEMPLATE.replace(
    " {{ m.content }} {{ eos_token }}",
    "{% if m.role == 'assistant' %}{% generation %} {{ m.content }} {{ eos_token }}"
    "{% endgeneration %}{% else %} {{ m.content }} {{ eos_token }}{% endif %}",
)


def conversation(number: int, turns: int = 1) -> list[dict[str, str]]:
    """A question of some words, whose answer is the same words counted on by one."""
    found = []
    for turn in range(turns):
        words = [5 + (3 * number + 5 * turn + i) % 20 for i in range(2 + (number + turn) % 3)]
        found.append({"role": "user", "content": " ".join(f"w{w}" for w in words)})
        found.append({"role": "assistant", "content": " ".join(f"w{w + 1}" for w in words)})
    return found


def save_model(folder: Path, seed: int = 0, template: str | None = TEMPLATE) -> Path:
    """A tiny random Llama with a chat template."""
    teacher = tiny_teacher("llama", tied=True, dtype=torch.float32, seed=seed)
    teacher.tokenizer.chat_template = template
    teacher.model.save_pretrained(folder)
    teacher.tokenizer.save_pretrained(folder)
    return folder


def write_chats(path: Path, number: int = 40, sharegpt: bool = False) -> Path:
    rows = [conversation(i, 1 + i % 2) for i in range(number)]
    if sharegpt:
        names = {"user": "human", "assistant": "gpt"}
        turns = [[{"from": names[m["role"]], "value": m["content"]} for m in row] for row in rows]
        lines = [{"conversations": row} for row in turns]
    else:
        lines = [{"messages": row} for row in rows]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def parts(tmp_path: Path) -> dict[str, Any]:
    """The settings of a short tuning of a tiny model."""
    return {
        "model": str(save_model(tmp_path / "model")),
        "data": [str(write_chats(tmp_path / "chat.jsonl"))],
        "held_out_fraction": 0.2,
        "steps": 6,
        "micro_batch": 4,
        "learning_rate": 0.01,
        "eval_every": 3,
        "checkpoint_every": 2,
        "log_every": 1,
        "device": "cpu",
    }


def page_of(folder: Path) -> Tables:
    """The page of a tuning."""
    path = api.write_report(folder, out=folder.parent / f"{folder.name}.html")
    return Tables(path.read_text())


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("template", [TEMPLATE, MARKED], ids=["rendered", "marked"])
def test_answers_and_their_ends_are_learned_and_nothing_else(template: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    encoded = Encoder(tokenizer, 64).encode(
        [
            {"role": "user", "content": "w5 w6"},
            {"role": "assistant", "content": "w7"},
            {"role": "user", "content": "w8"},
            {"role": "assistant", "content": "w9 w10"},
        ]
    )
    assert encoded is not None
    assert encoded.input_ids.tolist() == [0, 3, 5, 6, 1, 4, 7, 1, 3, 8, 1, 4, 9, 10, 1]
    learned = [i for i, one in enumerate(encoded.learned) if one]
    assert [encoded.input_ids[i] for i in learned] == [7, 1, 9, 10, 1]
    assert learned == [6, 7, 12, 13, 14]


def test_a_marker_without_the_end_of_turn_is_not_trusted() -> None:
    """Such a model would never learn to stop."""
    plain = tiny_tokenizer().backend_tokenizer.to_str().replace('"w32"', '"dummy"')
    tokenizer = PreTrainedTokenizerFast(  # TRL probes the template with a word "dummy"
        tokenizer_object=Backend.from_str(plain), bos_token="<s>", eos_token="</s>"
    )
    tokenizer.chat_template = MARKED.replace(
        "{{ m.content }} {{ eos_token }}{% endgeneration %}",
        "{{ m.content }}{% endgeneration %} {{ eos_token }}",
    )
    encoder = Encoder(tokenizer, 64)
    assert encoder.template is None
    encoded = encoder.encode(conversation(0))
    assert encoded is not None
    assert encoded.learned[-1]
    assert encoded.input_ids[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("end", [" {{ eos_token }}", "\n"])
def test_answers_without_an_end_are_noticed_once(
    end: str, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE.replace(" {{ eos_token }}", end)
    encoder = Encoder(tokenizer, 64)
    for number in range(2):
        assert encoder.encode(conversation(number, turns=2)) is not None
    assert caplog.text.count("does not learn where answers end") == (end == "\n")


def test_trls_own_template_is_used_where_it_knows_one() -> None:
    from trl.chat_template_utils import qwen2_5_chat_template, qwen2_5_training_chat_template

    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = qwen2_5_chat_template
    assert Encoder(tokenizer, 64).template == qwen2_5_training_chat_template


def test_a_template_that_changes_earlier_answers_is_refused_in_a_sentence() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE.replace(
        "m.content", "('w9' if not loop.last else m.content)"
    )
    with pytest.raises(UserError, match="renders an answer in another way"):
        encode_all([conversation(0, 2), conversation(1, 2)], Encoder(tokenizer, 64), 0.5, 9, 0)


def test_long_conversations_are_cut_and_those_without_an_answer_left_out() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    long = [
        {"role": "user", "content": "w5 " * 20},
        {"role": "assistant", "content": "w6"},
    ]
    rows = [conversation(i) for i in range(4)]
    found = encode_all([*rows, long], Encoder(tokenizer, 10), 0.25, 9, 0)
    assert found.left_out == {"there is no answer within max_length": 1}
    assert len(found.training) == 3
    assert len(found.held_out) == 1
    assert max(len(one.input_ids) for one in found.training) <= 10


def test_an_empty_answer_is_not_learned() -> None:
    """It would teach the model to say nothing. A call of a tool is an answer."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    question = {"role": "user", "content": "w5"}
    empty = [question, {"role": "assistant", "content": " "}]
    call = [question, {"role": "assistant", "content": "", "tool_calls": [{"function": {}}]}]
    rows = [*(conversation(i) for i in range(4)), empty, call]
    found = encode_all(rows, Encoder(tokenizer, 64), 0.25, 9, 0)
    assert found.left_out == {"an answer is empty": 1}
    assert len(found.training) + len(found.held_out) == 5


def test_what_the_template_refuses_is_left_out_with_its_reason() -> None:
    tokenizer = tiny_tokenizer()
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    tokenizer.chat_template = refuses + TEMPLATE
    system = {"role": "system", "content": "w9"}
    rows = [conversation(0), conversation(1), [system, *conversation(2)]]
    found = encode_all(rows, Encoder(tokenizer, 64), 0.5, 9, 0)
    assert found.left_out == {"the chat template refuses them (no system)": 1}
    with pytest.raises(UserError, match=r"0 can be learned from.*Left out: 1, because .*no system"):
        encode_all(rows[2:], Encoder(tokenizer, 64), 0.5, 9, 0)


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": [{"from": "Human", "value": "w5"}, {"from": "GPT", "value": "w6"}]},
        {"messages": [{"role": "human", "content": "w5"}, {"role": "gpt", "content": "w6"}]},
        {"messages": [{"role": "user", "value": "w5"}, {"role": "bot", "value": "w6"}]},
        {
            "messages": None,
            "conversations": [
                {"role": "user", "content": "w5", "tool_calls": None},
                {"role": "assistant", "content": "w6", "name": None},
            ],
        },
    ],
)
def test_common_ways_to_write_a_conversation(row: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps(row))
    question, answer = {"role": "user", "content": "w5"}, {"role": "assistant", "content": "w6"}
    assert list(read_conversations([str(path)], "train")) == [[question, answer]]


def test_calls_of_tools_are_kept_and_their_description_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
    turns = [call, {"role": "tool", "content": "w5"}, {"role": "observation", "content": "w6"}]
    path.write_text(json.dumps({"messages": turns, "tools": []}))
    assert list(read_conversations([str(path)], "train")) == [[{**call, "content": ""}, *turns[1:]]]
    path.write_text(json.dumps({"messages": turns, "tools": [{"name": "f"}]}))
    with pytest.raises(UserError, match="describes `tools`"):
        list(read_conversations([str(path)], "train"))


def test_the_held_out_loss_is_the_mean_over_answer_tokens(parts: dict[str, Any]) -> None:
    model = AutoModelForCausalLM.from_pretrained(parts["model"]).double()
    tokenizer = AutoTokenizer.from_pretrained(parts["model"])
    encoder = Encoder(tokenizer, 64)
    encoded = [encoder.encode(conversation(i, 1 + i % 3)) for i in range(7)]
    total, count = 0.0, 0
    for one in encoded:
        assert one is not None
        logits = model(torch.tensor(one.input_ids)[None].long()).logits[0, :-1, :33]
        labels = torch.tensor(one.labels())[1:].long()
        total += functional.cross_entropy(logits, labels, reduction="sum").item()
        count += int((labels >= 0).sum())
    for rows in (1, 3, 7):
        found = HeldOutLoss([one for one in encoded if one], tokenizer, rows).measure(model)
        assert found == pytest.approx(total / count, rel=1e-12)


def _trainer(parts: dict[str, Any], tmp_path: Path, **changes: Any) -> Any:
    """A trainer, its model in float64, as it stands before the first step."""
    tuning = Tuning(**{**parts, **changes})
    model = AutoModelForCausalLM.from_pretrained(tuning.model).double()
    tokenizer = AutoTokenizer.from_pretrained(tuning.model)
    rows = [conversation(i, 1 + i % 2) for i in range(40)]
    found = encode_all(rows, Encoder(tokenizer, tuning.max_length), 0.2, 9, 0)
    teacher = None
    if tuning.teacher:
        from lrc.model.teacher import load_teacher

        teacher = load_teacher(tuning.teacher)
        teacher.model.double()
    reporter = Reporter(tmp_path / "metrics.jsonl", StopRequest(), lambda _: None)
    return make_trainer(tuning, model, tokenizer, teacher, found, tmp_path / "kept", reporter)


def _batches(trainer: Any) -> tuple[list[Any], Any]:
    steps = trainer.args.gradient_accumulation_steps
    return trainer.get_batch_samples(
        iter(trainer.get_train_dataloader()), steps, torch.device("cpu")
    )


def _gradients(trainer: Any) -> dict[str, torch.Tensor]:
    """Gradients of the first optimizer step."""
    trainer.model.train()
    batches, items = _batches(trainer)
    for batch in batches:
        trainer.compute_loss(trainer.model, batch, num_items_in_batch=items).backward()
    return {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("packing", [False, True])
def test_loss_with_a_teacher_is_lm_and_kl_on_answers(
    parts: dict[str, Any], tmp_path: Path, accumulate: int, packing: bool
) -> None:
    """Against all logits at once, in float64, over every micro-batch of a step."""
    teacher = save_model(tmp_path / "teacher", seed=5)
    weights = {"kl_weight": 0.7, "lm_weight": 0.4, "temperature": 2.0, "chunk_tokens": 3}
    trainer = _trainer(
        parts,
        tmp_path,
        teacher=str(teacher),
        accumulate=accumulate,
        micro_batch=2,
        packing=packing,
        max_length=48,
        **weights,
    )
    batches, items = _batches(trainer)
    found = sum(
        trainer.compute_loss(trainer.model, batch, num_items_in_batch=items).item()
        for batch in batches
    )
    theirs_model = trainer._teacher.model
    lm = kl = count = 0.0
    for batch in batches:
        names = ("input_ids", "attention_mask", "position_ids")
        inputs = {k: v for k, v in batch.items() if k in names} | {"use_cache": False}
        labels = batch["labels"][:, 1:]
        kept = labels >= 0
        ours = trainer.model(**inputs).logits[:, :-1, :33][kept]
        theirs = theirs_model(**inputs).logits[:, :-1, :33][kept]
        lm += functional.cross_entropy(ours, labels[kept], reduction="sum").item()
        log_p, log_q = (theirs / 2).log_softmax(-1), (ours / 2).log_softmax(-1)
        kl += (log_p.exp() * (log_p - log_q)).sum().item()
        count += int(kept.sum())
    assert count > 10
    assert found == pytest.approx((0.4 * lm + 0.7 * 4 * kl) / count, rel=1e-9)


def test_accumulating_and_one_large_batch_give_the_same_gradients(
    parts: dict[str, Any], tmp_path: Path
) -> None:
    teacher = str(save_model(tmp_path / "teacher", seed=5))
    one = _gradients(_trainer(parts, tmp_path, teacher=teacher, micro_batch=6, accumulate=1))
    three = _gradients(_trainer(parts, tmp_path, teacher=teacher, micro_batch=2, accumulate=3))
    for name, value in one.items():
        torch.testing.assert_close(three[name], value, rtol=1e-8, atol=1e-10)


def test_without_a_teacher_the_loss_is_lm_alone(parts: dict[str, Any], tmp_path: Path) -> None:
    """TRL's own gradients equal ours without KL."""
    teacher = str(save_model(tmp_path / "teacher", seed=5))
    plain = _gradients(_trainer(parts, tmp_path))
    trainer = _trainer(parts, tmp_path, teacher=teacher, kl_weight=1e-30)
    trainer._held_out.vocab = 37  # TRL counts the padding rows of the head, too
    ours = _gradients(trainer)
    for name, value in plain.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=1e-6)


def test_packed_conversations_do_not_see_each_other(parts: dict[str, Any], tmp_path: Path) -> None:
    packed = _trainer(parts, tmp_path, packing=True, max_length=48, micro_batch=1)
    batch = next(iter(packed.get_train_dataloader()))
    starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
    assert len(starts) > 1
    model = packed.model
    together = model(
        batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
    ).logits[0]
    for start, end in zip(starts, [*starts[1:], len(together)], strict=True):
        alone = model(batch["input_ids"][:, start:end]).logits[0]
        torch.testing.assert_close(together[start:end], alone, rtol=1e-8, atol=1e-9)


def test_tuning_lowers_the_held_out_loss_and_keeps_everything_else(
    parts: dict[str, Any], tmp_path: Path, lrc: Command
) -> None:
    """Through the command line; ShareGPT rows give what messages give."""
    source = Path(parts["model"])
    settings = {**parts, "steps": 40}
    config = tmp_path / "sft.yaml"
    config.write_text(json.dumps({k: v for k, v in settings.items() if k not in ("model", "data")}))
    for name, sharegpt in (("one", False), ("two", True)):
        data = write_chats(tmp_path / f"{name}.jsonl", sharegpt=sharegpt)
        code, out, err = lrc(
            "sft", source, "--data", data, "--recipe", config, "--out", tmp_path / name
        )
        assert code == 0, err
    assert "held-out loss on answers" in out
    assert "{" not in out  # TRL prints its metrics as dictionaries
    assert same(weights(tmp_path / "one/student"), weights(tmp_path / "two/student"))
    summary = json.loads((tmp_path / "one/summary.json").read_text())
    assert summary["held_out_lm"] < summary["held_out_lm_before"] - 0.3
    for name in ("environment.json", "curves.png"):
        assert (tmp_path / "one" / name).stat().st_size > 100, name
    code, out, err = lrc("report", tmp_path / "one", "--out", tmp_path / "page.html")
    assert code == 0, err
    page = Tables((tmp_path / "page.html").read_text())
    losses = [f"{summary[key]:.4f}" for key in ("held_out_lm_before", "held_out_lm")]
    assert page.section("results")["held-out loss on answers"] == losses
    assert page.section("recipe")["micro_batch"] == [str(settings["micro_batch"])]
    assert page.pictures == 4  # held-out loss, loss, gradient norm, learning rate
    assert "one is a comparison or a tuning" in lrc.refusal(
        "report", tmp_path / "one", tmp_path / "two", "--out", tmp_path / "no.html"
    )
    student = tmp_path / "one/student"
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        before, after = (json.loads((f / name).read_text()) for f in (source, student))
        for ours in ("use_cache", "transformers_version", "architectures"):
            before.pop(ours, None), after.pop(ours, None)
        assert {**before, **after} == after, name
    assert AutoTokenizer.from_pretrained(student).chat_template == TEMPLATE
    card = (student / "README.md").read_text()
    assert f"{summary['held_out_lm']:.4f}" in card
    assert str(tmp_path) not in card
    kept = GenerationConfig.from_pretrained(student)
    assert kept.to_dict() == GenerationConfig.from_pretrained(source).to_dict()
    code, out, err = lrc("resume", tmp_path / "one")
    assert code == 0, err
    assert "has ended" in out
    given = {k: v for k, v in settings.items() if k not in ("model", "data")}
    by_python = api.sft(source, data=tmp_path / "one.jsonl", settings=given, out=tmp_path / "three")
    assert same(weights(student), weights(by_python))
    code, out, err = lrc("generate", tmp_path / "one", "w5 w6", "--chat", "--max-new-tokens", "4")
    assert code == 0, err


def test_lora_is_merged(parts: dict[str, Any], tmp_path: Path) -> None:
    """Adapters have a higher rate by default, and change the maps by a matrix of their rank."""
    assert Tuning(model="m", data=["d"]).learning_rate == 1e-5
    given = {key: value for key, value in parts.items() if key != "learning_rate"}
    more = {"lora_rank": 2, "lora_alpha": 8, "report_to": ["tensorboard"]}
    tuning = Tuning(**given, **more, schedule="constant")
    sft(tuning, tmp_path / "out")
    lines = map(json.loads, (tmp_path / "out/metrics.jsonl").read_text().splitlines())
    assert max(line.get("learning_rate", 0) for line in lines) == 1e-4
    assert list((tmp_path / "out/tensorboard").glob("events*"))
    before, after = weights(Path(parts["model"])), weights(tmp_path / "out/student")
    assert before.keys() == after.keys()
    assert torch.equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])
    name = "model.layers.0.mlp.up_proj.weight"
    difference = after[name] - before[name]
    assert 0 < torch.linalg.matrix_rank(difference, rtol=1e-4) <= 2


@pytest.mark.parametrize("teacher", [False, True])
def test_a_stopped_tuning_continues_as_if_nothing_had_happened(
    parts: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, teacher: bool
) -> None:
    if teacher:
        parts["teacher"] = str(save_model(tmp_path / "teacher", seed=5))
    tuning = Tuning(**parts)
    sft(tuning, tmp_path / "whole")
    write = Reporter.on_log

    def stop(self: Any, args: Any, state: Any, *rest: Any, **more: Any) -> None:
        write(self, args, state, *rest, **more)
        if state.global_step == 3 and "loss" in more["logs"]:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Reporter, "on_log", stop)
        with pytest.raises(Interrupted, match="lrc resume"):
            sft(tuning, tmp_path / "parts")
    assert not (tmp_path / "parts/student").exists()
    with pytest.raises(UserError, match="other settings"):
        sft(tuning.model_copy(update={"steps": 9}), tmp_path / "parts")
    so_far = page_of(tmp_path / "parts")
    assert so_far.section("results")[""] == ["before", "so far", *["teacher"] * teacher]
    assert not (tmp_path / "parts/curves.png").exists()
    sft(tuning, tmp_path / "parts")
    assert same(weights(tmp_path / "whole/student"), weights(tmp_path / "parts/student"))
    lines = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "parts")
    ]
    steps = [[line["step"] for line in of if "loss" in line] for of in lines]
    assert steps[0] == steps[1] == [1, 2, 3, 4, 5, 6]
    losses = [[line["loss"] for line in of if "loss" in line] for of in lines]
    assert losses[0] == losses[1]


def test_what_a_kill_cut_off_is_passed_over(parts: dict[str, Any], tmp_path: Path) -> None:
    tuning = Tuning(**parts)
    sft(tuning, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut/student")
    (tmp_path / "cut/checkpoints/checkpoint-6/trainer_state.json").unlink()
    metrics = tmp_path / "cut/metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes() + b'{"step": 6, "lo')
    assert page_of(tmp_path / "cut").section("results")
    sft(tuning, tmp_path / "cut")
    assert same(weights(tmp_path / "whole/student"), weights(tmp_path / "cut/student"))
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert sorted(set(steps)) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("teacher", [False, True])
def test_bfloat16_learns_as_float32_does(
    parts: dict[str, Any], tmp_path: Path, teacher: bool
) -> None:
    if teacher:
        parts["teacher"] = str(save_model(tmp_path / "teacher", seed=5))
    found = [
        sft(Tuning(**parts, precision=precision), tmp_path / precision)
        for precision in ("float32", "bfloat16")
    ]
    assert found[1]["held_out_lm"] == pytest.approx(found[0]["held_out_lm"], abs=0.1)
    assert found[1]["held_out_lm"] < found[1]["held_out_lm_before"]


def test_other_conversations_do_not_continue_a_tuning(
    parts: dict[str, Any], tmp_path: Path
) -> None:
    tuning = Tuning(**parts)
    sft(tuning, tmp_path / "out")
    (tmp_path / "out/summary.json").unlink()
    write_chats(Path(parts["data"][0]), number=30)
    with pytest.raises(UserError, match=r"other inputs \(the conversations\)"):
        sft(tuning, tmp_path / "out")


@pytest.mark.parametrize("changed", ["model", "teacher"])
def test_other_weights_do_not_continue_a_tuning(
    parts: dict[str, Any], tmp_path: Path, changed: str
) -> None:
    """A run that went on has another student in the same folder."""
    parts["teacher"] = str(save_model(tmp_path / "teacher", seed=5))
    tuning = Tuning(**parts)
    sft(tuning, tmp_path / "out")
    (tmp_path / "out/summary.json").unlink()
    save_model(tmp_path / changed, seed=9)
    with pytest.raises(UserError, match=rf"other inputs \(the {changed}\)"):
        sft(tuning, tmp_path / "out")


@pytest.mark.parametrize("template", [TEMPLATE, MARKED], ids=["rendered", "marked"])
def test_the_template_s_end_of_an_answer_ends_generation(
    parts: dict[str, Any], tmp_path: Path, template: str, lrc: Command
) -> None:
    """A base model's generation stops at another token than the one by which answers end."""
    template = template.replace("{{ eos_token }}", "<pad>\n")
    folder = save_model(tmp_path / "model", template=template)
    before = GenerationConfig.from_pretrained(folder).eos_token_id
    assert sft(Tuning(**parts), tmp_path / "out")["steps"] == 6
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert before != tokenizer.pad_token_id
    ends = {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<pad>")}
    assert set(GenerationConfig.from_pretrained(tmp_path / "out/student").eos_token_id) == ends


def test_on_policy_may_be_set_in_a_recipe(
    parts: dict[str, Any], tmp_path: Path, lrc: Command
) -> None:
    own = {**parts, "teacher": parts["model"], "on_policy": True, "max_new_tokens": 4, "steps": 1}
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(yaml.safe_dump({k: v for k, v in own.items() if k != "model"}))
    lrc.printed("sft", parts["model"], "--recipe", recipe, "--out", tmp_path / "one")
    assert load_tuning(str(tmp_path / "one/sft.yaml")).on_policy
    del own["on_policy"], own["model"]
    recipe.write_text(yaml.safe_dump(own))
    flag = ("--set", "on_policy=true")
    lrc.printed("sft", parts["model"], "--recipe", recipe, "--out", tmp_path / "two", *flag)
    assert load_tuning(str(tmp_path / "two/sft.yaml")).on_policy


def test_a_teacher_that_caps_its_logits_is_refused(parts: dict[str, Any], tmp_path: Path) -> None:
    teacher = tiny_teacher("gemma2", dtype=torch.float32)
    teacher.tokenizer.chat_template = TEMPLATE
    teacher.model.save_pretrained(tmp_path / "teacher")
    teacher.tokenizer.save_pretrained(tmp_path / "teacher")
    with pytest.raises(UserError, match="cap their logits in different ways"):
        sft(Tuning(**parts, teacher=str(tmp_path / "teacher")), tmp_path / "out")


def test_on_policy_learns_from_the_teacher_on_its_own_answers(
    parts: dict[str, Any], tmp_path: Path
) -> None:
    """The student comes nearer to its teacher on text that no data holds."""
    teacher = save_model(tmp_path / "teacher", seed=5)
    changes = {"steps": 30, "max_new_tokens": 6, "max_length": 40, "learning_rate": 0.02}
    tuning = Tuning(**{**parts, **changes, "teacher": str(teacher), "on_policy": True})
    sft(tuning, tmp_path / "out")
    models = [
        AutoModelForCausalLM.from_pretrained(f).eval()
        for f in (teacher, parts["model"], tmp_path / "out/student")
    ]
    ids = torch.tensor([[0, 3, 5, 6, 1, 4, 7, 1], [0, 3, 9, 10, 1, 4, 11, 1]])
    p, before, after = (model(ids).logits[:, 5:, :33].log_softmax(-1) for model in models)
    kl = [functional.kl_div(q, p, log_target=True, reduction="batchmean") for q in (before, after)]
    assert kl[1] < 0.8 * kl[0]


def test_mistakes_are_told_before_anything_is_loaded(
    parts: dict[str, Any], tmp_path: Path, lrc: Command
) -> None:
    model, data = parts["model"], parts["data"][0]
    plain = save_model(tmp_path / "base", template=None)
    other = tmp_path / "bad.jsonl"
    other.write_text('{"text": "w5"}\n')
    for arguments, told in (
        ((model,), "'data' is missing"),
        ((model, "--data", "nowhere.jsonl"), "does not exist"),
        ((model, "--data", data, "--on-policy"), "give one"),
        ((model, "--data", data, "--set", "kl_weight=2"), "goes with a teacher"),
        ((model, "--data", data, "--set", "max_lenght=9"), "nearest: 'max_length'"),
        ((model, "--data", other), "holds no conversation"),
        ((plain, "--data", data), "no chat template: use a chat model's"),
        ((model, "--data", data, "--out", tmp_path), "already exists"),
    ):
        code, _, err = lrc(
            "sft", *arguments, *(() if "--out" in arguments else ("--out", tmp_path / "x"))
        )
        assert code == 2, err
        assert told in err
    assert not (tmp_path / "x/sft.yaml").exists()


def test_a_teacher_with_another_tokenizer_is_refused(parts: dict[str, Any], tmp_path: Path) -> None:
    teacher = save_model(tmp_path / "teacher")
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    tokenizer.add_tokens(["w99"])
    tokenizer.save_pretrained(teacher)
    with pytest.raises(UserError, match="differ"):
        sft(Tuning(**parts, teacher=str(teacher)), tmp_path / "out")


def test_a_loss_that_is_not_finite_is_reported(parts: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(DivergedError, match="learning_rate"):
        sft(Tuning(**{**parts, "learning_rate": 1e30}), tmp_path / "out")


def test_weights_that_the_last_step_breaks_are_not_exported(
    parts: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its loss is from before it."""
    on_step_end = Reporter.on_step_end

    def broken(self: Any, args: Any, state: Any, control: Any, **more: Any) -> Any:
        if state.global_step == 5:
            more["model"].lm_head.weight.data.fill_(float("nan"))
        return on_step_end(self, args, state, control, **more)

    monkeypatch.setattr(Reporter, "on_step_end", broken)
    with pytest.raises(DivergedError, match="not finite at step 5"):
        sft(Tuning(**{**parts, "steps": 5}), tmp_path / "out")
    assert not (tmp_path / "out/student").exists()


def test_a_damaged_model_is_refused(parts: dict[str, Any], tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(parts["model"])
    model.model.norm.weight.data.fill_(3e38)  # finite, but its logits are not
    model.save_pretrained(parts["model"])
    with pytest.raises(UserError, match="not finite before tuning"):
        sft(Tuning(**parts), tmp_path / "out")


def test_a_gguf_file_is_tuned_to_a_plain_model(parts: dict[str, Any], tmp_path: Path) -> None:
    """transformers marks the model of such a file as quantized."""
    tokenizer = byte_level_bpe()
    tiny_student("llama", tokenizer).float().save_pretrained(tmp_path / "plain")
    tokenizer.save_pretrained(tmp_path / "plain")
    convert_to_gguf(str(tmp_path / "plain"), tmp_path / "model.gguf", GGMLQuantizationType.F32)
    sft(Tuning(**{**parts, "model": str(tmp_path / "model.gguf"), "steps": 2}), tmp_path / "out")
    assert "quantization_config" not in json.loads(
        (tmp_path / "out/student/config.json").read_text()
    )
    card = (tmp_path / "out/student/README.md").read_text()
    assert card.index("## Chat tuning") < card.index("## Use")


def test_the_card_keeps_the_settings_of_each_tuning_and_its_example_chats(
    parts: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = [str(write_chats(tmp_path / "more.jsonl"))]
    teacher = str(save_model(tmp_path / "teacher", seed=1))
    rates = {"one": 0.0123, "two": 0.0456, "three": 0.0789}
    model = parts["model"]
    for name, rate in rates.items():
        more = {"model": model, "data": data, "teacher": teacher, "learning_rate": rate}
        sft(Tuning(**{**parts, **more, "steps": 2}), tmp_path / name)
        model = str(tmp_path / name)
    student = tmp_path / "three/student"
    card = (student / "README.md").read_text()
    titles = [line for line in card.splitlines() if line.startswith("## ")]
    assert titles == [
        "## Chat tuning",
        "## Chat tuning 2",
        "## Chat tuning 3",
        "## Chat",
        "## Use",
    ]
    assert str(tmp_path) not in card
    sections = [part.partition("\n## ")[0] for part in card.split("\n## Chat tuning")[1:]]
    folded = [part.partition("```yaml\n")[2].partition("```")[0] for part in sections]
    for text, name, before in zip(folded, rates, ["model", "one", "two"], strict=True):
        settings = yaml.safe_load(text)
        assert settings["learning_rate"] == rates[name]
        assert settings["schedule"] == "linear"  # not given
        assert (settings["model"], settings["teacher"]) == (Path(before).name, "teacher")
        assert settings["data"] == ["more.jsonl"]
    example = card.partition("\n## Chat\n")[2].partition("```python\n")[2].partition("```")[0]
    names: dict[str, Any] = {}
    exec(example.replace(PLACE, str(student)), names)
    prompt = names["inputs"]["input_ids"][0].tolist()
    tokenizer = AutoTokenizer.from_pretrained(student)
    assert tokenizer.decode(prompt).endswith("w4")  # the template asks for an answer
    answer = tokenizer.decode(names["output"][0, len(prompt) :], skip_special_tokens=True)
    assert capsys.readouterr().out.endswith(f"{answer}\n")


@pytest.mark.parametrize("name", shipped("sft recipe"))
def test_shipped_sft_recipe_is_valid(name: str) -> None:
    assert load_tuning(name, {"model": "student"}).data


# Several processes


def flags(parts: dict[str, Any], **settings: Any) -> list[str]:
    """The settings of a tuning as arguments of `lrc sft`; a step has two micro-batches."""
    given = {**parts, "micro_batch": 2, "accumulate": 2, **settings}
    model, data = given.pop("model"), given.pop("data")
    sets = [part for key, value in given.items() for part in ("--set", f"{key}={value}")]
    return ["sft", model, "--data", data[0], *sets]


def together(prepared: Prepared, *arguments: Any, code: str = CLI) -> list[tuple[int, str, str]]:
    """Exit codes, outputs and errors of a command in two processes."""
    started = [
        prepared.start(*arguments, code=code, environment=EXACT | place) for place in places(2)
    ]
    return [process.wait() for process in started]


def lines_of(folder: Path, *names: str) -> list[list[Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [[line.get(name) for name in ("step", *names)] for line in lines]


@pytest.mark.parametrize(
    "kind", [pytest.param("plain", marks=pytest.mark.slow), "lora, packing and a teacher"]
)
def test_two_processes_tune_as_one_does(
    parts: dict[str, Any], tmp_path: Path, prepared: Prepared, kind: str
) -> None:
    settings: dict[str, Any] = {}
    if kind != "plain":
        settings = {"lora_rank": 4, "packing": "true", "max_length": 48}
        settings["teacher"] = save_model(tmp_path / "teacher", seed=5)
    command = flags(parts, **settings)
    one = prepared.start(*command, "--out", tmp_path / "one", environment=EXACT)
    for code, _, err in (*together(prepared, *command, "--out", tmp_path / "two"), one.wait()):
        assert code == 0, err
    found = [lines_of(tmp_path / name, "loss", "lm", "kl", "eval_loss") for name in ("one", "two")]
    assert len(found[0]) == 9
    assert found[0] == found[1]
    assert same(weights(tmp_path / "one/student"), weights(tmp_path / "two/student"))
    summaries = [
        json.loads((tmp_path / name / "summary.json").read_text()) for name in ("one", "two")
    ]
    for summary in summaries:
        summary.pop("seconds")
    assert summaries[0] == summaries[1]


BREAKS = """
import os
from lrc.tuning import trainers

def breaks(kind, name, signal):
    real = getattr(kind, name)
    def broken(self, *rest, **more):
        state = self.state if kind is trainers.Plain else rest[1]
        if state.global_step == 3 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal)
        return real(self, *rest, **more)
    setattr(kind, name, broken)

breaks({kind}, "{name}", {signal})
"""
"""Sends a signal to the second process, at step 3."""


@pytest.mark.slow
@pytest.mark.parametrize("place", ["compute_loss", "on_step_end"])
def test_a_killed_process_ends_all_and_the_tuning_goes_on(
    parts: dict[str, Any], tmp_path: Path, prepared: Prepared, place: str
) -> None:
    kind = {"compute_loss": "trainers.Plain", "on_step_end": "trainers.Reporter"}[place]
    code = BREAKS.format(kind=kind, name=place, signal=9) + CLI
    (first, _, err), (second, _, _) = together(
        prepared, *flags(parts), "--out", tmp_path / "out", code=code
    )
    assert (first, second) == (2, -9)
    assert "Another process of this run has ended" in err
    assert not (tmp_path / "out/student").exists()
    resume, whole = ["resume", tmp_path / "out"], [*flags(parts), "--out", tmp_path / "whole"]
    for command in (resume, whole):
        code_, _, err = prepared.run(*command, environment=EXACT)
        assert code_ == 0, err
    assert same(weights(tmp_path / "out/student"), weights(tmp_path / "whole/student"))


@pytest.mark.slow
def test_a_signal_to_one_process_stops_both(
    parts: dict[str, Any], tmp_path: Path, prepared: Prepared
) -> None:
    code = BREAKS.format(kind="trainers.Reporter", name="on_step_end", signal=15) + CLI
    found = together(prepared, *flags(parts), "--out", tmp_path / "out", code=code)
    assert [code for code, _, _ in found] == [128 + 15] * 2
    assert "Stopped after step 3" in found[0][1]
    assert (tmp_path / "out/checkpoints/checkpoint-3/trainer_state.json").is_file()


@pytest.mark.slow
def test_two_processes_learn_on_policy(
    parts: dict[str, Any], tmp_path: Path, prepared: Prepared
) -> None:
    teacher = save_model(tmp_path / "teacher", seed=5)
    settings = {"on_policy": "true", "teacher": teacher, "max_new_tokens": 6, "max_length": 40}
    found = together(prepared, *flags(parts, **settings), "--out", tmp_path / "out")
    assert [code for code, _, _ in found] == [0, 0], found
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert summary["held_out_lm"] < summary["held_out_lm_before"] - 0.05


@pytest.mark.slow
def test_processes_that_cannot_tune_together_are_refused(
    parts: dict[str, Any], tmp_path: Path, prepared: Prepared
) -> None:
    command = [*flags(parts, accumulate=3), "--out", tmp_path / "out"]
    for code, _, err in together(prepared, *command):
        assert code == 2
        assert "2 processes cannot divide: set it to 4" in err
    differ = "import os, sys\nsys.argv += ['--set', 'seed=' + os.environ['RANK']]\n" + CLI
    for code, _, err in together(prepared, *flags(parts), "--out", tmp_path / "out", code=differ):
        assert code == 2
        assert "differ in the settings" in err
    assert not (tmp_path / "out/sft.yaml").exists()
