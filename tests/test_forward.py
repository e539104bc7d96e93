"""The NumPy forward pass of every architecture, and the parts that layers are made of, against transformers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import tiny_models
from gguf_files import describe
from hypothesis import given
from hypothesis import strategies as st

from sq_stream.errors import UnsupportedModelError
from sq_stream.formats.checkpoint import Checkpoint
from sq_stream.models import layers
from sq_stream.models.attention import causal_attention
from sq_stream.models.forward import find_decoder, forward, head_name, layer_names
from sq_stream.models.rotary import Rotary

NAMES = [name for name, model in tiny_models.MODELS.items() if not model.mtp]


@pytest.fixture(scope="module", params=NAMES)
def model(request, tmp_path_factory):
    """(name, decoder, weights by GGUF name, checkpoint folder) of a tiny model with random weights."""
    folder = tiny_models.write(request.param, tmp_path_factory.mktemp("tiny") / request.param)
    with Checkpoint.open(folder) as checkpoint:
        spec = describe(checkpoint)
        weights = {t.name: t.read(checkpoint, 0, t.n_rows).reshape(t.shape) for t in spec.tensors}
    return request.param, find_decoder(spec.arch, spec.metadata), weights, folder


def test_logits_are_those_of_transformers(model):
    name, decoder, weights, _ = model
    logits = forward(tiny_models.TOKENS, weights, decoder)
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, tiny_models.golden_logits(name), atol=2e-4)


def test_logits_over_many_tiles_are_those_of_live_transformers(model):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    _, decoder, weights, folder = model
    oracle = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = np.random.RandomState(1).randint(0, tiny_models.N_VOCAB, (2, 300))
    with torch.no_grad():
        expected = oracle(torch.from_numpy(tokens)).logits.numpy()
    np.testing.assert_allclose(forward(tokens, weights, decoder), expected, atol=1e-3)


def test_sequences_of_a_batch_do_not_meet(model):
    _, decoder, weights, _ = model
    tokens = np.stack([tiny_models.TOKENS, tiny_models.TOKENS[::-1]])
    together = forward(tokens, weights, decoder)
    for i in range(2):
        np.testing.assert_allclose(together[i], forward(tokens[i], weights, decoder), atol=1e-4)


def test_later_tokens_change_nothing_before_them(model):
    _, decoder, weights, _ = model
    changed = tiny_models.TOKENS.copy()
    changed[-1] += 1
    before, after = (forward(tokens, weights, decoder) for tokens in (tiny_models.TOKENS, changed))
    np.testing.assert_array_equal(before[:-1], after[:-1])
    assert not np.array_equal(before[-1], after[-1])


def test_every_linear_is_observed_at_one_site(model):
    _, decoder, weights, _ = model
    seen = {}
    forward(tiny_models.TOKENS, weights, decoder, seen.__setitem__)
    observed = [f"{name}.weight" for site in seen for name in site]
    not_linear = ("norm.weight", "conv1d.weight")
    linears = {name for name, w in weights.items() if w.ndim == 2 and not name.endswith(not_linear)}
    if head_name(weights) == "output":
        linears.remove("token_embd.weight")
    assert sorted(observed) == sorted(linears)
    for site, x in seen.items():
        assert {x.shape[-1]} == {weights[f"{name}.weight"].shape[1] for name in site}


def test_a_layer_leaves_its_input_as_it_was(model):
    _, decoder, weights, _ = model
    x = np.random.RandomState(0).standard_normal((9, weights["output_norm.weight"].size)).astype(np.float32)
    before = x.copy()
    for i in range(decoder.n_layer):
        own = {short: weights[name] for short, name in layer_names(weights, i).items()}
        y = decoder.layer(x, own, i)
        np.testing.assert_array_equal(x, before)
        assert y.shape == x.shape
        assert y.dtype == np.float32
        assert not np.shares_memory(x, y)


def test_matrices_in_tiles_give_the_same_bits(model, monkeypatch):
    """What is read from a file tile by tile is multiplied as what is in memory."""
    _, decoder, weights, _ = model
    monkeypatch.setattr(layers.tiles, "__defaults__", (2**13,))
    x = np.random.RandomState(0).standard_normal((9, weights["output_norm.weight"].size)).astype(np.float32)
    own = {short: weights[name] for short, name in layer_names(weights, 0).items()}
    np.testing.assert_array_equal(decoder.layer(x, own, 0), decoder.layer(x, tiny_models.tiled(own), 0))


def test_unknown_architectures_are_refused():
    with pytest.raises(UnsupportedModelError, match="'gpt2'"):
        find_decoder("gpt2", [])


def test_unknown_scaling_of_positions_is_refused():
    keys = {"rope.freq_base": 1e4, "rope.scaling.type": "longrope", "rope.scaling.factor": 4.0}
    with pytest.raises(UnsupportedModelError, match="'longrope'"):
        Rotary.from_keys(keys, 8)


@pytest.mark.parametrize("neighbors", [False, True])
def test_rotated_queries_and_keys_know_only_their_distance(neighbors):
    rotary = Rotary.from_keys({"rope.freq_base": 1e4}, 6, neighbors=neighbors)
    q, k = np.random.RandomState(0).standard_normal((2, 8)).astype(np.float32)
    q, k = (rotary.turn(np.tile(x, (20, 1, 1)))[:, 0] for x in (q, k))
    by_distance = [np.diag(q @ k.T, -n) for n in range(20)]
    for scores in by_distance:
        np.testing.assert_allclose(scores, scores[0], atol=1e-5)
    assert np.ptp([scores[0] for scores in by_distance]) > 0.1
    np.testing.assert_array_equal(q[:, 6:], np.tile(q[:1, 6:], (20, 1)))


def plain_attention(q, k, v, scale, window):
    """Token by token and head by head in float64: q [n_tok, n_head, head_dim]."""
    out = np.zeros(q.shape)
    n_group = q.shape[1] // k.shape[1]
    for t in range(q.shape[0]):
        first = 0 if window is None else max(0, t - window + 1)
        for h in range(q.shape[1]):
            scores = np.exp(scale * k[first : t + 1, h // n_group].astype(float) @ q[t, h].astype(float))
            out[t, h] = scores / scores.sum() @ v[first : t + 1, h // n_group]
    return out


@given(
    n_tok=st.integers(1, 300),
    heads=st.sampled_from([(1, 1), (4, 2), (6, 2), (3, 3)]),
    window=st.sampled_from([None, 1, 7, 128, 150]),
    seed=st.integers(0, 2**32 - 1),
)
def test_attention_in_tiles_is_plain_attention(n_tok, heads, window, seed):
    random = np.random.RandomState(seed)
    q, k, v = (random.standard_normal((n_tok, n, 4)).astype(np.float32) for n in (heads[0], heads[1], heads[1]))
    scale = 1.0 if seed % 2 else None
    out = causal_attention(q, k, v, scale=scale, window=window)
    np.testing.assert_allclose(out, plain_attention(q, k, v, scale or 0.5, window), atol=1e-5)


@given(
    n_tok=st.integers(1, 300),
    heads=st.sampled_from([(1, 1), (4, 2), (6, 2), (3, 3)]),
    window=st.sampled_from([None, 7, 150]),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_head_puts_out_the_values_of_its_mixture_of_inputs(n_tok, heads, window, seed):
    random = np.random.RandomState(seed)
    q, k = (random.standard_normal((2, n_tok, n, 4)).astype(np.float32) for n in heads)
    x = random.standard_normal((2, n_tok, 5)).astype(np.float32)
    attn_v = random.standard_normal((heads[1] * 4, 5)).astype(np.float32)
    seen = {}
    out = causal_attention(
        q, k, (x @ attn_v.T).reshape(k.shape), window=window, inputs=x, observe=lambda site, x: seen.update({site: x})
    )
    (mixtures,) = seen.values()
    assert seen.keys() == {("attn_v",)}
    assert mixtures.shape == x.shape
    values = (mixtures @ attn_v.T).reshape(k.shape).repeat(heads[0] // heads[1], axis=-2)  # of every query head
    for token in range(n_tok):
        head = token % heads[0]
        np.testing.assert_allclose(values[:, token, head], out[:, token, head], atol=1e-5)


def test_attention_does_not_overflow():
    q = np.full((3, 1, 4), 1e4, np.float32)
    out = causal_attention(q, q, q)
    np.testing.assert_allclose(out, q)


@pytest.mark.parametrize("function", ["sigmoid", "silu", "gelu", "softplus"])
def test_activations_are_exact_and_stay_finite(function):
    x = np.concatenate([np.linspace(-20, 20, 401), [-1e4, -200, 200, 1e4]]).astype(np.float32)
    exact = {
        "sigmoid": lambda x: 1 / (1 + math.exp(-x)) if x > -500 else 0.0,
        "silu": lambda x: x / (1 + math.exp(-x)) if x > -500 else 0.0,
        "gelu": lambda x: 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
        "softplus": lambda x: math.log1p(math.exp(x)) if x < 30 else x,
    }[function]
    expected = [exact(float(value)) for value in x]
    result = getattr(layers, function)(x)
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, expected, rtol=1e-6, atol=2e-6)


def test_elementwise_works_in_place_on_all_blocks():
    x = np.arange(3 * 50_000, dtype=np.float32).reshape(3, -1)
    expected = x + 1
    assert layers.elementwise(lambda block: block + np.float32(1), x) is x
    np.testing.assert_array_equal(x, expected)
