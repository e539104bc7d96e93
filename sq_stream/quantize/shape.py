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
Indices = NDArray[np.int64]

RUN = 32  # columns that are next to each other in every order
MOST_SWEEPS = 8
LEAST_GAIN = 0.003  # of the objective, for another sweep to be worth it
DAMPING = 0.01  # of the mean diagonal, added to the diagonal


@dataclass
class _Panel:
    """What has been decided for the rows of a tile in one panel."""

    scales: Scales
    codes: Array  # [n, p]

    def pack(self, runs: Indices) -> NDArray[np.uint8]:
        """The blocks, given which of the matrix's runs of columns these are in turn."""
        natural = np.argsort(runs)
        return self.scales.arranged(natural).pack(np.take(self.codes, columns_of(natural), axis=1))


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
        self._runs = order_runs(diagonal)
        by_panel = [columns_of(runs) for runs in self._runs]
        columns = np.concatenate(by_panel)
        bounds = np.cumsum([0, *map(len, by_panel)])
        panels = [slice(int(a), int(b)) for a, b in pairwise(bounds)]
        self._columns = columns
        self._metric: Metric
        if dense:
            a = upper_blocks(factor, by_panel, panels, workers)
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
        first = last = errors.objectives()
        rows = np.arange(len(w))
        for _ in range(MOST_SWEEPS):
            before = last
            self._sweep(panels, errors, rows)
            last = errors.objectives()
            rows = rows[last[rows] < (1 - LEAST_GAIN) * before[rows]]  # each row by itself: tiles must not matter
            if not len(rows):
                break
        packed = {int(runs.min()): panel.pack(runs) for runs, panel in zip(self._runs, panels, strict=True)}
        return np.hstack([packed[place] for place in sorted(packed)]), float(first.sum()), float(last.sum())

    def _round(self, wanted: Array, errors: Errors) -> list[_Panel]:
        """The pass with error feedback on the rows `wanted` [n, n_in], which fills `errors`."""
        grid, panels = GRIDS[self._type.name], []
        for i, own in enumerate(self._metric.panels):
            conditional, shift = self._metric.conditional[i], errors.correction(i)
            x = wanted[:, own] + shift
            scales = fit_scales(x, self._type, np.diag(conditional).copy())
            factor = panel_factor(conditional)
            scales.choose(x, factor)
            scale, offset = scales.values()
            codes = np.empty_like(x)
            descent.round_with_feedback(
                x, scale, offset, _groups(scales, x.shape[1]), factor,
                np.float32(grid.lowest), np.float32(grid.highest), codes,
            )  # fmt: skip
            errors.add(i, shift - x)
            panels.append(_Panel(scales, codes))
        return panels

    def _sweep(self, panels: Sequence[_Panel], errors: Errors, rows: Indices) -> None:
        """Descend once on the codes and scales of every panel in some rows, keeping `errors` up to date."""
        grid = GRIDS[self._type.name]
        for i, panel in enumerate(panels):
            gradient, metric = errors.gradient(i), self._metric.block(i)
            moves = np.zeros_like(gradient)
            scale, offset = panel.scales.values()
            descent.descend_codes(
                rows, gradient, metric, scale, offset, _groups(panel.scales, len(metric)),
                np.float32(grid.lowest), np.float32(grid.highest), panel.codes, moves,
            )  # fmt: skip
            panel.scales.improve(rows, gradient, metric, panel.codes, moves)
            errors.add(i, moves)


def order_runs(diagonal: Array) -> list[Indices]:
    """The runs of RUN columns of each panel, by number, in the order in which they are decided: most energy first."""
    energy = diagonal.reshape(-1, RUN).sum(axis=1)
    panels = [np.arange(start, min(start + PANEL // RUN, len(energy))) for start in range(0, len(energy), PANEL // RUN)]
    panels.sort(key=lambda runs: -float(energy[runs].sum()))
    return [runs[np.argsort(-energy[runs], kind="stable")] for runs in panels]


def columns_of(runs: Indices) -> Indices:
    """The columns of `runs`."""
    columns: Indices = (runs[:, None] * RUN + np.arange(RUN)).ravel()
    return columns


def _groups(scales: Scales, p: int) -> NDArray[np.int64]:
    """Group of each of p columns."""
    return np.arange(p) // scales.group_size
