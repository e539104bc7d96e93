"""The backward pass of every architecture, and of the parts that layers are made of, in float64."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import tiny_models
from gguf_files import describe
from gradients import assert_close, assert_is_gradient, torch_gradients
from hypothesis import given, settings
from hypothesis import strategies as st
from threadpoolctl import threadpool_limits

from sq_stream.formats.checkpoint import Checkpoint
from sq_stream.models import layers
from sq_stream.models.attention import causal_attention, causal_attention_vjp
from sq_stream.models.backward import backward, draw, sampled_loss_vjp
from sq_stream.models.forward import Decoder, find_decoder, forward, head_name, layer_names
from sq_stream.models.gated_delta import gated_delta, gated_delta_vjp
from sq_stream.models.rotary import Rotary

NAMES = [name for name, model in tiny_models.MODELS.items() if not model.mtp]
TOKENS = np.random.RandomState(1).randint(0, tiny_models.N_VOCAB, (2, 150))  # over tiles of attention, and chunks
UNIFORM = draw(0, [0, 1], 150)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Small products: threads of BLAS would only wait for each other."""
    with threadpool_limits(1):
        yield


@pytest.fixture(scope="module", params=NAMES)
def model(request, tmp_path_factory):
    """(decoder, float64 weights by GGUF name, checkpoint folder, spec) of a tiny model with random weights."""
    folder = tiny_models.write(request.param, tmp_path_factory.mktemp("tiny") / request.param)
    with Checkpoint.open(folder) as checkpoint:
        spec = describe(checkpoint)
        weights = {t.name: read_float64(t, checkpoint) for t in spec.tensors}
    return find_decoder(spec.arch, spec.metadata), weights, folder, spec


def read_float64(tensor, checkpoint):
    if tensor.function == "neg_exp":  # rounded to float32 in the file
        return -np.exp(read_float64(replace(tensor, function="identity"), checkpoint))
    return tensor.read(checkpoint, 0, tensor.n_rows).reshape(tensor.shape).astype(float)


class WeightGradients(dict):
    """Gradients of weights by name, from what an observer sees."""

    def __init__(self):
        self.dtypes = set()

    def __call__(self, site, x, dys):
        self.dtypes |= {x.dtype, *(dy.dtype for dy in dys)}
        x = x.reshape(-1, x.shape[-1])
        for name, dy in zip(site, dys, strict=True):
            assert f"{name}.weight" not in self
            rows = dy.reshape(len(x), -1)
            if name.endswith("norm"):
                self[f"{name}.weight"] = (rows * x).sum(axis=0)
            else:
                self[f"{name}.weight"], self[f"{name}.bias"] = rows.T @ x, rows.sum(axis=0)


def layer_weights(weights, i, dtype=float):
    return {short: weights[name].astype(dtype) for short, name in layer_names(weights, i).items()}


def layer_inputs(decoder, weights, dtype=float):
    """One layer of each kind: (number, weights, input, gradient of its output)."""
    random = np.random.RandomState(0)
    x, dy = random.standard_normal((2, 2, 140, weights["output_norm.weight"].size)).astype(dtype)
    kinds = {decoder.layers[i]: i for i in range(decoder.n_layer)}
    return [(i, layer_weights(weights, i, dtype), x, dy) for i in kinds.values()]


def test_gradients_are_those_of_torch(model, monkeypatch):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    decoder, weights, folder, spec = model
    seen = WeightGradients()
    labels, d_rows = backward(TOKENS, weights, decoder, UNIFORM, seen)
    expected, entering = torch_gradients(folder, spec, TOKENS, labels, monkeypatch)
    assert_close(d_rows, entering * decoder.embedding_scale, tolerance=1e-9)
    for name in seen.keys() & weights.keys():
        assert_close(seen[name], expected[name], name, tolerance=1e-9)


def test_gradients_are_those_of_differences(model):
    decoder, weights, _, _ = model
    for i, own, x, dy in layer_inputs(decoder, weights):
        seen = WeightGradients()
        dx = decoder.layer_vjp(dy, x, own, i, seen)
        names = [name for name in seen if name in own]

        def layer(x, *changed, own=own, names=names, i=i):
            return decoder.layer(x, {**own, **dict(zip(names, changed, strict=True))}, i)

        inputs = [x, *(own[name] for name in names)]
        assert_is_gradient(layer, inputs, dy, [dx, *(seen[name] for name in names)])


def test_the_whole_model_goes_down_its_gradient(model):
    """The loss of the sampled labels, as the embedding's rows change where they enter."""
    decoder, weights, _, _ = model
    weights = {"output.weight": weights["token_embd.weight"], **weights}  # untied
    tokens, uniform = np.arange(12), UNIFORM[0, :12]
    labels, d_rows = backward(tokens, weights, decoder, uniform)

    def loss(rows):
        logits = forward(tokens, {**weights, "token_embd.weight": rows}, decoder)
        return np.log(np.exp(logits).sum(axis=-1)) - logits[np.arange(len(labels)), labels]

    assert_is_gradient(loss, [weights["token_embd.weight"][tokens]], np.ones(12), [d_rows])


def test_every_linear_and_norm_is_observed_at_one_site(model):
    decoder, weights, _, _ = model
    seen = WeightGradients()
    backward(TOKENS[:, :9], weights, decoder, UNIFORM[:, :9], seen)
    linears = {name for name, w in weights.items() if w.ndim == 2 and not name.endswith("conv1d.weight")}
    linears -= {f"{head_name(weights)}.weight", "token_embd.weight"}
    norms = {name for name in weights if name.endswith("norm.weight")}
    assert {name for name in seen if name.endswith(".weight")} == linears | norms
    assert all(np.abs(seen[name]).max() > 0 for name in linears | norms)


def test_float32_stays_float32_and_inputs_stay_as_they_were(model):
    decoder, weights, _, _ = model
    exact = layer_inputs(decoder, weights)
    for (i, own, x, dy), (_, own64, x64, dy64) in zip(layer_inputs(decoder, weights, np.float32), exact, strict=True):
        before, seen = (x.copy(), dy.copy()), WeightGradients()
        dx = decoder.layer_vjp(dy, x, own, i, seen)
        assert dx.dtype == np.float32
        assert seen.dtypes == {np.dtype(np.float32)}
        np.testing.assert_array_equal(before, (x, dy))
        assert_close(dx, decoder.layer_vjp(dy64, x64, own64, i), tolerance=1e-4)


def test_matrices_in_tiles_give_the_same_bits(model, monkeypatch):
    """What is read from a file tile by tile is multiplied as what is in memory."""
    decoder, weights, _, _ = model
    i, own, x, dy = layer_inputs(decoder, weights, np.float32)[0]
    whole = decoder.layer_vjp(dy, x, own, i)
    monkeypatch.setattr(layers.tiles, "__defaults__", (2**13,))
    in_tiles = decoder.layer_vjp(dy, x, tiny_models.tiled(own), i)
    np.testing.assert_array_equal(in_tiles, decoder.layer_vjp(dy, x, own, i))
    assert_close(in_tiles, whole, tolerance=1e-4)


def random_arrays(seed, *shapes):
    random = np.random.RandomState(seed)
    return [random.standard_normal(shape) for shape in shapes]


@given(
    n_tok=st.integers(1, 300),
    heads=st.sampled_from([(1, 1), (4, 2), (6, 2), (3, 3)]),
    window=st.sampled_from([None, 1, 7, 128, 150]),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=30)
def test_attention(n_tok, heads, window, seed):
    shapes = [(2, n_tok, n, 4) for n in (heads[0], heads[0], heads[1], heads[1])]
    dy, *inputs = random_arrays(seed, *shapes)
    options = {"scale": 1.0 if seed % 2 else None, "window": window}
    gradients = causal_attention_vjp(dy, *inputs, **options)
    assert_is_gradient(lambda *x: causal_attention(*x, **options), inputs, dy, gradients)


@given(
    n_tok=st.integers(1, 40),
    n_head=st.integers(1, 3),
    dims=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    n_chunk=st.sampled_from([1, 3, 8, 64]),
    forgetting=st.sampled_from([0.01, 1.0, 20.0]),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=30)
def test_gated_delta_rule(n_tok, n_head, dims, n_chunk, forgetting, seed):
    key, value, scalar = ((2, n_tok, n_head, *dim) for dim in ((dims[0],), (dims[1],), ()))
    dy, q, k, v, decay, beta = random_arrays(seed, value, key, key, value, scalar, scalar)
    q, k = q + np.sign(q), k + np.sign(k)  # differences are small against their length
    inputs = q, k, v, -forgetting * np.abs(decay), 1 / (1 + np.exp(beta))
    gradients = gated_delta_vjp(dy, *inputs, n_chunk)
    assert_is_gradient(lambda *x: gated_delta(*x, n_chunk), inputs, dy, gradients)


@pytest.mark.parametrize("neighbors", [False, True])
def test_rotation(neighbors):
    rotary = Rotary.from_keys({"rope.freq_base": 1e4}, 6, neighbors=neighbors)
    rotary = Rotary(rotary.frequencies, neighbors, magnitude=1.3)
    x, dy = random_arrays(0, (20, 2, 8), (20, 2, 8))
    factors = np.array([1.0, 2.0, 3.0])
    assert_is_gradient(lambda x: rotary.turn(x, factors), [x], dy, [rotary.turn(dy, factors, back=True)])


@pytest.mark.parametrize("name", ["silu", "gelu"])
def test_slopes_of_activations(name):
    x = np.concatenate([np.linspace(-20, 20, 401), [-1e4, -200, 200, 1e4]])
    function, slope = getattr(layers, name), getattr(layers, f"{name}_slope")
    np.testing.assert_allclose(slope(x), (function(x + 1e-6) - function(x - 1e-6)) / 2e-6, atol=1e-6)
    assert np.isfinite(slope(x.astype(np.float32))).all()


def predictions(soft_cap, n_tok=60):
    """(what enters the output matrix, the matrix, a decoder), of peaked and of flat predictions."""
    x, weight = random_arrays(3, (n_tok, 16), (100, 16))
    x *= np.linspace(0, 3, n_tok)[:, None]
    return x, weight, Decoder(layers=(), eps=1e-6, soft_cap=soft_cap)


@pytest.mark.parametrize("soft_cap", [0.0, 5.0])
@pytest.mark.parametrize("tile", [16, 16 * 7, 16 * 100])
def test_labels_and_their_gradient(soft_cap, tile, monkeypatch):
    monkeypatch.setattr(layers.tiles, "__defaults__", (tile,))
    x, weight, decoder = predictions(soft_cap)
    uniform = draw(1, [7], len(x))[0]
    labels, dx = sampled_loss_vjp(x, weight, decoder, uniform)
    logits = decoder.cap(x @ weight.T)
    shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_array_equal(labels, (shares.cumsum(axis=1) <= uniform[:, None]).sum(axis=1))

    def losses(x):
        logits = decoder.cap(x @ weight.T)
        return np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(labels)), labels]

    assert_is_gradient(losses, [x], np.ones(len(x)), [dx])


def test_extreme_draws_and_logits():
    x, weight, decoder = predictions(0.0)
    for uniform in (0.0, 1 - 2.0**-53):
        for scale in (1, 1e3):
            x32, w32 = (scale * x).astype(np.float32), weight.astype(np.float32)
            labels, dx = sampled_loss_vjp(x32, w32, decoder, np.full(len(x), uniform))
            assert np.isfinite(dx).all()
            logits = x32 @ w32.T
            chosen = logits[np.arange(len(x)), labels]
            assert (chosen > logits.max(axis=1) - 110).all()  # of a probability that float32 can hold


def test_gradients_of_all_labels_cancel():
    """Labels are as frequent as predicted: at the model's own predictions the expected gradient is zero."""
    _, weight, decoder = predictions(0.0)
    n = 20_000
    labels, dx = sampled_loss_vjp(np.ones((n, 16)) * 0.1, weight, decoder, draw(0, [0], n)[0])
    error = dx.mean(axis=0) / (dx.std(axis=0) / n**0.5)
    assert len(np.unique(labels)) == len(weight)
    assert np.abs(error).max() < 4


def test_draws_depend_on_seed_and_window_alone():
    together = draw(3, range(4), 9)
    np.testing.assert_array_equal(together[2:], draw(3, [2, 3], 9))
    assert len(np.unique(np.concatenate([together, draw(4, range(4), 9)]))) == 2 * together.size
