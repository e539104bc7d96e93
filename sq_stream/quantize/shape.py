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
from sq_stream.quantize.metric import PANEL, DenseMetric, Errors, FactorMetric, Metric, panel_factor, upper_blocks

Array = NDArray[np.float32]

MOST_SWEEPS = 8
LEAST_GAIN = 0.003  # of the objective, for another sweep to be worth it
DAMPING = 0.01  # of the mean diagonal, added to the diagonal


@dataclass
class _Panel:
    """What has been decided for the rows of a tile in one panel."""

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
        residual = residual / mean + np.float32(DAMPING)
        n_in = len(residual)
        starts = range(0, n_in, PANEL)
        order = sorted(starts, key=lambda start: -float(diagonal[start : start + PANEL].sum()))
        self._natural = [slice(start, min(start + PANEL, n_in)) for start in order]
        columns = np.concatenate([np.arange(panel.start, panel.stop) for panel in self._natural])
        bounds = np.cumsum([0, *(panel.stop - panel.start for panel in self._natural)])
        panels = [slice(int(a), int(b)) for a, b in pairwise(bounds)]
        self._columns = columns
        self._metric: Metric
        if dense:
            a = upper_blocks(factor, self._natural, panels, workers)
            a /= np.float32(mean)
            a[np.diag_indices(n_in)] += residual[columns]
            self._metric = DenseMetric(a, panels, workers)
        else:
            factor = np.take(factor, columns, axis=1)
            factor /= np.float32(mean**0.5)
            self._metric = FactorMetric(residual[columns], factor, panels, workers)

    def shape(self, w: Array) -> tuple[NDArray[np.uint8], float, float]:
        """Blocks of the rows w [n, n_in]; and their objective after the first pass and at the end."""
        errors = self._metric.errors(len(w))
        panels = self._round(np.take(w, self._columns, axis=1), errors)
        first = last = errors.objective()
        for _ in range(MOST_SWEEPS):
            before = last
            self._sweep(panels, errors)
            last = errors.objective()
            if last > (1 - LEAST_GAIN) * before:
                break
        by_place = sorted(range(len(panels)), key=lambda i: self._natural[i].start)
        return np.hstack([panels[i].scales.pack(panels[i].codes) for i in by_place]), first, last

    def _round(self, wanted: Array, errors: Errors) -> list[_Panel]:
        """The pass with error feedback on the rows `wanted` [n, n_in], which fills `errors`."""
        grid, panels = GRIDS[self._type.name], []
        for i, own in enumerate(self._metric.panels):
            conditional, shift = self._metric.conditional[i], errors.correction(i)
            x = wanted[:, own] + shift
            scales = fit_scales(x, self._type, np.diag(conditional).copy())
            scale, offset = scales.values()
            codes = np.empty_like(x)
            descent.round_with_feedback(
                x, scale, offset, _groups(scales, x.shape[1]), panel_factor(conditional),
                np.float32(grid.lowest), np.float32(grid.highest), codes,
            )  # fmt: skip
            errors.add(i, shift - x)
            panels.append(_Panel(scales, codes))
        return panels

    def _sweep(self, panels: Sequence[_Panel], errors: Errors) -> None:
        """Descend once on the codes and scales of every panel, keeping `errors` up to date."""
        grid = GRIDS[self._type.name]
        for i, panel in enumerate(panels):
            gradient, metric = errors.gradient(i), self._metric.block(i)
            moves = np.zeros_like(gradient)
            scale, offset = panel.scales.values()
            descent.descend_codes(
                gradient, metric, scale, offset, _groups(panel.scales, len(metric)),
                np.float32(grid.lowest), np.float32(grid.highest), panel.codes, moves,
            )  # fmt: skip
            panel.scales.improve(gradient, metric, panel.codes, moves)
            errors.add(i, moves)


def _groups(scales: Scales, p: int) -> NDArray[np.int64]:
    """Group of each of p columns."""
    return np.arange(p) // scales.group_size
