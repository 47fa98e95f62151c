"""The training loop, its checkpoints and the output of a run."""

from lrc.train.session import train

__all__ = ["train"]
