"""Which hidden sizes a student may have, given only the teacher's sizes."""

from lrc.model.families import Family
from lrc.system.errors import UserError


def check_student_size(
    hidden_size: int, family: Family, teacher_size: int, heads: int, largest: int | None = None
) -> None:
    """Refuse a hidden size that gives no usable student.

    Args:
        hidden_size: the student's hidden size.
        family: the teacher's family.
        teacher_size: the teacher's hidden size.
        heads: number of the student's attention heads.
        largest: the largest allowed hidden size; None allows any below the teacher's.

    Raises:
        UserError: if it is odd or too large, or is not a multiple of the number of heads and the
            family's configuration class requires that.
    """
    largest = largest or teacher_size - 1
    if hidden_size > largest:
        word = "smaller one" if largest < teacher_size else "size no larger"
        raise UserError(
            f"student.hidden_size is {hidden_size}, but the teacher's is {teacher_size}: "
            f"choose a {word}."
        )
    if family.divides_by_heads and (hidden_size % heads or hidden_size % 2):
        step = heads if heads % 2 == 0 else 2 * heads
        near = min(max(round(hidden_size / step), 1) * step, largest // step * step)
        raise UserError(
            f"student.hidden_size is {hidden_size}, but {family.model_type} models need an "
            f"even multiple of their {heads} attention heads: the nearest is {near}."
        )
    if hidden_size % 2:
        raise UserError(f"student.hidden_size is {hidden_size}; choose an even number.")
