"""Where everything goes in a GGUF file, known before a byte of it is written.

Source: the GGUF specification (docs/gguf.md of the ggml project) and ggml/src/gguf.cpp, which reads it.
"""

from __future__ import annotations

import math
import struct
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sq_stream.formats.blocks import BlockType
from sq_stream.formats.metadata import Entry, ValueType, u32

MAGIC = b"GGUF"
VERSION = 3
DEFAULT_ALIGNMENT = 32
ALIGNMENT_KEY = "general.alignment"
MAX_NAME_BYTES = 63  # GGML_MAX_NAME less the terminating zero
MAX_DIMENSIONS = 4  # GGML_MAX_DIMS

NUMBER_DTYPES: dict[ValueType, np.dtype[Any]] = {
    ValueType.UINT8: np.dtype("<u1"),
    ValueType.INT8: np.dtype("<i1"),
    ValueType.UINT16: np.dtype("<u2"),
    ValueType.INT16: np.dtype("<i2"),
    ValueType.UINT32: np.dtype("<u4"),
    ValueType.INT32: np.dtype("<i4"),
    ValueType.FLOAT32: np.dtype("<f4"),
    ValueType.BOOL: np.dtype("?"),
    ValueType.UINT64: np.dtype("<u8"),
    ValueType.INT64: np.dtype("<i8"),
    ValueType.FLOAT64: np.dtype("<f8"),
}


@dataclass(frozen=True)
class TensorLayout:
    """One tensor of a GGUF file: `n_bytes` from byte `offset` of the file, row after row."""

    name: str
    shape: tuple[int, ...]  # row-major: [n_out, n_in], the reverse of the order in the file
    block_type: BlockType
    offset: int  # from the start of the file
    n_bytes: int

    @property
    def n_rows(self) -> int:
        """Rows of the tensor seen as a matrix [n_rows, n_in]."""
        return math.prod(self.shape[:-1])

    @property
    def row_bytes(self) -> int:
        """Stored bytes of one row."""
        return self.block_type.row_bytes(self.shape[-1])


@dataclass(frozen=True)
class FileLayout:
    """A GGUF file without its tensor data."""

    header: bytes  # everything before the tensor data, padded: data_offset bytes
    tensors: tuple[TensorLayout, ...]
    data_offset: int
    total_bytes: int


def padded(n_bytes: int, alignment: int) -> int:
    """The smallest multiple of `alignment` that is not below `n_bytes`."""
    return -(-n_bytes // alignment) * alignment


def lay_out(
    metadata: Sequence[Entry],
    tensors: Sequence[tuple[str, Sequence[int], BlockType]],
    alignment: int = DEFAULT_ALIGNMENT,
) -> FileLayout:
    """The layout of a file with these keys and these tensors (name, row-major shape, type), in this order.

    An alignment other than 32 is written as the key `general.alignment`.

    Raises:
        ValueError: a key or name is used twice, a name is too long, a shape does not suit its type, a value its type.
    """
    if alignment != DEFAULT_ALIGNMENT:
        metadata = [*metadata, u32(ALIGNMENT_KEY, alignment)]
    _refuse_duplicates("metadata key", [entry.key for entry in metadata])
    _refuse_duplicates("tensor", [name for name, _, _ in tensors])
    header = bytearray(MAGIC + struct.pack("<IQQ", VERSION, len(tensors), len(metadata)))
    for entry in metadata:
        header += _encode_entry(entry)
    offset, relative = 0, []
    for name, shape, block_type in tensors:
        header += _encode_tensor_info(name, shape, block_type, offset)
        relative.append(offset)
        offset += padded(block_type.tensor_bytes(shape), alignment)
    data_offset = padded(len(header), alignment)
    header += bytes(data_offset - len(header))
    placed = tuple(
        TensorLayout(name, tuple(shape), block_type, data_offset + start, block_type.tensor_bytes(shape))
        for (name, shape, block_type), start in zip(tensors, relative, strict=True)
    )
    return FileLayout(bytes(header), placed, data_offset, data_offset + offset)


def _refuse_duplicates(kind: str, names: Sequence[str]) -> None:
    for name, count in Counter(names).most_common(1):
        if count > 1:
            raise ValueError(f"{kind} {name!r} is given {count} times")


def _encode_string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _encode_tensor_info(name: str, shape: Sequence[int], block_type: BlockType, offset: int) -> bytes:
    if not 1 <= len(shape) <= MAX_DIMENSIONS:
        raise ValueError(f"tensor {name!r} has {len(shape)} dimensions; GGUF stores 1 to {MAX_DIMENSIONS}")
    if len(name.encode()) > MAX_NAME_BYTES:
        raise ValueError(f"tensor name {name!r} is longer than {MAX_NAME_BYTES} bytes")
    dimensions = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
    return _encode_string(name) + dimensions + struct.pack("<IQ", block_type.ggml_id, offset)


def can_encode(entry: Entry) -> bool:
    """Whether the value is one of the entry's type."""
    try:
        with np.errstate(over="raise"):
            _encode_entry(entry)
    except (ArithmeticError, AttributeError, TypeError, ValueError):
        return False
    return True


def _encode_entry(entry: Entry) -> bytes:
    start = _encode_string(entry.key) + struct.pack("<I", entry.type)
    if entry.type is not ValueType.ARRAY:
        return start + _encode_value(entry.type, entry.value)
    if entry.element is None:
        raise ValueError(f"array {entry.key!r} lacks its element type")
    return start + struct.pack("<IQ", entry.element, len(entry.value)) + _encode_array(entry.element, entry.value)


def _encode_value(kind: ValueType, value: Any) -> bytes:
    return _encode_string(value) if kind is ValueType.STRING else np.array(value, NUMBER_DTYPES[kind]).tobytes()


def _encode_array(element: ValueType, values: Any) -> bytes:
    if element is ValueType.STRING:
        return b"".join(map(_encode_string, values))
    return np.asarray(values, NUMBER_DTYPES[element]).tobytes()
