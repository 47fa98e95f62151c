"""The size of a pruned student compared with LRC's of the same hidden size."""

from dataclasses import dataclass
from typing import Any

import torch

from lrc.model.shapes import parameters_of
from lrc.model.student import derive_config
from lrc.model.teacher import Teacher
from lrc.recipe.sections import StudentSection

TOLERANCE = 0.03
"""Largest relative difference between two students that count as equally large."""


@dataclass(frozen=True)
class Sizes:
    """Parameters of a student and of LRC's with the same `student.hidden_size`."""

    student: int
    clone: int

    @property
    def excess(self) -> float:
        """The student's excess over LRC's, as a share of LRC's."""
        return self.student / self.clone - 1

    @property
    def fair(self) -> bool:
        """Whether both count as equally large."""
        return abs(self.excess) <= TOLERANCE

    def sentence(self) -> str:
        """Both counts, with a warning if they are too far apart."""
        text = f"The student has {self.student:,} parameters, LRC's {self.clone:,}"
        if self.student == self.clone:
            return f"{text}."
        text = f"{text} ({self.excess:+.1%})"
        return f"{text}." if self.fair else f"{text}: more than {TOLERANCE:.0%} apart."


def compare_sizes(teacher: Teacher, student: StudentSection, config: Any) -> Sizes:
    """Parameters of a student with this configuration, and of LRC's of the same recipe."""
    clone = derive_config(teacher, student)
    return Sizes(parameter_count(teacher, config), parameter_count(teacher, clone))


def size_notes(teacher: Teacher, student: StudentSection, config: Any) -> list[str]:
    """A note for the user if a student is not as large as LRC's of the same recipe; none if that is
    as large as the teacher, so that only the method's own settings make the student smaller."""
    sizes = compare_sizes(teacher, student, config)
    whole = sizes.clone == parameter_count(teacher, teacher.config)
    return [] if whole or sizes.student == sizes.clone else [sizes.sentence()]


def parameter_count(teacher: Teacher, config: Any) -> int:
    """Parameters of a model of the teacher's class, counting tied weights once; takes no memory."""
    with torch.device("meta"):
        return parameters_of(type(teacher.model)(config))
