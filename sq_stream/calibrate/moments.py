"""Second moments of activations, summed over batches: exact, or of low rank where the site is too wide for that."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from sq_stream.calibrate.factor import cholesky, strongest
from sq_stream.calibrate.ordered import InOrder
from sq_stream.calibrate.sketch import Factored

Array = NDArray[np.float32]

PANEL = 1024  # columns of a second moment that are summed at a time
_SHIFT = 1e-5  # of the largest mean square, added to the diagonal while a sketch is solved for


class Moment(Protocol):
    """The sum of x xᵀ over all activations x of one site, from batches added in order by several threads."""

    n_tokens: int

    def add(self, batch: int, x: Array) -> None:
        """Add the activations x [n, n_in] of a batch; every batch is added once."""
        ...

    def finish(self, energy: float) -> Factored:
        """The mean over all tokens as a sketch; uses the sums up.

        Raises:
            FloatingPointError: it is not finite.
        """
        ...


class ExactMoment:
    """All of the matrix: the upper triangle in panels of columns, float32."""

    def __init__(self, n_in: int, order: InOrder) -> None:
        self.n_tokens = 0
        self._order = order
        self._panels = [np.zeros((stop, (stop - 1) % PANEL + 1), np.float32) for stop in _stops(n_in)]

    @staticmethod
    def resident_bytes(n_in: int) -> int:
        """Bytes that stay, for a site of `n_in` values."""
        return 4 * sum(stop * ((stop - 1) % PANEL + 1) for stop in _stops(n_in))

    @staticmethod
    def working_bytes(n_in: int) -> int:
        """Bytes that every thread needs at a time to add a batch."""
        return 4 * n_in * min(PANEL, n_in)

    def add(self, batch: int, x: Array) -> None:
        """See `Moment`."""
        for sums in self._panels:
            stop, width = sums.shape
            own = x[:, stop - width : stop]
            above = x[:, : stop - width].T @ own
            square = own.T @ own
            with self._order.turn((id(self), stop), batch):
                sums[: stop - width] += above
                sums[stop - width :] += square
        with self._order.turn((id(self), "count"), batch):
            self.n_tokens += len(x)

    def finish(self, energy: float) -> Factored:
        """See `Moment`."""
        for sums in self._panels:
            np.divide(sums, np.float32(max(self.n_tokens, 1)), out=sums)
            _check_finite(sums)
        panels, self._panels = self._panels, []
        return strongest(panels, self.n_tokens, energy) if energy < 1 else cholesky(panels, self.n_tokens)


class SketchedMoment:
    """A Nyström sketch of `rank`: A ≈ Y (ΩᵀY)⁻¹ Yᵀ with Y = A Ω for a fixed random Ω [n_in, rank].

    Linear in A, so that batches are added as to the exact matrix, and never more than A; the diagonal is kept exactly.
    Source: Tropp, Yurtsever, Udell, Cevher, "Fixed-rank approximation of a positive-semidefinite matrix from streaming
    data" (arXiv:1706.05736), algorithm 3; in practice far more accurate than Frequent Directions of the same size.
    """

    def __init__(self, n_in: int, rank: int, order: InOrder) -> None:
        self.n_tokens = 0
        self._order = order
        self._test = np.random.RandomState(0).standard_normal((n_in, rank)).astype(np.float32)
        self._sums = np.zeros((n_in, rank), np.float32)
        self._diagonal = np.zeros(n_in, np.float32)

    @staticmethod
    def resident_bytes(n_in: int, rank: int) -> int:
        """Bytes that stay; the test matrix is drawn in float64."""
        return 16 * n_in * rank

    @staticmethod
    def working_bytes(n_in: int, rank: int) -> int:
        """Bytes that every thread needs at a time to add a batch."""
        return 4 * n_in * rank

    def add(self, batch: int, x: Array) -> None:
        """See `Moment`."""
        part = x.T @ (x @ self._test)
        diagonal = np.einsum("ij,ij->j", x, x)
        with self._order.turn(id(self), batch):
            self._sums += part
            self._diagonal += diagonal
            self.n_tokens += len(x)

    def finish(self, energy: float) -> Factored:
        """See `Moment`; all of the rank is kept, whatever the `energy`."""
        mean = np.float32(1 / max(self.n_tokens, 1))
        diagonal = self._diagonal * mean
        _check_finite(diagonal)
        shift = np.float32(_SHIFT) * diagonal.max(initial=np.float32(1e-30))
        y = self._sums * mean + shift * self._test
        core = self._test.T.astype(np.float64) @ y
        factor = np.linalg.cholesky((core + core.T) / 2)
        s = np.linalg.solve(factor, y[diagonal > 0].T).astype(np.float32)  # [rank, n_live]
        return Factored(self.n_tokens, diagonal, [s])


def _stops(n_in: int) -> list[int]:
    """Ends of the panels."""
    return [*range(PANEL, n_in, PANEL), n_in]


def _check_finite(sums: Array) -> None:
    if not (np.isfinite(sums.max(initial=0)) and np.isfinite(sums.min(initial=0))):
        raise FloatingPointError
