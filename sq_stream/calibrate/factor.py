"""Factors of a second moment that is held as its upper triangle, in panels of columns.

Panel i is [all rows up to its last column, its columns].
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sq_stream.calibrate.sketch import Factored

Array = NDArray[np.float32]

RIDGE = 1e-5
"""Added to the diagonal of the correlation matrix before it is factored; below it, float32 sums are noise."""


def cholesky(panels: list[Array], n_tokens: int) -> Factored:
    """All of the matrix: S is its Cholesky factor, computed in the place of `panels`."""
    diagonal, panels = _live(panels)
    deviation = np.sqrt(diagonal[diagonal > 0])
    for i, panel in enumerate(panels):
        stop, width = panel.shape
        own = slice(stop - width, stop)
        np.divide(panel, deviation[:stop, None] * deviation[own], out=panel)  # correlations
        for above in panels[:i]:
            rows = slice(len(above) - above.shape[1], len(above))
            panel[rows] -= above[: rows.start].T @ panel[: rows.start]
            panel[rows] = np.linalg.solve(above[rows].T.astype(np.float64), panel[rows])
        panel[own] -= panel[: own.start].T @ panel[: own.start]
        panel[own] = _upper_factor(panel[own])
    for panel in panels:
        np.multiply(panel, deviation[len(panel) - panel.shape[1] : len(panel)], out=panel)
    return Factored(n_tokens, diagonal, panels)


def strongest(panels: list[Array], n_tokens: int, energy: float) -> Factored:
    """Rows of S along as many eigenvectors as hold the share `energy` of the trace."""
    diagonal, panels = _live(panels)
    n = sum(p.shape[1] for p in panels)
    a = np.zeros((n, n), np.float32)
    for panel in panels:
        a[: len(panel), len(panel) - panel.shape[1] : len(panel)] = panel
    values, vectors = np.linalg.eigh(a, "U")
    values, vectors = np.maximum(values[::-1], 0), vectors[:, ::-1]
    total = np.cumsum(values, dtype=np.float64)
    rank = int(np.searchsorted(total, energy * total[-1])) + 1 if n else 0
    factor = (np.sqrt(values[:rank]) * vectors[:, :rank]).T
    return Factored(n_tokens, diagonal, [np.ascontiguousarray(factor)])


def _live(panels: list[Array]) -> tuple[Array, list[Array]]:
    """The diagonal of the matrix, and the matrix without the channels where that is zero."""
    own = [p[len(p) - p.shape[1] :] for p in panels]
    diagonal = np.concatenate([np.diag(square) for square in own])
    live = diagonal > 0
    if live.all():
        return diagonal, panels
    rows = [live[: len(p)] for p in panels]
    return diagonal, [p[np.ix_(kept, kept[-p.shape[1] :])] for p, kept in zip(panels, rows, strict=True)]


def _upper_factor(c: Array) -> NDArray[np.float64]:
    """Upper triangular U with UᵀU = c + a ridge, which is raised until c is positive definite."""
    ridge = RIDGE
    while True:
        try:
            factor: NDArray[np.float64] = np.linalg.cholesky(c + ridge * np.eye(len(c))).T
            return factor
        except np.linalg.LinAlgError:
            ridge *= 10
