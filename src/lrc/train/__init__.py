"""The training loop, its checkpoints and what a run leaves behind."""

from lrc.train.session import need_whole_teacher, train

__all__ = ["need_whole_teacher", "train"]
