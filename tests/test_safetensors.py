"""Safetensors headers: damaged files as a table, sound ones against the safetensors package."""

from __future__ import annotations

import json
import os
import struct
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from sq_stream.errors import BadInputError, StorageError
from sq_stream.formats.safetensors import Header, read_header

A = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
B = {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]}


def file_bytes(header: object, data: int = 32) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(data)


PATH = Path("folder/model.safetensors")


def parse(contents: bytes) -> Header:
    with open(os.memfd_create("safetensors"), "w+b") as file:
        file.write(contents)
        file.flush()
        return read_header(file.fileno(), PATH)


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
ENTRY = b'{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]}'
DAMAGED = {
    "empty": (b"", "0 bytes"),
    "seven bytes": (b"\x08" + bytes(6), "7 bytes"),
    "git-lfs": (LFS, "git lfs pull"),
    "web page": (b"<!DOCTYPE html><html></html>", "is not a safetensors file"),
    "header of 2**63": (struct.pack("<Q", 2**63) + bytes(100), "header length 9223372036854775808"),
    "header over the limit": (struct.pack("<Q", 2**25 + 1) + bytes(100), "at most 33554432"),
    "header over the file": (struct.pack("<Q", 1000) + bytes(100), "describes 1008 bytes, the file has 108"),
    "not JSON": (file_bytes(b"{'a': 1}"), "not valid JSON"),
    "not UTF-8": (file_bytes(b'{"\xff\xff": 1}'), "not valid JSON"),
    "nested too deep": (file_bytes(b"[" * 100_000), "not valid JSON"),
    "number too long": (file_bytes(b'{"a": ' + b"9" * 5000 + b"}"), "not valid JSON"),
    "a list": (file_bytes([]), "JSON list where an object is expected"),
    "two of a name": (file_bytes(b'{"a":' + ENTRY + b',"a":' + ENTRY + b"}", 24), "names 'a' twice"),
    "two shapes": (file_bytes(b'{"a":' + ENTRY[:-1] + b',"shape":[6]}}', 24), "names 'shape' twice"),
    "entry not an object": (file_bytes({"a": 3}), "'a' lacks dtype"),
    "entry without offsets": (file_bytes({"a": {"dtype": "F32", "shape": [2]}}), "'a' lacks dtype, shape or"),
    "unknown dtype": (file_bytes({"a": A | {"dtype": "Q4"}}), "unknown dtype 'Q4'"),
    "dtype not a name": (file_bytes({"a": A | {"dtype": ["F32"]}}), "unknown dtype ['F32']"),
    "negative dimension": (file_bytes({"a": A | {"shape": [-2, -3]}}), "impossible shape [-2, -3]"),
    "fractional dimension": (file_bytes({"a": A | {"shape": [2.0, 3]}}), "impossible shape [2.0, 3]"),
    "true as dimension": (file_bytes({"a": A | {"shape": [True, 6]}}), "impossible shape [True, 6]"),
    "shape not a list": (file_bytes({"a": A | {"shape": 6}}), "impossible shape 6"),
    "dimension of 2**64": (file_bytes({"a": A | {"shape": [2**64]}}), "impossible shape"),
    "product of 2**65": (file_bytes({"a": A | {"shape": [2**62, 8]}}), "needs 147573952589676412928 bytes"),
    "65 dimensions": (file_bytes({"a": A | {"shape": [1] * 65}}), "impossible shape"),
    "one offset": (file_bytes({"a": A | {"data_offsets": [0]}}), "impossible data_offsets [0]"),
    "negative offset": (file_bytes({"a": A | {"data_offsets": [-24, 0]}}), "impossible data_offsets [-24, 0]"),
    "offsets reversed": (file_bytes({"a": A | {"data_offsets": [24, 0]}}), "24 to 0 hold -24"),
    "offsets too narrow": (file_bytes({"a": A | {"data_offsets": [0, 20]}}), "needs 24 bytes"),
    "half a byte": (file_bytes({"a": {"dtype": "F4", "shape": [3], "data_offsets": [0, 1]}}, 1), "needs 1.5 bytes"),
    "overlap": (file_bytes({"a": A, "b": B | {"data_offsets": [20, 28]}}, 28), "'b' overlaps the tensor before it"),
    "hole": (file_bytes({"a": A, "b": B | {"data_offsets": [26, 34]}}, 34), "'b' follows a hole"),
    "hole at the start": (file_bytes({"a": A | {"data_offsets": [8, 32]}}), "'a' follows a hole"),
    "truncated": (file_bytes({"a": A, "b": B}, 31), "describes 169 bytes, the file has 168"),
    "truncated to its header": (file_bytes({"a": A, "b": B}, 0), "is truncated"),
    "data left over": (file_bytes({"a": A, "b": B}, 33), "1 bytes that belong to no tensor"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_refuses_damaged_file(damage):
    contents, message = DAMAGED[damage]
    with pytest.raises(BadInputError) as caught:
        parse(contents)
    assert message in str(caught.value)
    assert str(PATH) in str(caught.value)


@pytest.mark.parametrize("damage", DAMAGED.keys() - {"two of a name"})  # of which it takes the last
def test_damage_is_no_oddity_of_ours(tmp_path, damage):
    """The safetensors package refuses these files too."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(DAMAGED[damage][0])
    with pytest.raises(safetensors.SafetensorError):
        safetensors.safe_open(path, framework="numpy").keys()


def test_orders_tensors_by_their_data():
    header = parse(file_bytes({"b": B, "__metadata__": {"format": "pt"}, "a": A}))
    assert [entry.name for entry in header.tensors] == ["a", "b"]
    assert [entry.offset for entry in header.tensors] == [8 + len(header.raw), 8 + len(header.raw) + 24]
    assert header.tensors[1].shape == (4,)


def test_header_may_be_padded_and_tensors_empty():
    empty = {"dtype": "F32", "shape": [0, 3], "data_offsets": [24, 24]}
    header = parse(file_bytes(json.dumps({"a": A, "e": empty}).encode() + b"   ", 24))
    assert [(entry.name, entry.n_bytes) for entry in header.tensors] == [("a", 24), ("e", 0)]


def test_reports_a_file_that_cannot_be_read(tmp_path):
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        with pytest.raises(StorageError, match="is a folder"):
            read_header(fd, tmp_path)
    finally:
        os.close(fd)


DTYPES = ["float16", "float32", "float64", "int8", "uint16", "int64", "bool"]
ARRAYS = st.sampled_from(DTYPES).flatmap(
    lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5))
)


@given(tensors=st.dictionaries(st.text(st.characters(codec="utf-8"), min_size=1, max_size=20), ARRAYS, max_size=6))
def test_agrees_with_the_safetensors_package(tensors):
    tensors.pop("__metadata__", None)
    contents = safetensors.numpy.save(tensors)
    found = {entry.name: entry for entry in parse(contents).tensors}
    assert found.keys() == tensors.keys()
    for name, x in tensors.items():
        entry = found[name]
        assert entry.shape == x.shape
        assert contents[entry.offset : entry.offset + entry.n_bytes] == x.tobytes()


SOUND = safetensors.numpy.save({"a": np.ones((3, 5), np.float32), "b": np.ones(7, np.float16)})


@given(position=st.integers(0, len(SOUND) - 1), byte=st.integers(0, 255), cut=st.integers(0, len(SOUND)))
@example(position=len(SOUND) - 1, byte=1, cut=len(SOUND))
def test_any_damage_is_refused_or_harmless(position, byte, cut):
    contents = bytearray(SOUND)
    contents[position] = byte
    with suppress(BadInputError):
        header = parse(bytes(contents[:cut]))
        assert sum(entry.n_bytes for entry in header.tensors) == cut - 8 - len(header.raw)
