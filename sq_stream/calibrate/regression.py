"""Linear regression on activations, trusted as far as it holds for text that it was not fitted to."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sq_stream.calibrate.sketch import Sketch

Array = NDArray[np.float32]

PANEL = 256  # rows that are solved for together
DAMPING = 0.01  # of the mean diagonal, added to the diagonal


def shrunk_regression(sketch: Sketch, fitted: Array, held: Array) -> Array:
    """Coefficients of y on x, each direction of x explaining y as far as other text confirms.

    In the coordinates z = L⁻¹ x, E[x xᵀ] = L Lᵀ, all directions are alike. Along each, the fit says that E[y z] is c,
    and the other text that it is d. Of c the share c·d / c·c is kept, from 0 to 1: the noise of both has no part in it.
    Otherwise a fit explains some of y by chance, having so many directions, and a chain of fits to the same text ever
    more of it.

    Args:
        sketch: of x: exact.
        fitted: mean of y xᵀ over the tokens of the fit, float32 [n_out, n_in].
        held: the same over other tokens.

    Returns:
        float32 [n_out, n_in].
    """
    a = sketch.dense()
    a[np.diag_indices(len(a))] += np.float32(DAMPING) * (a.trace() / len(a) or np.float32(1))
    lower = np.linalg.cholesky(a)
    del a
    along, held_along = (_solve(lower, np.array(y.T, order="C")) for y in (fitted, held))  # [n_in, n_out]
    confirmed = np.einsum("ij,ij->i", along, held_along, dtype=np.float64)
    energy = np.einsum("ij,ij->i", along, along, dtype=np.float64)
    share = np.divide(confirmed, energy, out=np.zeros_like(energy), where=energy > 0)
    along *= np.clip(share, 0, 1)[:, None].astype(np.float32)
    del held_along
    coefficients: Array = np.ascontiguousarray(_solve_transposed(lower, along).T)
    return coefficients


def _solve(lower: Array, y: Array) -> Array:
    """L⁻¹ y in the place of y [n, m], without the copies in float64 that NumPy makes of all of a matrix."""
    for start in range(0, len(lower), PANEL):
        own = slice(start, start + PANEL)
        y[own] -= lower[own, :start] @ y[:start]
        y[own] = np.linalg.solve(lower[own, own].astype(np.float64), y[own])
    return y


def _solve_transposed(lower: Array, y: Array) -> Array:
    """L⁻ᵀ y in the place of y [n, m]."""
    for start in reversed(range(0, len(lower), PANEL)):
        own, after = slice(start, start + PANEL), slice(start + PANEL, None)
        y[own] -= lower[after, own].T @ y[after]
        y[own] = np.linalg.solve(lower[own, own].T.astype(np.float64), y[own])
    return y


def needed_bytes(n_out: int, n_in: int) -> int:
    """Resident bytes at the peak, of arguments and all: while L is made, in copies of float64, or it is solved with."""
    panels = 8 * PANEL * (n_in + 4 * n_out)
    return 4 * max(8 * n_in**2 + 2 * n_out * n_in, 2 * n_in**2 + 5 * n_out * n_in) + panels
