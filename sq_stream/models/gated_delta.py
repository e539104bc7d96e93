"""The gated delta rule, the linear attention of Qwen3-Next and Qwen3.5.

Every head keeps a matrix S [key_dim, value_dim] that maps keys to values. A token with key k, value v, decay α and
write strength β forgets a little, corrects what S says of k, and reads S with its query q:

    S ← α S + β k (v − α Sᵀk)ᵀ        out = Sᵀq / √key_dim

Source: Gated Delta Networks (arXiv:2412.06464).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
_L2_EPS = np.float32(1e-6)  # of flash-linear-attention, which Qwen3.5 was trained with


def gated_delta(q: Array, k: Array, v: Array, log_decay: Array, beta: Array, n_chunk: int = 64) -> Array:
    """Outputs of the gated delta rule, from an empty state.

    The tokens of a chunk are computed together. The vectors u that they write to S obey a unit lower triangular
    system, since each is corrected by those before it (the WY form of the paper, its section 3.3).

    Args:
        q: queries [..., n_tok, n_head, key_dim], of any length.
        k: keys [..., n_tok, n_head, key_dim], of any length.
        v: values [..., n_tok, n_head, value_dim].
        log_decay: log α ≤ 0 [..., n_tok, n_head].
        beta: β in 0 to 1 [..., n_tok, n_head].
        n_chunk: tokens in a chunk; the result does not depend on it but for rounding.

    Returns:
        float32 [..., n_tok, n_head, value_dim].
    """
    q, k, v = (np.swapaxes(x, -3, -2) for x in (_unit(q), _unit(k), v))  # [..., n_head, n_tok, dim]
    log_decay, beta = (np.swapaxes(x, -2, -1)[..., None] for x in (log_decay, beta))  # [..., n_head, n_tok, 1]
    key_dim, n_tok = q.shape[-1], q.shape[-2]
    q = q * np.float32(key_dim**-0.5)
    state = np.zeros((*v.shape[:-2], key_dim, v.shape[-1]), np.float32)
    out = np.empty_like(v)
    for start in range(0, n_tok, n_chunk):
        t = np.s_[..., start : start + n_chunk, :]
        out[t], state = _chunk(state, q[t], k[t], v[t], log_decay[t], beta[t])
    return np.swapaxes(out, -3, -2)


def _chunk(state: Array, q: Array, k: Array, v: Array, log_decay: Array, beta: Array) -> tuple[Array, Array]:
    """Outputs [..., t, value_dim] of t tokens and the state after them; decay and beta are [..., t, 1]."""
    total = np.cumsum(log_decay, axis=-2)  # since the chunk began
    between = total - np.swapaxes(total, -1, -2)  # [..., t, t]: from token j to token i
    decay = np.exp(np.where(np.tri(q.shape[-2], dtype=bool), between, np.float32(-np.inf)))
    k_t = np.swapaxes(k, -1, -2)  # [..., key_dim, t]
    system = np.tril(beta * (k @ k_t) * decay, -1) + np.eye(q.shape[-2], dtype=np.float32)
    u = np.linalg.solve(system, beta * (v - np.exp(total) * (k @ state)))  # [..., t, value_dim]
    out = np.exp(total) * (q @ state) + ((q @ k_t) * decay) @ u
    last = total[..., -1:, :]
    return out, np.exp(last) * state + k_t @ (np.exp(last - total) * u)


def _unit(x: Array) -> Array:
    """Vectors [..., n] divided by their length."""
    length: Array = np.sqrt(np.sum(x * x, axis=-1, keepdims=True) + _L2_EPS)
    return x / length
