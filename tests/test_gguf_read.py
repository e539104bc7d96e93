"""GGUF files that we read: equal to what was written, by us or by the gguf package, and nothing damaged believed."""

from __future__ import annotations

import os
import struct
from contextlib import suppress
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from oracles.gguf_file import llamacpp_opens
from test_gguf_write import LAYOUT, entries, random_data, tensors, write_file

from sq_stream.errors import BadInputError, StorageError
from sq_stream.formats.gguf_layout import lay_out
from sq_stream.formats.gguf_read import GGUFReader
from sq_stream.formats.metadata import Entry, ValueType, array, u32


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("gguf")


def plain(entry: Entry) -> tuple[Any, ...]:
    value = entry.value.tolist() if isinstance(entry.value, np.ndarray) else entry.value
    return entry.key, entry.type, value, entry.element


@given(metadata=entries(), tensors=tensors())
def test_reads_what_was_written(folder, metadata, tensors):
    layout = lay_out(metadata, tensors)
    data = random_data(layout)
    write_file(folder / "x.gguf", layout, data)
    with GGUFReader.open(folder / "x.gguf") as reader:
        assert [plain(entry) for entry in reader.metadata.values()] == [plain(entry) for entry in metadata]
        assert tuple(reader.tensors.values()) == layout.tensors
        assert (reader.data_offset, reader.file_bytes) == (layout.data_offset, layout.total_bytes)
        for tensor, rows in zip(layout.tensors, data, strict=True):
            np.testing.assert_array_equal(reader.read_rows(tensor.name, 0, tensor.n_rows), rows)
            np.testing.assert_array_equal(reader.read_rows(tensor.name, tensor.n_rows - 1, tensor.n_rows), rows[-1:])


def test_agrees_with_the_gguf_package(tmp_path):
    """On a file with block types that sq-stream itself does not write."""
    path = tmp_path / "x.gguf"
    writer = gguf.GGUFWriter(path, arch="llama")
    writer.add_custom_alignment(64)
    writer.add_array("tokenizer.ggml.tokens", ["a", "é", ""])
    writer.add_array("tokenizer.ggml.scores", [0.5, -1.0])
    writer.add_array("flags", [True, False])
    for kind in (gguf.GGMLQuantizationType.Q2_K, gguf.GGMLQuantizationType.IQ4_XS, gguf.GGMLQuantizationType.I32):
        n_bytes = gguf.GGML_QUANT_SIZES[kind][1]
        writer.add_tensor(kind.name, np.full((2, 3, n_bytes), 7, np.uint8), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    theirs = gguf.GGUFReader(path)
    with GGUFReader.open(path) as ours:
        assert ours.alignment == 64
        for name, field in theirs.fields.items():
            if not name.startswith("GGUF."):
                value = ours.metadata[name].value
                assert (value.tolist() if isinstance(value, np.ndarray) else value) == field.contents()
        for tensor in theirs.tensors:
            mine = ours.tensors[tensor.name]
            assert (mine.block_type.name, mine.offset) == (tensor.tensor_type.name, tensor.data_offset)
            assert (mine.n_bytes, list(mine.shape[::-1])) == (tensor.n_bytes, tensor.shape.tolist())
            assert (ours.read_rows(tensor.name, 0, mine.n_rows) == 7).all()


def text(value: str | bytes) -> bytes:
    data = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(data)) + data


def number(key: str, value: int, kind: int = 4) -> bytes:
    return text(key) + struct.pack("<II", kind, value)


def info(
    name: str | bytes, dims: tuple[int, ...] = (8,), kind: int = 0, offset: int = 0, n_dims: int | None = None
) -> bytes:
    n_dims = len(dims) if n_dims is None else n_dims
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", n_dims, *dims, kind, offset)


def gguf_bytes(
    *, entries: tuple[bytes, ...] = (), infos: tuple[bytes, ...] = (), data: int = 32, magic: bytes = b"GGUF",
    version: int = 3, n_entries: int | None = None, n_tensors: int | None = None,
) -> bytes:  # fmt: skip
    counts = (len(infos) if n_tensors is None else n_tensors, len(entries) if n_entries is None else n_entries)
    header = magic + struct.pack("<IQQ", version, *counts) + b"".join(entries + infos)
    return header + bytes(-len(header) % 32 + data)


def array_start(kind: int, count: int) -> bytes:
    return text("a") + struct.pack("<IIQ", 9, kind, count)


HUGE = 2**63
DAMAGED = {
    "empty": (b"", "is not a GGUF file: it begins with b''"),
    "git-lfs": (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    "another format": (gguf_bytes(magic=b"GGML"), "begins with b'GGML'"),
    "magic alone": (b"GGUF", "the version at byte 4 needs 4 bytes, the file has 4"),
    "version 2": (gguf_bytes(version=2), "GGUF version 2; version 3 can be read"),
    "big-endian": (gguf_bytes(version=3 << 24), "(a big-endian file)"),
    "too many tensors": (gguf_bytes(n_tensors=HUGE), f"0 keys and {HUGE} tensors; at most 4096 and 131072 are read"),
    "too many keys": (gguf_bytes(n_entries=10), "a header of 10 keys and 0 tensors at byte 24 needs 130 bytes"),
    "key over the end": (gguf_bytes(entries=(struct.pack("<Q", 1000) + b"a",)), "a key at byte 32 needs 1000 bytes"),
    "key of 2**63": (gguf_bytes(entries=(struct.pack("<Q", HUGE) + b"a",)), f"a key needs {HUGE} bytes"),
    "key not UTF-8": (gguf_bytes(entries=(number("a", 1).replace(b"a", b"\xff"),)), "a key is not UTF-8"),
    "key twice": (gguf_bytes(entries=(number("a", 1), number("a", 2))), "the key 'a' is there twice"),
    "unknown value type": (gguf_bytes(entries=(number("a", 1, kind=13),)), "the value of 'a' has the unknown type 13"),
    "value not UTF-8": (gguf_bytes(entries=(text("a") + struct.pack("<I", 8) + text(b"\xff"),)), "'a' is not UTF-8"),
    "array over the end": (gguf_bytes(entries=(array_start(4, 1000),)), "the value of 'a' at byte 49 needs 4000 bytes"),
    "array of 2**63": (gguf_bytes(entries=(array_start(0, HUGE),)), f"the value of 'a' needs {HUGE} bytes"),
    "strings over the end": (gguf_bytes(entries=(array_start(8, 1000),)), "at byte 49 needs 8000 bytes"),
    "strings of 2**60": (gguf_bytes(entries=(array_start(8, 2**60),)), "of a header are read"),
    "unknown element type": (gguf_bytes(entries=(array_start(77, 1),)), "unknown type 77"),
    "array of arrays": (gguf_bytes(entries=(array_start(9, 1),)), "'a' is an array of arrays"),
    "alignment 0": (gguf_bytes(entries=(number("general.alignment", 0),)), "general.alignment is 0, not a power of"),
    "alignment 48": (gguf_bytes(entries=(number("general.alignment", 48),)), "general.alignment is 48"),
    "alignment negative": (gguf_bytes(entries=(number("general.alignment", 32, kind=5),)), "general.alignment is 32"),
    "tensor twice": (gguf_bytes(infos=(info("w"), info("w", offset=32))), "the tensor 'w' is there twice"),
    "tensor name too long": (gguf_bytes(infos=(info("w" * 64),)), "is longer than 63 bytes"),
    "tensor name not UTF-8": (gguf_bytes(infos=(info(b"\xff"),)), "a tensor name is not UTF-8"),
    "five dimensions": (gguf_bytes(infos=(info("w", (8, 1, 1, 1, 1)),)), "'w' has 5 dimensions, at most 4"),
    "2**32 - 1 dimensions": (gguf_bytes(infos=(info("w", n_dims=2**32 - 1),)), "at most 4 are allowed"),
    "negative dimension": (gguf_bytes(infos=(info("w", (2**64 - 1, 0)),)), "impossible shape [0, 184467"),
    "product of 2**64": (gguf_bytes(infos=(info("w", (2**32, 2**32)),)), "impossible shape [4294967296, 4294967296]"),
    "unknown block type": (gguf_bytes(infos=(info("w", kind=99),)), "'w' has the unknown block type 99"),
    "removed block type": (gguf_bytes(infos=(info("w", kind=4),)), "'w' has the unknown block type 4"),
    "broken block": (gguf_bytes(infos=(info("w", (300, 2), kind=12),)), "not a multiple of the 256 of a Q4_K block"),
    "offset not aligned": (gguf_bytes(infos=(info("w", offset=8),)), "'w' follows a hole: its data offset is 8, 0 is"),
    "overlap": (gguf_bytes(infos=(info("v"), info("w"))), "'w' overlaps the one before it"),
    "hole": (gguf_bytes(infos=(info("v"), info("w", offset=64)), data=96), "data offset is 64, 32 is expected"),
    "offset of 2**63": (gguf_bytes(infos=(info("w", offset=HUGE),)), "follows a hole"),
    "truncated": (gguf_bytes(infos=(info("w", (9,)),)), "'w' ends at byte 100, the file has 96; download it again"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGED)
def test_refuses_damaged_file(tmp_path, damage):
    contents, message = DAMAGED[damage]
    path = tmp_path / "x.gguf"
    path.write_bytes(contents)
    with pytest.raises(BadInputError) as caught:
        GGUFReader.open(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


NOT_SEEN_BY_LLAMACPP = {"version 2", "key not UTF-8", "value not UTF-8", "tensor name not UTF-8", "truncated"}


@pytest.mark.parametrize("damage", DAMAGED.keys() - NOT_SEEN_BY_LLAMACPP)
def test_damage_is_no_oddity_of_ours(tmp_path, damage):
    """llama.cpp refuses these files too."""
    path = tmp_path / "x.gguf"
    path.write_bytes(DAMAGED[damage][0])
    assert not llamacpp_opens(path)


def test_the_table_is_about_its_damages(tmp_path):
    """What all rows of the table are made of is sound."""
    contents = gguf_bytes(
        entries=(number("a", 1), number("general.alignment", 32)), infos=(info("w"), info("v", offset=32)), data=64
    )
    (tmp_path / "x.gguf").write_bytes(contents)
    with GGUFReader.open(tmp_path / "x.gguf") as reader:
        assert reader.metadata["a"] == u32("a", 1)
        assert list(reader.tensors) == ["w", "v"]
    assert llamacpp_opens(tmp_path / "x.gguf")


@pytest.fixture(scope="module")
def sound(folder) -> bytes:
    write_file(folder / "sound.gguf", LAYOUT, random_data(LAYOUT))
    return (folder / "sound.gguf").read_bytes()


@given(
    position=st.integers(0, len(LAYOUT.header) - 1), byte=st.integers(0, 255), cut=st.integers(0, LAYOUT.total_bytes)
)
@example(position=0, byte=ord("G"), cut=LAYOUT.total_bytes)
def test_any_damage_is_refused_or_harmless(folder, sound, position, byte, cut):
    contents = bytearray(sound)
    contents[position] = byte
    (folder / "damaged.gguf").write_bytes(contents[:cut])
    with suppress(BadInputError), GGUFReader.open(folder / "damaged.gguf") as reader:
        assert llamacpp_opens(folder / "damaged.gguf")
        for tensor in reader.tensors.values():
            assert reader.read_rows(tensor.name, 0, tensor.n_rows).size == tensor.n_bytes


def test_refuses_rows_that_are_not_there(folder, sound):
    with GGUFReader.open(folder / "sound.gguf") as reader:
        for start, stop in [(0, 5), (-1, 2), (3, 2)]:
            with pytest.raises(IndexError, match="of tensor 'w', which has 4"):
                reader.read_rows("w", start, stop)
        with pytest.raises(BadInputError, match="has no tensor 'x'"):
            reader.read_rows("x", 0, 1)


def test_reports_a_file_that_cannot_be_opened(tmp_path):
    with pytest.raises(StorageError, match="No such file"):
        GGUFReader.open(tmp_path / "x.gguf")
    with pytest.raises(StorageError, match="is a folder"):
        GGUFReader.open(tmp_path)


def test_only_a_growing_file_may_change_while_it_is_open(folder, sound):
    path, name = folder / "changing.gguf", next(t.name for t in LAYOUT.tensors if t.n_rows)
    path.write_bytes(sound)
    with GGUFReader.open(path) as reader, GGUFReader.open(path, growing=True) as growing:
        before = reader.read_rows(name, 0, 1)
        os.utime(path, ns=(1, 1))
        np.testing.assert_array_equal(growing.read_rows(name, 0, 1), before)
        with pytest.raises(StorageError, match=r"changing.gguf was changed while in use"):
            reader.read_rows(name, 0, 1)


def test_large_vocabulary_survives(tmp_path):
    tokens = [f"token {i} é" for i in range(250_000)]
    path = tmp_path / "x.gguf"
    write_file(
        path,
        lay_out([array("tokens", ValueType.STRING, tokens), array("types", ValueType.INT32, range(250_000))], []),
        [],
    )
    with GGUFReader.open(path) as reader:
        assert reader.metadata["tokens"].value == tokens
        assert reader.metadata["types"].value.sum() == sum(range(250_000))
