"""Intervals of 95% by resampling windows, the same ones for whatever is compared.

Source: the percentile bootstrap (Efron and Tibshirani, "An Introduction to the Bootstrap", 1993).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
N_SAMPLES = 10_000


def resampled(window_means: Array) -> Array:
    """Means of windows [n_windows] drawn again with replacement: [N_SAMPLES]."""
    n = len(window_means)
    return window_means[np.random.default_rng(0).integers(n, size=(N_SAMPLES, n))].mean(axis=1)


def interval(samples: Array) -> tuple[float, float]:
    """In which 95% of the samples lie."""
    low, high = np.quantile(samples, [0.025, 0.975])
    return float(low), float(high)


def ratio(above: Array, below: Array) -> tuple[float, tuple[float, float]]:
    """Of the means of two figures of the same windows [n_windows], and its interval."""
    return float(above.mean() / below.mean()), interval(resampled(above) / resampled(below))
