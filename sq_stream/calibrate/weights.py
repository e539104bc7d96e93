"""Weights for the forward pass, one layer at a time or row tile by row tile, from a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sq_stream.calibrate.sketches import is_linear
from sq_stream.formats.checkpoint import check_finite
from sq_stream.models.base import ModelSpec, TensorMap, TensorReader
from sq_stream.models.forward import layer_names
from sq_stream.models.layers import TILE_WEIGHTS, Array


@dataclass(frozen=True, eq=False)
class RowsOnDisk:
    """A matrix of the checkpoint that is read whenever rows of it are asked for."""

    tensor: TensorMap
    checkpoint: TensorReader

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows and columns."""
        return self.tensor.shape

    def __getitem__(self, rows: slice) -> Array:
        x = self.tensor.read(self.checkpoint, rows.start, rows.stop)
        check_finite(x, self.tensor.source, rows.start)
        return x


@dataclass(frozen=True, eq=False)
class Zeros:
    """A matrix of zeros that takes neither memory nor time: what it is multiplied with becomes zero."""

    shape: tuple[int, ...]

    @property
    def T(self) -> Zeros:
        """The transpose."""
        return Zeros(self.shape[::-1])

    def __getitem__(self, rows: slice) -> Zeros:
        return Zeros((len(range(*rows.indices(self.shape[0]))), self.shape[1]))

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, out: tuple[Array]) -> Array:
        out[0][:] = 0
        return out[0]


class LayerReader:
    """The tensors of a checkpoint by GGUF name, given out for one layer at a time."""

    def __init__(self, spec: ModelSpec, checkpoint: TensorReader) -> None:
        self._tensors = {tensor.name: tensor for tensor in spec.tensors}
        self._checkpoint = checkpoint

    @property
    def names(self) -> Iterable[str]:
        """All GGUF names."""
        return self._tensors.keys()

    @property
    def n_vocab(self) -> int:
        """Rows of the token embedding."""
        return self._tensors["token_embd.weight"].n_rows

    @property
    def n_embd(self) -> int:
        """Values of the residual stream."""
        return self._tensors["token_embd.weight"].n_in

    def shapes(self, i: int) -> dict[str, tuple[int, ...]]:
        """Shapes of layer i's tensors, by name without `blk.N.`."""
        return {short: self._tensors[name].shape for short, name in layer_names(self._tensors, i).items()}

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor."""
        return self._tensors[name].shape

    def on_disk(self, name: str) -> RowsOnDisk:
        """A matrix whose rows are read when they are asked for."""
        return RowsOnDisk(self._tensors[name], self._checkpoint)

    def read(self, name: str) -> Array:
        """A whole tensor in its shape.

        Raises:
            BadInputError: it holds NaN or Inf.
            StorageError: reading fails.
        """
        tensor = self._tensors[name]
        x = tensor.read(self._checkpoint, 0, tensor.n_rows)
        check_finite(x, tensor.source or name)
        return x.reshape(tensor.shape)

    def layer(self, i: int, *, resident: bool) -> dict[str, Any]:
        """Layer i's tensors by name without `blk.N.`."""
        names = layer_names(self._tensors, i)
        return {short: self.tensor(name, resident=resident) for short, name in names.items()}

    def tensor(self, name: str, *, resident: bool) -> Any:
        """A whole tensor, in memory; if not all are to be `resident`, a large matrix as `RowsOnDisk`."""
        return self.read(name) if resident or not is_large(self._tensors[name].shape) else self.on_disk(name)

    def rows(self, name: str, numbers: NDArray[np.integer[Any]]) -> Array:
        """Rows of a matrix, for row numbers [...] in any order and with repetitions: float32 [..., n_in]."""
        unique, place = np.unique(numbers, return_inverse=True)
        x = self._tensors[name].gather(self._checkpoint, unique.astype(np.int64))
        for k in np.flatnonzero(~np.isfinite(x).all(axis=1)):
            check_finite(x[k : k + 1], self._tensors[name].source, int(unique[k]))
        rows: Array = x[place.reshape(numbers.shape)]
        return rows


def zeros(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Tensors of zeros in the shapes given."""
    return {
        name: Zeros(shape) if is_linear(name, shape) else np.zeros(shape, np.float32) for name, shape in shapes.items()
    }


def is_large(shape: tuple[int, ...]) -> bool:
    """Whether a tensor is a matrix of more than one tile, which need not be in memory as a whole."""
    return len(shape) == 2 and shape[0] * shape[1] > TILE_WEIGHTS
