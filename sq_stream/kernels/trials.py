"""Trials: the squared error of rounding a block to many candidate grids at once, one candidate in each lane.

A sum runs over the values in a fixed order within its lane and the loop over lanes vectorizes, so that no sum is ever
reordered: the result is the same on every machine. Rounding is to nearest, ties to even.
"""

from __future__ import annotations

import numpy as np
from numba import njit

TRIALS = 16  # lanes: candidates tried together

_ZERO = np.float32(0)
_ONE = np.float32(1)
_TINY = np.float32(2.0**-120)  # a peak below this counts as zero: its reciprocal might overflow
_INDEX_BITS = np.uint32(TRIALS - 1)

_leaf = njit(cache=True, error_model="numpy")


@_leaf
def signed_peak(bits, n):
    """The value (float32) of greatest magnitude among `bits`, uint32 [n] of float32 values; of ±v, −v.

    With the sign moved to the lowest bit an integer maximum finds it, which vectorizes as a float one would not.
    """
    peak = np.uint32(0)
    for i in range(n):
        peak = max(peak, np.uint32((bits[i] << np.uint32(1)) | (bits[i] >> np.uint32(31))))
    return np.uint32(np.uint32(peak >> np.uint32(1)) | np.uint32(peak << np.uint32(31))).view(np.float32)


@_leaf
def reciprocal(x):
    """1 / x, and 0 for values too small to have one."""
    return _ONE / x if abs(x) > _TINY else _ZERO


@_leaf
def lowest(errors):
    """Index of the least of errors, float32 [TRIALS], none negative, equal but for the last bits counting as equal.

    The index rides in the lowest bits of each error's pattern: one integer minimum finds both.
    """
    least = np.uint32(0xFFFF_FFFF)
    for k in range(TRIALS):
        pattern = np.float32(errors[k]).view(np.uint32)
        least = min(least, np.uint32(np.uint32(pattern & ~_INDEX_BITS) | np.uint32(k)))
    return least & _INDEX_BITS
