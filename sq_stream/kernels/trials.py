"""Trials: the squared error of rounding a block to many candidate grids at once, one candidate in each lane.

A sum runs over the values in a fixed order within its lane and the loop over lanes vectorizes, so that no sum is ever
reordered: the result is the same on every machine. Rounding is to nearest, ties to even.
"""

from __future__ import annotations

import numpy as np

from sq_stream.kernels.jit import jit

TRIALS = 16  # lanes: candidates tried together

_ZERO = np.float32(0)
_ONE = np.float32(1)
_TINY = np.float32(2.0**-120)  # a value below this counts as zero: its reciprocal might overflow
_INDEX_BITS = np.uint32(TRIALS - 1)

# Inlined leaves cost no call; integers stay uint32 since Numba widens all others.
_leaf = jit(inline="always")


@_leaf
def reciprocal(x):
    """1 / x, and 0 for values too small to have one."""
    return _ONE / x if abs(x) > _TINY else _ZERO


@_leaf
def signed_peak(bits, n):
    """The value (float32) of greatest magnitude among `bits`, uint32 [n] of float32 values; of ±v, −v.

    With the sign moved to the lowest bit an integer maximum finds it, which vectorizes as a float one would not.
    """
    peak = np.uint32(0)
    for i in range(n):
        peak = max(peak, np.uint32(np.uint32(bits[i] << np.uint32(1)) | np.uint32(bits[i] >> np.uint32(31))))
    return np.uint32(np.uint32(peak >> np.uint32(1)) | np.uint32(peak << np.uint32(31))).view(np.float32)


@_leaf
def extremes(bits, n):
    """Least and greatest value (float32) among `bits`, uint32 [n] of float32 values.

    Setting the sign bit of positive values and inverting negative ones gives integers of the same order.
    """
    greatest, least_inverted = np.uint32(0), np.uint32(0)
    for i in range(n):
        inverted = np.uint32(np.uint32(0) - np.uint32(bits[i] >> np.uint32(31)))
        ordered = np.uint32(bits[i] ^ np.uint32(inverted | np.uint32(0x8000_0000)))
        greatest = max(greatest, ordered)
        least_inverted = max(least_inverted, np.uint32(~ordered))
    return _from_ordered(np.uint32(~least_inverted)), _from_ordered(greatest)


@_leaf
def _from_ordered(ordered):
    bits = np.uint32(ordered ^ np.uint32(0x8000_0000)) if ordered >> np.uint32(31) else np.uint32(~ordered)
    return np.uint32(bits).view(np.float32)


@_leaf
def lowest(errors):
    """Index of the least of errors, float32 [TRIALS], none negative; close to equal ones count as equal.

    The index rides in the lowest bits of each error's pattern: one integer minimum finds both.
    """
    least = np.uint32(0xFFFF_FFFF)
    for k in range(TRIALS):
        pattern = np.float32(errors[k]).view(np.uint32)
        least = min(least, np.uint32(np.uint32(pattern & ~_INDEX_BITS) | np.uint32(k)))
    return least & _INDEX_BITS


@jit()
def best_scales(x, levels, highest, d):
    """For each block the scale d that has the least error among those that put its peak at one of `levels`.

    Which scale is best is a matter of luck, since it decides how every value rounds.

    Args:
        x: float32 [n_blocks, 32].
        levels: float32 [TRIALS], in code units, none beyond half a unit outside the codes' range.
        highest: float32, the largest code.
        d: out, float32 [n_blocks].
    """
    cost, errors = np.empty(TRIALS, np.float32), np.empty(TRIALS, np.float32)
    for k in range(TRIALS):
        cost[k] = _ONE / (levels[k] * levels[k])
    bits = x.view(np.uint32)
    for b in range(len(x)):
        d[b] = signed_peak(bits[b], 32)
    for b in range(len(x)):
        _try_levels(x[b], reciprocal(d[b]), levels, cost, highest, errors)
        d[b] /= levels[lowest(errors)]


@_leaf
def _try_levels(x, inverse_peak, levels, cost, highest, errors):
    """Errors of x [32] in each trial, in units of the squared peak; four sums each, to be added up side by side."""
    for k in range(TRIALS):
        inverse = levels[k] * inverse_peak
        e0 = e1 = e2 = e3 = _ZERO
        for i in range(8):
            e0 += _squared_rest(x[i] * inverse, highest)
            e1 += _squared_rest(x[8 + i] * inverse, highest)
            e2 += _squared_rest(x[16 + i] * inverse, highest)
            e3 += _squared_rest(x[24 + i] * inverse, highest)
        errors[k] = ((e0 + e1) + (e2 + e3)) * cost[k]


@_leaf
def _squared_rest(u, highest):
    rest = u - min(np.rint(u), highest)
    return rest * rest
