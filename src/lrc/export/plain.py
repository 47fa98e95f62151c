"""The plain export: safetensors, tokenizer, generation config and model card."""

import copy
from pathlib import Path

import torch
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from lrc.files import new_folder


def export_student(
    student: PreTrainedModel,
    tokenizer: Tokenizer,
    card: str | None,
    folder: Path,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a model folder that plain transformers opens.

    Args:
        student: the student with its weights written.
        tokenizer: the teacher's tokenizer.
        card: text of the model card; None: there is none.
        folder: where to write; an older export there is replaced as a whole.
        dtype: element type of the written weights; None: the student's own.

    Raises:
        UserError: the disk is full or the place cannot be written.
    """
    if dtype not in (None, student.dtype):
        student = copy.deepcopy(student).to(dtype)
    with new_folder(folder) as temporary:
        student.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        if card is not None:
            (temporary / "README.md").write_text(card, encoding="utf-8")
