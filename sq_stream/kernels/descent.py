"""Choosing codes under a full metric: rounding with error feedback, then coordinate descent.

All leaves work on one *panel*, the columns that are decided together: rows [n_rows, p] of the matrix, p at most 256.
A value with code q decodes to `scale·q + offset`, scale and offset belonging to its group of columns. The objective of
a row is ½ e A eᵀ with e = decoded − wanted; `gradient` is e A, kept up to date as codes and scales move.

Sources: error feedback is LDLQ of QuIP (arXiv:2307.13304), which is the update of GPTQ (arXiv:2210.17323); descent on
codes with a running gradient is that of QuantEase (arXiv:2309.01885).
"""

from __future__ import annotations

import numpy as np
from numba import prange

from sq_stream.kernels.jit import jit

_ZERO = np.float32(0)
_HALF = np.float32(0.5)

_leaf = jit()
_driver = jit(parallel=True)


@_leaf
def nearest_code(x, scale, offset, lowest, highest):
    """The code (float32, whole) whose value is nearest to x; 0, as far as the range has it, where the scale is 0."""
    code = np.rint((x - offset) / scale) if scale != _ZERO else _ZERO
    return min(max(code, lowest), highest)


@_driver
def round_with_feedback(x, scale, offset, group, factor, lowest, highest, codes):
    """Round column after column, moving what is still to come so that it makes up for the error so far.

    Args:
        x: in, float32 [n_rows, p], wanted values; out, what rounding left over: wanted − decoded of each column as it
            was wanted before this panel was begun.
        scale: float32 [n_rows, n_groups].
        offset: float32 [n_rows, n_groups].
        group: int64 [p], each column's group.
        factor: float32 [p, p], upper triangular U with UᵀU the inverse of the panel's metric.
        lowest: float32, the least code.
        highest: float32, the greatest.
        codes: out, float32 [n_rows, p].
    """
    n_rows, p = x.shape
    for row in prange(n_rows):
        moved = x[row].copy()
        for j in range(p):
            s, o = scale[row, group[j]], offset[row, group[j]]
            code = nearest_code(moved[j], s, o, lowest, highest)
            codes[row, j] = code
            value = s * code + o
            step = (moved[j] - value) / factor[j, j]
            x[row, j] -= value
            for k in range(j + 1, p):
                moved[k] -= step * factor[j, k]


@_driver
def descend_codes(rows, gradient, metric, scale, offset, group, lowest, highest, codes, moves):
    """Give every code in turn the value that is best while all others stay.

    Args:
        rows: int64 [n], those to work on.
        gradient: in and out, float32 [n_rows, p].
        metric: float32 [p, p], the panel's block of A.
        scale: float32 [n_rows, n_groups].
        offset: float32 [n_rows, n_groups].
        group: int64 [p].
        lowest: float32.
        highest: float32.
        codes: in and out, float32 [n_rows, p].
        moves: in and out, float32 [n_rows, p], grows by the changes of the decoded values.
    """
    p = codes.shape[1]
    for i_row in prange(len(rows)):
        row = rows[i_row]
        g = gradient[row]
        for j in range(p):
            s = scale[row, group[j]]
            if s == _ZERO or metric[j, j] <= _ZERO:
                continue
            code = np.rint(codes[row, j] - g[j] / (metric[j, j] * s))
            code = min(max(code, lowest), highest)
            if code != codes[row, j]:
                move = s * (code - codes[row, j])
                codes[row, j] = code
                moves[row, j] += move
                for k in range(p):
                    g[k] += move * metric[j, k]


@_leaf
def times_metric(direction, metric, first, out):
    """Fill out [p] with metric · v, v being `direction` [n] in the columns from `first` on and zero elsewhere."""
    out[:] = _ZERO
    for i in range(len(direction)):
        if direction[i] != _ZERO:
            for k in range(len(out)):
                out[k] += direction[i] * metric[first + i, k]


@_leaf
def dot(a, b, first):
    """Σ a[i] b[first + i] over all i of a."""
    total = _ZERO
    for i in range(len(a)):
        total += a[i] * b[first + i]
    return total


@_leaf
def step_cost(g_s, g_o, h_ss, h_so, h_oo, s, o):
    """Change of the objective when a scale moves by s and an offset by o."""
    return g_s * s + g_o * o + _HALF * (h_ss * s * s + h_oo * o * o) + h_so * s * o
