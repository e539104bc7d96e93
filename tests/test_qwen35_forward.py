"""The parts of Qwen3.5's delta net layers, against plain recurrences."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from sq_stream.models.gated_delta import gated_delta
from sq_stream.models.qwen35_forward import causal_convolution


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
