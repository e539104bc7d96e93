"""Second moments of activations: sums, factors, sketches and their files, against NumPy in float64."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sq_stream.calibrate import moments
from sq_stream.calibrate.moments import ExactMoment, SketchedMoment
from sq_stream.calibrate.ordered import AbandonedError, InOrder
from sq_stream.calibrate.sketch import Sketch, read_sketch, write_sketch
from sq_stream.errors import BadInputError, StorageError


def activations(n_tokens, n_in, seed=0, decay=1.0, dead=0):
    """Correlated activations of very different sizes; the first `dead` channels are zero."""
    random = np.random.RandomState(seed)
    mix = random.standard_normal((n_in, n_in)) * np.arange(1, n_in + 1)[:, None] ** -decay
    x = random.standard_normal((n_tokens, n_in)) @ mix * 10.0 ** random.uniform(-2, 2, n_in)
    x[:, random.permutation(n_in)[:dead]] = 0
    return x.astype(np.float32)


def expected_of(x):
    return x.T.astype(np.float64) @ x / len(x)


def collect(moment, x, n_batch=5, energy=1.0):
    for i, part in enumerate(np.array_split(x, n_batch)):
        moment.add(i, part)
    return moment.finish(energy)


def relative_error(a, expected):
    """Largest error of an entry, in units of √(A_ii A_jj)."""
    scale = np.sqrt(np.diag(expected))
    scale = np.where(scale > 0, scale, 1)
    return np.abs((a - expected) / scale / scale[:, None]).max()


@settings(max_examples=30)
@given(
    n_in=st.integers(1, 70),
    n_tokens=st.integers(1, 150),
    panel=st.sampled_from([1, 7, 16, 64]),
    dead=st.integers(0, 5),
    seed=st.integers(0, 2**32 - 1),
)
def test_exact_moments_survive_their_file(tmp_path_factory, n_in, n_tokens, panel, dead, seed):
    x = activations(n_tokens, n_in, seed, dead=min(dead, n_in))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moments, "PANEL", panel)
        factored = collect(ExactMoment(n_in, InOrder()), x)
    path = tmp_path_factory.mktemp("sketch") / "a.sketch"
    write_sketch(path, factored)
    sketch, expected = read_sketch(path), expected_of(x)
    assert sketch.n_tokens == n_tokens
    assert sketch.n_dead == min(dead, n_in)
    assert relative_error(sketch.dense(), expected) < 2e-4
    np.testing.assert_allclose(sketch.diagonal(), np.diag(expected), rtol=1e-5)
    assert (sketch.residual >= 0).all()
    assert np.linalg.eigvalsh(sketch.dense().astype(np.float64)).min() >= -1e-6 * np.trace(expected)


def test_factor_of_well_conditioned_moments_is_accurate(tmp_path):
    x = np.random.RandomState(0).standard_normal((4000, 1500)).astype(np.float32)
    factored = collect(ExactMoment(1500, InOrder()), x)
    write_sketch(tmp_path / "a", factored)
    sketch, expected = read_sketch(tmp_path / "a"), expected_of(x)
    assert relative_error(sketch.dense(), expected) < 4e-5
    assert sketch.rank == 1500
    assert (tmp_path / "a").stat().st_size < 1500**2 * 1.1  # half of the entries, two bytes each


def test_strongest_directions_hold_the_energy():
    x = activations(500, 60, decay=0.5)
    expected = expected_of(x)
    for energy in (0.5, 0.9, 0.999):
        sketch = collect(ExactMoment(60, InOrder()), x, energy=energy).sketch()
        values = np.linalg.eigvalsh(expected)[::-1]
        kept = np.cumsum(values) / values.sum()
        assert sketch.rank == np.searchsorted(kept, energy) + 1
        assert (sketch.factor**2).sum() >= energy * np.trace(expected) * (1 - 1e-5)
        np.testing.assert_allclose(sketch.diagonal(), np.diag(expected), rtol=1e-5)


def test_a_narrow_sketch_finds_the_strong_directions():
    """Nearly as good as the best of its rank, and exact on the diagonal; never more than the matrix."""
    random = np.random.RandomState(3)
    basis = np.linalg.qr(random.standard_normal((200, 200)))[0]
    x = (random.standard_normal((3000, 200)) * np.arange(1, 201) ** -1.5 @ basis).astype(np.float32)
    expected = expected_of(x)
    sketch = collect(SketchedMoment(200, 60, InOrder()), x).sketch()
    values = np.sort(np.linalg.eigvalsh(expected))[::-1]
    low = sketch.factor.T.astype(np.float64) @ sketch.factor
    assert np.trace(expected - low) < 3 * values[30:].sum()
    np.testing.assert_allclose(sketch.diagonal(), np.diag(expected), rtol=1e-4)
    assert np.linalg.eigvalsh(expected - low).min() > -1e-4 * values[0]


def test_a_sketch_of_more_rank_than_data():
    x = activations(20, 50)
    sketch = collect(SketchedMoment(50, 40, InOrder()), x, n_batch=2).sketch()
    expected = expected_of(x)
    assert np.abs(sketch.dense() - expected).max() < 1e-3 * np.abs(expected).max()


@pytest.mark.parametrize("kind", [lambda order: ExactMoment(40, order), lambda order: SketchedMoment(40, 8, order)])
def test_threads_do_not_change_a_bit(kind):
    parts = np.array_split(activations(900, 40), 30)
    moment = kind(InOrder())
    for i, part in enumerate(parts):
        moment.add(i, part)
    expected = moment.finish(1.0).sketch()
    moment = kind(InOrder())
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(moment.add, range(30), parts))
    sketch = moment.finish(1.0).sketch()
    np.testing.assert_array_equal(sketch.factor, expected.factor)
    np.testing.assert_array_equal(sketch.residual, expected.residual)


def test_those_who_wait_for_a_failed_batch_are_released():
    order = InOrder()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(ExactMoment(4, order).add, 1, activations(5, 4))
        order.fail(0)
        with pytest.raises(AbandonedError):
            waiting.result()


def test_neutral_statistics_are_the_identity():
    sketch = Sketch.neutral(5)
    np.testing.assert_array_equal(sketch.dense(), np.eye(5))
    assert (sketch.n_tokens, sketch.rank, sketch.n_in, sketch.n_dead) == (0, 0, 5, 0)


def test_a_site_that_saw_only_zeros(tmp_path):
    write_sketch(tmp_path / "a", collect(ExactMoment(6, InOrder()), np.zeros((10, 6), np.float32)))
    sketch = read_sketch(tmp_path / "a")
    assert sketch.n_dead == 6
    np.testing.assert_array_equal(sketch.dense(), np.zeros((6, 6)))


@given(position=st.floats(0, 0.999), bit=st.integers(0, 7))
def test_damaged_files_are_found(tmp_path_factory, position, bit):
    path = tmp_path_factory.mktemp("sketch") / "a.sketch"
    write_sketch(path, collect(ExactMoment(9, InOrder()), activations(30, 9)))
    data = bytearray(path.read_bytes())
    data[int(position * len(data))] ^= 1 << bit
    path.write_bytes(data)
    with pytest.raises(BadInputError, match=r"a\.sketch"):
        read_sketch(path)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(StorageError, match="gone"):
        read_sketch(tmp_path / "gone")
