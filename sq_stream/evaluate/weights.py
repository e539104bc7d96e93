"""Weights of a baseline that is made in memory: a `TensorReader` like a checkpoint or a file, read in the same way."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from threading import Lock

import numpy as np
from numpy.typing import NDArray

from sq_stream.calibrate.gguf_weights import CHUNK_WEIGHTS, Array, Rows, decoder_of, row_numbers, row_runs
from sq_stream.formats.blocks import BlockType
from sq_stream.models.base import TensorMap, TensorReader


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
        self._encoding = Lock()  # Numba's threads serve one caller at a time

    def keep(self, names: Iterable[str]) -> None:
        """Encode these tensors and keep their blocks, and no others' from now on."""
        self._kept = {}
        for name in names:
            tensor, block_type = self._maps[name], self._types[name]
            blocks = np.empty((tensor.n_rows, block_type.row_bytes(tensor.n_in)), np.uint8)
            for at, start, n in row_runs(np.arange(tensor.n_rows), max(1, CHUNK_WEIGHTS // tensor.n_in)):
                blocks[at : at + n] = self._encode(name, slice(start, start + n))
            self._kept[name] = blocks

    def read_rows(self, name: str, rows: Rows) -> Array:
        """See `TensorReader`."""
        decode, kept = decoder_of(self._types[name]), self._kept.get(name)
        if kept is not None:
            return decode(kept[rows])
        tensor = self._maps[name]
        numbers = row_numbers(rows, tensor.n_rows)
        x = np.empty((len(numbers), tensor.n_in), np.float32)
        step = max(1, CHUNK_WEIGHTS // tensor.n_in)
        for at in range(0, len(numbers), step):
            x[at : at + step] = decode(self._encode(name, numbers[at : at + step]))
        return x

    def _encode(self, name: str, rows: Rows) -> NDArray[np.uint8]:
        from sq_stream.kernels.codec import encode

        x = self._maps[name].gather(self._checkpoint, rows)
        with self._encoding:
            return encode(x, self._types[name], self._importance.get(name))
