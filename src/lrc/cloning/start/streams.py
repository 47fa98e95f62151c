"""Residual streams of all calibration tokens, in memory or in a temporary file.

Files are read and written, not mapped: a full disk then raises an error instead of a bus error, and
the process holds only one batch. Each file is unlinked right after its creation, so that the system
frees it however the process ends.
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

    A slice that was read may share memory with the stream. Use it before the next write.

    Args:
        shape: sequences, length and width.
        dtype: float32 or float64.
        device: device of the slices.
        on_disk: whether to store it in a file in the system's temporary folder ($TMPDIR).

    Raises:
        UserError: if the disk has no room for it.
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
        """Read sequences [b, length, width]."""
        if self._file is None:
            return self._whole[part]
        value = torch.empty(part.stop - part.start, *self.shape[1:], dtype=self.dtype)
        self._file.seek(part.start * self._sequence_bytes)
        self._file.readinto(value.numpy())  # type: ignore[attr-defined]
        return value.to(self.device)

    def __setitem__(self, part: slice, value: Tensor) -> None:
        """Write sequences [b, length, width].

        Raises:
            UserError: if the disk is full.
        """
        if self._file is None:
            self._whole[part] = value
            return
        with disk_errors(self._folder):
            self._file.seek(part.start * self._sequence_bytes)
            self._file.write(value.to("cpu", self.dtype).contiguous().numpy().data)
            self._file.flush()

    def close(self) -> None:
        """Free the memory or the file."""
        if self._file is None:
            self._whole = torch.empty(0)
        else:
            self._file.close()


def _reserve(file: BinaryIO, size: int) -> None:
    """Reserve a file's disk space at once, so that a full disk fails before hours of work.

    Where the system has no such function, the write that fills the disk fails.
    """
    with suppress(AttributeError):  # not on macOS
        os.posix_fallocate(file.fileno(), 0, size)
