"""Softmax attention in tiles of queries, and what an error of the value projection acts on."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from sq_stream.models.layers import Array, Observe

_QUERY_TILE = 128  # tokens


def causal_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    scale: float | None = None,
    window: int | None = None,
    inputs: Array | None = None,
    observe: Observe | None = None,
) -> Array:
    """Grouped-query softmax attention, each token looking at itself and those before it.

    Args:
        q: [..., n_tok, n_head, head_dim].
        k: [..., n_tok, n_kv_head, head_dim]; n_head / n_kv_head neighboring query heads share one.
        v: [..., n_tok, n_kv_head, head_dim].
        scale: of the scores; 1 / √head_dim where it is None.
        window: how many tokens a token sees, itself included; None: all.
        inputs: [..., n_tok, n_in], what v was computed from; needed by `observe` only.
        observe: shown, as the site of attn_v alone, the inputs mixed by attention: float32 [..., n_tok, n_in]. What a
            head puts out is attn_v of its mixture, both maps being linear, so it is there that an error of attn_v
            acts, and not at single tokens: the first token gets little of a text but much of the attention. Of the
            mixtures of a token only that of one head is computed; the heads take turns.

    Returns:
        [..., n_tok, n_head, head_dim].
    """
    (*batch, n_tok, n_head, head_dim), n_kv_head = q.shape, k.shape[-2]
    n_group = n_head // n_kv_head
    q = q * (head_dim**-0.5 if scale is None else scale)
    q = q.reshape(-1, n_tok, n_kv_head, n_group, head_dim)
    k, v = (x.reshape(-1, n_tok, n_kv_head, head_dim) for x in (k, v))
    out = np.empty_like(q)
    x = None if observe is None or inputs is None else inputs.reshape(len(q), n_tok, -1)
    mixtures = np.empty_like(x) if x is not None else None
    for tile, seen, hidden in _query_tiles(n_tok, window):
        for i, head in np.ndindex(len(q), n_kv_head):
            shares = _shares(q[i, tile, head], k[i, seen, head], hidden)  # [n_query, n_group, n_key]
            out[i, tile, head] = (shares.reshape(-1, shares.shape[-1]) @ v[i, seen, head]).reshape(
                -1, n_group, head_dim
            )
            if x is not None and mixtures is not None:
                for member in range(n_group):
                    turn = slice((head * n_group + member - tile.start) % n_head, None, n_head)
                    mixtures[i, tile][turn] = shares[turn, member] @ x[i, seen]
    if observe is not None and inputs is not None and mixtures is not None:
        observe(("attn_v",), mixtures.reshape(inputs.shape))
    return out.reshape(*batch, n_tok, n_head, head_dim)


def causal_attention_vjp(
    dy: Array, q: Array, k: Array, v: Array, *, scale: float | None = None, window: int | None = None
) -> tuple[Array, Array, Array]:
    """Gradients of q, k and v from that of their `causal_attention`, [..., n_tok, n_head, head_dim]."""
    shapes, (n_tok, n_head, head_dim), n_kv_head = (q.shape, k.shape, v.shape), q.shape[-3:], k.shape[-2]
    scale = head_dim**-0.5 if scale is None else scale
    q, dy = (x.reshape(-1, n_tok, n_kv_head, n_head // n_kv_head, head_dim) for x in (q * scale, dy))
    k, v = (x.reshape(-1, n_tok, n_kv_head, head_dim) for x in (k, v))
    dq, dk, dv = np.empty_like(q), np.zeros_like(k), np.zeros_like(v)
    for tile, seen, hidden in _query_tiles(n_tok, window):
        for i, head in np.ndindex(len(q), n_kv_head):
            queries, out = (x[i, tile, head].reshape(-1, head_dim) for x in (q, dy))  # [n_query · n_group, head_dim]
            shares = _shares(q[i, tile, head], k[i, seen, head], hidden).reshape(len(queries), -1)
            dv[i, seen, head] += shares.T @ out
            scores = out @ v[i, seen, head].T  # the gradient of the shares, then of the scores
            scores -= np.einsum("ij,ij->i", scores, shares)[:, None]
            scores *= shares
            dq[i, tile, head] = (scores @ k[i, seen, head]).reshape(-1, *dq.shape[-2:])
            dk[i, seen, head] += scores.T @ queries
    dq *= scale
    return dq.reshape(shapes[0]), dk.reshape(shapes[1]), dv.reshape(shapes[2])


def _query_tiles(n_tok: int, window: int | None) -> Iterator[tuple[slice, slice, Array]]:
    """Tiles of queries, each with the keys that any of them sees, and with what `_hidden` says of them."""
    for start in range(0, n_tok, _QUERY_TILE):
        tile = slice(start, min(start + _QUERY_TILE, n_tok))
        seen = slice(0 if window is None else max(0, start - window + 1), tile.stop)
        yield tile, seen, _hidden(tile, seen, window)


def _shares(queries: Array, keys: Array, hidden: Array) -> Array:
    """Shares of keys [n_key, head_dim] in what queries [n_query, n_group, head_dim] get: [n_query, n_group, n_key]."""
    n_query, n_group, head_dim = queries.shape
    scores: Array = (queries.reshape(-1, head_dim) @ keys.T).reshape(n_query, n_group, len(keys))
    scores += hidden
    scores -= scores.max(axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    scores /= scores.sum(axis=-1, keepdims=True)
    return scores


def _hidden(queries: slice, keys: slice, window: int | None) -> Array:
    """What is added to the scores of tokens: [n_query, 1, n_key], -inf where a key is not seen."""
    age = np.arange(queries.start, queries.stop)[:, None, None] - np.arange(keys.start, keys.stop)
    seen = (age >= 0) if window is None else (age >= 0) & (age < window)
    hidden: Array = np.where(seen, np.float32(0), np.float32(-np.inf))
    return hidden
