"""Finished and unfinished calibrations on disk, found again by what they were made from."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sq_stream.calibrate.sketch import Factored, Sketch, read_sketch, write_sketch
from sq_stream.errors import BadInputError, InterruptedJobError, SqStreamError
from sq_stream.events import Note, OnEvent, ignore
from sq_stream.formats.journal import Journal
from sq_stream.formats.storage import Closing, storage_errors
from sq_stream.models.layers import Site

JOURNAL = "journal"
PASS = "pass"  # the residual stream of an unfinished calibration
_READ_BYTES = 2**22


def default_folder() -> Path:
    """`sq-stream` in the user's cache folder (XDG_CACHE_HOME, or ~/.cache)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sq-stream"


@dataclass(frozen=True)
class Summary:
    """One calibration of the store, for `sq-stream cache list`."""

    key: str
    model: str  # name of the checkpoint's folder
    n_tokens: int
    done: int  # steps
    steps: int
    n_bytes: int

    @property
    def complete(self) -> bool:
        """Whether it can be used."""
        return self.done == self.steps


class Store:
    """A folder of calibrations, each in a folder of its own."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = Path(folder or default_folder())

    def has(self, identity: Mapping[str, Any]) -> bool:
        """Whether there is a finished calibration made from `identity`."""
        return any(s.key == key_of(identity) and s.complete for s in self.list())

    def open(
        self, identity: Mapping[str, Any], about: Mapping[str, Any], steps: int, on_event: OnEvent = ignore
    ) -> Entry:
        """The calibration made from `identity`, new or as far as it has come, locked for this process.

        One that is damaged is started anew, and said so.

        Args:
            identity: everything that the sketches depend on: JSON values.
            about: what `list` shows: `model` and `n_tokens`.
            steps: that make it complete.
            on_event: told what was found.

        Raises:
            InterruptedJobError: another process is at work on it.
            StorageError: it cannot be read or made.
        """
        folder = self.folder / key_of(identity)
        with storage_errors("making", folder):
            folder.mkdir(parents=True, exist_ok=True)
        return Entry(folder, {"calibration": dict(identity), "about": dict(about), "steps": steps}, on_event)

    def list(self) -> list[Summary]:
        """All calibrations, by key; folders that are none are passed over."""
        if not self.folder.is_dir():
            return []
        found = (_summarize(folder) for folder in sorted(self.folder.iterdir()) if folder.is_dir())
        return [summary for summary in found if summary is not None]

    def clear(self, keys: Iterable[str] | None = None) -> int:
        """Delete calibrations, all of them unless `keys` are given; returns the bytes that were freed.

        Raises:
            BadInputError: there is none with that key.
            StorageError: deleting fails.
        """
        present = {summary.key: summary for summary in self.list()}
        freed = 0
        for key in present if keys is None else list(keys):
            if key not in present:
                raise BadInputError(f"{self.folder} has no calibration {key}: see `sq-stream cache list`")
            with storage_errors("deleting", self.folder / key):
                shutil.rmtree(self.folder / key)
            freed += present[key].n_bytes
        return freed


class Entry(Closing):
    """One calibration of the store, open and locked; made by `Store.open`."""

    def __init__(self, folder: Path, header: dict[str, Any], on_event: OnEvent) -> None:
        self.folder = folder
        self.pass_folder = folder / PASS
        self._header = header
        self._lock = _lock(folder / "lock")
        try:
            self._journal = self._find(on_event)
        except BaseException:
            os.close(self._lock)
            raise

    def _find(self, on_event: OnEvent) -> Journal:
        """The journal that is there, or a new one."""
        if not (self.folder / JOURNAL).exists():
            return self._create()
        try:
            journal = _open_sound(self.folder, self._header)
        except BadInputError as error:
            on_event(Note(f"{error}; calibrating anew"))
            return self._create()
        done, steps = len(journal.records), self._header["steps"]
        if done == steps:
            on_event(Note(f"calibration found in {self.folder}"))
        elif done:
            on_event(Note(f"resuming the calibration: {done} of {steps} steps are done"))
        return journal

    def _create(self) -> Journal:
        """A new journal, in place of whatever is there."""
        with storage_errors("deleting files in", self.folder):
            shutil.rmtree(self.pass_folder, ignore_errors=not self.pass_folder.exists())
            for path in self.folder.glob("*.sketch"):
                path.unlink()
        return Journal.create(self.folder / JOURNAL, self._header)

    def restart(self) -> None:
        """Forget everything that is finished.

        Raises:
            StorageError: deleting or writing fails.
        """
        self._journal.close()
        self._journal = self._create()

    @property
    def done(self) -> int:
        """Steps (layers, then the output matrix) that are finished."""
        return len(self._journal.records)

    @property
    def complete(self) -> bool:
        """Whether all steps are finished."""
        return self.done == int(self._header["steps"])

    @property
    def sites(self) -> dict[Site, dict[str, Any]]:
        """What the journal says of every finished site, by its linears without `.weight`."""
        return _sites(self._journal)

    def finish_step(self, sketches: Mapping[Site, Factored]) -> None:
        """Keep the sketches of a step; after this it is not computed again.

        Raises:
            StorageError: writing fails; the step is then unfinished.
        """
        records = []
        for site, factored in sketches.items():
            crc = write_sketch(self.folder / f"{site[0]}.sketch", factored)
            n_dead = int((factored.diagonal == 0).sum())
            records.append({"linears": site, "crc32": crc, "n_tokens": factored.n_tokens, "n_dead": n_dead})
        self._journal.append({"sites": records})

    def load(self, site: Site) -> Sketch:
        """The sketch of a finished site.

        Raises:
            BadInputError: its file is damaged.
            StorageError: it cannot be read.
        """
        return read_sketch(self.folder / f"{site[0]}.sketch")

    def close(self) -> None:
        """Let go of the calibration; it stays on disk."""
        self._journal.close()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def _open_sound(folder: Path, header: Mapping[str, Any]) -> Journal:
    """The journal in `folder` if it is what `header` says and all sketches have their checksums, else BadInputError."""
    journal = Journal.open(folder / JOURNAL)
    try:
        if any(journal.header.get(key) != header[key] for key in ("calibration", "steps")):
            raise BadInputError(f"{journal.path} is of another calibration")
        for site, about in _sites(journal).items():
            path = folder / f"{site[0]}.sketch"
            if not path.is_file() or _crc32(path) != about["crc32"]:
                raise BadInputError(f"{path} is damaged: its checksum is wrong")
    except BaseException:
        journal.close()
        raise
    return journal


def _sites(journal: Journal) -> dict[Site, dict[str, Any]]:
    return {tuple(site["linears"]): site for step in journal.records for site in step["sites"]}


def key_of(identity: Mapping[str, Any]) -> str:
    """The name of a calibration's folder."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:20]


def _summarize(folder: Path) -> Summary | None:
    if not (folder / JOURNAL).is_file():
        return None
    try:
        with Journal.open(folder / JOURNAL) as journal:
            header, done = journal.header, len(journal.records)
        about = header["about"]
        n_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        return Summary(folder.name, about["model"], about["n_tokens"], done, header["steps"], n_bytes)
    except (SqStreamError, KeyError, OSError):
        return Summary(folder.name, "damaged", 0, 0, 1, 0)


def _lock(path: Path) -> int:
    with storage_errors("opening", path):
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(fd)
        raise InterruptedJobError(
            f"another process is at work on the calibration in {path.parent}: wait for it to end, or stop it"
        ) from error
    except OSError:  # a file system without locks
        pass
    return fd


def _crc32(path: Path) -> int:
    crc = 0
    with storage_errors("reading", path), open(path, "rb") as file:
        while part := file.read(_READ_BYTES):
            crc = zlib.crc32(part, crc)
    return crc
