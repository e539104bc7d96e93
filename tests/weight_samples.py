"""Values to encode: like trained weights, and the edge cases that every block type must survive."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]

N_IN = 768


def heavy_tailed(seed: int, n_rows: int = 48, n_in: int = N_IN) -> Array:
    """Like trained weights: Student t, rows and columns of different size."""
    rng = np.random.default_rng(seed)
    rows, columns = np.exp(0.3 * rng.standard_normal((n_rows, 1))), np.exp(0.3 * rng.standard_normal(n_in))
    return (0.02 * rows * columns * rng.standard_t(5, (n_rows, n_in))).astype(np.float32)


def column_importance(seed: int, n_in: int = N_IN, sigma: float = 1.0) -> Array:
    return np.exp(sigma * np.random.default_rng(seed).standard_normal(n_in)).astype(np.float32)


def squared_error(x: Array, y: Array, importance: Array | None = None) -> float:
    weights = 1 if importance is None else importance.astype(np.float64)
    return float((weights * np.square(x.astype(np.float64) - y)).sum())


def edge_cases(n_rows: int = 4) -> dict[str, Array]:
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((n_rows, 256)).astype(np.float32)
    outlier, half_zero = noise.copy(), noise.copy()
    outlier[:, 77] = 300
    half_zero[:, :128] = 0
    return {
        "zeros": np.zeros_like(noise),
        "constant": np.full_like(noise, 0.37),
        "negative constant": np.full_like(noise, -0.37),
        "positive": 5 + noise / 10,
        "negative": -5 + noise / 10,
        "one value": np.where(np.arange(256) == 3, np.float32(1), np.float32(0)) * np.ones_like(noise),
        "outlier": outlier,
        "half zero": half_zero,
        "two values": np.sign(noise),
        "large": 6e4 * np.sign(noise) + noise,
        "unit of fp16": noise * np.float32(2.0**-24),
        "fp16 subnormals": noise * np.float32(1e-6),
        "float32 subnormals": noise * np.float32(1e-40),
    }


EDGE_CASES = edge_cases()
