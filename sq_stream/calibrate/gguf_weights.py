"""Weights of any GGUF file, decoded where they are asked for.

A `TensorReader` like a checkpoint, so that the streamed passes read both in the same way.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from sq_stream.errors import BadInputError
from sq_stream.formats.blocks import BLOCK_TYPES, BlockType
from sq_stream.formats.gguf_read import GGUFReader

Array = NDArray[np.float32]
Rows = slice | NDArray[np.int64]
Decode = Callable[[NDArray[np.uint8]], Array]

CHUNK_WEIGHTS = 2**20
"""Weights that are decoded, or rounded, at a time."""


def decoder_of(block_type: BlockType) -> Decode:
    """From stored rows uint8 [n, row_bytes] of a type to their values [n, n_in], by the gguf package where not by ours.

    Raises:
        BadInputError: neither can decode it.
    """
    if block_type.name in BLOCK_TYPES:
        from sq_stream.kernels.codec import decode

        return lambda data: decode(data, block_type)
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    kind = GGMLQuantizationType(block_type.ggml_id)

    def decode_foreign(data: NDArray[np.uint8]) -> Array:
        with np.errstate(all="ignore"):  # what is not finite is found by who asked for it
            return np.asarray(dequantize(data, kind), np.float32)

    try:
        decode_foreign(np.zeros((1, block_type.block_bytes), np.uint8))
    except NotImplementedError:
        raise BadInputError(f"there is no decoder for the block type {block_type.name}") from None
    return decode_foreign


class GGUFWeights:
    """The tensors of an open GGUF file."""

    def __init__(self, reader: GGUFReader) -> None:
        """Raises BadInputError for a block type that cannot be decoded."""
        self._reader = reader
        types = {tensor.block_type for tensor in reader.tensors.values()}
        self._decode = {block_type: decoder_of(block_type) for block_type in types}

    def data(self, name: str, start: int, stop: int) -> NDArray[np.uint8]:
        """Stored rows of a tensor: [stop - start, row_bytes]."""
        return self._reader.read_rows(name, start, stop)

    def read_rows(self, name: str, rows: Rows) -> Array:
        """See `TensorReader`."""
        tensor = self._reader.tensors[name]
        decode = self._decode[tensor.block_type]
        numbers = row_numbers(rows, tensor.n_rows)
        x = np.empty((len(numbers), tensor.shape[-1]), np.float32)
        for at, start, n in row_runs(numbers, max(1, CHUNK_WEIGHTS // tensor.shape[-1])):
            x[at : at + n] = decode(self.data(name, start, start + n))
        return x


def row_numbers(rows: Rows, n_rows: int) -> NDArray[np.int64]:
    """The numbers of `rows` of a matrix that has `n_rows`."""
    return np.arange(*rows.indices(n_rows)) if isinstance(rows, slice) else rows


def row_runs(numbers: NDArray[np.int64], most: int) -> Iterator[tuple[int, int, int]]:
    """Consecutive row numbers in pieces of at most `most`: position in `numbers`, first row, count."""
    if not len(numbers):
        return
    starts = [0, *(np.flatnonzero(np.diff(numbers) != 1) + 1).tolist(), len(numbers)]
    for first, stop in itertools.pairwise(starts):
        for at in range(first, stop, most):
            yield at, int(numbers[at]), min(most, stop - at)
