"""Weights of a model that is scored: of a checkpoint, of any GGUF file, or rounded in memory.

Each is a `TensorReader`, so that the forward pass reads all of them in the same way.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from sq_stream.errors import BadInputError
from sq_stream.formats.blocks import BLOCK_TYPES, BlockType
from sq_stream.formats.gguf_read import GGUFReader
from sq_stream.models.base import TensorMap, TensorReader

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

    def read_rows(self, name: str, rows: Rows) -> Array:
        """See `TensorReader`."""
        tensor = self._reader.tensors[name]
        decode = self._decode[tensor.block_type]
        numbers = _numbers(rows, tensor.n_rows)
        x = np.empty((len(numbers), tensor.shape[-1]), np.float32)
        for at, start, n in _runs(numbers, max(1, CHUNK_WEIGHTS // tensor.shape[-1])):
            x[at : at + n] = decode(self._reader.read_rows(name, start, start + n))
        return x


class RoundedWeights:
    """A checkpoint's tensors as a file with the `types` given would have them, encoded where they are asked for.

    Encoding takes far longer than decoding: what is read again and again is kept encoded (`keep`).
    """

    def __init__(
        self,
        maps: Mapping[str, TensorMap],
        checkpoint: TensorReader,
        types: Mapping[str, BlockType],
        importance: Mapping[str, Array],
    ) -> None:
        """Tensors of `maps` by GGUF name; `importance` [n_in] weighs the columns of those that it names."""
        self._maps, self._checkpoint, self._types, self._importance = maps, checkpoint, types, importance
        self._kept: dict[str, NDArray[np.uint8]] = {}

    def keep(self, names: Iterable[str]) -> None:
        """Encode these tensors and keep their blocks, and no others' from now on."""
        self._kept = {}
        for name in names:
            tensor, block_type = self._maps[name], self._types[name]
            blocks = np.empty((tensor.n_rows, block_type.row_bytes(tensor.n_in)), np.uint8)
            for at, start, n in _runs(np.arange(tensor.n_rows), max(1, CHUNK_WEIGHTS // tensor.n_in)):
                blocks[at : at + n] = self._encode(name, slice(start, start + n))
            self._kept[name] = blocks

    def read_rows(self, name: str, rows: Rows) -> Array:
        """See `TensorReader`."""
        decode, kept = decoder_of(self._types[name]), self._kept.get(name)
        if kept is not None:
            return decode(kept[rows])
        tensor = self._maps[name]
        numbers = _numbers(rows, tensor.n_rows)
        x = np.empty((len(numbers), tensor.n_in), np.float32)
        step = max(1, CHUNK_WEIGHTS // tensor.n_in)
        for at in range(0, len(numbers), step):
            x[at : at + step] = decode(self._encode(name, numbers[at : at + step]))
        return x

    def _encode(self, name: str, rows: Rows) -> NDArray[np.uint8]:
        from sq_stream.kernels.codec import encode

        x = self._maps[name].gather(self._checkpoint, rows)
        return encode(x, self._types[name], self._importance.get(name))


def _numbers(rows: Rows, n_rows: int) -> NDArray[np.int64]:
    return np.arange(*rows.indices(n_rows)) if isinstance(rows, slice) else rows


def _runs(numbers: NDArray[np.int64], most: int) -> Iterator[tuple[int, int, int]]:
    """Consecutive row numbers in pieces of at most `most`: position in `numbers`, first row, count."""
    if not len(numbers):
        return
    starts = [0, *(np.flatnonzero(np.diff(numbers) != 1) + 1).tolist(), len(numbers)]
    for first, stop in itertools.pairwise(starts):
        for at in range(first, stop, most):
            yield at, int(numbers[at]), min(most, stop - at)
