"""Small files that appear whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from sq_stream.formats.storage import open_locked, storage_errors, sync


def partial_path(path: Path) -> Path:
    """Where the unfinished contents of `path` live: `OUT.gguf.partial` beside `OUT.gguf`."""
    return path.with_name(path.name + ".partial")


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """A binary file that becomes `path` when the block ends; on any exception `path` stays as it was.

    Raises:
        InterruptedJobError: another process is writing the same file.
        StorageError: writing, syncing or renaming fails.
    """
    partial = partial_path(path)
    fd = open_locked(partial, os.O_RDWR | os.O_CREAT)
    with storage_errors("writing", path), open(fd, "wb") as file:
        try:
            file.truncate(0)
            yield file
            file.flush()
            os.fsync(fd)
            os.replace(partial, path)
        except BaseException:
            with suppress(OSError):
                partial.unlink()
            raise
    sync(path.parent)
