"""The header of a safetensors file, checked as if it came from an enemy.

Format: 8 bytes little-endian header length, a JSON object {name: {dtype, shape, data_offsets}}, then the data, without
holes. Source: the safetensors README and `safetensors/src/tensor.rs` (limits and dtype sizes).
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sq_stream.errors import BadInputError
from sq_stream.formats.storage import read_into
from sq_stream.formats.strict_json import LFS_POINTER, brief, parse_object, refuse_lfs_pointer

MAX_HEADER_BYTES = 2**25
"""The format allows 100 MB; a header of 100,000 tensors has some 12 MB."""
MAX_DIMENSIONS = 64
METADATA = "__metadata__"

DTYPE_BITS = (
    {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
    | dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8)
    | dict.fromkeys(("I16", "U16", "F16", "BF16"), 16)
    | dict.fromkeys(("I32", "U32", "F32"), 32)
    | dict.fromkeys(("I64", "U64", "F64", "C64"), 64)
)


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor's values are: little-endian, row-major, `n_bytes` from byte `offset` of file `path`."""

    name: str
    dtype: str  # a key of DTYPE_BITS
    shape: tuple[int, ...]
    path: Path
    offset: int  # from the start of the file
    n_bytes: int


@dataclass(frozen=True)
class Header:
    """The checked header of one file; `raw` is its text, `tensors` are in the order of their data."""

    raw: bytes
    tensors: tuple[TensorEntry, ...]


def read_header(fd: int, path: Path) -> Header:
    """The header of the open safetensors file `fd`; `path` is for messages.

    Raises:
        BadInputError: the file is a Git-LFS pointer, truncated, or breaks the format.
        StorageError: reading fails.
    """
    file_bytes = os.fstat(fd).st_size
    start = _read(fd, 0, min(file_bytes, len(LFS_POINTER)), path)
    refuse_lfs_pointer(start, path)
    header_bytes = int.from_bytes(start[:8], "little")
    if file_bytes < 8 or header_bytes > MAX_HEADER_BYTES:
        raise BadInputError(
            f"{path} is not a safetensors file: {file_bytes} bytes, header length {header_bytes} "
            f"(at most {MAX_HEADER_BYTES}); download it again"
        )
    data_start = 8 + header_bytes
    if data_start > file_bytes:
        raise _truncated(path, data_start, file_bytes)
    raw = _read(fd, 8, header_bytes, path)
    described = parse_object(raw, path, unique_names=True)
    described.pop(METADATA, None)
    tensors = sorted(
        (_parse_entry(name, fields, path, data_start) for name, fields in described.items()),
        key=lambda entry: (entry.offset, entry.n_bytes),
    )
    _check_coverage(tensors, path, data_start, file_bytes)
    return Header(raw, tuple(tensors))


def _read(fd: int, offset: int, n_bytes: int, path: Path) -> bytes:
    buffer = np.empty(n_bytes, np.uint8)
    read_into(fd, buffer, offset, path)
    return buffer.tobytes()


def _parse_entry(name: str, fields: Any, path: Path, data_start: int) -> TensorEntry:
    if not isinstance(fields, Mapping) or not {"dtype", "shape", "data_offsets"} <= fields.keys():
        raise BadInputError(f"{path}: tensor {brief(name)} lacks dtype, shape or data_offsets; the file is damaged")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise BadInputError(f"{path}: tensor {brief(name)} has the unknown dtype {brief(dtype)}; the file is damaged")
    if not _are_sizes(shape) or len(shape) > MAX_DIMENSIONS:
        raise BadInputError(f"{path}: tensor {brief(name)} has the impossible shape {brief(shape)}")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise BadInputError(f"{path}: tensor {brief(name)} has the impossible data_offsets {brief(offsets)}")
    begin, end = offsets
    n_bits = math.prod(shape) * DTYPE_BITS[dtype]
    if n_bits % 8 or end - begin != n_bits // 8:
        needed = brief(n_bits // 8) + (str(n_bits % 8 / 8)[1:] if n_bits % 8 else "")
        raise BadInputError(
            f"{path}: tensor {brief(name)} of shape {brief(shape)} and dtype {dtype} needs {needed} bytes, "
            f"but its data_offsets {begin} to {end} hold {end - begin}; the file is damaged"
        )
    return TensorEntry(name, dtype, tuple(shape), path, data_start + begin, end - begin)


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(n) is int and 0 <= n < 2**63 for n in values)


def _check_coverage(tensors: list[TensorEntry], path: Path, data_start: int, file_bytes: int) -> None:
    """Raise BadInputError unless `tensors`, sorted by offset, fill the file from `data_start` to its end."""
    end = data_start
    for entry in tensors:
        if entry.offset != end:
            kind = "overlaps the tensor before it" if entry.offset < end else "follows a hole"
            raise BadInputError(
                f"{path}: the data of tensor {brief(entry.name)} {kind}: it begins at byte {entry.offset} of the file, "
                f"{end} is expected; the file is damaged"
            )
        end += entry.n_bytes
    if end > file_bytes:
        raise _truncated(path, end, file_bytes)
    if end < file_bytes:
        raise BadInputError(
            f"{path} has {file_bytes - end} bytes that belong to no tensor: its header describes {end} bytes, "
            f"the file has {file_bytes}; download it again"
        )


def _truncated(path: Path, expected: int, actual: int) -> BadInputError:
    return BadInputError(
        f"{path} is truncated: its header describes {expected} bytes, the file has {actual}; download it again"
    )
