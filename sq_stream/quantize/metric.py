"""The metric of a linear's input, A ≈ diag(r) + SᵀS, in the two forms that shaping asks for.

Columns are decided panel by panel. With `e` the errors of a panel that has just been rounded and the later columns R
still free, the best correction of those is −e A_pR A_RR⁻¹, and what then remains to be paid for is e C eᵀ with the
*conditional* metric C = A_pp − A_pR A_RR⁻¹ A_Rp. Descent afterwards needs A_pp and the gradient E A_:p.

`DenseMetric` holds A [n_in, n_in]; `FactorMetric` never forms it and works from r [n_in] and S [rank, n_in].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from sq_stream.parallel import Workers

Array = NDArray[np.float32]


class Metric(Protocol):
    """A metric whose columns are in the order in which they are decided; panel i is columns panels[i]."""

    panels: Sequence[slice]

    def conditional(self, i: int) -> Array:
        """The conditional metric C of panel i: float32 [p, p]."""
        ...

    def correction(self, i: int, errors: Array) -> Array:
        """What the wanted values of the columns after panel i change by, for errors [n, p] (wanted − decoded) in it."""
        ...

    def block(self, i: int) -> Array:
        """A_pp of panel i: float32 [p, p]."""
        ...

    def gradient(self, i: int, errors: Array) -> Array:
        """Columns of panel i of E A, for errors E [n, n_in] (decoded − wanted): float32 [n, p]."""
        ...


class DenseMetric:
    """A held as a matrix."""

    def __init__(self, a: Array, panels: Sequence[slice], workers: Workers) -> None:
        self.panels = panels
        self._matmul = workers.matmul
        self._a = a
        upper = _inverse_factor(a.astype(np.float64))
        self._conditional: list[Array] = []
        self._onward: list[Array] = []
        for own in panels:
            inverse = np.linalg.inv(upper[own, own])
            self._conditional.append((inverse @ inverse.T).astype(np.float32))
            self._onward.append((-inverse @ upper[own, own.stop :]).astype(np.float32))

    def conditional(self, i: int) -> Array:
        """The conditional metric C of panel i, from its diagonal block of the factor of A⁻¹."""
        return self._conditional[i]

    def correction(self, i: int, errors: Array) -> Array:
        """What the wanted values of the columns after panel i change by."""
        return self._matmul(errors, self._onward[i])

    def block(self, i: int) -> Array:
        """A_pp of panel i."""
        return np.ascontiguousarray(self._a[self.panels[i], self.panels[i]])

    def gradient(self, i: int, errors: Array) -> Array:
        """Columns of panel i of E A."""
        return self._matmul(errors, self._a[:, self.panels[i]])


class FactorMetric:
    """A held as r and S; by Woodbury, A_pR A_RR⁻¹ = S_pᵀ M⁻¹ S_R D_R⁻¹ with M = I + S_R D_R⁻¹ S_Rᵀ [rank, rank].

    `_left[i]` is S_pᵀ M⁻¹ of panel i: in float64 until then, for it is where large numbers cancel.
    """

    def __init__(self, residual: Array, factor: Array, panels: Sequence[slice], workers: Workers) -> None:
        self.panels = panels
        self._matmul = workers.matmul
        self._r, self._s = residual, factor
        self._left: list[Array] = []
        m = np.eye(len(factor))
        for own in reversed(panels):
            s = factor[:, own].astype(np.float64)
            self._left.insert(0, np.linalg.solve(m, s).T.astype(np.float32))
            m += (s / residual[own]) @ s.T

    def conditional(self, i: int) -> Array:
        """C = D_p + S_pᵀ M⁻¹ S_p."""
        own = self.panels[i]
        c: Array = np.diag(self._r[own]) + self._left[i] @ self._s[:, own]
        return c

    def correction(self, i: int, errors: Array) -> Array:
        """(errors S_pᵀ M⁻¹) S_R D_R⁻¹."""
        later = slice(self.panels[i].stop, None)
        return self._matmul(self._matmul(errors, self._left[i]), self._s[:, later] / self._r[later])

    def block(self, i: int) -> Array:
        """A_pp = D_p + S_pᵀ S_p."""
        own = self._s[:, self.panels[i]]
        a: Array = np.diag(self._r[self.panels[i]]) + own.T @ own
        return a

    def gradient(self, i: int, errors: Array) -> Array:
        """E_:p D_p + (E Sᵀ) S_p."""
        own = self.panels[i]
        return errors[:, own] * self._r[own] + self._matmul(self._matmul(errors, self._s.T), self._s[:, own])


def _inverse_factor(a: NDArray[np.float64]) -> NDArray[np.float64]:
    """Upper triangular U with UᵀU = A⁻¹, for a positive definite A."""
    upper: NDArray[np.float64] = np.linalg.cholesky(np.linalg.inv(a)).T
    return upper


def panel_factor(conditional: Array) -> Array:
    """Upper triangular U [p, p] with UᵀU = C⁻¹, for `descent.round_with_feedback`."""
    return np.ascontiguousarray(_inverse_factor(conditional.astype(np.float64)), np.float32)
