"""The encoders of Q8_0, Q5_0, Q5_1 and Q6_K in plain NumPy, to check by eye; the kernels give the same bits.

Each takes blocks x [n, 32] or [n, 256] and weights alike in shape, float32, and returns the values that are stored.
Axis k runs over trials.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]

F = np.float32


def q8_0(x: Array) -> Array:
    d = stored(np.abs(best_scale(x, F(127) - np.arange(16, dtype=F) / F(2), 127)))
    return d * codes(x, d, F(0), -127, 127)


def q5_0(x: Array) -> Array:
    levels = (np.arange(16) / 5 - 16.4).astype(F)
    d = stored(best_scale(x, levels, 15))
    return d * (codes(x, d, F(-16) * d, 0, 31) - F(16))


def q5_1(x: Array) -> Array:
    """Least squares for the codes on the block's full span; the residues are cut to multiples of 2⁻¹⁶."""
    bottom = x.min(1, keepdims=True)
    d = (x.max(1, keepdims=True) - bottom) / F(31)
    u = (x - bottom) * reciprocal(d)
    q = np.rint(u)
    rests = np.trunc((u - q) * F(65536)).astype(np.float64)
    sq, sqq, sr, srq = (s.sum(1, keepdims=True).astype(F) for s in (q, q * q, rests / 65536, rests * q / 65536))
    scaling = reciprocal(F(32) * sqq - sq * sq)
    ideal = bottom + d * scaling * (sqq * sr - sq * srq)
    m = nearest_half(ideal)
    d = stored(d + (d * scaling * (F(32) * srq - sq * sr) + (ideal - m) * sq * reciprocal(sqq)))
    return d * codes(x, d, m, 0, 31) + m


def q5_0_weighted(x: Array, w: Array) -> Array:
    """96 trials of where the peak comes to lie, then two least-squares fits of d."""
    levels = np.concatenate([np.arange(48) / 7 - 18, 17 - np.arange(48) / 7]).astype(F)
    inverses = levels * reciprocal(peak(x))
    inverse, _ = best_grid(x, w, inverses, np.full_like(inverses, 16))
    d = reciprocal(inverse)
    for _ in range(2):
        _, _, _, wrq, wqq = statistics(x, w, d, F(-16) * d, 16)
        d = d + wrq * reciprocal(wqq)
    d = stored(d)
    return d * (codes(x, d, F(-16) * d, 0, 31) - F(16))


def q5_1_weighted(x: Array, w: Array) -> Array:
    """256 trials of where the extremes come to lie, two least-squares fits of d and m, d fitted to the stored m."""
    bottom, top = x.min(1, keepdims=True), x.max(1, keepdims=True)
    above = x - bottom
    bottoms, tops = (a.ravel() for a in np.meshgrid(np.arange(16) / 4 - 2, 33 - np.arange(16) / 4, indexing="ij"))
    inverses = (tops - bottoms).astype(F) * reciprocal(top - bottom)
    inverse, offset = best_grid(above, w, inverses, np.broadcast_to(bottoms.astype(F), inverses.shape))
    d = reciprocal(inverse)
    m = -offset * d
    for _ in range(2):
        sw, wq, wr, wrq, wqq = statistics(above, w, d, m, 0)
        determinant = sw * wqq - wq * wq
        regular = np.where(determinant > F(1e-6) * sw * wqq, determinant, F(0))
        d = d + divide(sw * wrq - wq * wr, regular)
        m = m + divide(wqq * wr - wq * wrq, regular)
    ideal = bottom + m
    m = nearest_half(ideal)
    d = stored(d + (ideal - m) * wq * reciprocal(wqq))
    return d * codes(x, d, m, 0, 31) + m


def q6_k(x: Array, w: Array) -> Array:
    """The best scales for two first d, then twice for the least-squares d, as long as that is an improvement."""
    x, w = x.reshape(-1, 16, 16), w.reshape(-1, 16, 16)  # [n, group, value]
    largest = np.abs(x).max((1, 2), keepdims=True)
    best_d, best_scales, best_error = largest, np.zeros_like(x[..., :1]), np.full_like(largest, np.inf)
    for first in (116, 123):
        d = stored(largest / (F(32) * F(first)))
        scales, error = q6_k_scales(x, w, d)
        better = error < best_error
        best_d, best_error = np.where(better, d, best_d), np.where(better, error, best_error)
        best_scales = np.where(better, scales, best_scales)
    running = np.ones_like(best_d, bool)
    for _ in range(2):
        q = codes(x, best_d * best_scales, F(0), -32, 31)
        moments, squares = in_order(w * q * x), in_order(w * q * q)
        projection = in_order((best_scales * moments)[..., 0])
        norm = in_order((best_scales * best_scales * squares)[..., 0])
        d = np.where(norm > 0, stored(np.maximum(divide(projection, norm), F(0))), best_d[..., 0])[..., None]
        running &= d != best_d
        scales, error = q6_k_scales(x, w, d)
        better = (error < best_error) & running
        best_d, best_error = np.where(better, d, best_d), np.where(better, error, best_error)
        best_scales = np.where(better, scales, best_scales)
    step = best_d * best_scales
    return (step * codes(x, step, F(0), -32, 31)).reshape(-1, 256)


def q6_k_scales(x: Array, w: Array, d: Array) -> tuple[Array, Array]:
    """Scales [n, 16, 1] for d [n, 1, 1], the best of 8 that put the peak at code −32 or near it, and of 8 for 31."""
    peaks = peak(x)
    sign = np.where(peaks > 0, F(1), F(-1))
    steps = divide(np.abs(peaks), d)
    at_lowest, at_highest = (np.maximum(np.floor(steps / F(code + 0.5)), F(1)) for code in (32, 31))
    k = np.arange(8, dtype=F)
    trials = np.concatenate([-sign * (at_lowest + k), sign * (at_highest + k)], -1).clip(-128, 127)  # [n, group, k]
    inverses = divide(F(1), d * trials)
    e = w[..., None, :] * squared_rest(x[..., None, :] * inverses[..., None], -32, 31)
    errors = (in_order(e[..., :8]) + in_order(e[..., 8:]))[..., 0] * (trials * trials)
    best = lowest(errors)
    error = in_order(np.take_along_axis(errors, best, -1)[..., 0])[..., None] * d * d
    return np.take_along_axis(trials, best, -1), error


def best_scale(x: Array, levels: Array, highest: int) -> Array:
    """The scale [n, 1] of least error among those that put the block's peak at one of `levels`."""
    top = peak(x)
    inverses = levels * reciprocal(top)  # [n, k]
    e = squared_rest(x[:, None, :] * inverses[..., None], -np.inf, highest).reshape(len(x), -1, 4, 8)
    sums = in_order(e)[..., 0]  # [n, k, 4]
    errors = ((sums[..., 0] + sums[..., 1]) + (sums[..., 2] + sums[..., 3])) * (F(1) / (levels * levels))
    return top / levels[lowest(errors)]


def best_grid(x: Array, w: Array, inverses: Array, offsets: Array) -> tuple[Array, Array]:
    """The inverse and offset [n, 1] with the least weighted error of the trials [n, k]: of 16 by 16 the first best."""
    u = x[:, None, :] * inverses[..., None] + offsets[..., None]
    sums = in_order((w[:, None, :] * squared_rest(u, 0, 31)).reshape(*inverses.shape, 4, 8))[..., 0]
    step = reciprocal(inverses)
    errors = ((sums[..., 0] + sums[..., 1]) + (sums[..., 2] + sums[..., 3])) * (step * step)
    of_16 = errors.reshape(len(x), -1, 16)
    winners = lowest(of_16)[..., 0] + 16 * np.arange(of_16.shape[1])  # [n, k / 16]
    best = np.take_along_axis(winners, np.take_along_axis(errors, winners, 1).argmin(1)[:, None], 1)
    return np.take_along_axis(inverses, best, 1), np.take_along_axis(offsets, best, 1)


def statistics(x: Array, w: Array, d: Array, m: Array, center: int) -> list[Array]:
    """Σ w, w·q, w·r, w·r·q, w·q² [n, 1] with codes q counted from `center` and residues r."""
    code = codes(x, d, m, 0, 31)
    r, q = x - (d * code + m), code - F(center)
    return [in_order(s) for s in (w, w * q, w * r, w * r * q, w * q * q)]


def codes(x: Array, d: Array, m: Array, least: int, greatest: int) -> Array:
    return np.rint((x - m) * reciprocal(d)).clip(least, greatest)


def squared_rest(u: Array, least: float, greatest: float) -> Array:
    return np.square(u - np.rint(u).clip(F(least), F(greatest)))


def in_order(terms: Array) -> Array:
    """Sums over the last axis, kept, one term after the other."""
    total = np.zeros_like(terms[..., :1])
    for i in range(terms.shape[-1]):
        total = total + terms[..., i : i + 1]
    return total


def lowest(errors: Array) -> NDArray[np.int64]:
    """Index of the least of 16 on the last axis, kept; errors equal but for their last 4 bits count as equal."""
    bits = np.ascontiguousarray(errors, F).view(np.uint32)
    return ((bits & ~np.uint32(15)) | np.arange(16, dtype=np.uint32)).argmin(-1)[..., None]


def peak(x: Array) -> Array:
    """The value of greatest magnitude on the last axis, kept; of two with equal magnitude the negative one."""
    least, greatest = x.min(-1, keepdims=True), x.max(-1, keepdims=True)
    return np.where(-least >= greatest, least, greatest)


def reciprocal(x: Array) -> Array:
    usable = np.abs(x) > F(2.0**-120)
    return np.where(usable, F(1) / np.where(usable, x, F(1)), F(0))


def divide(a: Array, b: Array) -> Array:
    """A / b, and 0 where b is 0."""
    return np.where(b != 0, a, F(0)) / np.where(b != 0, b, F(1))


def nearest_half(x: Array) -> Array:
    return x.clip(-65504, 65504).astype(np.float16).astype(F)


def stored(d: Array) -> Array:
    """The half stored for a scale: 0 for 0 only."""
    half = nearest_half(d)
    return np.where((half == 0) & (d != 0), np.copysign(F(2.0**-24), d), half)
