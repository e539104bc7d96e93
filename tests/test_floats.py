"""Half-precision conversion against NumPy's."""

from __future__ import annotations

import numpy as np
from numba import njit

from sq_stream.kernels.floats import fp16_bits, fp16_value

ALL_HALVES = np.arange(2**16, dtype=np.uint16)
VALUES = ALL_HALVES.view(np.float16).astype(np.float32)


@njit
def _to_bits(x):
    bits = np.empty(x.size, np.uint16)
    for i in range(x.size):
        bits[i] = fp16_bits(x[i])
    return bits


@njit
def _to_values(bits):
    x = np.empty(bits.size, np.float32)
    for i in range(bits.size):
        x[i] = fp16_value(bits[i])
    return x


def test_every_half_has_numpys_value():
    ours, numpys = _to_values(ALL_HALVES), VALUES
    np.testing.assert_array_equal(np.isnan(ours), np.isnan(numpys))
    known = ~np.isnan(numpys)
    np.testing.assert_array_equal(ours[known].view(np.uint32), numpys[known].view(np.uint32))


def test_rounds_like_numpy_at_and_beside_every_midpoint():
    halves = np.unique(VALUES[np.isfinite(VALUES)])
    midpoints = ((halves[1:].astype(np.float64) + halves[:-1]) / 2).astype(np.float32)
    above, below = (np.nextafter(midpoints, np.float32(side)) for side in (np.inf, -np.inf))
    beyond = np.float32([65519.996, 65520, 65536, 3e38, np.inf, -65520, -np.inf, -0.0, 1e-45])
    x = np.concatenate([halves, midpoints, above, below, beyond])
    with np.errstate(over="ignore"):
        expected = x.astype(np.float16).view(np.uint16)
    np.testing.assert_array_equal(_to_bits(x), expected)


def test_rounds_like_numpy_on_random_bits():
    x = np.random.default_rng(0).integers(0, 2**32, 10**6, dtype=np.uint32).view(np.float32)
    x = x[~np.isnan(x)]
    with np.errstate(over="ignore"):
        expected = x.astype(np.float16).view(np.uint16)
    np.testing.assert_array_equal(_to_bits(x), expected)


def test_nan_stays_nan():
    assert np.isnan(_to_bits(np.float32([np.nan])).view(np.float16)).all()
