"""What a model file says of a checkpoint: its GGUF tensors, where their values come from, and its GGUF keys."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from sq_stream.formats.metadata import Entry

Function = Literal["identity", "add_one", "neg_exp"]


class TensorReader(Protocol):
    """The part of a checkpoint that a tensor map reads (see `formats.checkpoint.Checkpoint`)."""

    def read_rows(self, name: str, rows: slice | NDArray[np.int64]) -> NDArray[np.float32]:
        """Rows of tensor `name` seen as a matrix: [all dimensions but the last, the last], a vector being one row."""
        ...


@dataclass(frozen=True, eq=False)
class TensorMap:
    """One GGUF tensor and the checkpoint tensor that it is made of.

    The target row i is source row `row_order[i]` with its columns taken in `column_order`, then `function` applied
    elementwise in float32. A tensor with `values` is computed from the config and has no source.
    """

    name: str  # GGUF name
    shape: tuple[int, ...]  # of the target, row-major: [n_out, n_in] or [n]
    source: str = ""  # Hugging Face name
    source_shape: tuple[int, ...] | None = None  # where it differs from `shape` by dimensions of one value
    row_order: NDArray[np.int64] | None = None  # [n_out]
    column_order: NDArray[np.int64] | None = None  # [n_in]
    function: Function = "identity"
    values: NDArray[np.float32] | None = None

    @property
    def n_in(self) -> int:
        """Values in one row."""
        return self.shape[-1]

    @property
    def n_rows(self) -> int:
        """Rows of the tensor seen as a matrix [n_rows, n_in]."""
        return math.prod(self.shape[:-1])

    def read(self, checkpoint: TensorReader, start: int, stop: int) -> NDArray[np.float32]:
        """Target rows `start` to `stop`: float32 [stop - start, n_in]."""
        return self.gather(checkpoint, slice(start, stop))

    def gather(self, checkpoint: TensorReader, rows: slice | NDArray[np.int64]) -> NDArray[np.float32]:
        """Target rows in a slice or by number, in any order: float32 [n, n_in]."""
        if self.values is not None:
            return self.values.reshape(self.n_rows, self.n_in)[rows]
        x = checkpoint.read_rows(self.source, rows if self.row_order is None else self.row_order[rows])
        if self.column_order is not None:
            x = x.take(self.column_order, axis=1)  # row-major, as plain indexing would not be
        if self.function == "add_one":
            x = x + np.float32(1)
        elif self.function == "neg_exp":
            x = -np.exp(x.astype(np.float64)).astype(np.float32)  # float32 exp differs between machines
        return x


@dataclass(frozen=True, eq=False)
class ModelSpec:
    """A checkpoint as llama.cpp will see it."""

    arch: str  # GGUF architecture: "llama", "qwen35", ...
    n_layer: int  # as llama.cpp counts them: multi-token-prediction layers included when they are kept
    tensors: tuple[TensorMap, ...]
    metadata: tuple[Entry, ...]  # the `<arch>.*` keys; general.* and tokenizer.* come from elsewhere
    n_expert: int = 0
    left_out: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # reason -> checkpoint tensors not converted
    notes: tuple[str, ...] = ()  # where llama.cpp will run the model otherwise than its authors' code: for the user

    @property
    def stored(self) -> ModelSpec:
        """The same model, its tensors taken from its GGUF file as they are there."""
        tensors = tuple(TensorMap(tensor.name, tensor.shape, tensor.name) for tensor in self.tensors)
        return ModelSpec(self.arch, self.n_layer, tensors, self.metadata)


class ModelFile(Protocol):
    """What each module in models/ defines; adding an architecture is adding one such module."""

    ARCHITECTURES: tuple[str, ...]  # names in config.json's "architectures"

    def describe(
        self, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], *, mtp: bool = False
    ) -> ModelSpec:
        """The GGUF model of a checkpoint with this config.json and these tensors.

        Raises:
            BadInputError: a tensor is missing, unexpected or of the wrong shape, or a config value is unusable.
            UnsupportedModelError: the config asks for a variant that is not supported.
            UsageError: `mtp` is asked of a checkpoint without multi-token prediction layers.
        """
        ...
