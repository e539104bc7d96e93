"""Smoothing: moving some of the spread between channels from activations into weights, which changes no output.

A norm's weights divided by v and the columns of the linears that it enters multiplied by v cancel. Loud channels then
get columns of larger weights, which the block formats store with a smaller relative error, and runtimes that round
activations to 8 bits in blocks lose less of the quiet channels beside them.

Source: per-channel scales from activation statistics are those of AWQ (arXiv:2306.00978), their use against rounded
activations is that of SmoothQuant (arXiv:2211.10438). The exponent was chosen on convergence60: docs/method.md.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from sq_stream.calibrate.sketches import Sketches
from sq_stream.quantize.grids import GRIDS

Array = NDArray[np.float32]

EXPONENT = 0.25  # of a channel's root mean square


def find_factors(
    norms: Mapping[str, tuple[str, ...]], types: Mapping[str, str], sketches: Sketches
) -> dict[str, Array]:
    """What to multiply tensors by: for a norm its weights, for a linear its columns; float32 [n_in] each.

    Args:
        norms: from a norm's tensor to the linears that it enters.
        types: block type of every tensor. A norm stays as it is where a linear after it is not shaped.
        sketches: of their inputs, before smoothing.
    """
    factors: dict[str, Array] = {}
    for norm, linears in norms.items():
        sketch = sketches[linears[0]]
        if sketch.rank and all(types[name] in GRIDS for name in linears):
            columns = channel_factors(sketch.diagonal())
            factors |= {norm: np.reciprocal(columns), **dict.fromkeys(linears, columns)}
    return factors


def channel_factors(mean_squares: Array) -> Array:
    """Root mean squares to the power of EXPONENT, with a geometric mean of 1 over live channels: float32 [n_in]."""
    live = mean_squares > 0
    logs = np.log(mean_squares[live].astype(np.float64))
    factors = np.ones_like(mean_squares)
    factors[live] = np.exp(EXPONENT / 2 * (logs - logs.mean())) if live.any() else 1
    return factors
