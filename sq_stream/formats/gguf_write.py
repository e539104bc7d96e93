"""Writing a GGUF file in any order, resumably, under another name until it is whole."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sq_stream.errors import BadInputError
from sq_stream.formats.atomic import partial_path
from sq_stream.formats.gguf_layout import FileLayout, TensorLayout
from sq_stream.formats.storage import Closing, open_locked, read_into, storage_errors, sync, write_all


class GGUFFile(Closing):
    """A GGUF file being written to `<path>.partial`; `commit` gives it its name.

    Rows may be written in any order and from several threads. The partial file is locked (flock) while it is open and
    stays on disk when the writer is only closed, to be reopened later; an empty one is removed.
    """

    def __init__(self, path: Path, layout: FileLayout, fd: int) -> None:
        self.path = path
        self.partial = partial_path(path)
        self.layout = layout
        self._fd: int | None = fd

    @classmethod
    def open(cls, path: Path, layout: FileLayout) -> GGUFFile:
        """Lock the partial file, as it is or empty: `start` it, or `check` it to go on.

        Raises:
            InterruptedJobError: another process is writing the same file.
            StorageError: the folder cannot be written.
        """
        return cls(Path(path), layout, open_locked(partial_path(path), os.O_RDWR | os.O_CREAT))

    @classmethod
    def create(cls, path: Path, layout: FileLayout) -> GGUFFile:
        """`open` and `start`; see there."""
        file = cls.open(path, layout)
        try:
            file.start()
        except BaseException:
            file.close()
            raise
        return file

    @classmethod
    def reopen(cls, path: Path, layout: FileLayout) -> GGUFFile:
        """Go on with a file that `create` started with the same layout.

        Raises:
            BadInputError: the partial file is missing or has another size or header.
            InterruptedJobError: another process is writing the same file.
            StorageError: it cannot be opened or read.
        """
        path = Path(path)
        partial = partial_path(path)
        if not partial.is_file():
            raise BadInputError(f"{partial} is not there: start the job anew")
        file = cls(path, layout, open_locked(partial, os.O_RDWR))
        try:
            file.check()
        except BaseException:
            file.close()
            raise
        return file

    @property
    def is_empty(self) -> bool:
        """Whether it has never been started."""
        return os.fstat(self._open_fd).st_size == 0

    def start(self) -> None:
        """Take all of the file's disk space and write its header, in place of whatever is there.

        Raises:
            StorageError: the disk is too full, or writing fails; the file is then empty.
        """
        try:
            with storage_errors("writing", self.partial):
                os.ftruncate(self._open_fd, 0)
                _allocate(self._open_fd, self.layout.total_bytes)
            write_all(self._open_fd, self.layout.header, 0, self.partial)
        except BaseException:
            with suppress(OSError):
                os.ftruncate(self._open_fd, 0)
            raise

    def check(self) -> None:
        """Make sure that the file was started with the same layout.

        Raises:
            BadInputError: it has another size or header.
            StorageError: it cannot be read.
        """
        size, expected = os.fstat(self._open_fd).st_size, self.layout.total_bytes
        header = np.zeros(len(self.layout.header), np.uint8)
        if size == expected:
            read_into(self._open_fd, header, 0, self.partial)
        if size != expected or header.tobytes() != self.layout.header:
            raise BadInputError(
                f"{self.partial} ({size} bytes) belongs to another job than this one ({expected} bytes): "
                "delete it to start anew"
            )

    def write_rows(self, tensor: TensorLayout, first_row: int, data: NDArray[np.uint8]) -> None:
        """Write stored rows `data` [n, tensor.row_bytes] of `tensor` from row `first_row` on.

        Raises:
            StorageError: the write fails.
            ValueError: the rows are not rows of the tensor.
        """
        n = data.shape[0]
        if data.shape != (n, tensor.row_bytes) or data.dtype != np.uint8 or not 0 <= first_row <= tensor.n_rows - n:
            raise ValueError(
                f"rows {first_row} to {first_row + n} of {data.dtype} {data.shape} do not fit {tensor.name!r}: "
                f"{tensor.n_rows} rows of {tensor.row_bytes} bytes"
            )
        offset = tensor.offset + first_row * tensor.row_bytes
        write_all(self._open_fd, np.ascontiguousarray(data), offset, self.partial)

    def read_rows(self, tensor: TensorLayout, start: int, stop: int) -> NDArray[np.uint8]:
        """Stored rows `start` to `stop` of `tensor` as they are in the file now: uint8 [stop - start, row_bytes].

        Raises:
            StorageError: the read fails.
        """
        rows = np.empty((stop - start, tensor.row_bytes), np.uint8)
        read_into(self._open_fd, rows, tensor.offset + start * tensor.row_bytes, self.partial)
        return rows

    def sync(self) -> None:
        """Make everything written so far survive a power cut."""
        with storage_errors("syncing", self.partial):
            os.fsync(self._open_fd)

    def commit(self) -> None:
        """Finish: sync, give the file its name (replacing a file of that name), sync the folder.

        Raises:
            StorageError: one of them fails; the file does not have its name then.
        """
        self.sync()
        with storage_errors("renaming", self.partial):
            os.replace(self.partial, self.path)
        try:
            sync(self.path.parent)
        except BaseException:
            os.replace(self.path, self.partial)
            raise
        self.close()

    def close(self) -> None:
        """Release the file; an unfinished one stays as it is, to be reopened, unless it is empty."""
        if self._fd is not None:
            if self.is_empty:
                with suppress(OSError):
                    self.partial.unlink()
            os.close(self._fd)
            self._fd = None

    @property
    def _open_fd(self) -> int:
        if self._fd is None:
            raise ValueError(f"{self.partial} is closed")
        return self._fd


def _allocate(fd: int, n_bytes: int) -> None:
    try:
        os.posix_fallocate(fd, 0, n_bytes)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # file systems that cannot preallocate
            raise
        os.ftruncate(fd, n_bytes)
