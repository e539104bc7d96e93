"""The NumPy forward pass of Qwen3.5, and the layers it is made of, against transformers and plain recurrences."""

from __future__ import annotations

import numpy as np
import pytest
import tiny_models
from gguf_files import describe
from hypothesis import given, settings
from hypothesis import strategies as st

from sq_stream.errors import UnsupportedModelError
from sq_stream.formats.checkpoint import Checkpoint
from sq_stream.formats.metadata import string, u32
from sq_stream.models import layers
from sq_stream.models.gated_delta import gated_delta
from sq_stream.models.qwen35_forward import Dims, causal_convolution, forward, layer

NAMES = ("qwen35", "qwen35_multimodal")  # as many value heads as key heads; three times as many


@pytest.fixture(scope="module", params=NAMES)
def model(request, tmp_path_factory):
    """(name, dims, weights by GGUF name, checkpoint folder) of a tiny model with random weights."""
    folder = tiny_models.write(request.param, tmp_path_factory.mktemp("tiny") / request.param)
    with Checkpoint.open(folder) as checkpoint:
        spec = describe(checkpoint)
        weights = {t.name: t.read(checkpoint, 0, t.n_rows).reshape(t.shape) for t in spec.tensors}
    return request.param, Dims.from_metadata(spec.metadata), weights, folder


def test_logits_are_those_of_transformers(model):
    name, dims, weights, _ = model
    logits = forward(tiny_models.TOKENS, weights, dims)
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, tiny_models.golden_logits(name), atol=2e-4)


def test_logits_over_many_chunks_are_those_of_live_transformers(model):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    _, dims, weights, folder = model
    oracle = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = np.random.RandomState(1).randint(0, tiny_models.N_VOCAB, (2, 150))
    with torch.no_grad():
        expected = oracle(torch.from_numpy(tokens)).logits.numpy()
    np.testing.assert_allclose(forward(tokens, weights, dims), expected, atol=5e-4)


def test_sequences_of_a_batch_do_not_meet(model):
    _, dims, weights, _ = model
    tokens = np.stack([tiny_models.TOKENS, tiny_models.TOKENS[::-1]])
    together = forward(tokens, weights, dims)
    for i in range(2):
        np.testing.assert_allclose(together[i], forward(tokens[i], weights, dims), atol=1e-4)


def test_later_tokens_change_nothing_before_them(model):
    _, dims, weights, _ = model
    changed = tiny_models.TOKENS.copy()
    changed[-1] += 1
    before, after = (forward(tokens, weights, dims) for tokens in (tiny_models.TOKENS, changed))
    np.testing.assert_array_equal(before[:-1], after[:-1])
    assert not np.array_equal(before[-1], after[-1])


def test_every_linear_is_observed_at_one_site(model):
    _, dims, weights, _ = model
    seen = {}
    forward(tiny_models.TOKENS, weights, dims, seen.__setitem__)
    observed = [f"{name}.weight" for site in seen for name in site]
    not_linear = ("norm.weight", "conv1d.weight")
    linears = {name for name, w in weights.items() if w.ndim == 2 and not name.endswith(not_linear)}
    if "output.weight" in weights:
        linears.remove("token_embd.weight")
    assert sorted(observed) == sorted(linears)
    for site, x in seen.items():
        assert {x.shape[-1]} == {weights[f"{name}.weight"].shape[1] for name in site}


def test_what_is_observed_is_what_enters(model):
    _, dims, weights, _ = model
    x = np.random.RandomState(0).standard_normal((9, 256)).astype(np.float32)
    for i in (0, 3):
        own = {name.removeprefix(f"blk.{i}."): w for name, w in weights.items() if name.startswith(f"blk.{i}.")}
        seen = {}
        y = layer(x, own, dims, is_delta=dims.is_delta[i], observe=seen.__setitem__)
        mixer = "ssm_out" if dims.is_delta[i] else "attn_output"
        added = sum(seen[(name,)] @ own[f"{name}.weight"].T for name in (mixer, "ffn_down"))
        np.testing.assert_allclose(x + added, y, atol=1e-4)


def recurrence(q, k, v, log_decay, beta):
    """The gated delta rule token by token, for one head: q, k [n_tok, key_dim], v [n_tok, value_dim], float64."""
    state, out = np.zeros((q.shape[1], v.shape[1])), []
    for t in range(len(q)):
        q_t, k_t = q[t] / np.linalg.norm(q[t]) / np.sqrt(q.shape[1]), k[t] / np.linalg.norm(k[t])
        state = np.exp(log_decay[t]) * state
        state = state + beta[t] * np.outer(k_t, v[t] - state.T @ k_t)
        out.append(state.T @ q_t)
    return np.array(out)


@settings(max_examples=30)
@given(
    n_tok=st.integers(1, 40),
    n_head=st.integers(1, 3),
    dims=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    n_chunk=st.sampled_from([1, 3, 8, 64]),
    forgetting=st.sampled_from([0.0, 0.01, 1.0, 200.0]),
    seed=st.integers(0, 2**32 - 1),
)
def test_chunks_give_the_recurrence(n_tok, n_head, dims, n_chunk, forgetting, seed):
    random = np.random.RandomState(seed)
    q, k, v = (random.standard_normal((n_tok, n_head, n)).astype(np.float32) for n in (*dims[:1] * 2, dims[1]))
    q, k = q + np.sign(q), k + np.sign(k)  # far from the length zero, where 1e-6 would count
    log_decay = (-forgetting * random.random_sample((n_tok, n_head))).astype(np.float32)
    beta = random.random_sample((n_tok, n_head)).astype(np.float32)
    out = gated_delta(q, k, v, log_decay, beta, n_chunk)
    assert out.dtype == np.float32
    heads = [recurrence(*(x[:, h].astype(np.float64) for x in (q, k, v, log_decay, beta))) for h in range(n_head)]
    np.testing.assert_allclose(out, np.stack(heads, axis=1), atol=2e-4)


def test_convolution_is_causal_and_ends_with_the_last_tap():
    x = np.zeros((6, 2), np.float32)
    x[1] = 1, 10
    weight = np.array([[1, 2, 3, 4], [5, 6, 7, 8]], np.float32)
    expected = [[0, 0], [4, 80], [3, 70], [2, 60], [1, 50], [0, 0]]
    np.testing.assert_array_equal(causal_convolution(x, weight), expected)


@pytest.mark.parametrize("function", ["sigmoid", "silu", "softplus"])
def test_activations_are_exact_and_stay_finite(function):
    x = np.concatenate([np.linspace(-20, 20, 401), [-1e4, -200, 200, 1e4]]).astype(np.float32)
    exact = {
        "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
        "silu": lambda x: x / (1 + np.exp(-x)),
        "softplus": lambda x: np.where(x > 30, x, np.log1p(np.exp(np.minimum(x, 30)))),
    }[function]
    with np.errstate(over="ignore"):
        expected = exact(x.astype(np.float64))
    result = getattr(layers, function)(x)
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, expected, rtol=1e-6, atol=2e-6)


def test_other_architectures_are_refused():
    with pytest.raises(UnsupportedModelError, match="'llama'"):
        Dims.from_metadata([string("general.architecture", "llama"), u32("llama.block_count", 2)])


def test_scaled_rotary_embeddings_are_refused():
    entries = [u32("qwen35.ssm.group_count", 1), string("qwen35.rope.scaling.type", "yarn")]
    with pytest.raises(UnsupportedModelError, match="'yarn'"):
        Dims.from_metadata(entries)
