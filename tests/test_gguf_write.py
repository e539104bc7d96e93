"""GGUF files that we write: byte for byte those of the gguf package, and never half a file under a finished name."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sq_stream.errors import BadInputError, InterruptedJobError, StorageError
from sq_stream.formats.blocks import BLOCK_TYPES, F32, Q4_K, Q8_0, BlockType
from sq_stream.formats.gguf_layout import FileLayout, lay_out
from sq_stream.formats.gguf_write import GGUFFile
from sq_stream.formats.metadata import Entry, ValueType, array, boolean, f32, string, u32

INTEGERS = {
    ValueType.UINT8: (0, 2**8 - 1),
    ValueType.INT8: (-(2**7), 2**7 - 1),
    ValueType.UINT16: (0, 2**16 - 1),
    ValueType.INT16: (-(2**15), 2**15 - 1),
    ValueType.UINT32: (0, 2**32 - 1),
    ValueType.INT32: (-(2**31), 2**31 - 1),
    ValueType.UINT64: (0, 2**64 - 1),
    ValueType.INT64: (-(2**63), 2**63 - 1),
}
VALUES = {kind: st.integers(*bounds) for kind, bounds in INTEGERS.items()} | {
    ValueType.FLOAT32: st.floats(width=32, allow_nan=False),
    ValueType.FLOAT64: st.floats(allow_nan=False),
    ValueType.BOOL: st.booleans(),
    ValueType.STRING: st.text(st.characters(codec="utf-8")),
}
KEYS = st.text("abcxyz._0123", min_size=1, max_size=12).map("general.".__add__).filter("general.alignment".__ne__)


@st.composite
def entries(draw: st.DrawFn, min_array: int = 0) -> list[Entry]:
    """Metadata of every type."""
    drawn = []
    for key in draw(st.lists(KEYS, unique=True, max_size=8)):
        kind = draw(st.sampled_from(list(VALUES)))
        if draw(st.booleans()):
            drawn.append(array(key, kind, draw(st.lists(VALUES[kind], min_size=min_array, max_size=5))))
        else:
            drawn.append(Entry(key, kind, draw(VALUES[kind])))
    return drawn


@st.composite
def tensors(draw: st.DrawFn) -> list[tuple[str, tuple[int, ...], BlockType]]:
    """Names, row-major shapes and types that suit each other."""
    drawn = []
    for name in draw(st.lists(st.text("abwé.0123", min_size=1, max_size=20), unique=True, max_size=5)):
        block_type = draw(st.sampled_from(list(BLOCK_TYPES.values())))
        leading = draw(st.lists(st.integers(1, 3), max_size=3))
        drawn.append((name, (*leading, draw(st.integers(1, 2)) * block_type.block_size), block_type))
    return drawn


def random_data(layout: FileLayout) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (t.n_rows, t.row_bytes), dtype=np.uint8) for t in layout.tensors]


def write_file(path: Path, layout: FileLayout, data: list[np.ndarray]) -> None:
    with GGUFFile.create(path, layout) as file:
        for tensor, rows in reversed(list(zip(layout.tensors, data, strict=True))):
            for row in reversed(range(tensor.n_rows)):
                file.write_rows(tensor, row, rows[row : row + 1])
        file.commit()


def write_reference(path: Path, metadata: list[Entry], layout: FileLayout, data: list[np.ndarray]) -> None:
    """The same file by the gguf package."""
    writer = gguf.GGUFWriter(path, arch="")
    writer.kv_data[0].clear()
    for entry in metadata:
        element = entry.element and gguf.GGUFValueType(entry.element)
        writer.add_key_value(entry.key, entry.value, gguf.GGUFValueType(entry.type), element)
    for tensor, rows in zip(layout.tensors, data, strict=True):
        shape = (*tensor.shape[:-1], tensor.row_bytes)
        writer.add_tensor(
            tensor.name, rows.reshape(shape), raw_dtype=gguf.GGMLQuantizationType(tensor.block_type.ggml_id)
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("gguf")


@given(metadata=entries(min_array=1), tensors=tensors())
def test_same_bytes_as_the_gguf_package(folder, metadata, tensors):
    layout = lay_out(metadata, tensors)
    data = random_data(layout)
    write_file(folder / "ours.gguf", layout, data)
    write_reference(folder / "theirs.gguf", metadata, layout, data)
    ours = (folder / "ours.gguf").read_bytes()
    assert ours == (folder / "theirs.gguf").read_bytes()
    assert len(ours) == layout.total_bytes


METADATA = [
    string("general.architecture", "llama"),
    u32("llama.block_count", 2),
    array("a", ValueType.STRING, ["é", ""]),
]
TENSORS = [("w", (4, 512), Q4_K), ("norm", (3,), F32), ("v", (2, 3, 64), Q8_0)]
LAYOUT = lay_out(METADATA, TENSORS)


def test_knows_every_place_before_writing():
    w, norm, v = LAYOUT.tensors
    assert (w.n_rows, w.row_bytes, w.n_bytes) == (4, 288, 1152)
    assert (norm.n_rows, norm.row_bytes, norm.n_bytes) == (1, 12, 12)
    assert (v.n_rows, v.row_bytes, v.n_bytes) == (6, 68, 408)
    assert w.offset == LAYOUT.data_offset == len(LAYOUT.header)
    assert (norm.offset - w.offset, v.offset - norm.offset) == (1152, 32)
    assert LAYOUT.total_bytes == v.offset + 416


def test_alignment_is_kept_and_stated(tmp_path):
    layout = lay_out(METADATA, TENSORS, alignment=256)
    assert all(tensor.offset % 256 == 0 for tensor in layout.tensors)
    write_file(tmp_path / "x.gguf", layout, random_data(layout))
    reader = gguf.GGUFReader(tmp_path / "x.gguf")
    assert [tensor.data_offset for tensor in reader.tensors] == [tensor.offset for tensor in layout.tensors]


@pytest.mark.parametrize(
    ("metadata", "tensors", "message"),
    [
        ([u32("a", 1), f32("a", 1)], [], "metadata key 'a' is given 2 times"),
        ([], [("w", (1,), F32), ("w", (2,), F32)], "tensor 'w' is given 2 times"),
        ([], [("w", (1, 1, 1, 1, 1), F32)], "5 dimensions; GGUF stores 1 to 4"),
        ([], [("w", (), F32)], "0 dimensions"),
        ([], [("w" * 64, (1,), F32)], "longer than 63 bytes"),
        ([], [("w", (2, 300), Q4_K)], "Q4_K needs rows of a multiple of 256 values, not 300"),
        ([Entry("a", ValueType.ARRAY, [1])], [], "array 'a' lacks its element type"),
    ],
)
def test_refuses_what_cannot_be_laid_out(metadata, tensors, message):
    with pytest.raises(ValueError, match=message):
        lay_out(metadata, tensors)


@pytest.mark.parametrize("entry", [u32("a", 2**32), u32("a", -1), array("a", ValueType.INT8, [128])])
def test_refuses_numbers_that_do_not_fit_their_type(entry):
    with pytest.raises(OverflowError):
        lay_out([entry, boolean("b", True)], [])


def test_nothing_has_the_name_before_commit(tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(b"old")
    file = GGUFFile.create(path, LAYOUT)
    file.write_rows(LAYOUT.tensors[0], 0, random_data(LAYOUT)[0])
    assert path.read_bytes() == b"old"
    assert sorted(os.listdir(tmp_path)) == ["x.gguf", "x.gguf.partial"]
    assert (tmp_path / "x.gguf.partial").stat().st_size == LAYOUT.total_bytes
    file.commit()
    assert os.listdir(tmp_path) == ["x.gguf"]
    assert path.stat().st_size == LAYOUT.total_bytes


def test_an_exception_leaves_only_the_partial_file(tmp_path):
    def interrupted() -> None:
        with GGUFFile.create(tmp_path / "x.gguf", LAYOUT):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert os.listdir(tmp_path) == ["x.gguf.partial"]


def test_reopened_file_ends_as_one_written_at_once(tmp_path):
    data = random_data(LAYOUT)
    write_file(tmp_path / "once.gguf", LAYOUT, data)
    path = tmp_path / "x.gguf"
    with GGUFFile.create(path, LAYOUT) as file:
        file.write_rows(LAYOUT.tensors[1], 0, data[1])
        file.sync()
    with GGUFFile.reopen(path, LAYOUT) as file:
        np.testing.assert_array_equal(file.read_rows(LAYOUT.tensors[1], 0, 1), data[1])
        file.write_rows(LAYOUT.tensors[0], 0, data[0])
        file.write_rows(LAYOUT.tensors[2], 2, data[2][2:])
        file.write_rows(LAYOUT.tensors[2], 0, data[2][:2])
        file.commit()
    assert path.read_bytes() == (tmp_path / "once.gguf").read_bytes()


@pytest.mark.parametrize(
    "other",
    [lay_out(METADATA, TENSORS[:2]), lay_out([*METADATA[:1], u32("llama.block_count", 3), *METADATA[2:]], TENSORS)],
)
def test_reopen_refuses_another_jobs_file(tmp_path, other):
    GGUFFile.create(tmp_path / "x.gguf", LAYOUT).close()
    with pytest.raises(BadInputError, match=rf"\({LAYOUT.total_bytes} bytes\) belongs to another job"):
        GGUFFile.reopen(tmp_path / "x.gguf", other)
    assert (tmp_path / "x.gguf.partial").exists()


def test_reopen_needs_a_partial_file(tmp_path):
    with pytest.raises(BadInputError, match=r"x\.gguf\.partial is not there"):
        GGUFFile.reopen(tmp_path / "x.gguf", LAYOUT)


@pytest.mark.parametrize("start", [GGUFFile.create, GGUFFile.reopen])
def test_only_one_writer_at_a_time(tmp_path, start):
    data = random_data(LAYOUT)
    with GGUFFile.create(tmp_path / "x.gguf", LAYOUT) as file:
        file.write_rows(LAYOUT.tensors[0], 0, data[0])
        with pytest.raises(InterruptedJobError, match="another process is at work"):
            start(tmp_path / "x.gguf", LAYOUT)
        np.testing.assert_array_equal(file.read_rows(LAYOUT.tensors[0], 0, 4), data[0])


def test_create_lets_go_of_a_file_that_was_finished_meanwhile(tmp_path, monkeypatch):
    """A second writer opens the partial file, the first renames it, the second gets the lock: it must start anew."""
    path = tmp_path / "x.gguf"
    first = GGUFFile.create(path, LAYOUT)
    real_open = os.open

    def open_then_commit(*arguments: object) -> int:
        fd = real_open(*arguments)
        monkeypatch.undo()
        first.commit()
        return fd

    monkeypatch.setattr(os, "open", open_then_commit)
    with GGUFFile.create(path, LAYOUT) as second:
        second.write_rows(LAYOUT.tensors[0], 0, random_data(LAYOUT)[0])
    assert not path.read_bytes()[LAYOUT.data_offset :].strip(b"\0")


def failing(number: int):
    def call(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    return call


def test_full_disk_is_told_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "posix_fallocate", failing(errno.ENOSPC))
    with pytest.raises(StorageError, match=r"x\.gguf\.partial failed \(No space left on device\): free disk space"):
        GGUFFile.create(tmp_path / "x.gguf", LAYOUT)
    assert os.listdir(tmp_path) == []


def test_file_systems_that_cannot_preallocate_are_served(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "posix_fallocate", failing(errno.EOPNOTSUPP))
    data = random_data(LAYOUT)
    write_file(tmp_path / "x.gguf", LAYOUT, data)
    assert (tmp_path / "x.gguf").stat().st_size == LAYOUT.total_bytes


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_failing_commit_leaves_no_finished_file(tmp_path, monkeypatch, call):
    with GGUFFile.create(tmp_path / "x.gguf", LAYOUT) as file:
        monkeypatch.setattr(os, call, failing(errno.EIO))
        with pytest.raises(StorageError, match="the disk reported a fault"):
            file.commit()
    assert os.listdir(tmp_path) == ["x.gguf.partial"]


def test_a_file_that_was_never_started_leaves_nothing(tmp_path):
    file = GGUFFile.open(tmp_path / "x.gguf", LAYOUT)
    file.close()
    assert os.listdir(tmp_path) == []
    with pytest.raises(ValueError, match="is closed"):
        file.sync()


def test_names_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(StorageError, match="check that the folder exists"):
        GGUFFile.create(tmp_path / "nowhere" / "x.gguf", LAYOUT)


@pytest.mark.parametrize(
    ("first_row", "shape", "dtype"),
    [
        (0, (5, 288), np.uint8),
        (1, (4, 288), np.uint8),
        (-1, (1, 288), np.uint8),
        (0, (1, 287), np.uint8),
        (0, (1, 288), np.int8),
    ],
)
def test_refuses_rows_outside_the_tensor(tmp_path, first_row, shape, dtype):
    with GGUFFile.create(tmp_path / "x.gguf", LAYOUT) as file, pytest.raises(ValueError, match="do not fit 'w'"):
        file.write_rows(LAYOUT.tensors[0], first_row, np.zeros(shape, dtype))


def test_gives_ordinary_permissions(tmp_path):
    old = os.umask(0o027)
    try:
        write_file(tmp_path / "x.gguf", LAYOUT, random_data(LAYOUT))
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "x.gguf").stat().st_mode) == 0o640
