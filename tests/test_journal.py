"""A journal cut or damaged at any byte gives back the records before the damage, and goes on from there."""

from __future__ import annotations

import errno
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sq_stream.errors import BadInputError, StorageError
from sq_stream.formats.journal import Journal

HEADER = {"job": "a", "sizes": [1, 2]}
RECORDS = [{"tensor": "blk.0.é", "crc32": 1}, {"tensor": "line\nbreak", "crc32": 2}, {"tensor": "x", "crc32": 3}]


def line_ends(contents: bytes) -> list[int]:
    return [i + 1 for i, byte in enumerate(contents) if byte == ord("\n")]


@pytest.fixture
def path(tmp_path):
    with Journal.create(tmp_path / "journal", HEADER) as journal:
        for record in RECORDS:
            journal.append(record)
    return tmp_path / "journal"


def test_gives_back_what_was_appended(path):
    with Journal.open(path) as journal:
        assert (journal.header, journal.records) == (HEADER, RECORDS)
        journal.append({"tensor": "y"})
        assert journal.records == [*RECORDS, {"tensor": "y"}]
    with Journal.open(path) as journal:
        assert journal.records == [*RECORDS, {"tensor": "y"}]


def test_create_replaces_an_older_journal(path):
    with Journal.create(path, {"job": "b"}) as journal:
        assert (journal.header, journal.records) == ({"job": "b"}, [])


def test_torn_at_every_byte(path):
    contents = path.read_bytes()
    header_end, *ends = line_ends(contents)
    for cut in range(header_end, len(contents)):
        path.write_bytes(contents[:cut])
        whole = sum(end <= cut for end in ends)
        with Journal.open(path) as journal:
            assert journal.records == RECORDS[:whole]
            journal.append({"again": cut})
        with Journal.open(path) as journal:
            assert journal.records == [*RECORDS[:whole], {"again": cut}]


def test_damaged_at_every_byte(path):
    contents = path.read_bytes()
    header_end, *ends = line_ends(contents)
    for position in range(header_end, len(contents)):
        damaged = bytearray(contents)
        damaged[position] ^= 0x04
        path.write_bytes(damaged)
        with Journal.open(path) as journal:
            assert journal.records == RECORDS[: sum(end <= position for end in ends)]
        assert len(path.read_bytes()) == ([header_end, *ends])[len(journal.records)]


def test_header_torn_at_every_byte(path):
    header = path.read_bytes()[: line_ends(path.read_bytes())[0]]
    for cut in range(len(header)):
        path.write_bytes(header[:cut])
        with pytest.raises(BadInputError, match="is not a journal of sq-stream or is damaged"):
            Journal.open(path)


def test_failed_append_leaves_the_journal_as_it_was(path, monkeypatch):
    pwrite = os.pwrite

    def full(fd: int, data: bytes, offset: int) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def torn(fd: int, data: bytes, offset: int) -> int:
        monkeypatch.setattr(os, "pwrite", full)
        return pwrite(fd, data[:20], offset)

    with Journal.open(path) as journal:
        monkeypatch.setattr(os, "pwrite", torn)
        with pytest.raises(StorageError, match="No space left"):
            journal.append({"tensor": "a long name that is torn in the middle"})
        monkeypatch.undo()
        assert journal.records == RECORDS
        journal.append({"s": 1})
    with Journal.open(path) as journal:
        assert journal.records == [*RECORDS, {"s": 1}]


def test_remove_deletes_the_file(path):
    Journal.open(path).remove()
    assert not path.exists()
    with pytest.raises(StorageError, match="No such file"):
        Journal.open(path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(), values, max_size=3),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("journal")


@settings(max_examples=25)  # each syncs several files
@given(records=st.lists(st.dictionaries(st.text(), JSON, max_size=4), min_size=1, max_size=4))
def test_any_record_survives(folder, records):
    with Journal.create(folder / "journal", records[0]) as journal:
        for record in records:
            journal.append(record)
    with Journal.open(folder / "journal") as journal:
        assert (journal.header, journal.records) == (records[0], records)
