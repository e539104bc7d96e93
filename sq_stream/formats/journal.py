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
from sq_stream.formats.atomic import atomic_write
from sq_stream.formats.storage import Closing, storage_errors, sync_folder, write_all


class Journal(Closing):
    """An open journal: its header and the records read from the file or appended since."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: list[dict[str, Any]] = []
        with storage_errors("opening", path):
            self._fd = os.open(path, os.O_RDWR)
        try:
            with storage_errors("reading", path), open(self._fd, "rb", closefd=False) as file:
                lines = file.read().splitlines(keepends=True)
            header = _decode(lines[0]) if lines else None
            if header is None:
                raise BadInputError(f"{path} is not a journal of sq-stream or is damaged: delete it to start anew")
            self.header = header
            self._end = len(lines[0])
            for line in lines[1:]:
                if (record := _decode(line)) is None:
                    break
                self.records.append(record)
                self._end += len(line)
            with storage_errors("truncating", path):
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
        """Close and delete the file: the job is done."""
        self.close()
        with storage_errors("deleting", self.path):
            self.path.unlink(missing_ok=True)
        sync_folder(self.path.parent)


def _encode(record: dict[str, Any]) -> bytes:
    text = json.dumps(record, ensure_ascii=True, separators=(",", ":")).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _decode(line: bytes) -> dict[str, Any] | None:
    """The record of a whole, undamaged line."""
    text = line[9:-1]
    if line != b"%08x %s\n" % (zlib.crc32(text), text):
        return None
    record = json.loads(text)
    return record if isinstance(record, dict) else None
