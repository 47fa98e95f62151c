"""Documents as sequences of their own, for models that cannot keep those of a sequence apart."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from lrc.cloning.distill_pass import DistillPass
from lrc.data.batch import Batch
from lrc.evaluation.agreement import HeldOut, measure
from tiny import gradients, tiny_batch, tiny_method, tiny_teacher
from tiny_runs import SETTINGS, go, new_run

rows_of_documents = st.lists(st.integers(1, 12), min_size=1, max_size=12).flatmap(
    lambda row: st.lists(st.permutations(row), min_size=1, max_size=4)
)


@settings(max_examples=100, deadline=None)
@given(rows_of_documents)
def test_every_document_once(documents: list[list[int]]) -> None:
    length = sum(documents[0])
    plain = tiny_batch(len(documents), length, documents=documents)
    sources = torch.arange(plain.input_ids.numel()).view_as(plain.input_ids)
    batch = Batch(plain.input_ids, plain.position_ids, None, sources)
    found, labels = [], []
    for part in batch.split_documents():
        assert part.position_ids is None
        assert part.input_ids.numel() <= batch.input_ids.numel()
        mask = part.attention_mask
        mask = torch.ones_like(part.input_ids) if mask is None else mask
        assert (mask.diff(dim=1) <= 0).all()  # padded at the ends
        for row, kept in enumerate(mask.bool()):
            assert part.source_ids is not None
            where = part.source_ids[row][kept]
            found.append(where.tolist())
            assert torch.equal(part.input_ids[row][kept], batch.input_ids.flatten()[where])
            labels += list(zip(where.tolist(), part.labels()[row][kept].tolist(), strict=True))
    starts = torch.tensor([n for row in documents for n in row]).cumsum(0).tolist()
    expected = [list(range(a, b)) for a, b in zip([0, *starts], starts, strict=False)]
    assert sorted(found) == expected
    assert [label for _, label in sorted(labels)] == batch.labels().flatten().tolist()


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_step_is_that_of_masked_documents(family: str) -> None:
    """Losses and gradients, in a model that can do both."""
    batch = tiny_batch(3, 12, documents=[[5, 7], [12], [1, 3, 8]])
    method = tiny_method(tiny_teacher(family))
    losses, expected = gradients(method, batch)
    split, found = gradients(method, *batch.split_documents())
    assert len(batch.split_documents()) > 1
    for name in ("loss", "kl", "lm", "clone"):
        torch.testing.assert_close(split[name], losses[name], rtol=1e-6, atol=1e-9)
    for name, value in expected.items():
        error = (found[name] - value).abs().max() / value.abs().max()
        assert error < 1e-5, name


@pytest.mark.parametrize("family", ["qwen3_5_text", "gpt_oss"])
def test_a_run_splits_them(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SETTINGS["data"], "document_mask", True)
    monkeypatch.setitem(SETTINGS, "initialize", {"method": "random"})
    seen: list[Batch] = []
    forward = DistillPass.forward

    def watch(self: Any, batch: Batch, *arguments: Any) -> Any:
        seen.append(batch)
        return forward(self, batch, *arguments)

    monkeypatch.setattr(DistillPass, "forward", watch)
    run = new_run(tmp_path, tokens=64, eval_sequences=20)
    go(run, family)
    tokens = 0
    for batch in seen:
        assert batch.position_ids is None
        mask = batch.token_mask()
        kept = torch.ones_like(batch.input_ids, dtype=torch.bool) if mask is None else mask
        assert not ((batch.input_ids == 0) & kept)[:, 1:].any()  # BOS only at the beginning
        tokens += int(kept.sum())
    assert tokens == 64
    assert run.summary()["tokens"] == 64
    teacher = tiny_teacher(family, dtype=torch.float32)
    held_out = HeldOut(run.recipe.teacher, run.recipe.data, run.recipe, 20, 2)
    student = AutoModelForCausalLM.from_pretrained(run.need_student(), dtype=torch.float32)
    measured = measure(held_out, teacher, student, teacher.tokenizer, lambda *_: None)
    expected = run.summary()["student_perplexity"]
    assert measured.metrics["perplexity"].value == pytest.approx(expected, rel=1e-5)
