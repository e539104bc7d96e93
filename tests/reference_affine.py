"""The fit of Q4_K and Q5_K in plain NumPy, as a formula to check by eye: equal to the kernels bit for bit.

All arrays are float32; a block's quantities are [n, 8], its values [n, 8, 32], a super-block's quantities [n, 1].
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]


@dataclass
class Grid:
    """Decoding is d·sc·q − dmin·m."""

    d: Array
    dmin: Array
    sc: Array
    m: Array

    @property
    def scale(self) -> Array:
        return self.d * self.sc

    @property
    def low(self) -> Array:
        return -self.dmin * self.m

    def decode(self, codes: Array) -> Array:
        return self.scale[..., None] * codes - (self.dmin * self.m)[..., None]


def fit(x: Array, w: Array, q_max: int) -> tuple[Grid, Array]:
    """The grid of super-blocks x [n, 8, 32] with weights w, and the codes [n, 8, 32]."""
    grid = round_to_grid(*fit_blocks(x, w, q_max))
    for offsets in (checkerboard(range(-4, 8), range(-4, 5)), neighbors()):
        grid = search(x, w, q_max, grid, offsets)
        grid = refit(x, w, q_max, grid)
    return grid, nearest_codes(x, grid.scale, grid.low, q_max)


def checkerboard(sc: range, m: range) -> list[tuple[int, int]]:
    return [(a, b) for a in sc for b in m if (a + b) % 2 == 0]


def neighbors() -> list[tuple[int, int]]:
    return [(a, b) for a in (-1, 0, 1) for b in (-1, 0, 1)]


def fit_blocks(x: Array, w: Array, q_max: int) -> tuple[Array, Array, Statistics]:
    """Each block's own least-squares scale and low: refitted once from three starts, the best of them twice more."""
    smallest = np.minimum(x.min(-1), 0)
    span = np.maximum(x.max(-1) - smallest, 0)
    scale, low, error = span, smallest, np.full_like(span, np.inf)
    for part in (1, 1.03, 0.8):
        s = statistics(x, w, span * np.float32(part) / np.float32(q_max), smallest, q_max)
        trial = least_squares(s, span * np.float32(part) / np.float32(q_max), smallest)
        better = trial[2] < error
        scale, low, error = (np.where(better, new, old) for new, old in zip(trial, (scale, low, error), strict=True))
    for _ in range(2):
        s = statistics(x, w, scale, low, q_max)
        scale, low, _ = least_squares(s, scale, low)
    return scale, low, s


def least_squares(s: Statistics, scale: Array, low: Array) -> tuple[Array, Array, Array]:
    """Best scale >= 0 and low <= 0 for the codes that the values have at `scale` and `low`, and the error left."""
    determinant = s.w * s.wqq - s.wq * s.wq
    regular = determinant > np.float32(1e-6) * s.w * s.wqq
    low_move = np.where(regular, divide(s.wqq * s.wr - s.wq * s.wrq, determinant), 0)
    low_move = np.minimum(low_move, -low)
    scale_move = np.maximum(np.where(s.wqq > 0, divide(s.wrq - s.wq * low_move, s.wqq), 0), -scale)
    curvature = (
        s.wqq * scale_move * scale_move + np.float32(2) * s.wq * scale_move * low_move + s.w * low_move * low_move
    )
    error = s.wrr - np.float32(2) * (s.wrq * scale_move + s.wr * low_move) + curvature
    return scale + scale_move, low + low_move, error


def round_to_grid(scale: Array, low: Array, s: Statistics) -> Grid:
    """The best d for the scales; then the best dmin for the lows that suit the rounded scales."""
    d = best_step(scale, np.maximum(s.wqq - s.wq * s.wq / s.w, 0))
    sc = six_bits(scale / d)
    offset = np.maximum(s.wq * (d * sc - scale) / s.w - low, 0)
    dmin = best_step(offset, s.w)
    return Grid(d, dmin, sc, six_bits(offset / dmin))


def best_step(values: Array, weights: Array) -> Array:
    """The step [n, 1] whose multiples are nearest to values [n, 8], the largest of them being 48 to 63 steps."""
    steps = [storable(values.max(-1, keepdims=True) / np.float32(n)) for n in range(63, 47, -1)]
    residuals = [values - step * six_bits(values / step) for step in steps]
    errors = np.stack([ordered_sum(weights * r * r) for r in residuals])  # [16, n]
    return np.choose(errors.argmin(0)[:, None], steps)


def search(x: Array, w: Array, q_max: int, grid: Grid, offsets: list[tuple[int, int]]) -> Grid:
    """The least exact error over sc + a and, b from the m that would suit that scale at the present codes."""
    s = statistics(x, w, grid.scale, grid.low, q_max)
    best, best_error = grid, s.wrr
    for a, b in offsets:
        sc = six_bits(grid.sc + np.float32(a))
        low_move = (s.wr - s.wq * (grid.d * sc - grid.scale)) / s.w
        trial = Grid(grid.d, grid.dmin, sc, six_bits(grid.m - low_move / grid.dmin + np.float32(b)))
        _, r = round_values(x, trial.scale, trial.low, q_max)
        error = ordered_sum(w * r * r)
        better = error < best_error
        best = Grid(grid.d, grid.dmin, np.where(better, sc, best.sc), np.where(better, trial.m, best.m))
        best_error = np.where(better, error, best_error)
    return best


def refit(x: Array, w: Array, q_max: int, grid: Grid) -> Grid:
    """Solve the normal equations of decoded = d·(sc·q) + dmin·(−m) for d and dmin; keep what lowers the error."""
    s = statistics(x, w, grid.scale, grid.low, q_max)
    aa, ab, bb = grid.sc * grid.sc * s.wqq, -(grid.sc * grid.m * s.wq), grid.m * grid.m * s.w
    ar, br = grid.sc * s.wrq, -(grid.m * s.wr)
    aa, ab, bb, ar, br = (ordered_sum(terms)[:, None] for terms in (aa, ab, bb, ar, br))
    determinant = aa * bb - ab * ab
    regular = determinant > np.float32(1e-6) * aa * bb
    d_move = np.where(regular, divide(bb * ar - ab * br, determinant), divide(ar, aa))
    dmin_move = np.where(regular, divide(aa * br - ab * ar, determinant), np.where(aa > 0, 0, divide(br, bb)))
    trial = Grid(storable(grid.d + d_move), storable(grid.dmin + dmin_move), grid.sc, grid.m)
    gain = ordered_sum(s.wrr - statistics(x, w, trial.scale, trial.low, q_max).wrr)[:, None]
    return Grid(np.where(gain > 0, trial.d, grid.d), np.where(gain > 0, trial.dmin, grid.dmin), grid.sc, grid.m)


@dataclass
class Statistics:
    """Sums over each block [n, 8] of products of weight w, code q and error r = x − decoded."""

    w: Array
    wq: Array
    wqq: Array
    wr: Array
    wrq: Array
    wrr: Array


def statistics(x: Array, w: Array, scale: Array, low: Array, q_max: int) -> Statistics:
    q, r = round_values(x, scale, low, q_max)
    wq, wr = w * q, w * r
    return Statistics(*map(ordered_sum, (w, wq, wq * q, wr, wr * q, wr * r)))


def round_values(x: Array, scale: Array, low: Array, q_max: int) -> tuple[Array, Array]:
    q = nearest_codes(x, scale, low, q_max)
    return q, (x - low[..., None]) - scale[..., None] * q


def nearest_codes(x: Array, scale: Array, low: Array, q_max: int) -> Array:
    inverse = np.where(scale > np.float32(2.0**-40), divide(np.float32(1), scale), 0)
    return np.rint(np.clip((x - low[..., None]) * inverse[..., None], 0, np.float32(q_max)))


def six_bits(x: Array) -> Array:
    return np.rint(np.clip(x, 0, 63))


def storable(x: Array) -> Array:
    """The positive fp16 value nearest to x."""
    return np.clip(x, np.float32(2.0**-24), np.float32(65504)).astype(np.float16).astype(np.float32)


def ordered_sum(terms: Array) -> Array:
    """Sum over the last axis from left to right: np.sum would pair terms."""
    return np.cumsum(terms, axis=-1, dtype=np.float32)[..., -1]


def divide(a: Array, b: Array) -> Array:
    """Quotient a/b, 0 where b is not positive."""
    a, b = np.broadcast_arrays(a, b)
    return np.divide(a, b, out=np.zeros_like(a), where=b > 0)
