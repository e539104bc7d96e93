"""Shaping: each kernel against its reference, the scales' bytes against gguf's decoder, and what it is all for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray
from reference_shape import descend_codes, round_with_feedback

from sq_stream.formats.blocks import BLOCK_TYPES, Q4_K
from sq_stream.job.budget import SHAPED_TYPES
from sq_stream.kernels import descent, regrid
from sq_stream.kernels.codec import decode, encode
from sq_stream.parallel import Workers
from sq_stream.quantize.grids import GRIDS, AffineSuperScales, Scales, fit_scales
from sq_stream.quantize.metric import DenseMetric, FactorMetric, panel_factor
from sq_stream.quantize.shape import Shaper

Array = NDArray[np.float32]
TYPES = list(GRIDS)


@pytest.fixture(scope="module")
def workers():
    with Workers(2) as pool:
        yield pool


def linear(n_out: int, n_in: int, seed: int = 3) -> tuple[Array, Array, Array]:
    """Heavy-tailed weights, and the residual and factor of inputs with a few strong directions."""
    random = np.random.default_rng(seed)
    w = random.standard_t(5, (n_out, n_in)).astype(np.float32) * 0.05
    factor = random.standard_normal((40, n_in)).astype(np.float32) * np.geomspace(3, 0.1, 40, dtype=np.float32)[:, None]
    residual = random.uniform(0.05, 0.4, n_in).astype(np.float32)
    return w, residual, factor


def dense(residual: NDArray[Any], factor: NDArray[Any]) -> NDArray[Any]:
    return np.diag(residual) + factor.T @ factor


def objective(decoded: Array, w: Array, a: Array) -> float:
    e = decoded.astype(np.float64) - w
    return 0.5 * float(np.einsum("ij,jk,ik->", e, a.astype(np.float64), e, optimize=True))


def oracle_decode(blocks: NDArray[np.uint8], name: str) -> Array:
    return gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[name])


def by_column(scales: Scales) -> tuple[Array, Array]:
    scale, offset = scales.values()
    return np.repeat(scale, scales.group_size, axis=1), np.repeat(offset, scales.group_size, axis=1)


def test_the_planner_knows_which_types_are_shaped() -> None:
    assert set(GRIDS) == SHAPED_TYPES


@pytest.mark.parametrize("name", TYPES)
def test_scales_and_codes_pack_to_what_gguf_decodes(name: str) -> None:
    random, grid = np.random.default_rng(1), GRIDS[name]
    scales = fit_scales(linear(9, 256)[0], BLOCK_TYPES[name], np.ones(256, np.float32))
    codes = random.integers(grid.lowest, grid.highest, (9, 256), endpoint=True).astype(np.float32)
    scale, offset = by_column(scales)
    np.testing.assert_allclose(oracle_decode(scales.pack(codes), name), scale * codes + offset, rtol=2e-7, atol=1e-9)


@pytest.mark.parametrize("name", TYPES)
def test_unpacking_loses_nothing(name: str) -> None:
    w, grid = linear(5, 256)[0], GRIDS[name]
    blocks = encode(w, BLOCK_TYPES[name], None)
    scales = grid.scales.unpack(blocks, BLOCK_TYPES[name])
    scale, offset = by_column(scales)
    codes = np.rint((decode(blocks, BLOCK_TYPES[name]) - offset) / np.where(scale == 0, 1, scale))
    np.testing.assert_array_equal(oracle_decode(scales.pack(codes), name), oracle_decode(blocks, name))


def panel(n_rows: int = 6, p: int = 64) -> tuple[Array, Array, Array, Array, NDArray[np.int64]]:
    w, residual, factor = linear(n_rows, p)
    random = np.random.default_rng(8)
    scale = random.uniform(0.01, 0.03, (n_rows, p // 32)).astype(np.float32)
    return w, dense(residual, factor), scale, -8 * scale, np.arange(p) // 32


def test_error_feedback_is_that_of_the_reference() -> None:
    w, a, scale, offset, group = panel()
    codes, left = np.empty_like(w), w.copy()
    descent.round_with_feedback(left, scale, offset, group, panel_factor(a), np.float32(0), np.float32(15), codes)
    for row in range(len(w)):
        s, o = scale[row, group].astype(np.float64), offset[row, group].astype(np.float64)
        expected = round_with_feedback(w[row].astype(np.float64), a.astype(np.float64), s, o, 0, 15)
        np.testing.assert_array_equal(codes[row], expected)
        np.testing.assert_allclose(left[row], w[row] - (s * codes[row] + o), atol=1e-6)


def test_descent_on_codes_is_that_of_the_reference() -> None:
    w, a, scale, offset, group = panel()
    s, o = scale[:, group], offset[:, group]
    codes = np.clip(np.rint((w - o) / s), 0, 15)
    start = codes.copy()
    gradient, moves = (s * codes + o - w) @ a, np.zeros_like(w)
    before = s * codes + o
    descent.descend_codes(
        np.arange(len(w)), gradient, a, scale, offset, group, np.float32(0), np.float32(15), codes, moves
    )
    for row in range(len(w)):
        expected = descend_codes(
            start[row].astype(np.float64), w[row], a.astype(np.float64), s[row], o[row], 0, 15
        )  # fmt: skip
        np.testing.assert_array_equal(codes[row], expected)
    assert (codes != start).any()
    np.testing.assert_allclose(before + moves, s * codes + o, atol=1e-6)
    np.testing.assert_allclose(gradient, (s * codes + o - w) @ a, atol=1e-4)


@pytest.mark.parametrize("name", TYPES)
def test_improved_scales_lower_the_objective_and_keep_the_books(name: str) -> None:
    w, residual, factor = linear(8, 256)
    a, grid = dense(residual, factor), GRIDS[name]
    scales = fit_scales(w, BLOCK_TYPES[name], np.ones(256, np.float32))
    scale, offset = by_column(scales)
    codes = np.clip(np.rint((w - offset) / np.where(scale == 0, 1, scale)), grid.lowest, grid.highest)
    decoded = scale * codes + offset
    gradient, moves = (decoded - w) @ a, np.zeros_like(w)
    scales.improve(np.arange(len(w)), gradient, a, codes, moves)
    improved = oracle_decode(scales.pack(codes), name)
    assert objective(improved, w, a) < objective(decoded, w, a)
    np.testing.assert_allclose(decoded + moves, improved, atol=1e-6)
    np.testing.assert_allclose(gradient, (improved - w) @ a, atol=2e-4)


def first_scales(w: Array) -> AffineSuperScales:
    scales = fit_scales(w, Q4_K, np.ones(256, np.float32))
    assert isinstance(scales, AffineSuperScales)
    return scales


def trials(scales: AffineSuperScales, codes: Array, b: int) -> Iterator[tuple[float, float]]:
    """All pairs (sc, m) that are tried for block b of the only row, given its codes [32]."""
    d, dmin, sc, m = scales.d[0], scales.dmin[0], scales.sc[0, b], scales.m[0, b]
    for a in range(-regrid.SC_REACH, regrid.SC_REACH + 1):
        new_sc = np.clip(sc + a, 0, 63)
        middle = m + np.rint(d * (new_sc - sc) * codes.mean() / dmin)
        for c in range(-regrid.M_REACH, regrid.M_REACH + 1):
            yield new_sc, np.clip(middle + c, 0, 63)


def test_first_scales_are_the_best_of_their_neighborhood_for_error_feedback() -> None:
    """For each block in turn, what the block adds to the objective when all later columns make up for it."""
    w, residual, factor = linear(1, 256)
    a, scales = dense(residual, factor).astype(np.float64), first_scales(w)
    chosen = replace(scales, sc=scales.sc.copy(), m=scales.m.copy())
    chosen.choose(w.copy(), panel_factor(a))
    assert (chosen.sc != scales.sc).sum() >= 3
    error = np.zeros(256)
    for b in range(8):
        own, later = slice(32 * b, 32 * b + 32), slice(32 * b + 32, 256)
        open_, conditional = slice(own.start, 256), a[own, own]
        if b < 7:
            conditional = conditional - a[own, later] @ np.linalg.solve(a[later, later], a[later, own])
        wanted = (w[0, open_] - np.linalg.solve(a[open_, open_], a[open_, : own.start] @ error[: own.start]))[:32]

        def rounded(sc: float, m: float, of: Array = wanted, under: Array = conditional) -> tuple[Array, Array]:
            s, o = np.full(32, scales.d[0] * sc), np.full(32, -scales.dmin[0] * m)
            codes = round_with_feedback(of, under, s, o, 0, 15)
            return codes, s * codes + o - of

        def cost(pair: tuple[float, float], under: Array = conditional) -> float:
            e = rounded(*pair)[1]
            return float(e @ under @ e)

        start, _ = rounded(scales.sc[0, b], scales.m[0, b])
        pairs = list(trials(scales, start, b))
        best = min(map(cost, pairs))
        assert cost((chosen.sc[0, b], chosen.m[0, b])) <= best * (1 + 1e-4)
        _, left = rounded(chosen.sc[0, b], chosen.m[0, b])
        error[own] = left + wanted - w[0, own]


def test_improved_blocks_cost_no_more_than_any_trial() -> None:
    """Block 0, the first to move: with all other columns as they are, no pair and its codes are better."""
    w, residual, factor = linear(1, 256)
    a, scales = dense(residual, factor).astype(np.float64), first_scales(w)
    scale, offset = by_column(scales)
    codes = np.clip(np.rint((w - offset) / scale), 0, 15)
    e = (scale * codes + offset - w)[0].astype(np.float64)
    wanted = w[0, :32] - np.linalg.solve(a[:32, :32], a[:32, 32:] @ e[32:])
    costs = []
    for sc, m in trials(scales, codes[0, :32], 0):
        s, o = np.full(32, scales.d[0] * sc), np.full(32, -scales.dmin[0] * m)
        left = s * round_with_feedback(wanted, a[:32, :32], s, o, 0, 15) + o - wanted
        costs.append(left @ a[:32, :32] @ left)
    new, moves = replace(scales, sc=scales.sc.copy(), m=scales.m.copy()), np.zeros_like(w)
    inverse = np.linalg.inv(a[:32, :32])[None]
    regrid.choose_again(
        np.arange(1), (e @ a).astype(np.float32)[None], a.astype(np.float32), inverse.astype(np.float32),
        np.ascontiguousarray(np.linalg.cholesky(inverse[0]).T[None], np.float32), np.float32(15),
        codes[:, :32], new.d, new.dmin, new.sc[:, :1], new.m[:, :1], moves[:, :32],
    )  # fmt: skip
    left = (new.d[0] * new.sc[0, 0] * codes[0, :32] - new.dmin[0] * new.m[0, 0]) - wanted
    assert left @ a[:32, :32] @ left == pytest.approx(min(costs), rel=1e-3)
    np.testing.assert_allclose(e[:32] + moves[0, :32], left + wanted - w[0, :32], atol=1e-6)


@pytest.mark.parametrize("name", TYPES)
def test_runs_of_columns_can_be_arranged(name: str) -> None:
    random, grid, w = np.random.default_rng(1), GRIDS[name], linear(4, 256)[0]
    scales = fit_scales(w, BLOCK_TYPES[name], np.ones(256, np.float32))
    codes = random.integers(grid.lowest, grid.highest, (4, 256), endpoint=True).astype(np.float32)
    runs = random.permutation(8)
    columns = (32 * runs[:, None] + np.arange(32)).ravel()
    arranged = oracle_decode(scales.arranged(runs).pack(codes[:, columns]), name)
    np.testing.assert_array_equal(arranged, oracle_decode(scales.pack(codes), name)[:, columns])


def panels_of(n_in: int) -> list[slice]:
    return [slice(start, min(start + 256, n_in)) for start in range(0, n_in, 256)]


@pytest.mark.parametrize("n_in", [256, 576, 800])
def test_both_metrics_are_the_same_metric(n_in: int, workers: Workers) -> None:
    w, residual, factor = linear(5, n_in)
    panels = panels_of(n_in)
    forms = DenseMetric(dense(residual, factor), panels, workers), FactorMetric(residual, factor, panels, workers)
    errors = [form.errors(len(w)) for form in forms]

    def assert_same(ours: Array, theirs: Array) -> None:
        assert ours.dtype == theirs.dtype == np.float32
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=3e-3 * np.abs(ours).max(initial=0))

    for i, own in enumerate(panels):
        assert_same(*(form.conditional[i] for form in forms))
        assert_same(*(form.block(i) for form in forms))
        assert_same(*(e.correction(i) for e in errors))
        for e in errors:
            e.add(i, w[:, own])
    for i in range(len(panels)):
        assert_same(*(e.gradient(i) for e in errors))
        np.testing.assert_allclose(errors[0].gradient(i), (w @ dense(residual, factor))[:, panels[i]], atol=1e-3)
    for e in errors:
        assert e.objectives().sum() == pytest.approx(objective(w, np.zeros_like(w), dense(residual, factor)), rel=1e-4)


@pytest.mark.parametrize("form", [DenseMetric, FactorMetric])
def test_correction_is_the_least_squares_answer_of_the_open_columns(form: type, workers: Workers) -> None:
    w, residual, factor = linear(4, 800)
    a, panels = dense(residual.astype(np.float64), factor.astype(np.float64)), panels_of(800)
    given = (dense(residual, factor),) if form is DenseMetric else (residual, factor)
    metric = form(*given, panels, workers)
    errors = metric.errors(len(w))
    for i, own in enumerate(panels):
        inverse = np.linalg.inv(a[own.start :, own.start :])
        best = -w[:, : own.start] @ a[: own.start, own.start :] @ inverse
        np.testing.assert_allclose(errors.correction(i), best[:, : own.stop - own.start], atol=3e-4)
        conditional = np.linalg.inv(inverse[: own.stop - own.start, : own.stop - own.start])
        np.testing.assert_allclose(metric.conditional[i], conditional, atol=1e-4 * np.abs(a).max())
        errors.add(i, w[:, own])


def test_a_metric_that_rounding_made_indefinite_still_shapes(workers: Workers) -> None:
    """Two inputs that carry nearly all of the energy and always agree."""
    w, residual, factor = linear(16, 768)
    factor[:, 300] = factor[:, 700] = 3e4 * factor[:, 5]
    for is_dense in (True, False):
        blocks, first, last = Shaper(residual, factor, Q4_K, workers, dense=is_dense).shape(w)
        assert np.isfinite(oracle_decode(blocks, "Q4_K")).all()
        assert 0 < last <= first


@pytest.mark.parametrize(("name", "n_in", "most"), [
    ("Q4_K", 512, 0.5), ("Q5_K", 512, 0.5), ("Q6_K", 512, 0.6),
    ("Q8_0", 288, 0.6), ("Q5_0", 288, 0.5), ("Q5_1", 288, 0.5),
])  # fmt: skip
@pytest.mark.parametrize("is_dense", [True, False])
def test_shaping_beats_rounding_with_the_same_importance(
    name: str, n_in: int, most: float, is_dense: bool, workers: Workers
) -> None:
    w, residual, factor = linear(48, n_in)
    a, block_type = dense(residual, factor), BLOCK_TYPES[name]
    rounded = oracle_decode(encode(w, block_type, np.diag(a).copy()), name)
    blocks, first, last = Shaper(residual, factor, block_type, workers, dense=is_dense).shape(w)
    assert blocks.shape == (48, block_type.row_bytes(n_in))
    assert last < first
    assert objective(oracle_decode(blocks, name), w, a) < most * objective(rounded, w, a)


def test_bytes_depend_on_neither_threads_nor_tiles() -> None:
    w, residual, factor = linear(300, 512)
    results = []
    for n_threads, tile in ((1, 300), (2, 300), (2, 128)):
        with Workers(n_threads) as pool:
            shaper = Shaper(residual, factor, Q4_K, pool)
            results.append(np.vstack([shaper.shape(w[i : i + tile])[0] for i in range(0, 300, tile)]))
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("value", [0.0, 0.25, -1e-9])
def test_constant_rows_and_dead_columns(name: str, value: float, workers: Workers) -> None:
    w = np.full((3, 256), value, np.float32)
    residual = np.zeros(256, np.float32)  # no input was ever seen
    blocks, _, _ = Shaper(residual, np.zeros((1, 256), np.float32), BLOCK_TYPES[name], workers).shape(w)
    np.testing.assert_allclose(oracle_decode(blocks, name), w, rtol=1e-2, atol=1e-7)
