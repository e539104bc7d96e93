"""Error feedback and descent as a reader can check them, one row at a time, in float64."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def nearest(x: float, scale: float, offset: float, lowest: int, highest: int) -> float:
    return 0.0 if scale == 0 else float(np.clip(np.rint((x - offset) / scale), lowest, highest))


def round_with_feedback(w: Array, a: Array, scale: Array, offset: Array, lowest: int, highest: int) -> Array:
    """Codes [n] for one row w [n]; scale and offset [n] by column.

    Before each column is rounded, it and all later ones are moved to where the whole row's objective
    (v − w) A (v − w)ᵀ is least, given the columns v already rounded.
    """
    n, codes, error = len(w), np.zeros(len(w)), np.zeros(len(w))
    for j in range(n):
        free = slice(j, n)
        best = w[free] - np.linalg.solve(a[free, free], a[free, :j] @ error[:j])
        codes[j] = nearest(best[0], scale[j], offset[j], lowest, highest)
        error[j] = scale[j] * codes[j] + offset[j] - w[j]
    return codes


def descend_codes(codes: Array, w: Array, a: Array, scale: Array, offset: Array, lowest: int, highest: int) -> Array:
    """Codes [n] after one sweep in which each in turn gets its best value of all there are."""
    codes = codes.copy()
    for j in range(len(w)):
        costs = []
        for code in range(lowest, highest + 1):
            codes[j] = code
            error = scale * codes + offset - w
            costs.append(error @ a @ error)
        codes[j] = lowest + int(np.argmin(costs))
    return codes
