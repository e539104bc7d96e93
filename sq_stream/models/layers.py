"""The parts that decoder layers are made of, in NumPy float32; weights are as GGUF stores them.

Activations are float32 [..., n_tok, n]: any number of leading dimensions, one sequence of tokens each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
Weights = Mapping[str, Array]
"""Tensors by GGUF name; within a layer without `blk.N.`, so `attn_q.weight`."""
Site = tuple[str, ...]
"""The linears that one activation vector enters, as ("attn_q", "attn_k", "attn_v")."""
Observe = Callable[[Site, Array], None]
"""Called with the activations [..., n_tok, n_in] that enter a site; must not change them."""


def apply_linears(x: Array, weights: Weights, site: Site, observe: Observe | None) -> list[Array]:
    """Outputs [..., n_tok, n_out] of every linear of `site` for the activations x [..., n_tok, n_in]."""
    if observe:
        observe(site, x)
    return [x @ weights[f"{name}.weight"].T for name in site]


def with_prefix(observe: Observe | None, prefix: str) -> Observe | None:
    """`observe`, given sites whose linears have `prefix` before their names."""
    if observe is None:
        return None
    return lambda site, x: observe(tuple(prefix + name for name in site), x)


def feed_forward(x: Array, weights: Weights, observe: Observe | None) -> Array:
    """SwiGLU: [..., n_tok, d_model] to the same shape."""
    gate, up = apply_linears(x, weights, ("ffn_gate", "ffn_up"), observe)  # [..., n_tok, n_ff]
    (down,) = apply_linears(silu(gate) * up, weights, ("ffn_down",), observe)
    return down


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """Every vector of x [..., n] divided by its root mean square, times weight [n]."""
    rms: Array = np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + np.float32(eps))
    return x / rms * weight


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x)), without overflow."""
    y: Array = np.tanh(x / 2)
    y = (y + 1) / np.float32(2)
    return y


def silu(x: Array) -> Array:
    """The swish function, x · sigmoid(x)."""
    y: Array = x * sigmoid(x)
    return y


def softplus(x: Array) -> Array:
    """log(1 + exp(x)), without overflow."""
    y: Array = np.logaddexp(np.float32(0), x)
    return y


def rotate(x: Array, theta: float, n_rotary: int) -> Array:
    """Rotary positions for x [..., n_tok, n_head, head_dim]: value i turns with value i + n_rotary / 2.

    The values from `n_rotary` on pass unchanged. Source: RoFormer (arXiv:2104.09864) in GPT-NeoX's pairing.
    """
    half = n_rotary // 2
    frequencies = theta ** (-np.arange(half) / half)
    angles = np.arange(x.shape[-3])[:, None, None] * frequencies  # [n_tok, 1, half], float64
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    a, b, rest = np.split(x, [half, n_rotary], axis=-1)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1)


def causal_attention(q: Array, k: Array, v: Array) -> Array:
    """Grouped-query softmax attention, each token looking at itself and those before it.

    Args:
        q: [..., n_tok, n_head, head_dim].
        k: [..., n_tok, n_kv_head, head_dim]; n_head / n_kv_head neighboring query heads share one.
        v: [..., n_tok, n_kv_head, head_dim].

    Returns:
        [..., n_tok, n_head, head_dim].
    """
    *batch, n_tok, n_head, head_dim = q.shape
    grouped = (*batch, n_tok, k.shape[-2], -1, head_dim)  # [..., n_tok, n_kv_head, n_group, head_dim]
    q = np.moveaxis(q.reshape(grouped), -4, -2)  # [..., n_kv_head, n_group, n_tok, head_dim]
    k, v = (np.swapaxes(x, -3, -2)[..., None, :, :] for x in (k, v))  # [..., n_kv_head, 1, n_tok, head_dim]
    scores = q @ np.swapaxes(k, -1, -2) * np.float32(head_dim**-0.5)
    scores = np.where(np.tri(n_tok, dtype=bool), scores, np.float32(-np.inf))  # [..., n_tok, n_tok]
    scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
    out: Array = scores / scores.sum(axis=-1, keepdims=True) @ v
    return np.moveaxis(out, -2, -4).reshape(*batch, n_tok, n_head, head_dim)
