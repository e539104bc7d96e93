"""Choosing the 6-bit scales and mins of Q4_K and Q5_K by trial, the codes rounded anew with error feedback in each.

A scale decides how every value of its block rounds, so that the objective is rugged in it, and a closed form with codes
held finds only the nearest dip. So each block of 32 tries all pairs around its present one, one pair in each *lane*:
the loop over lanes vectorizes although no sum is ever reordered. Conventions are those of `descent`.
"""

from __future__ import annotations

import numpy as np
from numba import prange

from sq_stream.kernels.jit import jit
from sq_stream.kernels.trials import reciprocal

_ZERO = np.float32(0)
_ONE = np.float32(1)
_SCALE_MAX = np.float32(63)  # of a 6-bit scale or min
_GAIN = np.float32(0.9999)  # of a block's cost, at least, for a change to be more than rounding of the sums
BLOCK = 32
SC_REACH, M_REACH = 8, 4
LANES = (2 * SC_REACH + 1) * (2 * M_REACH + 1)

_leaf = jit()
_driver = jit(parallel=True)


@_driver
def choose_first(x, factor, highest, d, dmin, sc, m):
    """Choose sc and m block after block, as `descent.round_with_feedback` would go on to round with them.

    Args:
        x: float32 [n_rows, 256], wanted values.
        factor: float32 [256, 256], upper triangular U with UᵀU the inverse of the panel's metric.
        highest: float32, the greatest code.
        d: float32 [n_rows]; as is dmin.
        dmin: float32 [n_rows].
        sc: in and out, float32 [n_rows, 8], whole numbers in 0..63; as is m.
        m: in and out, float32 [n_rows, 8].
    """
    n_rows, p = x.shape
    for row in prange(n_rows):
        moved, codes, steps = x[row].copy(), np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
        lanes, work = np.empty((5, LANES), np.float32), np.empty((BLOCK, LANES), np.float32)
        for b in range(p // BLOCK):
            first = b * BLOCK
            wanted, own = moved[first : first + BLOCK], factor[first : first + BLOCK, first : first + BLOCK]
            round_block(wanted, own, d[row] * sc[row, b], -dmin[row] * m[row, b], highest, codes, steps)
            sc[row, b], m[row, b] = best_pair(
                wanted, own, highest, d[row], dmin[row], sc[row, b], m[row, b], codes.mean(), lanes, work
            )
            round_block(wanted, own, d[row] * sc[row, b], -dmin[row] * m[row, b], highest, codes, steps)
            for j in range(BLOCK):
                for k in range(first + BLOCK, p):
                    moved[k] -= steps[j] * factor[first + j, k]


@_driver
def choose_again(rows, gradient, metric, inverse, factor, highest, codes, d, dmin, sc, m, moves):
    """Give each block in turn the codes, sc and m of the best trial while all others stay, if that gains.

    Args:
        rows: int64 [n], those to work on.
        gradient: in and out, float32 [n_rows, 256].
        metric: float32 [256, 256].
        inverse: float32 [8, 32, 32], of the metric's blocks on the diagonal.
        factor: float32 [8, 32, 32], upper triangular U with UᵀU = inverse.
        highest: float32, the greatest code.
        codes: in and out, float32 [n_rows, 256].
        d: float32 [n_rows]; as is dmin.
        dmin: float32 [n_rows].
        sc: in and out, float32 [n_rows, 8], whole numbers in 0..63; as is m.
        m: in and out, float32 [n_rows, 8].
        moves: in and out, float32 [n_rows, 256], grows by the changes of the decoded values.
    """
    p = codes.shape[1]
    for i_row in prange(len(rows)):
        row = rows[i_row]
        g, wanted = gradient[row], np.empty(BLOCK, np.float32)
        new, steps = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
        lanes, work = np.empty((5, LANES), np.float32), np.empty((BLOCK, LANES), np.float32)
        for b in range(p // BLOCK):
            first = b * BLOCK
            old, scale, offset = codes[row, first : first + BLOCK], d[row] * sc[row, b], -dmin[row] * m[row, b]
            cost = _ZERO
            for j in range(BLOCK):
                pull = _ZERO
                for k in range(BLOCK):
                    pull += inverse[b, j, k] * g[first + k]
                cost += pull * g[first + j]
                wanted[j] = scale * old[j] + offset - pull
            new_sc, new_m = best_pair(
                wanted, factor[b], highest, d[row], dmin[row], sc[row, b], m[row, b], old.mean(), lanes, work
            )
            new_scale, new_offset = d[row] * new_sc, -dmin[row] * new_m
            if round_block(wanted, factor[b], new_scale, new_offset, highest, new, steps) >= _GAIN * cost:
                continue
            for j in range(BLOCK):
                move = new_scale * new[j] + new_offset - (scale * old[j] + offset)
                if move != _ZERO:
                    moves[row, first + j] += move
                    for k in range(p):
                        g[k] += move * metric[first + j, k]
            old[:] = new
            sc[row, b], m[row, b] = new_sc, new_m


@_leaf
def best_pair(wanted, factor, highest, d, dmin, sc, m, mean_code, lanes, work):
    """The pair around (sc, m) that costs least when `wanted` [32] is rounded with feedback by `factor` [32, 32].

    With each other scale the min first makes up for what the scale does to the mean code. `lanes` [5, LANES] and
    `work` [32, LANES] are for the trials.
    """
    trial_sc, trial_m, scale, inverse, offset = lanes[0], lanes[1], lanes[2], lanes[3], lanes[4]
    t = 0
    for a in range(-SC_REACH, SC_REACH + 1):
        new_sc = min(max(sc + np.float32(a), _ZERO), _SCALE_MAX)
        shift = np.rint(d * (new_sc - sc) * mean_code / dmin) if dmin != _ZERO else _ZERO
        for b in range(-M_REACH, M_REACH + 1):
            trial_sc[t] = new_sc
            trial_m[t] = min(max(m + shift + np.float32(b), _ZERO), _SCALE_MAX)
            scale[t], offset[t] = d * new_sc, -dmin * trial_m[t]
            inverse[t] = reciprocal(scale[t])
            t += 1
    costs = _trial_costs(wanted, factor, scale, inverse, offset, highest, work)
    best = np.argmin(costs)
    return trial_sc[best], trial_m[best]


@_leaf
def _trial_costs(wanted, factor, scale, inverse, offset, highest, work):
    """Σ step² of `round_block` in each lane: float32 [LANES]."""
    costs = np.zeros(LANES, np.float32)
    for j in range(BLOCK):
        for t in range(LANES):
            work[j, t] = wanted[j]
    for j in range(BLOCK):
        root = _ONE / factor[j, j]
        for t in range(LANES):
            above = work[j, t] - offset[t]
            code = np.rint(min(max(above * inverse[t], _ZERO), highest))
            work[j, t] = (above - scale[t] * code) * root
            costs[t] += work[j, t] * work[j, t]
        for k in range(j + 1, BLOCK):
            for t in range(LANES):
                work[k, t] -= work[j, t] * factor[j, k]
    return costs


@_leaf
def round_block(wanted, factor, scale, offset, highest, codes, steps):
    """Round `wanted` [32] with feedback: fills codes [32] and steps [32] and returns Σ step².

    A step is a column's error over the diagonal of `factor` [32, 32]: its square is what the column adds to e A eᵀ when
    the later columns make up for the error as well as they can.
    """
    moved, cost = wanted.copy(), _ZERO
    inverse = reciprocal(scale)
    for j in range(BLOCK):
        above = moved[j] - offset
        codes[j] = np.rint(min(max(above * inverse, _ZERO), highest))
        steps[j] = (above - scale * codes[j]) / factor[j, j]
        cost += steps[j] * steps[j]
        for k in range(j + 1, BLOCK):
            moved[k] -= steps[j] * factor[j, k]
    return cost
