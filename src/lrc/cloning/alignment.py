"""Learned matrices that map a student's activations to the teacher's width."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lrc.cloning.projection import projection_key
from lrc.model.layout import LinearSite
from lrc.model.teacher import Teacher

STD = 0.02
"""Standard deviation of their initial values, as in TinyBERT."""


def new_alignment(
    teacher: Teacher, student: PreTrainedModel, names: Iterable[str], seed: int
) -> dict[str, nn.Parameter]:
    """Alignment matrices [d_S, d_T] by name, drawn from normal(0, 0.02); they are the same on every
    device, and have at least float32, whatever the student's passes compute in."""
    generator = torch.Generator().manual_seed(seed)
    dtype = torch.promote_types(student.dtype, torch.float32)
    shape = student.config.hidden_size, teacher.hidden_size
    return {
        name: nn.Parameter(
            (torch.randn(shape, generator=generator) * STD).to(student.device, dtype)
        )
        for name in names
    }


def writer_alignment(
    teacher: Teacher, student: PreTrainedModel, sites: Iterable[LinearSite], seed: int
) -> dict[str, nn.Parameter]:
    """Alignment matrices for the linear maps that write to the residual stream."""
    names = [_key(site) for site in sites if teacher.layout.writes(site)]
    return new_alignment(teacher, student, names, seed)


def align(output: Tensor, alignment: dict[str, nn.Parameter], site: LinearSite) -> Tensor:
    """Map the student's output [b, s, d_S] of a linear map to the teacher's width, [b, s, d_T]."""
    return output @ alignment[_key(site)].to(output.dtype)


def _key(site: LinearSite) -> str:
    return f"alignment.{projection_key(site)}"
