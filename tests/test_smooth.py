"""Smoothing: it changes no output, of any architecture, and is undone where files are compared with their source."""

from __future__ import annotations

import numpy as np
import pytest
import tiny_models
from gguf_files import describe
from hypothesis import given
from hypothesis import strategies as st

from sq_stream import api
from sq_stream.calibrate.sketch import Sketch
from sq_stream.calibrate.sketches import Sketches
from sq_stream.demo import model_folder
from sq_stream.formats.blocks import BF16, F16
from sq_stream.formats.checkpoint import Checkpoint
from sq_stream.formats.gguf_layout import lay_out
from sq_stream.formats.gguf_read import GGUFReader
from sq_stream.formats.gguf_write import GGUFFile
from sq_stream.kernels.codec import decode, encode
from sq_stream.models.forward import find_decoder, forward, linears_by_norm, linears_by_product
from sq_stream.quantize.smooth import EXPONENT, STEPS, Scaling, channel_factors, find_scalings, round_factors

NAMES = [name for name, model in tiny_models.MODELS.items() if not model.mtp]


@pytest.mark.parametrize("name", NAMES)
def test_any_factors_leave_the_logits_as_they_are(name, tmp_path):
    with Checkpoint.open(tiny_models.write(name, tmp_path / name)) as checkpoint:
        spec = describe(checkpoint)
        weights = {t.name: t.read(checkpoint, 0, t.n_rows).reshape(t.shape) for t in spec.tensors}
    decoder = find_decoder(spec.arch, spec.metadata)
    groups = linears_by_norm(decoder, weights)
    assert {norm.rpartition(".")[0].rpartition(".")[2] for norm in groups} >= {"attn_norm"}
    assert len(groups) == 2 * decoder.n_layer + ("output.weight" in weights)
    products = linears_by_product(decoder, weights)
    assert len(products) == decoder.n_layer
    random = np.random.RandomState(0)
    smoothed = dict(weights)
    for norm, linears in groups.items():
        factors = np.exp(random.standard_normal(weights[norm].shape)).astype(np.float32)
        smoothed[norm] = weights[norm] / factors
        for linear in linears:
            smoothed[linear] = weights[linear] * factors
    for before, after in products.items():
        factors = np.exp(random.standard_normal(len(weights[before]))).astype(np.float32)
        smoothed[before] = smoothed[before] / factors[:, None]
        smoothed[after] = smoothed[after] * factors
    expected = forward(tiny_models.TOKENS, weights, decoder)
    np.testing.assert_allclose(forward(tiny_models.TOKENS, smoothed, decoder), expected, atol=2e-4)


@given(st.lists(st.floats(0, 1e6, width=32), min_size=1, max_size=50))
def test_factors_are_powers_of_the_root_mean_square_around_one(values):
    mean_squares = np.array(values, np.float32)
    factors, live = channel_factors(mean_squares), mean_squares > 0
    assert factors.dtype == np.float32
    assert (factors[~live] == 1).all()
    assert (factors > 0).all()
    if live.any():
        np.testing.assert_allclose(np.log(factors[live].astype(float)).mean(), 0, atol=1e-5)
        ratios = np.log(factors[live] / factors[live][0])
        expected = EXPONENT * 0.5 * np.log(mean_squares[live].astype(float) / mean_squares[live][0])
        np.testing.assert_allclose(ratios, expected, atol=1e-4)


@pytest.fixture
def sketches(tmp_path):
    with Checkpoint.open(tiny_models.write("llama", tmp_path / "llama")) as checkpoint:
        spec = describe(checkpoint)
    sites = {
        ("blk.0.attn_q", "blk.0.attn_k"): 0, ("blk.0.attn_v",): 0,
        ("blk.0.ffn_gate", "blk.0.ffn_up"): 0, ("blk.0.ffn_down",): 0,
    }  # fmt: skip
    widths = {t.name: t.n_in for t in spec.tensors}

    def load(site):
        random, n_in = np.random.RandomState(len(site)), widths[f"{site[0]}.weight"]
        rank = 0 if "gate" in site[0] else 5
        return Sketch(9, random.random_sample(n_in).astype(np.float32), random.random_sample((rank, n_in)).astype("f4"))

    return Sketches(spec, sites, load)


NORMS = {
    "blk.0.attn_norm.weight": ("blk.0.attn_q.weight", "blk.0.attn_k.weight", "blk.0.attn_v.weight"),
    "blk.0.ffn_norm.weight": ("blk.0.ffn_gate.weight", "blk.0.ffn_up.weight"),
}


PRODUCTS = {"blk.0.ffn_up.weight": "blk.0.ffn_down.weight"}
ALL = {*sum(NORMS.values(), ()), *PRODUCTS, *PRODUCTS.values()}


def test_a_group_has_one_factor_for_each_channel_and_statistics_follow(sketches):
    linears = NORMS["blk.0.attn_norm.weight"]
    before = {name: sketches[name].dense() for name in (*linears, "blk.0.ffn_down.weight")}
    scalings = find_scalings(NORMS, PRODUCTS, ALL, sketches)
    assert scalings.keys() == {  # of what enters ffn_gate, only mean squares are known
        "blk.0.attn_norm.weight", *linears, "blk.0.ffn_up.weight", "blk.0.ffn_down.weight"
    }  # fmt: skip
    columns = channel_factors(np.diag(before[linears[0]]))
    np.testing.assert_allclose(scalings["blk.0.attn_norm.weight"].columns * columns, 1, rtol=1e-6)
    down, up = scalings["blk.0.ffn_down.weight"], scalings["blk.0.ffn_up.weight"]
    assert up.columns is None
    assert down.rows is None
    np.testing.assert_allclose(up.rows * down.columns, 1, rtol=1e-6)
    exact = channel_factors(np.diag(before["blk.0.ffn_down.weight"]))
    assert (np.abs(np.log2(down.columns / exact)) <= 0.5 / STEPS + 1e-6).all()
    sketches.smooth({name: scaling.columns for name, scaling in scalings.items() if scaling.columns is not None})
    for name, known in before.items():
        columns = scalings[name].columns
        for _ in range(2):  # loaded, and remembered
            np.testing.assert_allclose(sketches[name].dense() * np.outer(columns, columns), known, rtol=1e-5)


def test_a_group_with_a_linear_that_is_not_shaped_stays_as_it_is(sketches):
    assert find_scalings(NORMS, PRODUCTS, ALL - {"blk.0.attn_v.weight", "blk.0.ffn_up.weight"}, sketches) == {}


@given(st.lists(st.floats(2.0**-6, 2.0**6), min_size=1, max_size=20), st.floats(-0.08, 0.08))
def test_rounded_factors_survive_the_error_of_quantized_rows(values, error):
    rounded = round_factors(np.array(values))
    np.testing.assert_array_equal(round_factors(rounded * (1 + error)), rounded)
    np.testing.assert_array_equal(round_factors(np.array([0.0, -1.0])), [1, 1])


def test_scaling_is_undone():
    random = np.random.RandomState(0)
    w, rows = random.standard_normal((5, 8)).astype(np.float32), slice(2, 5)
    scaling = Scaling(*(random.uniform(0.5, 2, n).astype(np.float32) for n in (8, 5)))
    scaled = scaling.apply(w[rows].copy(), rows)
    np.testing.assert_allclose(scaled, w[rows] * scaling.columns * scaling.rows[2:5, None], rtol=1e-6)
    np.testing.assert_allclose(scaling.undo(scaled, rows), w[rows], rtol=1e-6)


def test_a_smoothed_file_is_compared_with_what_it_was_made_from(tmp_path):
    model, path = model_folder(), tmp_path / "smoothed.gguf"
    api.quantize(model, path, recipe="q6_k", windows=8, cache=tmp_path / "cache")
    api.quantize(model, tmp_path / "plain.gguf", recipe="q6_k", effort="fast")
    with GGUFReader.open(path) as smoothed, GGUFReader.open(tmp_path / "plain.gguf") as plain:
        norm, up = "blk.0.attn_norm.weight", "blk.0.ffn_up.weight"
        assert (smoothed.read_rows(norm, 0, 1) != plain.read_rows(norm, 0, 1)).any()
        ours, theirs = (decode(r.read_rows(up, 0, 99), r.tensors[up].block_type) for r in (smoothed, plain))
        lengths = np.linalg.norm(ours, axis=1) / np.linalg.norm(theirs, axis=1)
        assert np.ptp(np.log2(lengths)) > 0.4
    for check in api.verify(path, against=model):
        assert check.relative_error < (1e-6 if check.type == "F32" else 0.1), check


@pytest.mark.parametrize("block_type", [F16, BF16])
def test_norms_of_any_type_are_compared(block_type, tmp_path):
    """Other programs store norms as they like."""
    model, ours, theirs = model_folder(), tmp_path / "ours.gguf", tmp_path / "theirs.gguf"
    api.quantize(model, ours, recipe="q8_0", effort="fast")
    with GGUFReader.open(ours) as reader:
        types = {n: block_type if n.endswith("_norm.weight") else t.block_type for n, t in reader.tensors.items()}
        tensors = [(name, tensor.shape, types[name]) for name, tensor in reader.tensors.items()]
        layout = lay_out(list(reader.metadata.values()), tensors)
        with GGUFFile.create(theirs, layout) as file:
            for place in layout.tensors:
                rows = reader.read_rows(place.name, 0, place.n_rows)
                if types[place.name] == block_type:
                    rows = encode(decode(rows, reader.tensors[place.name].block_type), block_type)
                file.write_rows(place, 0, rows)
            file.commit()
    norms = 0
    for check in api.verify(theirs, against=model):
        assert check.relative_error < (0.02 if check.type == "Q8_0" else 0.004), check
        norms += check.type == block_type.name
    assert norms > 4
