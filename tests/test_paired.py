"""The paired pass: what it measures against both models run plainly, and what regressions on it are worth."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import pytest
import tiny_models
from calibrations import BATCH_TOKENS, WINDOWS
from numpy.typing import NDArray

from sq_stream.calibrate import budget, paired
from sq_stream.calibrate.paired import HEAD, Meeting, PairedPass, Side
from sq_stream.calibrate.regression import DAMPING, shrunk_regression
from sq_stream.calibrate.sketch import Sketch
from sq_stream.calibrate.streamed import Residuals, into_batches
from sq_stream.calibrate.weights import LayerReader
from sq_stream.models.forward import Decoder, find_decoder, forward, head_name, layer_names
from sq_stream.models.layers import Site
from sq_stream.parallel import Workers

Array = NDArray[np.float32]
NAMES = [name for name, model in tiny_models.MODELS.items() if not model.mtp]
N_FIT = 2  # batches of the four


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "BATCH_TOKENS", BATCH_TOKENS)


def inputs(tokens: NDArray[np.int32], weights: Mapping[str, Array], decoder: Decoder) -> dict[str, Array]:
    """What enters each site, by its first linear: [n_window, n_tok, n_in]."""
    seen: dict[str, Array] = {}
    forward(tokens, weights, decoder, lambda site, x: seen.update({site[0]: x.copy()}))
    return seen


def streams(tokens: NDArray[np.int32], weights: Mapping[str, Array], decoder: Decoder) -> Iterator[Array]:
    """The residual stream before each branch and behind the last."""
    x = decoder.embed(weights["token_embd.weight"][tokens])
    yield x
    for b in range(2 * decoder.n_layer):
        own = {short: weights[name] for short, name in layer_names(weights, b // 2).items()}
        x = x + decoder.branch(b).forward(x, own)
        yield x


def cross(y: Array, x: Array) -> NDArray[np.float64]:
    y, x = (a.reshape(-1, a.shape[-1]).astype(np.float64) for a in (y, x))
    moment: NDArray[np.float64] = y.T @ x / len(x)
    return moment


@pytest.mark.parametrize("name", NAMES)
def test_what_is_known_at_a_site_is_what_two_plain_passes_give(name, open_model, tmp_path, monkeypatch):
    """Every linear is made another in its turn, and those behind it must see that."""
    checkpoint, spec = open_model(name)
    decoder, reader = find_decoder(spec.arch, spec.metadata), LayerReader(spec, checkpoint)
    reference = {t.name: t.read(checkpoint, 0, t.n_rows).reshape(t.shape) for t in spec.tensors}
    random = np.random.RandomState(1)
    columns = {
        f"blk.{i}.ffn_down.weight": np.exp(random.standard_normal(reference[f"blk.{i}.ffn_down.weight"].shape[1]) / 2)
        for i in range(decoder.n_layer)
    }
    other, met = dict(reference), dict[str, Meeting]()
    monkeypatch.setattr(paired, "shrunk_regression", lambda sketch, fitted, held: np.stack([fitted, held]))

    def quantize(prefix: str, site: Site, meeting: Meeting) -> None:
        met[prefix + site[0]] = meeting
        for tensor in (f"{prefix}{linear}.weight" for linear in site):
            w = reference[tensor] * columns.get(tensor, np.float32(1))
            other[tensor] = (w + 0.05 * w.std() * random.standard_normal(w.shape)).astype(np.float32)
        if "ffn_up" in site:  # what is divided out of the columns of ffn_down
            other[f"{prefix}ffn_up.weight"] /= columns[f"{prefix}ffn_down.weight"][:, None].astype(np.float32)

    def layer(weights: Mapping[str, Array], i: int) -> dict[str, Array]:
        if i == HEAD:
            return {"output_norm.weight": weights["output_norm.weight"]}
        return {short: weights[name] for short, name in layer_names(weights, i).items()}

    batches = into_batches(WINDOWS)
    sides = [
        Side(Residuals(tmp_path / str(k), batches, reader, decoder), lambda i, weights=weights: layer(weights, i))
        for k, weights in enumerate((reference, other))
    ]
    seen = inputs(WINDOWS, reference, decoder)
    with Workers(2) as workers:
        both = PairedPass(*sides, {k: v.astype(np.float32) for k, v in columns.items()}, N_FIT, workers)
        for b in range(2 * decoder.n_layer):
            prefix, part = f"blk.{b // 2}.", decoder.branch(b).part
            of_layer = [s.removeprefix(prefix) for s in seen if s.startswith(prefix)]
            own = [s for s in of_layer if s.startswith("ffn") == bool(b % 2)]
            of_site = {part.entry[0]: part.entry, "attn_q": ("attn_q", "attn_k")}
            sites = {of_site.get(s, (s,)): seen[prefix + s].shape[-1] for s in own}
            both.run_branch(b, sites, lambda site, meeting, prefix=prefix: quantize(prefix, site, meeting))
        both.run_head(head_name(reference), lambda site, meeting: met.update({site[0]: meeting}))

    theirs, ours = seen, inputs(WINDOWS, other, decoder)
    before, behind = list(streams(WINDOWS, other, decoder)), list(streams(WINDOWS, reference, decoder))[1:]
    n_fit = sum(len(batch) for batch in batches[:N_FIT])
    assert met.keys() == theirs.keys()
    for site, meeting in met.items():
        gap = theirs[site] / columns.get(f"{site}.weight", 1) - ours[site]
        x, layer_number = ours[site], int(site.split(".")[1]) if site.startswith("blk.") else None
        b = None if layer_number is None else 2 * layer_number + site.endswith(("ffn_gate", "ffn_down"))
        if b is not None and site == f"blk.{b // 2}.{(decoder.branch(b).exit or ('',))[0]}":
            h = behind[b]
            gap = h - before[b] - ours[site] @ (reference[f"{site}.weight"] * columns.get(f"{site}.weight", 1)).T
            size = np.sqrt(np.square(h).mean(axis=-1, keepdims=True))
            gap, x = gap / size, x / size
        expected = np.stack([cross(gap[part], x[part]) for part in (np.s_[:n_fit], np.s_[n_fit:])])
        np.testing.assert_allclose(meeting.regression, expected, atol=2e-3 * np.abs(expected).max(), err_msg=site)
        moment = cross(x[:n_fit], x[:n_fit])
        np.testing.assert_allclose(meeting.sketch.dense(), moment, atol=2e-4 * moment.max(), err_msg=site)


def exact_sketch(x: Array) -> Sketch:
    moment = x.T @ x / len(x)
    return Sketch(len(x), np.zeros(x.shape[1], np.float32), np.linalg.cholesky(moment).T.astype(np.float32))


def drawn(seed: int, n: int = 400, n_in: int = 64, n_out: int = 256) -> tuple[Array, Array]:
    """Correlated inputs, and outputs of which two directions of them explain a part."""
    random, mix = np.random.default_rng(seed), np.random.default_rng(0).standard_normal((n_in, n_in))
    x = random.standard_normal((n, n_in)) @ mix
    y = 3 * random.standard_normal((n, n_out))
    y += np.linalg.solve(mix.T, x.T).T[:, :2] @ np.random.default_rng(7).standard_normal((2, n_out))
    return x.astype(np.float32), y.astype(np.float32)


def test_a_regression_that_other_text_confirms_is_ridge_regression():
    x, y = drawn(1)
    fitted, sketch = y.T @ x / len(x), exact_sketch(x)
    a = sketch.dense().astype(np.float64)
    expected = np.linalg.solve(a + DAMPING * np.trace(a) / len(a) * np.eye(len(a)), fitted.T).T
    np.testing.assert_allclose(shrunk_regression(sketch, fitted, fitted), expected, atol=1e-4 * np.abs(expected).max())
    assert not shrunk_regression(sketch, fitted, -fitted).any()


def test_a_shrunk_regression_explains_more_of_text_that_has_no_part_in_it():
    (x, y), (x_held, y_held), (x_new, y_new) = drawn(1), drawn(2), drawn(3, n=5000)
    fitted, held, sketch = y.T @ x / len(x), y_held.T @ x_held / len(x_held), exact_sketch(x)

    def left(coefficients: Array) -> float:
        return float(np.square(y_new - x_new @ coefficients.T).mean())

    nothing, plain = left(np.zeros_like(fitted)), left(shrunk_regression(sketch, fitted, fitted))
    shrunk = left(shrunk_regression(sketch, fitted, held))
    known = left(np.linalg.lstsq(x_new, y_new, rcond=None)[0].T)
    assert known < shrunk < nothing
    assert shrunk - known < 0.7 * (plain - known)


def test_channels_that_are_always_zero_explain_nothing():
    x, y = drawn(1)
    x[:, 5] = 0
    moment = x.T @ x / len(x)
    sketch = Sketch.with_diagonal(np.diag(moment).copy(), np.linalg.cholesky(moment + 1e-4 * np.eye(64)).T, len(x))
    fitted = y.T @ x / len(x)
    coefficients = shrunk_regression(sketch, fitted, fitted)
    assert np.isfinite(coefficients).all()
    assert np.abs(coefficients[:, 5]).max() < 1e-4 * np.abs(coefficients).max()
