"""Reading any GGUF file, every length in it checked before it is believed.

Source: the GGUF specification (docs/gguf.md of the ggml project) and ggml/src/gguf.cpp, whose rules are kept: what is
accepted here is what llama.cpp opens.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from sq_stream.errors import BadInputError
from sq_stream.formats.blocks import BLOCK_TYPES, BlockType
from sq_stream.formats.gguf_layout import (
    ALIGNMENT_KEY,
    DEFAULT_ALIGNMENT,
    MAGIC,
    MAX_DIMENSIONS,
    MAX_NAME_BYTES,
    NUMBER_DTYPES,
    VERSION,
    TensorLayout,
    padded,
)
from sq_stream.formats.metadata import Entry, ValueType
from sq_stream.formats.storage import Closing, file_state, only_regular, read_into, storage_errors
from sq_stream.formats.strict_json import LFS_POINTER, brief, refuse_lfs_pointer

MAX_HEADER_BYTES = 2**26
"""Of metadata and descriptions of tensors together; vocabularies of 262,144 tokens take some 2**24."""
MAX_KEYS = 2**12
MAX_TENSORS = 2**17
MAX_STRINGS = 2**22
"""In one array: each takes some 60 bytes of memory, be it nine in the file."""
_MIN_ENTRY_BYTES = 8 + 4 + 1  # an empty key, a type, one byte
_MIN_TENSOR_BYTES = 8 + 4 + 4 + 8  # an empty name, no dimensions, a type, an offset


class GGUFReader(Closing):
    """An open GGUF file: its metadata and tensors by name, in file order; the data is read when asked for."""

    path: Path
    metadata: dict[str, Entry]  # arrays of numbers are NumPy arrays, arrays of strings lists
    tensors: dict[str, TensorLayout]
    alignment: int
    data_offset: int
    file_bytes: int

    def __init__(self, path: Path, *, growing: bool = False) -> None:
        self.path = path
        with storage_errors("reading", path):
            self._file = open(path, "rb", 2**20, opener=only_regular)  # noqa: SIM115 - closed by close()
            try:
                state = file_state(self._file.fileno())
                self._state = None if growing else state
                self.file_bytes = state[0]
                self._parse(_Cursor(self._file, path, self.file_bytes))
            except BaseException:
                self.close()
                raise

    @classmethod
    def open(cls, path: Path, *, growing: bool = False) -> GGUFReader:
        """Open a file and check its structure; the data of a `growing` one may be written meanwhile.

        Raises:
            BadInputError: it is not a GGUF file of version 3, or breaks the format.
            StorageError: reading fails.
        """
        return cls(Path(path), growing=growing)

    def text(self, key: str) -> str:
        """The value of a key that is a string; empty if there is none, or if it is of another type."""
        entry = self.metadata.get(key)
        return entry.value if entry is not None and isinstance(entry.value, str) else ""

    def read_rows(self, name: str, start: int, stop: int) -> NDArray[np.uint8]:
        """Stored rows `start` to `stop` of tensor `name`: uint8 [stop - start, row_bytes]. Safe from several threads.

        Raises:
            BadInputError: no such tensor.
            StorageError: reading fails, or the file was changed since it was opened.
        """
        tensor = self.tensors.get(name)
        if tensor is None:
            raise BadInputError(f"{self.path} has no tensor {name!r}")
        if not 0 <= start <= stop <= tensor.n_rows:
            raise IndexError(f"rows {start} to {stop} of tensor {name!r}, which has {tensor.n_rows}")
        rows = np.empty((stop - start, tensor.row_bytes), np.uint8)
        read_into(self._file.fileno(), rows, tensor.offset + start * tensor.row_bytes, self.path, self._state)
        return rows

    def close(self) -> None:
        """Close the file; nothing can be read after."""
        self._file.close()

    def _parse(self, cursor: _Cursor) -> None:
        n_tensors, n_entries = _parse_start(cursor)
        self.metadata = {}
        for _ in range(n_entries):
            entry = _parse_entry(cursor)
            if entry.key in self.metadata:
                raise cursor.damaged(f"the key {brief(entry.key)} is there twice")
            self.metadata[entry.key] = entry
        self.alignment = self._parse_alignment(cursor)
        infos = {}
        for _ in range(n_tensors):
            info = _parse_tensor_info(cursor)
            if info.name in infos:
                raise cursor.damaged(f"the tensor {brief(info.name)} is there twice")
            infos[info.name] = info
        self.data_offset = padded(cursor.position, self.alignment)
        self.tensors = self._place(infos.values(), cursor)

    def _parse_alignment(self, cursor: _Cursor) -> int:
        entry = self.metadata.get(ALIGNMENT_KEY)
        if entry is None:
            return DEFAULT_ALIGNMENT
        if entry.type is not ValueType.UINT32 or entry.value.bit_count() != 1:
            raise cursor.damaged(f"{ALIGNMENT_KEY} is {brief(entry.value)}, not a power of two")
        return int(entry.value)

    def _place(self, infos: Iterable[TensorLayout], cursor: _Cursor) -> dict[str, TensorLayout]:
        """The tensors, offsets made absolute; they must follow each other without holes, as llama.cpp demands."""
        tensors, expected = {}, 0
        for info in infos:
            if info.offset != expected:
                kind = "overlaps the one before it" if info.offset < expected else "follows a hole"
                raise cursor.damaged(
                    f"the tensor {info.name!r} {kind}: its data offset is {info.offset}, {expected} is expected"
                )
            tensor = replace(info, offset=self.data_offset + info.offset)
            if tensor.offset + tensor.n_bytes > self.file_bytes:
                raise BadInputError(
                    f"{self.path} is truncated: tensor {tensor.name!r} ends at byte {tensor.offset + tensor.n_bytes}, "
                    f"the file has {self.file_bytes}; download it again"
                )
            tensors[tensor.name] = tensor
            expected += padded(tensor.n_bytes, self.alignment)
        return tensors


class _Cursor:
    """Takes the header of a file apart from front to back, never past its end."""

    def __init__(self, file: BinaryIO, path: Path, file_bytes: int) -> None:
        self.file, self.path, self.file_bytes = file, path, file_bytes
        self.position = 0

    def damaged(self, what: str) -> BadInputError:
        return BadInputError(f"{self.path} is not a sound GGUF file: {what} (near byte {self.position})")

    def require(self, n_bytes: int, what: str) -> None:
        """Raise BadInputError unless `n_bytes` are left for `what` and the header does not become absurdly long."""
        if self.position + n_bytes > MAX_HEADER_BYTES:
            raise self.damaged(f"{what} needs {n_bytes} bytes; at most {MAX_HEADER_BYTES} of a header are read")
        if n_bytes > self.file_bytes - self.position:
            raise BadInputError(
                f"{self.path} is truncated or damaged: {what} at byte {self.position} needs {n_bytes} bytes, "
                f"the file has {self.file_bytes}; download it again"
            )

    def take(self, n_bytes: int, what: str) -> bytes:
        self.require(n_bytes, what)
        data = self.file.read(n_bytes)
        self.position += len(data)
        return data

    def u32(self, what: str) -> int:
        return int.from_bytes(self.take(4, what), "little")

    def u64(self, what: str) -> int:
        return int.from_bytes(self.take(8, what), "little")

    def string(self, what: str) -> str:
        data = self.take(self.u64(what), what)
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise self.damaged(f"{what} is not UTF-8 ({error})") from error

    def value_type(self, what: str) -> ValueType:
        number = self.u32(what)
        if number not in ValueType._value2member_map_:
            raise self.damaged(f"{what} has the unknown type {number}")
        return ValueType(number)


def _parse_start(cursor: _Cursor) -> tuple[int, int]:
    """Number of tensors, number of metadata entries."""
    start = cursor.file.read(len(LFS_POINTER))
    refuse_lfs_pointer(start, cursor.path)
    cursor.file.seek(0)
    if not start.startswith(MAGIC):
        raise BadInputError(f"{cursor.path} is not a GGUF file: it begins with {start[:4]!r}, not {MAGIC!r}")
    cursor.take(4, "the magic")
    version = cursor.u32("the version")
    if version != VERSION:
        big_endian = " (a big-endian file)" if version & 0xFFFF == 0 else ""
        raise BadInputError(f"{cursor.path} is GGUF version {version}{big_endian}; version {VERSION} can be read")
    n_tensors, n_entries = cursor.u64("the tensor count"), cursor.u64("the metadata count")
    if n_entries > MAX_KEYS or n_tensors > MAX_TENSORS:
        raise cursor.damaged(f"{n_entries} keys and {n_tensors} tensors; at most {MAX_KEYS} and {MAX_TENSORS} are read")
    least_bytes = n_entries * _MIN_ENTRY_BYTES + n_tensors * _MIN_TENSOR_BYTES
    cursor.require(least_bytes, f"a header of {n_entries} keys and {n_tensors} tensors")
    return n_tensors, n_entries


def _parse_entry(cursor: _Cursor) -> Entry:
    key = cursor.string("a key")
    what = f"the value of {brief(key)}"
    kind = cursor.value_type(what)
    if kind is ValueType.STRING:
        return Entry(key, kind, cursor.string(what))
    if kind is not ValueType.ARRAY:
        return Entry(key, kind, _parse_numbers(cursor, kind, 1, what)[0].item())
    element = cursor.value_type(what)
    count = cursor.u64(what)
    if element is ValueType.ARRAY:
        raise cursor.damaged(f"{what} is an array of arrays")
    if element is ValueType.STRING:
        return Entry(key, kind, _parse_strings(cursor, count, what), element)
    return Entry(key, kind, _parse_numbers(cursor, element, count, what), element)


def _parse_numbers(cursor: _Cursor, kind: ValueType, count: int, what: str) -> NDArray[Any]:
    dtype = NUMBER_DTYPES[kind]
    data = cursor.take(count * dtype.itemsize, what)
    return np.frombuffer(data, np.uint8) != 0 if kind is ValueType.BOOL else np.frombuffer(data, dtype)


def _parse_strings(cursor: _Cursor, count: int, what: str) -> list[str]:
    cursor.require(8 * count, what)
    if count > MAX_STRINGS:
        raise cursor.damaged(f"{what} has {count} strings; at most {MAX_STRINGS} are read")
    return [cursor.string(what) for _ in range(count)]


def _parse_tensor_info(cursor: _Cursor) -> TensorLayout:
    """A tensor's description; its offset is relative to the data section."""
    name = cursor.string("a tensor name")
    what = f"the description of tensor {brief(name)}"
    if len(name.encode()) > MAX_NAME_BYTES:
        raise cursor.damaged(f"the tensor name {brief(name)} is longer than {MAX_NAME_BYTES} bytes")
    n_dims = cursor.u32(what)
    if n_dims > MAX_DIMENSIONS:
        raise cursor.damaged(f"tensor {name!r} has {n_dims} dimensions, at most {MAX_DIMENSIONS} are allowed")
    shape = tuple(reversed([cursor.u64(what) for _ in range(n_dims)])) or (1,)
    block_type = _block_type(cursor.u32(what), name, cursor)
    if math.prod(shape) >= 2**63 or max(shape) >= 2**63:
        raise cursor.damaged(f"tensor {name!r} has the impossible shape {list(shape)}")
    if shape[-1] % block_type.block_size:
        raise cursor.damaged(
            f"tensor {name!r} has rows of {shape[-1]} values, not a multiple of the {block_type.block_size} "
            f"of a {block_type.name} block"
        )
    return TensorLayout(name, shape, block_type, cursor.u64(what), block_type.tensor_bytes(shape))


_BY_ID = {t.ggml_id: t for t in BLOCK_TYPES.values()}


def _block_type(ggml_id: int, tensor: str, cursor: _Cursor) -> BlockType:
    """The block type with this number, from the gguf package where it is not one that sq-stream writes."""
    if ggml_id in _BY_ID:
        return _BY_ID[ggml_id]
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        known = GGMLQuantizationType(ggml_id)
    except ValueError as error:
        raise cursor.damaged(f"tensor {tensor!r} has the unknown block type {ggml_id}") from error
    return BlockType(known.name, ggml_id, *GGML_QUANT_SIZES[known])
