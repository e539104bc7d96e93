"""Fit the affine grids of Q4_K and Q5_K: an fp16 `d` and `dmin` per super-block, a 6-bit scale and min per block of 32.

A value decodes from its code q in 0..q_max as `scale·q + low`, with `scale = d·sc` and `low = −dmin·m`.

The leaves work on many blocks at once, one in each *lane*: `x[i, j]` is value i of the block in lane j, and lanes 8·b
to 8·b + 7 are super-block b. A sum runs over i in order within its lane: the loop over lanes vectorizes although no sum
is ever reordered, so that a result depends neither on the machine's vectors nor on the neighboring lanes.

Each block starts from its own least-squares fit, rounded to the d and dmin that suit its super-block. The search then
minimizes the exact error, every value rounded anew in each trial, over the pairs (sc, m) around that start; d and dmin
are fitted jointly, by least squares over the super-block.
"""

from __future__ import annotations

import numpy as np

from sq_stream.kernels.floats import FP16_MAX, fp16_bits, fp16_value
from sq_stream.kernels.jit import jit

N_LANES = 128
BLOCK = 32
BLOCKS = 8  # in a super-block
D, DMIN, SC, M = range(4)  # rows of a grid, float32 [4, N_LANES]; the lanes of a super-block have the same d and dmin
W, WQ, WQQ, WR, WRQ, WRR = range(6)  # rows of statistics, float32 [6, N_LANES]: sums over a block, r = x − decoded
X_MAX = np.float32(2.0**27)  # beyond all that can be stored: 65504·63·31

_ZERO = np.float32(0)
_ONE = np.float32(1)
_TWO = np.float32(2)
_SIX_BITS = np.float32(63)
_ROUND = np.float32(2.0**23)  # x + 2²³ − 2²³ is x rounded to the nearest integer, ties to even, for 0 <= x < 2²²
_SMALLEST = np.float32(2.0**-24)  # the least positive fp16
_NEGLIGIBLE = np.float32(2.0**-40)  # a scale below this counts as zero: its reciprocal might overflow
_SINGULAR = np.float32(1e-6)  # relative determinant below which scale and low cannot be told apart
_SPANS = (np.float32(1), np.float32(1.03), np.float32(0.8))  # what the codes span at first, over what the block spans
_SEARCHES = ((-4, 7, 4, 2), (-1, 1, 1, 1))  # arguments of search_grid: wide and every other pair, then all next pairs

_leaf = jit()


@_leaf
def fit_super_blocks(x, w, q_max, grid, codes):
    """Grids and codes with a small Σ w·(x − decoded)² over each super-block.

    Args:
        x: float32 [32, N_LANES], |x| <= X_MAX.
        w: float32 [32, N_LANES], weights from 2⁻³² to 1.
        q_max: float32, the largest code.
        grid: out, float32 [4, N_LANES]; d and dmin are positive fp16 values, sc and m integers in 0..63.
        codes: out, uint8 [32, N_LANES].
    """
    scale, low = np.empty(N_LANES, np.float32), np.empty(N_LANES, np.float32)
    stats = np.empty((6, N_LANES), np.float32)
    fit_blocks(x, w, q_max, scale, low, stats)
    first_grid(scale, low, stats, grid)
    grid_statistics(x, w, q_max, grid, stats)
    for sc_from, sc_to, m_reach, stride in _SEARCHES:
        search_grid(x, w, q_max, sc_from, sc_to, m_reach, stride, grid, stats)
        refit_grid(x, w, q_max, grid, stats)
    write_codes(x, q_max, grid, codes)


@_leaf
def fit_blocks(x, w, q_max, scale, low, stats):
    """Least-squares scale >= 0 and low <= 0 of each block by itself, from the best of three starts.

    Args:
        x: float32 [32, N_LANES].
        w: float32 [32, N_LANES].
        q_max: float32.
        scale: out, float32 [N_LANES].
        low: out, float32 [N_LANES].
        stats: out, float32 [6, N_LANES], as before the last refit.
    """
    smallest, largest = np.zeros(N_LANES, np.float32), x[0].copy()
    for i in range(BLOCK):
        for j in range(N_LANES):
            smallest[j] = min(smallest[j], x[i, j])
            largest[j] = max(largest[j], x[i, j])
    trial_scale, trial_low = np.empty(N_LANES, np.float32), np.empty(N_LANES, np.float32)
    error, trial_error = np.full(N_LANES, np.inf, np.float32), np.empty(N_LANES, np.float32)
    for span in _SPANS:
        for j in range(N_LANES):
            trial_low[j] = smallest[j]
            trial_scale[j] = max(largest[j] - smallest[j], _ZERO) * span / q_max
        block_statistics(x, w, trial_scale, trial_low, q_max, stats)
        refit_blocks(stats, trial_scale, trial_low, trial_error)
        for j in range(N_LANES):
            if trial_error[j] < error[j]:
                error[j], scale[j], low[j] = trial_error[j], trial_scale[j], trial_low[j]
    for _ in range(2):
        block_statistics(x, w, scale, low, q_max, stats)
        refit_blocks(stats, scale, low, error)


@_leaf
def refit_blocks(stats, scale, low, error):
    """Move scale and low to the weighted least squares at the present codes, subject to scale >= 0 and low <= 0.

    Args:
        stats: float32 [6, N_LANES], at scale and low.
        scale: in and out, float32 [N_LANES].
        low: in and out, float32 [N_LANES].
        error: out, float32 [N_LANES], Σ w·r² at these codes after the move.
    """
    for j in range(N_LANES):
        w, wq, wqq, wr, wrq = stats[W, j], stats[WQ, j], stats[WQQ, j], stats[WR, j], stats[WRQ, j]
        determinant = w * wqq - wq * wq
        regular = determinant > _SINGULAR * w * wqq
        move_low = (wqq * wr - wq * wrq) / determinant if regular else _ZERO
        move_low = min(move_low, -low[j])
        move_scale = (wrq - wq * move_low) / wqq if wqq > _ZERO else _ZERO
        move_scale = max(move_scale, -scale[j])
        curvature = wqq * move_scale * move_scale + _TWO * wq * move_scale * move_low + w * move_low * move_low
        error[j] = stats[WRR, j] - _TWO * (wrq * move_scale + wr * move_low) + curvature
        scale[j] += move_scale
        low[j] += move_low


@_leaf
def first_grid(scale, low, stats, grid):
    """Round scale and low of each block, and what the scale lost to the low, to the best d and dmin for a super-block.

    Args:
        scale: float32 [N_LANES].
        low: float32 [N_LANES].
        stats: float32 [6, N_LANES], at or near scale and low; only W, WQ and WQQ count.
        grid: out, float32 [4, N_LANES].
    """
    weight, offset = np.empty(N_LANES, np.float32), np.empty(N_LANES, np.float32)
    for j in range(N_LANES):
        weight[j] = max(stats[WQQ, j] - stats[WQ, j] * stats[WQ, j] / stats[W, j], _ZERO)  # low follows the scale
    for start in range(0, N_LANES, BLOCKS):
        d = _best_step(scale, weight, start)
        for j in range(start, start + BLOCKS):
            grid[D, j], grid[SC, j] = d, _round_clipped(scale[j] / d, _SIX_BITS)
            move_scale = d * grid[SC, j] - scale[j]
            offset[j] = max(stats[WQ, j] * move_scale / stats[W, j] - low[j], _ZERO)
            weight[j] = stats[W, j]
        dmin = _best_step(offset, weight, start)
        for j in range(start, start + BLOCKS):
            grid[DMIN, j], grid[M, j] = dmin, _round_clipped(offset[j] / dmin, _SIX_BITS)


@_leaf
def _best_step(values, weights, start):
    """The fp16 step whose multiples are nearest to one super-block's values >= 0, the largest being 48 to 63 steps."""
    largest = _ZERO
    for j in range(start, start + BLOCKS):
        largest = max(largest, values[j])
    best, best_error = _ZERO, np.float32(np.inf)
    for n in range(63, 47, -1):
        step = _storable(largest / np.float32(n))
        error = _ZERO
        for j in range(start, start + BLOCKS):
            r = values[j] - step * _round_clipped(values[j] / step, _SIX_BITS)
            error += weights[j] * r * r
        if error < best_error:
            best, best_error = step, error
    return best


@_leaf
def search_grid(x, w, q_max, sc_from, sc_to, m_reach, stride, grid, stats):
    """Give each block the best of the pairs (sc, m) around its present one, by exact error.

    The trials are sc + a for a in sc_from..sc_to, each with m = best m at the present codes + b for |b| <= m_reach, and
    a + b divisible by `stride`. `stats` [6, N_LANES] is of the grid on entry, and again on return.
    """
    scale, low, inverse = np.empty(N_LANES, np.float32), np.empty(N_LANES, np.float32), np.empty(N_LANES, np.float32)
    sc, m, best_m = np.empty(N_LANES, np.float32), np.empty(N_LANES, np.float32), np.empty(N_LANES, np.float32)
    old, best, error = grid.copy(), stats[WRR].copy(), np.empty(N_LANES, np.float32)
    for a in range(sc_from, sc_to + 1):
        for j in range(N_LANES):
            sc[j] = min(max(old[SC, j] + np.float32(a), _ZERO), _SIX_BITS)
            scale[j] = grid[D, j] * sc[j]
            inverse[j] = _inverse(scale[j])
            move_scale = scale[j] - grid[D, j] * old[SC, j]
            move_low = (stats[WR, j] - stats[WQ, j] * move_scale) / stats[W, j]
            best_m[j] = old[M, j] - move_low / grid[DMIN, j]
        for b in range(-m_reach, m_reach + 1):
            if (a + b) % stride:
                continue
            for j in range(N_LANES):
                m[j] = _round_clipped(best_m[j] + np.float32(b), _SIX_BITS)
                low[j] = -grid[DMIN, j] * m[j]
            block_errors(x, w, scale, inverse, low, q_max, error)
            for j in range(N_LANES):
                better = error[j] < best[j]
                best[j] = error[j] if better else best[j]
                grid[SC, j] = sc[j] if better else grid[SC, j]
                grid[M, j] = m[j] if better else grid[M, j]
    grid_statistics(x, w, q_max, grid, stats)


@_leaf
def refit_grid(x, w, q_max, grid, stats):
    """Move d and dmin to their joint least squares at the present codes, sc and m, where that lowers the exact error.

    `stats` [6, N_LANES] is of the grid on entry, and again on return.
    """
    trial, trial_stats = grid.copy(), np.empty_like(stats)
    for start in range(0, N_LANES, BLOCKS):
        aa, ab, bb, ar, br = _ZERO, _ZERO, _ZERO, _ZERO, _ZERO  # decoded = d·a + dmin·b with a = sc·q, b = −m
        for j in range(start, start + BLOCKS):
            sc, m = grid[SC, j], grid[M, j]
            aa += sc * sc * stats[WQQ, j]
            ab -= sc * m * stats[WQ, j]
            bb += m * m * stats[W, j]
            ar += sc * stats[WRQ, j]
            br -= m * stats[WR, j]
        determinant = aa * bb - ab * ab
        d, dmin = grid[D, start], grid[DMIN, start]
        if determinant > _SINGULAR * aa * bb:
            d += (bb * ar - ab * br) / determinant
            dmin += (aa * br - ab * ar) / determinant
        elif aa > _ZERO:
            d += ar / aa
        elif bb > _ZERO:
            dmin += br / bb
        d, dmin = _storable(d), _storable(dmin)
        for j in range(start, start + BLOCKS):
            trial[D, j], trial[DMIN, j] = d, dmin
    grid_statistics(x, w, q_max, trial, trial_stats)
    for start in range(0, N_LANES, BLOCKS):
        gain = _ZERO
        for j in range(start, start + BLOCKS):
            gain += stats[WRR, j] - trial_stats[WRR, j]
        if gain > _ZERO:
            for j in range(start, start + BLOCKS):
                grid[D, j], grid[DMIN, j] = trial[D, j], trial[DMIN, j]
                for row in range(len(stats)):
                    stats[row, j] = trial_stats[row, j]


@_leaf
def grid_statistics(x, w, q_max, grid, stats):
    """Statistics of each block on `grid`: out, float32 [6, N_LANES]."""
    block_statistics(x, w, grid[D] * grid[SC], -grid[DMIN] * grid[M], q_max, stats)


@_leaf
def block_statistics(x, w, scale, low, q_max, stats):
    """Sums over each block with every value rounded to `scale·q + low`: out, float32 [6, N_LANES]."""
    inverse = np.empty(N_LANES, np.float32)
    for j in range(N_LANES):
        inverse[j] = _inverse(scale[j])
    stats[:] = _ZERO
    for i in range(BLOCK):
        for j in range(N_LANES):
            above = x[i, j] - low[j]
            q = _round_clipped(above * inverse[j], q_max)
            r = above - scale[j] * q
            wq = w[i, j] * q
            wr = w[i, j] * r
            stats[W, j] += w[i, j]
            stats[WQ, j] += wq
            stats[WQQ, j] += wq * q
            stats[WR, j] += wr
            stats[WRQ, j] += wr * q
            stats[WRR, j] += wr * r


@_leaf
def block_errors(x, w, scale, inverse, low, q_max, error):
    """Σ w·(x − decoded)² of each block with every value rounded to `scale·q + low`: out, float32 [N_LANES]."""
    error[:] = _ZERO
    for i in range(BLOCK):
        for j in range(N_LANES):
            above = x[i, j] - low[j]
            r = above - scale[j] * _round_clipped(above * inverse[j], q_max)
            error[j] += w[i, j] * r * r


@_leaf
def write_codes(x, q_max, grid, codes):
    """Nearest code of each value on `grid`: out, uint8 [32, N_LANES]."""
    for i in range(BLOCK):
        for j in range(N_LANES):
            inverse = _inverse(grid[D, j] * grid[SC, j])
            codes[i, j] = np.uint8(_round_clipped((x[i, j] + grid[DMIN, j] * grid[M, j]) * inverse, q_max))


@jit(inline="always")
def _round_clipped(x, largest):
    return min(max(x, _ZERO), largest) + _ROUND - _ROUND


@jit(inline="always")
def _inverse(scale):
    return _ONE / scale if scale > _NEGLIGIBLE else _ZERO


@_leaf
def _storable(x):
    """The positive fp16 value nearest to x."""
    return fp16_value(fp16_bits(min(max(x, _SMALLEST), FP16_MAX)))
