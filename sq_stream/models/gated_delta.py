"""The gated delta rule, the linear attention of Qwen3-Next and Qwen3.5.

Every head keeps a matrix S [key_dim, value_dim] that maps keys to values. A token with key k, value v, decay α and
write strength β forgets a little, corrects what S says of k, and reads S with its query q:

    S ← α S + β k (v − α Sᵀk)ᵀ        out = Sᵀq / √key_dim

Source: Gated Delta Networks (arXiv:2412.06464).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
_L2_EPS = 1e-6  # of flash-linear-attention, which Qwen3.5 was trained with


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
        [..., n_tok, n_head, value_dim].
    """
    q, k, v, log_decay, beta = _by_head(q, k, v, log_decay, beta)
    state = _empty_state(k, v)
    out = np.empty_like(v)
    for t in _chunks(v, n_chunk):
        out[t], state = _chunk(state, q[t], k[t], v[t], log_decay[t], beta[t])
    return np.swapaxes(out, -3, -2)


def gated_delta_vjp(
    dy: Array, q: Array, k: Array, v: Array, log_decay: Array, beta: Array, n_chunk: int = 64
) -> tuple[Array, Array, Array, Array, Array]:
    """Gradients of all inputs of `gated_delta`, in its order, from that of its output [..., n_tok, n_head, value_dim].

    The states between chunks are computed first and kept: [key_dim, value_dim] for each chunk and head.
    """
    inputs = _by_head(q, k, v, log_decay, beta)
    chunks = [tuple(x[t] for x in inputs) for t in _chunks(inputs[2], n_chunk)]
    states = [_empty_state(*inputs[1:3])]
    for _, k_t, v_t, log_decay_t, beta_t in chunks[:-1]:
        total, _, _, u = _writes(states[-1], k_t, v_t, log_decay_t, beta_t)
        states.append(_state_after(states[-1], k_t, total, u))
    gradients = tuple(np.empty_like(x) for x in inputs)
    d_state = np.zeros_like(states[0])
    for t, chunk in zip(reversed(list(_chunks(inputs[2], n_chunk))), reversed(chunks), strict=True):
        parts, d_state = _chunk_vjp(np.swapaxes(dy, -3, -2)[t], d_state, states.pop(), *chunk)
        for gradient, part in zip(gradients, parts, strict=True):
            gradient[t] = part
    dq, dk, dv = (np.swapaxes(x, -3, -2) for x in gradients[:3])
    d_log_decay, d_beta = (np.swapaxes(x[..., 0], -2, -1) for x in gradients[3:])
    return _unit_vjp(dq * q.shape[-1] ** -0.5, q), _unit_vjp(dk, k), dv, d_log_decay, d_beta


def _by_head(q: Array, k: Array, v: Array, log_decay: Array, beta: Array) -> tuple[Array, Array, Array, Array, Array]:
    """All inputs as [..., n_head, n_tok, n], n being 1 for decay and strength; keys and scaled queries of length 1."""
    q, k, v = (np.swapaxes(x, -3, -2) for x in (_unit(q), _unit(k), v))
    log_decay, beta = (np.swapaxes(x, -2, -1)[..., None] for x in (log_decay, beta))
    return q * q.shape[-1] ** -0.5, k, v, log_decay, beta


def _empty_state(k: Array, v: Array) -> Array:
    return np.zeros((*v.shape[:-2], k.shape[-1], v.shape[-1]), v.dtype)


def _chunks(x: Array, n_chunk: int) -> Iterator[Any]:
    """Indices of chunks of tokens in arrays [..., n_tok, dim]."""
    return (np.s_[..., start : start + n_chunk, :] for start in range(0, x.shape[-2], n_chunk))


def _chunk(state: Array, q: Array, k: Array, v: Array, log_decay: Array, beta: Array) -> tuple[Array, Array]:
    """Outputs [..., t, value_dim] of t tokens and the state after them; decay and beta are [..., t, 1]."""
    total, decay, _, u = _writes(state, k, v, log_decay, beta)
    out = np.exp(total) * (q @ state) + ((q @ _t(k)) * decay) @ u
    return out, _state_after(state, k, total, u)


def _writes(state: Array, k: Array, v: Array, log_decay: Array, beta: Array) -> tuple[Array, Array, Array, Array]:
    """What the tokens of a chunk write to the state, and how.

    Returns:
        Log of the decay since the chunk began [..., t, 1]; decay from token j to token i [..., t, t]; the system
        [..., t, t] that is solved; what is written, u [..., t, value_dim].
    """
    total = np.cumsum(log_decay, axis=-2)
    between = total - _t(total)
    decay = np.exp(np.where(np.tri(k.shape[-2], dtype=bool), between, -np.inf))
    system = np.tril(beta * (k @ _t(k)) * decay, -1) + np.eye(k.shape[-2], dtype=k.dtype)
    return total, decay, system, np.linalg.solve(system, beta * (v - np.exp(total) * (k @ state)))


def _state_after(state: Array, k: Array, total: Array, u: Array) -> Array:
    last = total[..., -1:, :]
    after: Array = np.exp(last) * state + _t(k) @ (np.exp(last - total) * u)
    return after


def _chunk_vjp(
    dy: Array, d_after: Array, state: Array, q: Array, k: Array, v: Array, log_decay: Array, beta: Array
) -> tuple[tuple[Array, Array, Array, Array, Array], Array]:
    """Gradients of q, k, v, log_decay and beta of a chunk, and of the state before it, from that of the state after."""
    total, decay, system, u = _writes(state, k, v, log_decay, beta)
    last = total[..., -1:, :]
    kept, left = np.exp(total), np.exp(last - total)  # of the state before the chunk, of a write after it
    read, known, lasting = q @ state, k @ state, k @ d_after
    q_k, k_k = q @ _t(k), k @ _t(k)

    d_solved = np.linalg.solve(_t(system), _t(q_k * decay) @ dy + left * lasting)  # of beta · (v − kept · known)
    d_pairs = np.tril(d_solved @ _t(-u) * decay, -1)  # of beta · k_k
    d_q_k, d_k_k = dy @ _t(u) * decay, beta * d_pairs
    dv, d_read = beta * d_solved, kept * dy
    d_known = -kept * dv
    d_beta = _sum(d_solved * (v - kept * known)) + _sum(d_pairs * k_k)
    dq = d_q_k @ k + d_read @ _t(state)
    dk = _t(d_q_k) @ q + (d_k_k + _t(d_k_k)) @ k + d_known @ _t(state) + (left * u) @ _t(d_after)

    d_between, d_left = d_q_k * q_k + d_k_k * k_k, _sum(left * u * lasting)
    d_total = _sum(d_between) - _sum(_t(d_between)) + _sum(d_read * read) + _sum(d_known * known) - d_left
    d_last = np.exp(last) * _sum(_t(_sum(d_after * state))) + _sum(_t(d_left))
    d_total[..., -1:, :] += d_last
    d_log_decay = np.cumsum(d_total[..., ::-1, :], axis=-2)[..., ::-1, :]
    d_state = np.exp(last) * d_after + _t(k) @ d_known + _t(q) @ d_read
    return (dq, dk, dv, d_log_decay, d_beta), d_state


def _t(x: Array) -> Array:
    """The transpose of matrices [..., m, n]."""
    return np.swapaxes(x, -1, -2)


def _sum(x: Array) -> Array:
    """Sums of the rows of x [..., m, n]: [..., m, 1]."""
    sums: Array = x.sum(axis=-1, keepdims=True)
    return sums


def _unit(x: Array) -> Array:
    """Vectors [..., n] divided by their length."""
    return x / _length(x)


def _unit_vjp(dy: Array, x: Array) -> Array:
    """Gradient of x [..., n] from that of its `_unit`."""
    length = _length(x)
    unit = x / length
    dx = dy - unit * _sum(unit * dy)
    dx /= length
    return dx


def _length(x: Array) -> Array:
    square = _sum(x * x)
    square += _L2_EPS
    return np.sqrt(square)
