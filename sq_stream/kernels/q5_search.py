"""Search the grid of each block of Q5_0 and Q5_1 under weights: many trials by exact error, then least squares.

A block's grid is x ≈ d·q + m with q in 0..31; the centered one of Q5_0 has m = −16·d.
"""

from __future__ import annotations

import numpy as np

from sq_stream.kernels.floats import FP16_MAX, fp16_nearest
from sq_stream.kernels.jit import jit
from sq_stream.kernels.trials import TRIALS, extremes, lowest, reciprocal, signed_peak

BLOCK = 32
X_MAX = np.float32(FP16_MAX * 32)  # beyond all that can be stored

# Where trials put the value of greatest magnitude, in code units from the center: on either side, clipped or inside.
_PEAKS = np.concatenate([np.arange(48) / 7 - 18, 17 - np.arange(48) / 7]).astype(np.float32).reshape(-1, TRIALS)
# Where trials put the least and the greatest value.
_BOTTOMS = (np.arange(16) / 4 - 2).astype(np.float32)
_TOPS = (33 - np.arange(TRIALS) / 4).astype(np.float32)
_REFITS = 2
_CENTER = np.float32(16)
_ZERO = np.float32(0)
_HIGHEST = np.float32(31)
_SINGULAR = np.float32(1e-6)  # relative determinant below which d and m cannot be told apart

_leaf = jit(inline="always")
_stage = jit()


@_stage
def search_centered(x, weights, d):
    """Set d [n_blocks] for x [n_blocks, 32] with weights [n_blocks, 32]."""
    trials, values = np.zeros((3, TRIALS), np.float32), np.empty(BLOCK, np.float32)
    inverses, offsets, errors = trials[0], trials[1], trials[2]
    offsets[:] = _CENTER
    for b in range(len(x)):
        for i in range(BLOCK):
            values[i] = min(max(x[b, i], -X_MAX), X_MAX)
        inverse_peak = reciprocal(signed_peak(values.view(np.uint32), BLOCK))
        least, inverse = np.float32(np.inf), _ZERO
        for j in range(len(_PEAKS)):
            for k in range(TRIALS):
                inverses[k] = _PEAKS[j, k] * inverse_peak
            best = _best_trial(values, weights[b], inverses, offsets, errors)
            if errors[best] < least:
                least, inverse = errors[best], inverses[best]
        d[b] = reciprocal(inverse)
        for _ in range(_REFITS):
            _, _, _, moment, square = _statistics(values, weights[b], d[b], -_CENTER * d[b], _CENTER)
            d[b] += moment * reciprocal(square)


@_stage
def search_affine(x, weights, d, m):
    """Set d and m [n_blocks] for x [n_blocks, 32] with weights [n_blocks, 32]; m is fp16, d the best for it."""
    trials, bits, above = np.zeros((3, TRIALS), np.float32), x.view(np.uint32), np.empty(BLOCK, np.float32)
    inverses, offsets, errors = trials[0], trials[1], trials[2]
    for b in range(len(x)):
        bottom, top = extremes(bits[b], BLOCK)
        bottom, top = min(max(bottom, -FP16_MAX), FP16_MAX), min(max(top, -X_MAX), X_MAX)
        for i in range(BLOCK):
            above[i] = min(max(x[b, i], -X_MAX), X_MAX) - bottom
        inverse_span = reciprocal(top - bottom)
        least, inverse, offset = np.float32(np.inf), _ZERO, _ZERO
        for j in range(len(_BOTTOMS)):
            for k in range(TRIALS):
                inverses[k], offsets[k] = (_TOPS[k] - _BOTTOMS[j]) * inverse_span, _BOTTOMS[j]
            best = _best_trial(above, weights[b], inverses, offsets, errors)
            if errors[best] < least:
                least, inverse, offset = errors[best], inverses[best], _BOTTOMS[j]
        d[b] = reciprocal(inverse)
        m[b] = -offset * d[b]
        for _ in range(_REFITS):
            w, wq, wr, wrq, wqq = _statistics(above, weights[b], d[b], m[b], _ZERO)
            determinant = w * wqq - wq * wq
            if determinant > _SINGULAR * w * wqq:
                d[b] += (w * wrq - wq * wr) / determinant
                m[b] += (wqq * wr - wq * wrq) / determinant
        ideal = bottom + m[b]
        m[b] = fp16_nearest(ideal)
        d[b] += (ideal - m[b]) * wq * reciprocal(wqq)


@_leaf
def _best_trial(x, w, inverses, offsets, errors):
    """Index of the best trial; errors [TRIALS] are set to the trials', in units of w·x²."""
    errors[:] = _ZERO
    _try_grids(x[:16], w[:16], inverses, offsets, errors)
    _try_grids(x[16:], w[16:], inverses, offsets, errors)
    for k in range(TRIALS):
        step = reciprocal(inverses[k])
        errors[k] *= step * step
    return lowest(errors)


@_leaf
def _try_grids(x, w, inverses, offsets, errors):
    """Add to errors [TRIALS] those of x [16], weighted by w [16], coded as x·inverses + offsets, in code units."""
    for k in range(TRIALS):
        inverse, offset = inverses[k], offsets[k]
        front = back = _ZERO
        for i in range(8):
            u = x[i] * inverse + offset
            rest = u - min(max(np.rint(u), _ZERO), _HIGHEST)
            front += w[i] * (rest * rest)
            u = x[8 + i] * inverse + offset
            rest = u - min(max(np.rint(u), _ZERO), _HIGHEST)
            back += w[8 + i] * (rest * rest)
        errors[k] += front + back


@_leaf
def _statistics(x, w, d, m, center):
    """Sums of w, w·q, w·r, w·r·q and w·q² at these d and m, with r = x − decoded and q counted from `center`."""
    inverse = reciprocal(d)
    s_w = s_wq = s_wr = s_wrq = s_wqq = _ZERO
    for i in range(BLOCK):
        code = min(max(np.rint((x[i] - m) * inverse), _ZERO), _HIGHEST)
        rest, q = x[i] - (d * code + m), code - center
        s_w += w[i]
        s_wq += w[i] * q
        s_wr += w[i] * rest
        s_wrq += w[i] * rest * q
        s_wqq += w[i] * q * q
    return s_w, s_wq, s_wr, s_wrq, s_wqq
