"""What the planner counts against what NumPy allocates."""

from __future__ import annotations

import tracemalloc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from calibrations import OPTIONS, WINDOWS

from sq_stream.calibrate import regression
from sq_stream.calibrate.calibration import plan_calibration
from sq_stream.calibrate.moments import ExactMoment, Moment, Needs, SketchedMoment
from sq_stream.calibrate.ordered import InOrder
from sq_stream.calibrate.sensitivity import plan_sensitivity
from sq_stream.calibrate.sketch import Factored, Sketch, read_sketch, write_sketch
from sq_stream.calibrate.store import Store
from sq_stream.calibrate.streamed import Stream
from sq_stream.formats.blocks import F32, Q4_K, Q6_K
from sq_stream.job.budget import (
    MOST_TILE_WEIGHTS,
    PROGRAM_BYTES,
    SHAPED_ROWS_BYTES,
    SHAPING_BYTES,
    encoding_needs,
    kernel_uses,
    shaped_row_bytes,
)
from sq_stream.models.parts import Attention, FeedForward
from sq_stream.parallel import Workers
from sq_stream.quantize.metric import DenseMetric, FactorMetric
from sq_stream.quantize.shape import Shaper

N_IN, RANK = 2816, 512


@contextmanager
def allocating(least: float, most: float) -> Iterator[None]:
    """Check that the peak of what the block allocates is within these bytes."""
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert least <= peak <= most, f"{peak / 2**20:.1f} MiB, expected {least / 2**20:.1f} to {most / 2**20:.1f}"


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape, np.float32)


@pytest.mark.parametrize("rank", [N_IN, RANK])
def test_a_metric(rank: int) -> None:
    residual, factor = np.ones(N_IN, np.float32), random(rank, N_IN)
    is_dense = rank == N_IN
    needed = DenseMetric.needed_bytes(N_IN, 2) if is_dense else FactorMetric.needed_bytes(N_IN, rank)
    with Workers(2) as workers, allocating(0.7 * needed, needed):
        Shaper(residual, factor, Q4_K, workers, dense=is_dense)


@pytest.mark.parametrize("shape", [(128, 256), (4096, 256), (256, 512), (256, N_IN)])
@pytest.mark.parametrize("is_dense", [True, False])
def test_a_shaped_tile(shape: tuple[int, int], is_dense: bool) -> None:
    w, n_in = random(*shape), shape[1]
    rank = min(n_in // 2 - 1, RANK)
    needed = len(w) * shaped_row_bytes(n_in, None if is_dense else rank) + SHAPED_ROWS_BYTES - w.nbytes
    with Workers(2) as workers:
        shaper = Shaper(np.ones(n_in, np.float32), random(rank, n_in), Q4_K, workers, dense=is_dense)
        shaper.shape(w[:128])  # compiled
        with allocating(0.6 * needed, needed):
            shaper.shape(w)


TENSORS = [((100_000, 768), Q6_K), ((768, 1536), Q4_K), ((1536, 768), Q4_K), ((768,), F32)]


@pytest.mark.parametrize("ranks", [None, {}, {1536: 256}])
def test_the_largest_tile_is_what_memory_allows(ranks: dict[int, int] | None) -> None:
    needs = encoding_needs(TENSORS, vocabulary_bytes=2**20, threads=2, ranks=ranks)
    assert needs.largest_tile(2**40) == MOST_TILE_WEIGHTS
    limited = 0
    for max_ram in range(needs.smallest, needs.at(MOST_TILE_WEIGHTS), 2**19):
        tile = needs.largest_tile(max_ram)
        assert needs.at(tile) <= max_ram
        limited += needs.at(tile + 2**16) > max_ram
    assert limited > 10


def test_what_is_compiled_needs_no_memory_to_compile() -> None:
    types = [block_type for _, block_type in TENSORS]
    for ranks in (None, {}):
        uses = kernel_uses(types, shaped=ranks is not None)
        assert len(uses) == 2
        first, second = (
            encoding_needs(TENSORS, vocabulary_bytes=0, threads=2, ranks=ranks, kept=kept) for kept in ((), uses)
        )
        assert second.program == PROGRAM_BYTES + (0 if ranks is None else SHAPING_BYTES) < first.program


@pytest.mark.parametrize(("n_out", "n_in"), [(1024, 1024), (512, 1024), (2048, 512)])
def test_a_regression(n_out: int, n_in: int) -> None:
    """What LAPACK allocates is not seen here: a copy of float64."""
    factor, fitted, held = np.triu(random(n_in, n_in)), random(n_out, n_in), random(n_out, n_in)
    sketch = Sketch.with_diagonal(np.full(n_in, 2.0 * n_in, np.float32), factor, 1)
    needed = regression.needed_bytes(n_out, n_in)
    arguments = factor.nbytes + fitted.nbytes + held.nbytes
    with allocating(0.5 * needed - arguments, needed - arguments):
        regression.shrunk_regression(sketch, fitted, held)


@pytest.mark.parametrize("rank", [N_IN, RANK])
def test_reading_a_sketch(rank: int, tmp_path: Path) -> None:
    panels = [random(rank, min(1024, N_IN - start)) for start in range(0, N_IN, 1024)]
    write_sketch(tmp_path / "x", Factored(1, np.full(N_IN, 2.0 * rank, np.float32), panels))
    needed = Sketch.needed_bytes(N_IN, rank)
    with allocating(0.7 * needed, needed):
        read_sketch(tmp_path / "x")


@pytest.mark.parametrize("is_exact", [True, False])
def test_a_second_moment(is_exact: bool, tmp_path: Path) -> None:
    n = 128
    needs: Needs = ExactMoment.needs(N_IN) if is_exact else SketchedMoment.needs(N_IN, RANK, n)
    x = random(n, N_IN)
    with allocating(0.7 * (needs.resident + needs.adding), 1.01 * (needs.resident + needs.adding)):
        moment: Moment = ExactMoment(N_IN, InOrder()) if is_exact else SketchedMoment(N_IN, RANK, InOrder())
        moment.add(0, x)
    with allocating(0.2 * needs.finishing, needs.finishing):
        write_sketch(tmp_path / "x", moment.finish(1.0))


@pytest.mark.parametrize(
    ("plan", "last", "n_left"),
    [(plan_calibration, (FeedForward, "forward"), 0), (plan_sensitivity, (Attention, "vjp"), 1)],
)
def test_a_layer_lets_go_of_what_it_starts_from(
    plan: Callable[..., Any],
    last: tuple[type, str],
    n_left: int,
    open_model: Callable[[str], Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Behind its first branch it holds no input (forward) or gradient of its output (backward): plans count on it."""
    read, run, started, left = Stream.read, getattr(*last), [], []

    def watched(self: Stream, layer: int, batch: int) -> np.ndarray:
        x = read(self, layer, batch)
        started.append(weakref.ref(x))
        return x

    def counting(*arguments: Any) -> np.ndarray:
        left.append(sum(x() is not None for x in started))
        return run(*arguments)

    monkeypatch.setattr(Stream, "read", watched)
    monkeypatch.setattr(*last, counting)
    plan(*open_model("llama"), WINDOWS, Store(tmp_path), **{**OPTIONS, "threads": 1}).run().close()
    assert max(left) == n_left
