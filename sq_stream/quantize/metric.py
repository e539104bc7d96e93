"""The metric of a linear's input, A ≈ diag(r) + SᵀS, in the two forms that shaping asks for.

Columns are decided panel by panel. While R are the columns that are still open, errors E of the decided ones are best
made up for by changing the wanted values of R by −E A_dR A_RR⁻¹. With the block factorization A = (I + Q) C (I + Q)ᵀ,
Q strictly upper and C the *conditional* metrics of the panels (what an error there costs when later ones make up for
it), the change of the next panel alone is −E Q_i: the feedback of LDLQ. Descent afterwards needs A_pp and the gradient
E A_:p.

`DenseMetric` holds A [n_in, n_in]; `FactorMetric` never forms it and works from r [n_in] and S [rank, n_in].
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import partial
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from sq_stream.parallel import Workers

Array = NDArray[np.float32]
Double = NDArray[np.float64]

PANEL = 256  # columns decided together: a super-block, or eight blocks of 32
_SMALLEST = 1e-7  # eigenvalue of a conditional metric, as a share of its largest: below it, float32 sums are noise


class Metric(Protocol):
    """A metric whose columns are in the order in which they are decided; panel i is columns panels[i]."""

    panels: Sequence[slice]
    conditional: list[Array]  # the conditional metric C of each panel: float32 [p, p]

    def block(self, i: int) -> Array:
        """A_pp of panel i: float32 [p, p]."""
        ...

    def errors(self, n: int) -> Errors:
        """Errors of n rows, none so far."""
        ...


class Errors(ABC):
    """Errors E [n, n_in] of some rows, decoded − wanted, under a metric."""

    def __init__(self, panels: Sequence[slice], n: int) -> None:
        self._panels = panels
        self._values = np.zeros((n, panels[-1].stop), np.float32)

    @abstractmethod
    def correction(self, i: int) -> Array:
        """What the wanted values of panel i change by, for errors in the panels before it alone: float32 [n, p]."""

    @abstractmethod
    def gradient(self, i: int) -> Array:
        """Columns of panel i of E A: float32 [n, p]."""

    def add(self, i: int, moves: Array) -> None:
        """Let the errors in panel i grow by moves [n, p]."""
        self._values[:, self._panels[i]] += moves

    def objectives(self) -> Double:
        """½ e A eᵀ of each row: [n]."""
        total = np.zeros(len(self._values))
        for i, own in enumerate(self._panels):
            total += np.einsum("ij,ij->i", self.gradient(i), self._values[:, own], dtype=np.float64)
        return total / 2


class DenseMetric:
    """A held as a matrix, of which only the blocks on and above the diagonal are read; −Qᵀ takes the place below.

    Factored from the last panel to the first, in float64 panel by panel, for it is where large numbers cancel.
    """

    def __init__(self, a: Array, panels: Sequence[slice], workers: Workers) -> None:
        self.panels, self.matrix, self.matmul = panels, a, workers.matmul
        self.conditional: list[Array] = []
        for i in reversed(range(len(panels))):
            *above, square = workers.map(partial(self._reduced, i, self._costs(i)), panels[: i + 1])
            conditional, inverse = _positive(square)
            self.conditional.insert(0, conditional.astype(np.float32))
            for panel, block in zip(panels[:i], above, strict=True):
                a[panels[i], panel] = -(block @ inverse).T

    def _costs(self, i: int) -> Double:
        """−C Q_iᵀ of the panels after panel i, which are factored."""
        own, later = self.panels[i], self.panels[i + 1 :]
        costs = [
            c.astype(np.float64) @ self.matrix[panel, own] for c, panel in zip(self.conditional, later, strict=True)
        ]
        return np.vstack([np.empty((0, own.stop - own.start)), *costs])

    def _reduced(self, i: int, costs: Double, above: slice) -> Double:
        """The block of A in the rows `above` and panel i, without what the panels after it explain."""
        own = self.panels[i]
        reduced: Double = self.matrix[above, own] - self.matrix[own.stop :, above].T.astype(np.float64) @ costs
        return reduced

    @staticmethod
    def needed_bytes(n_in: int, threads: int) -> int:
        """Resident bytes at the peak: the matrix, and columns of panels in both precisions."""
        return 4 * n_in**2 + PANEL * n_in * (8 * threads + 24)

    def block(self, i: int) -> Array:
        """A_pp of panel i."""
        return np.ascontiguousarray(self.matrix[self.panels[i], self.panels[i]])

    def errors(self, n: int) -> Errors:
        """Errors of n rows, none so far."""
        return _DenseErrors(self, n)


class _DenseErrors(Errors):
    def __init__(self, metric: DenseMetric, n: int) -> None:
        super().__init__(metric.panels, n)
        self._a, self._matmul = metric.matrix, metric.matmul

    def correction(self, i: int) -> Array:
        own = self._panels[i]
        return self._matmul(self._values[:, : own.start], self._a[own, : own.start].T)

    def gradient(self, i: int) -> Array:
        own = self._panels[i]
        gradient = self._matmul(self._values[:, : own.stop], self._a[: own.stop, own])
        gradient += self._matmul(self._values[:, own.stop :], self._a[own, own.stop :].T)
        return gradient


class FactorMetric:
    """A held as r and S; by Woodbury, Q_i = S_dᵀ G_i with G_i = M⁻¹ S_i C_i⁻¹ [rank, p], M = I + S_R D_R⁻¹ S_Rᵀ.

    R are the panels after i here. All of it in float64, for it is where large numbers cancel.
    """

    def __init__(self, residual: Array, factor: Array, panels: Sequence[slice], workers: Workers) -> None:
        self.panels, self.matmul = panels, workers.matmul
        self.residual, self.factor = residual, factor
        self.conditional: list[Array] = []
        self.feedback: list[Array] = []  # -G
        m = np.eye(len(factor))
        for own in reversed(panels):
            s = factor[:, own].astype(np.float64)
            solved = np.linalg.solve(m, s)
            conditional, inverse = _positive(np.diag(residual[own]) + s.T @ solved)
            self.conditional.insert(0, conditional.astype(np.float32))
            self.feedback.insert(0, -(solved @ inverse).astype(np.float32))
            m += (s / residual[own]) @ s.T

    @staticmethod
    def needed_bytes(n_in: int, rank: int) -> int:
        """Resident bytes at the peak: S and G, C, and work on M."""
        return 8 * n_in * rank + 4 * PANEL * n_in + 32 * rank * (rank + PANEL)

    def block(self, i: int) -> Array:
        """A_pp = D_p + S_pᵀ S_p."""
        s = self.factor[:, self.panels[i]]
        a: Array = np.diag(self.residual[self.panels[i]]) + s.T @ s
        return a

    def errors(self, n: int) -> Errors:
        """Errors of n rows, none so far."""
        return _FactorErrors(self, n)


class _FactorErrors(Errors):
    """Keeps E Sᵀ [n, rank] besides E."""

    def __init__(self, metric: FactorMetric, n: int) -> None:
        super().__init__(metric.panels, n)
        self._metric = metric
        self._projected = np.zeros((n, len(metric.factor)), np.float32)

    def correction(self, i: int) -> Array:
        return self._metric.matmul(self._projected, self._metric.feedback[i])

    def gradient(self, i: int) -> Array:
        own = self._panels[i]
        gradient = self._metric.matmul(self._projected, self._metric.factor[:, own])
        gradient += self._values[:, own] * self._metric.residual[own]
        return gradient

    def add(self, i: int, moves: Array) -> None:
        super().add(i, moves)
        self._projected += self._metric.matmul(moves, self._metric.factor[:, self._panels[i]].T)


def upper_blocks(factor: Array, order: Sequence[NDArray[np.int64]], panels: Sequence[slice], workers: Workers) -> Array:
    """SᵀS with columns order[i] of S in the place panels[i], [n_in, n_in]: only blocks on and above the diagonal."""
    a = np.zeros((factor.shape[1], factor.shape[1]), np.float32)

    def block(pair: tuple[int, int]) -> None:
        i, j = pair
        np.matmul(factor[:, order[i]].T, factor[:, order[j]], out=a[panels[i], panels[j]])

    workers.map(block, [(i, j) for j in range(len(panels)) for i in range(j + 1)])
    return a


def _positive(a: Double) -> tuple[Double, Double]:
    """A symmetric matrix that is positive definite but for rounding, made so, and its inverse."""
    values, vectors = np.linalg.eigh(a)
    values = np.maximum(values, _SMALLEST * values[-1])
    return (vectors * values) @ vectors.T, (vectors / values) @ vectors.T


def panel_factor(conditional: Array) -> Array:
    """Upper triangular U [p, p] with UᵀU = C⁻¹, for `descent.round_with_feedback`."""
    inverse = np.linalg.inv(conditional.astype(np.float64))
    return np.ascontiguousarray(np.linalg.cholesky(inverse).T, np.float32)
