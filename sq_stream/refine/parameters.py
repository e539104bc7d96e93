"""The parameters of a quantized file on disk: one generation after each round, one chunk for each layer.

Generation 0 is what the file itself holds. Of every later one a layer's chunk has three rows: the parameters, and the
running means of their gradients and of the gradients' squares. The file is not touched, so that a round that was
interrupted can be done again from the generation before it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sq_stream.calibrate.gguf_weights import GGUFWeights
from sq_stream.calibrate.streamed import Chunks
from sq_stream.formats.blocks import F32, BlockType
from sq_stream.formats.gguf_read import GGUFReader
from sq_stream.models.layers import Array
from sq_stream.refine.scales import scales_of, with_scales

ENDS = "ends"
"""The group of the tensors that are in no layer."""
_LAYER = re.compile(r"blk\.\d+")


def group_of(name: str) -> str:
    """The layer of a tensor, as `blk.3`, or `ENDS`."""
    match = _LAYER.match(name)
    return match[0] if match else ENDS


def parameter_shape(name: str, shape: Sequence[int], block_type: BlockType) -> tuple[int, ...]:
    """Of the parameters of a tensor: scales [n_rows, n_blocks, n_scales], or a norm's weights [n]; (0,) of others."""
    if block_type.scales:
        return math.prod(shape[:-1]), shape[-1] // block_type.block_size, len(block_type.scales)
    return tuple(shape) if block_type == F32 and name.endswith("norm.weight") else (0,)


def n_parameters(name: str, shape: Sequence[int], block_type: BlockType) -> int:
    """How many a tensor has."""
    return math.prod(parameter_shape(name, shape, block_type))


class Generations(Chunks):
    """Parameters of the tensors in a GGUF file, with what the optimizer remembers of them.

    Args:
        file: the file, open; what it holds is generation 0.
        folder: where the others are.
        n_layer: layers that have gradients; those of multi-token prediction behind them have none.
    """

    def __init__(self, file: GGUFReader, folder: Path, n_layer: int) -> None:
        super().__init__(folder)
        self.file = file
        groups = {*(f"blk.{i}" for i in range(n_layer)), ENDS}
        own = [tensor for tensor in file.tensors.values() if group_of(tensor.name) in groups]
        shapes = {tensor.name: parameter_shape(tensor.name, tensor.shape, tensor.block_type) for tensor in own}
        self.shapes = {name: shape for name, shape in shapes.items() if math.prod(shape)}

    @property
    def n_parameters(self) -> int:
        """Of all tensors."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    def read(self, generation: int, group: str) -> Array:
        """The parameters of a group, and the means of their gradients and of the squares of these: [3, n].

        Raises:
            LostWorkError: they are missing or damaged.
            StorageError: reading fails.
        """
        names = self._names(group)
        if generation == 0:
            values = np.concatenate([np.zeros(0, np.float32), *map(self._stored, names)])
            return np.stack([values, np.zeros_like(values), np.zeros_like(values)])
        return self.read_array(generation, group, (3, sum(math.prod(self.shapes[name]) for name in names)))

    def write(self, generation: int, group: str, state: Array) -> None:
        """Keep the parameters of a group and the means, [3, n]; raises as `write_array`."""
        self.write_array(generation, group, state)

    def by_name(self, group: str, values: Array) -> dict[str, Array]:
        """The parameters [n] of a group, or gradients of them, by tensor and in their shapes."""
        names = self._names(group)
        ends = np.cumsum([math.prod(self.shapes[name]) for name in names])
        parts = np.split(values, ends[:-1])
        return {name: part.reshape(self.shapes[name]) for name, part in zip(names, parts, strict=True)}

    def _names(self, group: str) -> list[str]:
        """The tensors of a group that have parameters."""
        return [name for name in self.shapes if group_of(name) == group]

    def _stored(self, name: str) -> Array:
        tensor = self.file.tensors[name]
        data = self.file.read_rows(name, 0, tensor.n_rows)
        return (data.view(np.float32) if tensor.block_type == F32 else scales_of(data, tensor.block_type)).reshape(-1)


class RefinedWeights(GGUFWeights):
    """The tensors of a file with the parameters of a generation, scales rounded to fp16 as a file will have them."""

    def __init__(self, generations: Generations, generation: int) -> None:
        super().__init__(generations.file)
        self._generations = generations

        def values(group: str) -> dict[str, Array]:
            return generations.by_name(group, generations.read(generation, group)[0].copy())

        self._values = lru_cache(maxsize=1)(values)

    def data(self, name: str, start: int, stop: int) -> NDArray[np.uint8]:
        """See `GGUFWeights.data`."""
        stored = super().data(name, start, stop)
        if name not in self._generations.shapes:
            return stored
        own, block_type = self._values(group_of(name))[name], self._generations.file.tensors[name].block_type
        return own.view(np.uint8)[None] if block_type == F32 else with_scales(stored, block_type, own[start:stop])
