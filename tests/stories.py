"""stories260K for tests, where its files are there."""

import os
from pathlib import Path

import torch
from torch import Tensor

from lrc.model.teacher import Teacher
from lrc.stories260k import save_stories

__all__ = ["sample", "save_stories", "stories_source"]


def sample(teacher: Teacher, sequences: int, length: int) -> Tensor:
    """Text that a teacher tells, the same every time: int64 [sequences, length], the first token
    BOS; an end of text ends none."""
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


def shared_data() -> Path:
    """The folder of real data: $LRC_SHARED_DATA, or `shared/data` beside the checkout."""
    beside = Path(__file__).parents[2] / "shared" / "data"
    return Path(os.environ.get("LRC_SHARED_DATA", beside))


def stories_source() -> Path:
    """The folder of the two files."""
    return shared_data() / "models" / "stories260K"
