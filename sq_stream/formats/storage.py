"""The file-system calls that every reader and writer here shares, with errors that say what to do."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from sq_stream.errors import BadInputError, InterruptedJobError, StorageError

_READ_BYTES = 2**22
_ADVICE = {
    errno.ENOSPC: "free disk space and run the same command again, or choose another folder",
    errno.EDQUOT: "free disk space or raise the quota and run the same command again, or choose another folder",
    errno.EFBIG: "the file system or a limit (ulimit -f) does not allow a file of this size: choose another folder",
    errno.EROFS: "choose a folder that can be written",
    errno.EACCES: "check the permissions of the file and its folder",
    errno.EPERM: "check the permissions of the file and its folder",
    errno.ENOENT: "check that the folder exists and that nothing removes files from it",
    errno.ENOTDIR: "a part of the path is a file, not a folder",
    errno.EISDIR: "the path is a folder: give the name of a file",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.EIO: "the disk reported a fault: check it, or work on a copy",
    errno.ESTALE: "the network file system lost the file: mount it again",
}


_Self = TypeVar("_Self", bound="Closing")


class Closing(ABC):
    """A thing with `close`, called at the end of its `with` block."""

    @abstractmethod
    def close(self) -> None: ...  # noqa: D102

    def __enter__(self: _Self) -> _Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def user_cache() -> Path:
    """`sq-stream` in the user's cache folder (XDG_CACHE_HOME, or ~/.cache)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sq-stream"


@contextmanager
def storage_errors(action: str, path: Path) -> Iterator[None]:
    """Turn an OSError raised in the block into a StorageError that tells `action` ("reading"), path, reason, advice."""
    try:
        yield
    except OSError as error:
        advice = _ADVICE.get(error.errno or 0, "check the disk and the path")
        raise StorageError(f"{action} {path} failed ({error.strerror or error}): {advice}") from error


def only_regular(path: str | Path, flags: int) -> int:
    """Open a file of data, as `open`'s `opener`: a pipe or a device in its place would be read for ever.

    Raises:
        BadInputError: it is no regular file (nor a link to one).
        OSError: it cannot be opened, or is a folder.
    """
    fd = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)
    mode = os.fstat(fd).st_mode
    if stat.S_ISREG(mode):
        return fd
    os.close(fd)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    raise BadInputError(f"{path} is a pipe or a device, not a file: save its contents as a file")


def read_input(path: Path, most_bytes: int) -> bytes:
    """All of a file of at most `most_bytes`.

    Raises:
        BadInputError: it is larger, or no regular file.
        StorageError: it is not there, or reading fails.
    """
    with storage_errors("reading", path), open(path, "rb", opener=only_regular) as file:
        data = file.read(most_bytes + 1)
    if len(data) > most_bytes:
        raise BadInputError(f"{path} is larger than {most_bytes} bytes, the most that is read of such a file")
    return data


FileState = tuple[int, int]
"""Size and modification time of an open file, by which a change is noticed."""


def file_state(fd: int) -> FileState:
    """The state that an open file has now."""
    status = os.fstat(fd)
    return status.st_size, status.st_mtime_ns


def read_into(fd: int, buffer: NDArray[Any], offset: int, path: Path, state: FileState | None = None) -> None:
    """Fill the contiguous array `buffer` from byte `offset` of an open file, which had this `state` when it was opened.

    Raises:
        StorageError: the read fails, or the file was changed since it was opened.
    """
    view = memoryview(buffer.reshape(-1).view(np.uint8).data)
    with storage_errors("reading", path):
        while view:
            n = os.preadv(fd, [view], offset)
            if n == 0:
                raise StorageError(
                    f"{path} ends at byte {offset}, {len(view)} bytes too early: it shrank while in use, restore it"
                )
            view, offset = view[n:], offset + n
        if state is not None and file_state(fd) != state:
            raise StorageError(f"{path} was changed while in use: restore it, or start over with it as it is now")


def write_all(fd: int, data: bytes | NDArray[np.uint8], offset: int, path: Path) -> None:
    """Write all of `data` (a contiguous array or bytes) at byte `offset` of an open file.

    Raises:
        StorageError: the write fails.
    """
    view = memoryview(data if isinstance(data, bytes) else data.reshape(-1).data)
    with storage_errors("writing", path):
        while view:
            n = os.pwrite(fd, view, offset)
            view, offset = view[n:], offset + n


def sha256_of(path: Path) -> str:
    """SHA-256 (hex) of a file.

    Raises:
        StorageError: it cannot be read.
    """
    digest = hashlib.sha256()
    with storage_errors("reading", path), open(path, "rb") as file:
        while part := file.read(_READ_BYTES):
            digest.update(part)
    return digest.hexdigest()


def open_locked(path: Path, flags: int) -> int:
    """Open and lock (flock) `path` until it is closed; one that was renamed or deleted before we had it is let go.

    Raises:
        InterruptedJobError: another process has locked it.
        StorageError: it cannot be opened.
    """
    while True:
        with storage_errors("opening", path):
            fd = os.open(path, flags, 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(fd)
            raise InterruptedJobError(f"another process is at work on {path}: wait for its end or stop it") from error
        except OSError:  # a file system without locks
            return fd
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(fd), os.stat(path)):
                return fd
        os.close(fd)


def is_missing(error: StorageError) -> bool:
    """Whether what failed is that a file is not there."""
    return isinstance(error.__cause__, FileNotFoundError)


def sync(path: Path) -> None:
    """Make the contents of a file, or the names in a folder, survive a power cut.

    Raises:
        StorageError: syncing fails.
    """
    with storage_errors("syncing", path):
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def make_folder(folder: Path) -> None:
    """Make a folder, and those that it lies in, where they are not there yet, so that they survive a power cut.

    Raises:
        StorageError: one cannot be made.
    """
    if folder.is_dir():
        return
    make_folder(folder.parent)
    with storage_errors("making", folder):
        folder.mkdir(exist_ok=True)
    sync(folder.parent)
