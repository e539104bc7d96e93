"""How much of a linear's output the errors in its weights are, measured on the blocks that a file holds."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sq_stream.calibrate.sketch import Sketch
from sq_stream.formats.blocks import BlockType
from sq_stream.parallel import Workers
from sq_stream.quantize.smooth import Scaling

Array = NDArray[np.float32]


@dataclass(frozen=True)
class OutputError:
    """Error energies of a tensor W [n_out, n_in] relative to the energy of its outputs, tr(E A Eᵀ) / tr(W A Wᵀ).

    A is what is known of the inputs: their second moment (basis `outputs`), its diagonal (`importance`), or nothing,
    and then it is the identity (`weights`).
    """

    basis: str
    energy: float  # tr(W A Wᵀ)
    plain: float  # of rounding each weight as well as possible
    stored: float  # of what is in the file


class ErrorMeter:
    """Sums up the error of one tensor from row tiles.

    Args:
        block_type: of the blocks.
        sketch: of the inputs, before smoothing; None if there is none.
        scaling: what the tensor was multiplied by before it was encoded.
        workers: threads.
    """

    def __init__(self, block_type: BlockType, sketch: Sketch | None, scaling: Scaling, workers: Workers) -> None:
        known = sketch is not None and sketch.n_tokens > 0
        self._type, self._sketch, self._scaling = block_type, sketch if known else None, scaling
        self._matmul = workers.matmul
        self._energy = self._plain = self._stored = 0.0

    def add(self, w: Array, blocks: NDArray[np.uint8], rows: slice) -> None:
        """Add `rows` of the source, w [n, n_in], and the `blocks` [n, row_bytes] that stand for them in the file."""
        from sq_stream.kernels.codec import decode, encode

        self._energy += self._output_energy(w)
        x = self._scaling.undo(decode(blocks, self._type), rows)
        x -= w
        stored = self._output_energy(x)
        self._stored += stored
        if self._sketch is None:  # nothing but the weights was known: they are rounded plainly in the file too
            self._plain += stored
            return
        x = decode(encode(w, self._type), self._type)
        x -= w
        self._plain += self._output_energy(x)

    def result(self) -> OutputError:
        """The error of all rows added."""
        scale = self._energy or 1.0
        return OutputError(self.basis, self._energy, self._plain / scale, self._stored / scale)

    @property
    def basis(self) -> str:
        """What the error is measured on."""
        if self._sketch is None:
            return "weights"
        return "outputs" if self._sketch.rank else "importance"

    def _output_energy(self, x: Array) -> float:
        """tr(X A Xᵀ) with A = diag(r) + SᵀS."""
        if self._sketch is None:
            return float(np.einsum("ij,ij->", x, x, dtype=np.float64))
        projected = self._matmul(x, self._sketch.factor.T)  # [n, rank]
        squares = np.einsum("ij,ij->j", x, x, dtype=np.float64)  # [n_in]
        return float(squares @ self._sketch.residual + np.einsum("ij,ij->", projected, projected, dtype=np.float64))
