"""Descent on the stored scales of a panel under a full metric, codes held: the companions of `descent.descend_codes`.

Objective, panel and arguments are those of `descent`. Along the direction in which a scale moves the decoded values
the objective is a parabola, so each best move is in closed form, and is then rounded to what is stored.
"""

from __future__ import annotations

import numpy as np
from numba import prange

from sq_stream.kernels.descent import dot, step_cost, times_metric
from sq_stream.kernels.floats import FP16_MAX, fp16_bits, fp16_value
from sq_stream.kernels.jit import jit

_ZERO = np.float32(0)
_SINGULAR = np.float32(1e-6)

_leaf = jit()
_driver = jit(parallel=True)


@_driver
def rescale_affine(rows, gradient, metric, codes, d, dmin, sc, m, moves):
    """Improve d and dmin of each super-block of Q4_K or Q5_K.

    Args:
        rows: int64 [n], those to work on.
        gradient: in and out, float32 [n_rows, 256].
        metric: float32 [256, 256].
        codes: float32 [n_rows, 256].
        d: in and out, float32 [n_rows], fp16 values; as is dmin.
        dmin: in and out, float32 [n_rows].
        sc: float32 [n_rows, 8], whole numbers in 0..63; as is m.
        m: float32 [n_rows, 8].
        moves: in and out, float32 [n_rows, 256].
    """
    p = codes.shape[1]
    size = p // sc.shape[1]
    for i_row in prange(len(rows)):
        row = rows[i_row]
        pull = np.empty((2, p), np.float32)
        along, across = np.empty(p, np.float32), np.empty(p, np.float32)  # of the values, by d and by dmin
        for i in range(p):
            along[i], across[i] = sc[row, i // size] * codes[row, i], -m[row, i // size]
        parabola = _parabola(gradient[row], metric, along, across, 0, pull)
        new_d, new_dmin = _best_fp16(parabola, d[row], dmin[row])
        _move(gradient[row], moves[row], new_d - d[row], new_dmin - dmin[row], along, across, 0, pull)
        d[row], dmin[row] = new_d, new_dmin


@_driver
def rescale_scaled(rows, gradient, metric, codes, d, sc, moves):
    """Improve sc of each block of 16, then d of each super-block, of Q6_K.

    Args:
        rows: int64 [n], those to work on.
        gradient: in and out, float32 [n_rows, 256].
        metric: float32 [256, 256].
        codes: float32 [n_rows, 256].
        d: in and out, float32 [n_rows], fp16 values.
        sc: in and out, float32 [n_rows, 16], whole numbers in -128..127.
        moves: in and out, float32 [n_rows, 256].
    """
    p = codes.shape[1]
    size = p // sc.shape[1]
    for i_row in prange(len(rows)):
        row = rows[i_row]
        pull = np.empty((2, p), np.float32)
        for b in range(sc.shape[1]):
            along, none = codes[row, b * size : (b + 1) * size], np.zeros(size, np.float32)
            g, _, h, _, _ = _parabola(gradient[row], metric, along, none, b * size, pull)
            if d[row] != _ZERO and h > _ZERO:
                new_sc = min(max(np.rint(sc[row, b] - g / (h * d[row])), np.float32(-128)), np.float32(127))
                _move(gradient[row], moves[row], d[row] * (new_sc - sc[row, b]), _ZERO, along, none, b * size, pull)
                sc[row, b] = new_sc
        along, none = np.empty(p, np.float32), np.zeros(p, np.float32)
        for i in range(p):
            along[i] = sc[row, i // size] * codes[row, i]
        parabola = _parabola(gradient[row], metric, along, none, 0, pull)
        new_d, _ = _best_fp16(parabola, d[row], _ZERO)
        _move(gradient[row], moves[row], new_d - d[row], _ZERO, along, none, 0, pull)
        d[row] = new_d


@_driver
def rescale_blocks(rows, gradient, metric, codes, d, offset, has_offset, moves):
    """Improve the fp16 d, and the fp16 offset if there is one, of each block of 32 of Q8_0, Q5_0 or Q5_1.

    Args:
        rows: int64 [n], those to work on.
        gradient: in and out, float32 [n_rows, p].
        metric: float32 [p, p].
        codes: float32 [n_rows, p].
        d: in and out, float32 [n_rows, p / 32], fp16 values; as is offset.
        offset: in and out, float32 [n_rows, p / 32].
        has_offset: bool; without, offset stays 0.
        moves: in and out, float32 [n_rows, p].
    """
    p = codes.shape[1]
    size = p // d.shape[1]
    for i_row in prange(len(rows)):
        row = rows[i_row]
        pull = np.empty((2, p), np.float32)
        for b in range(d.shape[1]):
            along, across = codes[row, b * size : (b + 1) * size], np.full(size, np.float32(has_offset), np.float32)
            parabola = _parabola(gradient[row], metric, along, across, b * size, pull)
            new_d, new_offset = _best_fp16(parabola, d[row, b], offset[row, b])
            s, o = new_d - d[row, b], new_offset - offset[row, b]
            _move(gradient[row], moves[row], s, o, along, across, b * size, pull)
            d[row, b], offset[row, b] = new_d, new_offset


@_leaf
def _parabola(gradient, metric, along, across, first, pull):
    """Slopes and curvatures of the objective along two directions of the columns from `first` on, for `step_cost`.

    Fills pull [2, p] with what a unit step along each adds to the gradient.
    """
    times_metric(along, metric, first, pull[0])
    times_metric(across, metric, first, pull[1])
    return (
        dot(along, gradient, first),
        dot(across, gradient, first),
        dot(along, pull[0], first),
        dot(across, pull[0], first),
        dot(across, pull[1], first),
    )


@_leaf
def _move(gradient, moves, s, o, along, across, first, pull):
    """Step by s and o along the two directions."""
    if s != _ZERO or o != _ZERO:
        for i in range(len(along)):
            moves[first + i] += s * along[i] + o * across[i]
        for k in range(len(gradient)):
            gradient[k] += s * pull[0, k] + o * pull[1, k]


@_leaf
def _best_fp16(parabola, s, o):
    """fp16 values near the minimum of the parabola in scale and offset; s and o themselves if these are no better."""
    g_s, g_o, h_ss, h_so, h_oo = parabola
    new_s, new_o = s, o
    determinant = h_ss * h_oo - h_so * h_so
    if determinant > _SINGULAR * h_ss * h_oo:
        new_s = _to_fp16(s - (h_oo * g_s - h_so * g_o) / determinant)
        new_o = _to_fp16(o - (h_ss * g_o - h_so * g_s) / determinant)
    elif h_ss > _ZERO:
        new_s = _to_fp16(s - g_s / h_ss)
    if step_cost(g_s, g_o, h_ss, h_so, h_oo, new_s - s, new_o - o) < _ZERO:
        return new_s, new_o
    return s, o


@_leaf
def _to_fp16(x):
    return fp16_value(fp16_bits(min(max(np.float32(x), -FP16_MAX), FP16_MAX)))
