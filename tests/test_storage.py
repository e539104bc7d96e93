"""Files that appear whole or not at all, and errors that say what to do."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import numpy as np
import pytest

from sq_stream.errors import StorageError
from sq_stream.formats.atomic import atomic_write
from sq_stream.formats.storage import read_into, storage_errors, write_all


def failing(number: int):
    def call(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    return call


def test_atomic_write_replaces_the_file(tmp_path):
    path = tmp_path / "report.json"
    path.write_text("old")
    with atomic_write(path) as file:
        file.write(b"new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["report.json"]


def test_atomic_write_keeps_the_old_file_when_interrupted(tmp_path):
    path = tmp_path / "report.json"
    path.write_text("old")

    def interrupted() -> None:
        with atomic_write(path) as file:
            file.write(b"half")
            file.flush()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["report.json"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_atomic_write_leaves_nothing_when_the_disk_fails(tmp_path, monkeypatch, call):
    monkeypatch.setattr(os, call, failing(errno.EIO))
    message = r"writing .*report\.json failed .*: the disk reported a fault"
    with pytest.raises(StorageError, match=message), atomic_write(tmp_path / "report.json") as file:
        file.write(b"new")
    assert os.listdir(tmp_path) == []


def test_atomic_write_gives_ordinary_permissions(tmp_path):
    old = os.umask(0o027)
    try:
        with atomic_write(tmp_path / "report.json"):
            pass
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "report.json").stat().st_mode) == 0o640


@pytest.mark.parametrize(
    ("place", "message"),
    [("nowhere/report.json", "check that the folder exists"), ("file/report.json", "a part of the path is a file")],
)
def test_atomic_write_names_a_bad_place(tmp_path, place, message):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=message), atomic_write(tmp_path / place):
        pass


def test_unknown_system_errors_keep_their_reason():
    with (
        pytest.raises(StorageError, match=r"reading x failed \(Broken pipe\): check the disk"),
        storage_errors("reading", Path("x")),
    ):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_disk():
    fd = os.open("/dev/full", os.O_WRONLY)
    try:
        with pytest.raises(StorageError, match=r"writing /dev/full failed \(No space left on device\): free disk"):
            write_all(fd, b"x", 0, Path("/dev/full"))
    finally:
        os.close(fd)


def test_short_reads_and_writes_are_continued(tmp_path, monkeypatch):
    pwrite, preadv = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, data[:3], offset))
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: preadv(fd, [buffers[0][:5]], offset))
    x = np.arange(20, dtype=np.uint8)
    y = np.zeros(10, np.uint16)
    with open(tmp_path / "x", "w+b") as file:
        write_all(file.fileno(), x.reshape(4, 5), 7, tmp_path / "x")
        read_into(file.fileno(), y, 7, tmp_path / "x")
    np.testing.assert_array_equal(y.view(np.uint8), x)
