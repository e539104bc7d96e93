"""Shaping: codes and scales that push the error of a linear away from the directions its inputs use.

For the rows W [n, n_in] of a linear, find decoded values Ŵ in the block format with a small ½ tr(E A Eᵀ), E = Ŵ − W:
a pass with error feedback to start with, then coordinate descent on codes and scales while it gains. Rows do not
depend on each other, so a tensor is shaped in tiles of rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from sq_stream.formats.blocks import BlockType
from sq_stream.kernels import descent
from sq_stream.parallel import Workers
from sq_stream.quantize.grids import GRIDS, Scales, fit_scales
from sq_stream.quantize.metric import DenseMetric, FactorMetric, Metric, panel_factor

Array = NDArray[np.float32]

PANEL = 256  # columns decided together: a super-block, or eight blocks of 32
MOST_SWEEPS = 8
LEAST_GAIN = 0.003  # of the objective, for another sweep to be worth it
DAMPING = 0.01  # of the mean diagonal, added to the diagonal


@dataclass
class _Panel:
    """What has been decided for the rows of a tile in one panel."""

    columns: slice  # of the matrix
    scales: Scales
    codes: Array  # [n, p]


class Shaper:
    """Shapes the row tiles of one linear; made once for a tensor.

    Args:
        residual: r of the metric A = diag(r) + SᵀS, float32 [n_in].
        factor: S, float32 [rank, n_in].
        block_type: one of `GRIDS`.
        dense: form A [n_in, n_in]; else only r and S are used.
        workers: threads.
    """

    def __init__(
        self, residual: Array, factor: Array, block_type: BlockType, workers: Workers, *, dense: bool = True
    ) -> None:
        self._type = block_type
        diagonal = residual + np.einsum("ij,ij->j", factor, factor)
        mean = float(diagonal.mean()) or 1.0
        residual, factor = residual / mean + np.float32(DAMPING), factor / np.float32(mean**0.5)
        n_in = len(residual)
        starts = range(0, n_in, PANEL)
        order = sorted(starts, key=lambda start: -float(diagonal[start : start + PANEL].sum()))
        self._natural = [slice(start, min(start + PANEL, n_in)) for start in order]
        columns = np.concatenate([np.arange(panel.start, panel.stop) for panel in self._natural])
        bounds = np.cumsum([0, *(panel.stop - panel.start for panel in self._natural)])
        panels = [slice(int(a), int(b)) for a, b in pairwise(bounds)]
        residual, factor = residual[columns], np.ascontiguousarray(factor[:, columns])
        self._columns = columns
        self._metric: Metric
        if dense:
            a = factor.T @ factor
            a[np.diag_indices(n_in)] += residual
            self._metric = DenseMetric(a, panels, workers)
        else:
            self._metric = FactorMetric(residual, factor, panels, workers)

    def shape(self, w: Array) -> tuple[NDArray[np.uint8], float, float]:
        """Blocks of the rows w [n, n_in]; and their objective after the first pass and at the end."""
        wanted = np.ascontiguousarray(w[:, self._columns])
        panels = self._round(wanted.copy())
        errors = np.hstack([_decode(p) for p in panels]) - wanted  # [n, n_in]
        first = last = self._objective(errors)
        for _ in range(MOST_SWEEPS):
            before = last
            self._sweep(panels, errors)
            last = self._objective(errors)
            if last > (1 - LEAST_GAIN) * before:
                break
        by_place = sorted(range(len(panels)), key=lambda i: self._natural[i].start)
        return np.hstack([panels[i].scales.pack(panels[i].codes) for i in by_place]), first, last

    def _round(self, wanted: Array) -> list[_Panel]:
        """The pass with error feedback; `wanted` [n, n_in] is used up."""
        grid, panels = GRIDS[self._type.name], []
        for i, own in enumerate(self._metric.panels):
            conditional = self._metric.conditional(i)
            x = np.ascontiguousarray(wanted[:, own])
            scales = fit_scales(x, self._type, np.diag(conditional).copy())
            scale, offset = scales.values()
            codes = np.empty_like(x)
            descent.round_with_feedback(
                x, scale, offset, _groups(scales, x.shape[1]), panel_factor(conditional),
                np.float32(grid.lowest), np.float32(grid.highest), codes,
            )  # fmt: skip
            wanted[:, own.stop :] += self._metric.correction(i, x)
            panels.append(_Panel(own, scales, codes))
        return panels

    def _sweep(self, panels: Sequence[_Panel], errors: Array) -> None:
        """Descend once on the codes and scales of every panel, keeping errors [n, n_in] = decoded − wanted."""
        grid = GRIDS[self._type.name]
        for i, panel in enumerate(panels):
            gradient, metric = self._metric.gradient(i, errors), self._metric.block(i)
            moves = np.zeros_like(gradient)
            scale, offset = panel.scales.values()
            descent.descend_codes(
                gradient, metric, scale, offset, _groups(panel.scales, len(metric)),
                np.float32(grid.lowest), np.float32(grid.highest), panel.codes, moves,
            )  # fmt: skip
            panel.scales.improve(gradient, metric, panel.codes, moves)
            errors[:, panel.columns] += moves

    def _objective(self, errors: Array) -> float:
        """½ tr(E A Eᵀ)."""
        gradients = (
            np.einsum("ij,ij->", self._metric.gradient(i, errors), errors[:, own], dtype=np.float64)
            for i, own in enumerate(self._metric.panels)
        )
        return 0.5 * float(sum(gradients))


def _groups(scales: Scales, p: int) -> NDArray[np.int64]:
    """Group of each of p columns."""
    return np.arange(p) // scales.group_size


def _decode(panel: _Panel) -> Array:
    scale, offset = panel.scales.values()
    size = panel.scales.group_size
    return np.repeat(scale, size, axis=1) * panel.codes + np.repeat(offset, size, axis=1)
