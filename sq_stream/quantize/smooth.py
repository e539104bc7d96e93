"""Smoothing: moving some of the spread between channels from activations into weights, which changes no output.

A norm's weights divided by v and the columns of the linears that it enters multiplied by v cancel; so do, in a gated
feed-forward net, the rows of ffn_up divided by v and the columns of ffn_down multiplied by v. Loud channels then get
columns of larger weights, which the block formats store with a smaller relative error, and runtimes that round
activations to 8 bits in blocks lose less of the quiet channels beside them.

Source: per-channel scales from activation statistics are those of AWQ (arXiv:2306.00978), their use against rounded
activations is that of SmoothQuant (arXiv:2211.10438). The exponent was chosen on convergence60: docs/method.md.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sq_stream.calibrate.sketches import Sketches

Array = NDArray[np.float32]

EXPONENT = 0.25  # of a channel's root mean square
STEPS = 4  # to which an octave of the factors of rows is rounded


@dataclass(frozen=True, eq=False)
class Scaling:
    """What a tensor is multiplied by: its columns, its rows, or both; None is 1."""

    columns: Array | None = None  # [n_in]
    rows: Array | None = None  # [n_out]

    def apply(self, w: Array, rows: slice) -> Array:
        """Rows `rows` of the tensor, w [n_tile, n_in], scaled in place."""
        if self.columns is not None:
            w *= self.columns
        if self.rows is not None:
            w *= self.rows[rows, None]
        return w

    def undo(self, w: Array, rows: slice) -> Array:
        """The inverse of `apply`."""
        if self.columns is not None:
            w /= self.columns
        if self.rows is not None:
            w /= self.rows[rows, None]
        return w


UNSCALED = Scaling()


def find_scalings(
    norms: Mapping[str, tuple[str, ...]], products: Mapping[str, str], shaped: Collection[str], sketches: Sketches
) -> dict[str, Scaling]:
    """The scalings of all tensors that have one, by name.

    Args:
        norms: from a norm's tensor to the linears that it enters.
        products: from a linear whose outputs are multiplied by something to the linear that they then enter.
        shaped: the tensors that are. Where one of a group is not, the group stays as it is.
        sketches: of their inputs, before smoothing.
    """
    columns: dict[str, Array] = {}
    rows: dict[str, Array] = {}
    for norm, linears in norms.items():
        if set(linears) <= set(shaped) and (sketch := sketches[linears[0]]).rank:
            factors = channel_factors(sketch.diagonal())
            columns |= {norm: np.reciprocal(factors), **dict.fromkeys(linears, factors)}
    for before, after in products.items():
        if {before, after} <= set(shaped) and (sketch := sketches[after]).rank:
            columns[after] = round_factors(channel_factors(sketch.diagonal()))
            rows[before] = np.reciprocal(columns[after])
    return {name: Scaling(columns.get(name), rows.get(name)) for name in columns.keys() | rows.keys()}


def channel_factors(mean_squares: Array) -> Array:
    """Root mean squares to the power of EXPONENT, with a geometric mean of 1 over live channels: float32 [n_in]."""
    live = mean_squares > 0
    logs = np.log(mean_squares[live].astype(np.float64))
    factors = np.ones_like(mean_squares)
    factors[live] = np.exp(EXPONENT / 2 * (logs - logs.mean())) if live.any() else 1
    return factors


def round_factors(factors: NDArray[np.floating]) -> Array:
    """The powers of 2 with an exponent in whole STEPS that are nearest to positive factors; 1 for what is not positive.

    These steps are so coarse that a quantized row shows by which of them it was divided.
    """
    steps = np.rint(STEPS * np.log2(np.where(factors > 0, factors, 1)))
    rounded: Array = np.exp2(steps / STEPS).astype(np.float32)
    return rounded
