"""Finished and unfinished calibrations on disk, found again by what they were made from."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import zlib
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sq_stream.calibrate.sketch import Factored, Sketch, read_sketch, write_sketch
from sq_stream.errors import BadInputError, SqStreamError
from sq_stream.events import Note, OnEvent, ignore
from sq_stream.formats.atomic import partial_path
from sq_stream.formats.journal import Journal, read_journal
from sq_stream.formats.storage import (
    Closing,
    make_folder,
    only_regular,
    open_locked,
    storage_errors,
    sync,
    user_cache,
)
from sq_stream.models.layers import Site

JOURNAL = "journal"
LOCK = "lock"
PASS = "pass"  # the residual stream of an unfinished calibration
_READ_BYTES = 2**22
_LINEAR = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")


@dataclass(frozen=True)
class Summary:
    """One calibration of the store, for `sq-stream cache list`."""

    key: str
    model: str  # name of the checkpoint's folder
    n_tokens: int
    of: str  # what the statistics are of: linears' inputs, or the gradients of their outputs
    done: int  # steps
    steps: int
    n_bytes: int

    @property
    def complete(self) -> bool:
        """Whether it can be used."""
        return self.done == self.steps


@dataclass(frozen=True)
class FinishedSite:
    """What the journal says of a site whose sketch is finished."""

    linears: Site  # without `.weight`
    crc32: int  # of the file
    n_tokens: int
    n_dead: int  # channels that were zero in every token

    @classmethod
    def parse(cls, fields: Mapping[str, Any]) -> FinishedSite:
        """What `asdict` made; TypeError or ValueError if it is something else.

        The name of the first linear becomes that of a file.
        """
        site = cls(**{**fields, "linears": tuple(fields["linears"])})
        names = bool(site.linears) and all(isinstance(n, str) and _LINEAR.fullmatch(n) for n in site.linears)
        counts = (site.crc32, site.n_tokens, site.n_dead)
        if not names or not all(type(count) is int and 0 <= count < 2**63 for count in counts):
            raise ValueError("no site")
        return site


class Store:
    """A folder of calibrations, each in a folder of its own."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = Path(folder or user_cache())

    def has(self, identity: Mapping[str, Any]) -> bool:
        """Whether there is a finished calibration made from `identity`."""
        summary = _summarize(self.folder / key_of(identity))
        return summary is not None and summary.complete

    def n_bytes(self, identity: Mapping[str, Any]) -> int:
        """What there is on disk of the calibration made from `identity`."""
        return _bytes_in(self.folder / key_of(identity))

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
        make_folder(folder)
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
            InterruptedJobError: another process is at work on one.
            StorageError: deleting fails.
        """
        present = {summary.key: summary for summary in self.list()}
        freed = 0
        for key in present if keys is None else list(keys):
            if key not in present:
                raise BadInputError(f"{self.folder} has no calibration {key}: see `sq-stream cache list`")
            lock = open_locked(self.folder / key / LOCK, os.O_RDWR | os.O_CREAT)
            try:
                _delete(self.folder / key)
            finally:
                os.close(lock)
            freed += present[key].n_bytes
        return freed


class Entry(Closing):
    """One calibration of the store, open and locked; made by `Store.open`."""

    def __init__(self, folder: Path, header: dict[str, Any], on_event: OnEvent) -> None:
        self.folder = folder
        self.pass_folder = folder / PASS
        self._header = header
        self._lock = open_locked(folder / LOCK, os.O_RDWR | os.O_CREAT)
        try:
            self._journal = self._find(on_event)
        except BaseException:
            if not (folder / JOURNAL).exists():
                shutil.rmtree(folder, ignore_errors=True)
            os.close(self._lock)
            raise

    def _find(self, on_event: OnEvent) -> Journal:
        """The journal that is there, or a new one."""
        with storage_errors("deleting files in", self.folder):
            partial_path(self.folder / JOURNAL).unlink(missing_ok=True)  # of a start over that was killed
        try:
            journal = _open_sound(self.folder, self._header)
        except BadInputError as error:
            on_event(Note(f"{error}; calibrating anew"))
            return self._create()
        if journal is None:
            return self._create()
        done, steps = len(journal.records), self._header["steps"]
        if journal.dropped:
            on_event(Note(f"{journal.path} was damaged at its end: {done} of {steps} steps are known to be done"))
        elif done == steps:
            self.remove_pass()  # of a process that was killed at its end
            on_event(Note(f"calibration found in {self.folder}"))
        elif done:
            on_event(Note(f"resuming the calibration: {done} of {steps} steps are done"))
        return journal

    def _create(self) -> Journal:
        """A new journal, in place of whatever is there."""
        with storage_errors("deleting files in", self.folder):
            _delete(self.pass_folder)
            for path in self.folder.glob("*.sketch"):
                path.unlink()
        try:
            return Journal.create(self.folder / JOURNAL, self._header)
        except BaseException:
            with suppress(OSError):
                (self.folder / JOURNAL).unlink()
            raise

    @property
    def done(self) -> int:
        """Steps (layers, then the output matrix) that are finished."""
        return len(self._journal.records)

    @property
    def complete(self) -> bool:
        """Whether all steps are finished."""
        return self.done == int(self._header["steps"])

    @property
    def sites(self) -> list[FinishedSite]:
        """All finished sites."""
        return _sites(self._journal)

    def finish_step(self, sketches: Mapping[Site, Factored]) -> None:
        """Keep the sketches of a step, and what the next one is computed from; after this it is not computed again.

        Raises:
            StorageError: writing fails; the step is then unfinished.
        """
        records = []
        for site, factored in sketches.items():
            crc = write_sketch(self.folder / f"{site[0]}.sketch", factored)
            n_dead = int((factored.diagonal == 0).sum())
            records.append(asdict(FinishedSite(site, crc, factored.n_tokens, n_dead)))
        for path in (*self.folder.glob(PASS), *self.pass_folder.rglob("*")):
            sync(path)
        self._journal.append({"sites": records})

    def remove_pass(self) -> None:
        """Delete what lies between the layers: the pass is done.

        Raises:
            StorageError: deleting or syncing fails.
        """
        _delete(self.pass_folder)
        sync(self.folder)

    def load(self, site: Site, largest: tuple[int, int] | None = None) -> Sketch:
        """The sketch of a finished site; see `read_sketch`.

        Raises:
            BadInputError: its file is damaged.
            StorageError: it cannot be read.
        """
        return read_sketch(self.folder / f"{site[0]}.sketch", largest)

    def close(self) -> None:
        """Let go of the calibration; what is finished of it stays on disk."""
        if self._lock >= 0:
            self._journal.close()
            if self.done == 0:
                shutil.rmtree(self.folder, ignore_errors=True)
            os.close(self._lock)
            self._lock = -1

    def discard(self) -> None:
        """Let go of the calibration and delete it.

        Raises:
            StorageError: deleting fails.
        """
        _delete(self.folder)
        self.close()


def _open_sound(folder: Path, header: Mapping[str, Any]) -> Journal | None:
    """The journal in `folder`, if there is a calibration.

    Raises:
        BadInputError: it is not what `header` says, or a sketch does not have its checksum.
        StorageError: reading fails.
    """
    path, has_sketches = folder / JOURNAL, any(folder.glob("*.sketch"))
    if not path.exists():
        if has_sketches:
            raise BadInputError(f"{path} is missing")
        return None
    journal = Journal.open(path)
    try:
        if has_sketches and not journal.records:
            raise BadInputError(f"{path} knows of no finished layer")
        same = all(journal.header.get(key) == header[key] for key in ("calibration", "steps"))
        if not same or len(journal.records) > header["steps"]:
            raise BadInputError(f"{journal.path} is of another calibration")
        for site in _sites(journal):
            path = folder / f"{site.linears[0]}.sketch"
            if not path.is_file() or _crc32(path) != site.crc32:
                raise BadInputError(f"{path} is damaged: its checksum is wrong")
    except BaseException:
        journal.close()
        raise
    return journal


def _sites(journal: Journal) -> list[FinishedSite]:
    try:
        return [FinishedSite.parse(site) for step in journal.records for site in step["sites"]]
    except (KeyError, TypeError, ValueError) as error:
        raise BadInputError(f"{journal.path} is of another version of sq-stream") from error


def key_of(identity: Mapping[str, Any]) -> str:
    """The name of a calibration's folder."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:20]


def _summarize(folder: Path) -> Summary | None:
    if not (folder / JOURNAL).is_file():
        return None
    try:
        header, records, _ = read_journal(folder / JOURNAL)
        about, steps = header["about"], header["steps"]
        model, n_tokens, of = about["model"], about["n_tokens"], about.get("of", "inputs")
        if not (isinstance(model, str) and isinstance(of, str) and type(n_tokens) is int and type(steps) is int):
            raise TypeError("no summary")
        return Summary(folder.name, model, n_tokens, of, len(records), steps, _bytes_in(folder))
    except (SqStreamError, KeyError, TypeError):
        return Summary(folder.name, "damaged", 0, "", 0, 1, _bytes_in(folder))


def _delete(folder: Path) -> None:
    with storage_errors("deleting", folder):
        shutil.rmtree(folder, ignore_errors=not folder.exists())


def _bytes_in(folder: Path) -> int:
    """Of all files, as far as they are still there: another process may be at work."""
    n_bytes = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                n_bytes += os.stat(os.path.join(parent, name)).st_size
    return n_bytes


def _crc32(path: Path) -> int:
    crc = 0
    with storage_errors("reading", path), open(path, "rb", opener=only_regular) as file:
        while part := file.read(_READ_BYTES):
            crc = zlib.crc32(part, crc)
    return crc
