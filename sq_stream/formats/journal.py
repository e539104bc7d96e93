"""An append-only record of what a job has finished, which survives being cut off at any byte.

One line is the CRC-32 of a JSON object in eight hex digits, a space, the object, a newline. The first is the header.
"""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path
from typing import Any

from sq_stream.errors import BadInputError
from sq_stream.formats.atomic import atomic_write, partial_path
from sq_stream.formats.storage import Closing, read_input, storage_errors, write_all

MAX_BYTES = 2**26
"""Of a journal; that of a job with 1000 tensors and its measurements has some 2**20."""


class Journal(Closing):
    """An open journal: its header and the records read from the file or appended since."""

    dropped: int
    """Bytes at its end that were damaged when it was opened."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.header, self.records, self._end = read_journal(path)
        with storage_errors("opening", path):
            self._fd = os.open(path, os.O_RDWR)
        try:
            with storage_errors("truncating", path):
                self.dropped = os.fstat(self._fd).st_size - self._end
                os.ftruncate(self._fd, self._end)
        except BaseException:
            os.close(self._fd)
            raise

    @classmethod
    def create(cls, path: Path, header: dict[str, Any]) -> Journal:
        """Start a journal, replacing one that is there.

        Raises:
            StorageError: it cannot be written.
        """
        path = Path(path)
        with atomic_write(path) as file:
            file.write(_encode(header))
        return cls(path)

    @classmethod
    def open(cls, path: Path) -> Journal:
        """Open a journal to go on with it; from the first damaged line on, everything is dropped, also from the file.

        Raises:
            BadInputError: the header is damaged.
            StorageError: the file is not there, or cannot be read or written.
        """
        return cls(Path(path))

    def append(self, record: dict[str, Any]) -> None:
        """Add a record and sync it to disk; after an error the journal is as before.

        Raises:
            StorageError: writing fails.
        """
        line = _encode(record)
        write_all(self._fd, line, self._end, self.path)
        with storage_errors("syncing", self.path):
            os.fsync(self._fd)
        self._end += len(line)
        self.records.append(json.loads(line[9:]))

    def close(self) -> None:
        """Close the file and leave it on disk."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def remove(self) -> None:
        """Close and delete the file: the job is done.

        Raises:
            StorageError: deleting fails.
        """
        self.close()
        with storage_errors("deleting", self.path):
            partial_path(self.path).unlink(missing_ok=True)  # of a start over that was killed
            self.path.unlink(missing_ok=True)


def read_journal(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]], int]:
    """Header, undamaged records and their bytes, of a journal that another process may be writing.

    Raises:
        BadInputError: the header is damaged.
        StorageError: the file is not there, or cannot be read.
    """
    data = read_input(path, MAX_BYTES)
    records, n_bytes = [], 0
    for line in data.splitlines(keepends=True):
        if (record := _decode(line)) is None:
            break
        records.append(record)
        n_bytes += len(line)
    if not records:
        raise BadInputError(f"{path} is not a journal of sq-stream or is damaged: delete it to start anew")
    return records[0], records[1:], n_bytes


def _encode(record: dict[str, Any]) -> bytes:
    text = json.dumps(record, ensure_ascii=True, separators=(",", ":")).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _decode(line: bytes) -> dict[str, Any] | None:
    """The record of a whole, undamaged line."""
    text = line[9:-1]
    if line != b"%08x %s\n" % (zlib.crc32(text), text):
        return None
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None
