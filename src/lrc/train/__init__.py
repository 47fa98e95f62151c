"""The training loop, its checkpoints and what a run leaves behind."""

from lrc.train.session import train

__all__ = ["train"]
