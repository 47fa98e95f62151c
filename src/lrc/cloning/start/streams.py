"""Residual streams of all calibration tokens, in memory or in a temporary file.

Files are read and written rather than mapped: a full disk is then an error and not a bus error, and
what the process holds is a batch. Each is unlinked as it is made, so that the system frees it
however the process ends.
"""

import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, cast

import torch
from torch import Tensor

from lrc.system.files import disk_errors


class ActivationStore:
    """A tensor [sequences, length, width] that is read and written by slices of sequences.

    What is read may share memory with the stream, and is to be used before it is written again.

    Args:
        shape: sequences, length and width.
        dtype: float32 or float64.
        device: where slices are.
        on_disk: whether it lives in a file in the system's temporary folder ($TMPDIR).

    Raises:
        UserError: the disk has no room for it.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        on_disk: bool = False,
    ) -> None:
        self.shape, self.dtype, self.device = shape, dtype, device
        self._sequence_bytes = shape[1] * shape[2] * dtype.itemsize
        self._file: BinaryIO | None = None
        if on_disk:
            self._folder = Path(tempfile.gettempdir())
            with disk_errors(self._folder):
                file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115 - `close` does
                self._file = cast(BinaryIO, file)
                _reserve(self._file, shape[0] * self._sequence_bytes)
        else:
            self._whole = torch.empty(shape, dtype=dtype, device=device)

    def __getitem__(self, part: slice) -> Tensor:
        """Sequences [b, length, width]."""
        if self._file is None:
            return self._whole[part]
        value = torch.empty(part.stop - part.start, *self.shape[1:], dtype=self.dtype)
        self._file.seek(part.start * self._sequence_bytes)
        self._file.readinto(value.numpy())  # type: ignore[attr-defined]
        return value.to(self.device)

    def __setitem__(self, part: slice, value: Tensor) -> None:
        """Write sequences [b, length, width].

        Raises:
            UserError: the disk is full.
        """
        if self._file is None:
            self._whole[part] = value
            return
        with disk_errors(self._folder):
            self._file.seek(part.start * self._sequence_bytes)
            self._file.write(value.to("cpu", self.dtype).contiguous().numpy().data)
            self._file.flush()

    def close(self) -> None:
        """Let go of the memory or the file."""
        if self._file is None:
            self._whole = torch.empty(0)
        else:
            self._file.close()


def _reserve(file: BinaryIO, size: int) -> None:
    """Take a file's room at once, so that a full disk is told before hours of work.

    Where the system cannot, writing tells.
    """
    with suppress(AttributeError):  # not on macOS
        os.posix_fallocate(file.fileno(), 0, size)
