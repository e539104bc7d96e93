"""Arrays on disk, compressed by zstd and checksummed.

The bytes of the values are put together by significance first: neighbors have much the same exponent, and what is
left, the noise of the mantissas, is stored as it is.
"""

from __future__ import annotations

import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import zstandard
from numpy.typing import DTypeLike, NDArray

from sq_stream.errors import BadInputError
from sq_stream.formats.storage import read_input, storage_errors

_CRC_BYTES = 4
LEVEL = 1  # higher ones gain about one percent on activations


def compress(x: NDArray[Any]) -> bytes:
    """The values of x as a zstd frame, after its CRC-32: zstd's own checksum leaves some bits of the frame out."""
    values = np.ascontiguousarray(x).reshape(-1).view(np.uint8).reshape(-1, x.itemsize)
    planes = np.empty(values.shape[::-1], np.uint8)
    for i, plane in enumerate(planes):
        plane[:] = values[:, i]
    frame = zstandard.ZstdCompressor(level=LEVEL).compress(planes.data)
    return _crc32(frame) + frame


def decompress(data: bytes, dtype: DTypeLike, shape: tuple[int, ...], where: str) -> NDArray[Any]:
    """The array of `shape` that `compress` stored.

    Raises:
        BadInputError: the frame is damaged or holds something else; `where` names it in the message.
    """
    n_bytes = math.prod(shape) * np.dtype(dtype).itemsize
    checksum, frame = data[:_CRC_BYTES], data[_CRC_BYTES:]
    if checksum != _crc32(frame):
        raise BadInputError(f"{where} is damaged: its checksum is wrong")
    try:
        stated = zstandard.frame_content_size(frame)
        if stated != n_bytes:
            raise BadInputError(f"{where} is damaged: it holds {stated} bytes, {n_bytes} are expected")
        raw = zstandard.ZstdDecompressor().decompress(frame, max_output_size=n_bytes)
    except zstandard.ZstdError as error:
        raise BadInputError(f"{where} is damaged ({error})") from error
    if len(raw) != n_bytes:
        raise BadInputError(f"{where} is damaged: it holds {len(raw)} bytes, {n_bytes} are expected")
    out = np.empty(shape, dtype)
    values = out.reshape(-1).view(np.uint8).reshape(-1, out.itemsize)
    for i, plane in enumerate(np.frombuffer(raw, np.uint8).reshape(values.shape[::-1])):
        values[:, i] = plane
    return out


def write_chunk(path: Path, x: NDArray[Any]) -> None:
    """Write x to a file of its own, without syncing it: what a crash leaves half is found by its checksum.

    Raises:
        StorageError: writing fails.
    """
    with storage_errors("writing", path):
        path.write_bytes(compress(x))


def read_chunk(path: Path, dtype: DTypeLike, shape: tuple[int, ...]) -> NDArray[Any]:
    """Read back what `write_chunk` wrote.

    Raises:
        BadInputError: the file is damaged.
        StorageError: it is not there, or reading fails.
    """
    n_bytes = math.prod(shape) * np.dtype(dtype).itemsize
    return decompress(read_input(path, 2 * n_bytes + 1024), dtype, shape, str(path))


def _crc32(data: bytes) -> bytes:
    return zlib.crc32(data).to_bytes(_CRC_BYTES, "little")
