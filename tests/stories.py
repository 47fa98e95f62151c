"""Real data for tests, and text that stories260K writes."""

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lrc.model.teacher import Teacher


def sample(teacher: Teacher, sequences: int, length: int) -> Tensor:
    """Text sampled from a teacher, the same every time: int64 [sequences, length].

    The first token is BOS. Text continues after an end-of-text token.
    """
    torch.manual_seed(0)
    start = torch.full((sequences, 1), teacher.tokenizer.bos_token_id)
    ids: Tensor = teacher.model.generate(
        start,
        attention_mask=torch.ones_like(start),
        max_new_tokens=length - 1,
        do_sample=True,
        top_k=0,
        eos_token_id=teacher.config.vocab_size,
        pad_token_id=0,
    )
    return ids


def shared_data(*paths: str) -> Path:
    """The folder of real data: $LRC_SHARED_DATA, or `shared/data` beside the checkout.

    A test is skipped if there is no such folder. It fails if the folder lacks one of `paths`.
    """
    beside = Path(__file__).parents[2] / "shared" / "data"
    folder = Path(os.environ.get("LRC_SHARED_DATA", beside))
    if not folder.is_dir():
        pytest.skip("there is no real data; set LRC_SHARED_DATA to its folder")
    if missing := [path for path in paths if not (folder / path).exists()]:
        pytest.fail(f"{folder} lacks {', '.join(missing)}")
    return folder
