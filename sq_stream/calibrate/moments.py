"""Second moments of activations, summed over batches: exact, or of low rank where the site is too wide for that.

Beside them, cross moments: how one kind of vectors goes with another.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from sq_stream.calibrate.factor import cholesky, strongest
from sq_stream.calibrate.ordered import InOrder
from sq_stream.calibrate.sketch import PANEL, Factored

Array = NDArray[np.float32]

_SHIFT = 1e-5  # of the largest mean square, added to the diagonal while a sketch is solved for


class Needs(NamedTuple):
    """Bytes of a second moment: of its sums, what every thread adds to that, and what its factoring does."""

    resident: int
    adding: int
    finishing: int


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
    def needs(n_in: int) -> Needs:
        """What a site of `n_in` values needs."""
        width = min(PANEL, n_in)
        return Needs(
            resident=4 * sum(stop * ((stop - 1) % PANEL + 1) for stop in _stops(n_in)),
            adding=4 * (n_in + width) * width,
            finishing=max((4 * n_in + 48 * width) * width, 10 * width * n_in + n_in**2),
        )

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
        self._test = np.empty((n_in, rank), np.float32)
        random = np.random.RandomState(0)
        for rows in _panels(n_in):
            self._test[rows] = random.standard_normal(self._test[rows].shape)
        self._sums = np.zeros((n_in, rank), np.float32)
        self._diagonal = np.zeros(n_in, np.float32)

    @staticmethod
    def needs(n_in: int, rank: int, n: int) -> Needs:
        """What a site of `n_in` values needs where batches are of n activations."""
        return Needs(
            resident=8 * n_in * rank,
            adding=4 * rank * (2 * min(PANEL, n_in) + n),
            finishing=4 * n_in * rank + 32 * rank * (PANEL + rank),
        )

    def add(self, batch: int, x: Array) -> None:
        """See `Moment`."""
        projected = x @ self._test
        for rows in _panels(x.shape[1]):
            part = x[:, rows].T @ projected
            with self._order.turn((id(self), rows.start), batch):
                self._sums[rows] += part
        diagonal = np.einsum("ij,ij->j", x, x)
        with self._order.turn((id(self), "diagonal"), batch):
            self._diagonal += diagonal
            self.n_tokens += len(x)

    def finish(self, energy: float) -> Factored:
        """See `Moment`; all of the rank is kept, whatever the `energy`."""
        mean = np.float32(1 / max(self.n_tokens, 1))
        diagonal = self._diagonal * mean
        _check_finite(diagonal)
        shift = np.float32(_SHIFT) * diagonal.max(initial=np.float32(1e-30))
        y, core = self._sums, np.zeros((self._sums.shape[1],) * 2)
        for rows in _panels(len(y)):
            y[rows] = y[rows] * mean + shift * self._test[rows]
            core += self._test[rows].T.astype(np.float64) @ y[rows]
        factor = np.linalg.cholesky((core + core.T) / 2)
        live = np.flatnonzero(diagonal)
        panels = [np.linalg.solve(factor, y[live[rows]].T).astype(np.float32) for rows in _panels(len(live))]
        return Factored(self.n_tokens, diagonal, panels)


class CrossMoment:
    """The sum of y xᵀ over pairs of vectors y [n_out] and x [n_in], from batches added in order by several threads."""

    def __init__(self, n_out: int, n_in: int, order: InOrder) -> None:
        self._order = order
        self._sums = np.zeros((n_out, n_in), np.float32)

    @staticmethod
    def needs(n_out: int, n_in: int) -> Needs:
        """What a pair of these widths needs."""
        return Needs(resident=4 * n_out * n_in, adding=4 * n_out * min(PANEL, n_in), finishing=0)

    def add(self, batch: int, y: Array, x: Array) -> None:
        """Add the vectors y [n, n_out] and x [n, n_in] of a batch; every batch is added once."""
        for columns in _panels(x.shape[1]):
            part = y.T @ x[:, columns]
            with self._order.turn((id(self), columns.start), batch):
                self._sums[:, columns] += part

    def finish(self) -> Array:
        """The sum, float32 [n_out, n_in].

        Raises:
            FloatingPointError: it is not finite.
        """
        _check_finite(self._sums)
        return self._sums


def _panels(n: int) -> Iterator[slice]:
    """Slices of at most PANEL that cover n."""
    return (slice(start, min(start + PANEL, n)) for start in range(0, n, PANEL))


def _stops(n_in: int) -> list[int]:
    """Ends of the panels."""
    return [*range(PANEL, n_in, PANEL), n_in]


def _check_finite(sums: Array) -> None:
    if not (np.isfinite(sums.max(initial=0)) and np.isfinite(sums.min(initial=0))):
        raise FloatingPointError
