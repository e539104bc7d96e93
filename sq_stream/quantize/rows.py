"""Two-sided shaping: the rows of a linear make up for each other's errors where the predictions cannot tell.

With B the second moment of the gradients that the outputs of a linear get, its errors E cost tr(B E A Eᵀ). The rows are
quantized in groups. What the decided groups d cost is least if all open ones o are off by −B_oo⁻¹ B_od E_d: so a group
is shaped towards what is wanted of it plus its part of that. This is the error feedback of `shape`, from row to row
instead of from column to column. The rows to which the predictions are most sensitive come first: that others
make up for their errors costs less than the reverse.

Source: the Kronecker factors A ⊗ B of the Fisher information are those of K-FAC (arXiv:1503.05671).
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sq_stream.calibrate.sketch import Sketch
from sq_stream.parallel import Workers
from sq_stream.quantize.metric import PANEL, DenseMetric, upper_blocks

if TYPE_CHECKING:
    from sq_stream.quantize.encode import Encoder

Array = NDArray[np.float32]

LEAST_GROUPS = 32
DAMPING = 0.5  # of the mean diagonal, added to the diagonal: gradients say far less of other text than inputs do


class RowFeedback:
    """Encodes one linear group of rows by group of rows.

    Args:
        gradients: statistics of the gradients that its outputs get, [n_out, n_out].
        workers: threads.
    """

    def __init__(self, gradients: Sketch, workers: Workers) -> None:
        self._workers, n_out = workers, gradients.n_in
        self._groups = order_rows(gradients.diagonal())
        bounds = np.cumsum([0, *map(len, self._groups)])
        self._places = [slice(int(a), int(b)) for a, b in pairwise(bounds)]
        b = upper_blocks(gradients.factor, self._groups, self._places, workers)
        b[np.diag_indices(n_out)] += gradients.residual[np.concatenate(self._groups)]
        b[np.diag_indices(n_out)] += np.float32(DAMPING) * (b.trace() / n_out or np.float32(1))
        self._feedback = DenseMetric(b, self._places, workers).matrix  # below the diagonal: −Qᵀ

    def encode(self, wanted: Array, encode: Encoder, decode: Callable[[NDArray[np.uint8]], Array]) -> NDArray[np.uint8]:
        """Blocks [n_out, row_bytes] of the rows `wanted` [n_out, n_in], given how those of some are made and read."""
        blocks, errors = None, np.empty_like(wanted)
        for rows, place in zip(self._groups, self._places, strict=True):
            own = wanted[rows]
            shift = self._workers.matmul(self._feedback[place, : place.start], errors[: place.start])
            packed = encode(own + shift)
            if blocks is None:
                blocks = np.empty((len(wanted), packed.shape[1]), np.uint8)
            blocks[rows] = packed
            np.subtract(decode(packed), own, out=errors[place])
        assert blocks is not None
        return blocks

    @staticmethod
    def needed_bytes(n_out: int, n_in: int, threads: int) -> int:
        """Resident bytes at the peak: B and its factor; what is wanted, errors, blocks; and a group's part of these."""
        width = -(-n_out // number_of_groups(n_out))
        metric = Sketch.needed_bytes(n_out, n_out) + DenseMetric.needed_bytes(n_out, threads)
        return metric + 10 * n_out * n_in + 12 * width * n_in


def order_rows(diagonal: Array) -> list[NDArray[np.int64]]:
    """The rows of each group, in the order in which they are decided: those with the largest gradients first."""
    by_energy = np.argsort(-diagonal, kind="stable")
    return [np.sort(rows) for rows in np.array_split(by_energy, number_of_groups(len(diagonal)))]


def number_of_groups(n_out: int) -> int:
    """Into which the rows are divided: at least 32, of at most 256 rows."""
    return min(n_out, max(LEAST_GROUPS, -(-n_out // PANEL)))
