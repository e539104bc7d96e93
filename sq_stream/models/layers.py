"""The parts that decoder layers are made of, in NumPy float32; weights are as GGUF stores them.

Activations are float32 [..., n_tok, n]: any number of leading dimensions, one sequence of tokens each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
Weights = Mapping[str, Any]
"""Tensors by GGUF name; within a layer without `blk.N.`, so `attn_q.weight`.

A matrix may be anything with a shape whose row slices are arrays: an array, or a tensor read from its file.
"""
Site = tuple[str, ...]
"""The linears that one activation vector enters, as ("ffn_gate", "ffn_up")."""
Observe = Callable[[Site, Array], None]
"""Called with the activations [..., n_tok, n_in] that enter a site; must not change them."""

TILE_WEIGHTS = 2**22
"""Weights of a matrix that are multiplied at a time. Fixed, so that results do not depend on what is in memory."""
CACHED_VALUES = 2**16
"""Worked on at a time by elementwise functions."""


def apply_linears(x: Array, weights: Weights, site: Site, observe: Observe | None) -> list[Array]:
    """Outputs [..., n_tok, n_out] of every linear of `site`, with its bias, for activations x [..., n_tok, n_in]."""
    if observe:
        observe(site, x)
    return [linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias")) for name in site]


def linear(x: Array, weight: Any, bias: Array | None = None) -> Array:
    """Product of x [..., n_in] and the transpose of `weight` [n_out, n_in], in tiles of its rows, plus bias [n_out]."""
    n_out, n_in = weight.shape
    rows = x.reshape(-1, n_in)
    out = np.empty((len(rows), n_out), np.float32)
    for tile in tiles(n_out, n_in):
        np.matmul(rows, weight[tile].T, out=out[:, tile])
    if bias is not None:
        out += bias
    return out.reshape(*x.shape[:-1], n_out)


def tiles(n_rows: int, n_in: int, n_values: int = TILE_WEIGHTS) -> Iterator[slice]:
    """Slices that cover `n_rows` rows of `n_in` values, of about `n_values` values each."""
    step = max(1, n_values // n_in)
    return (slice(start, min(start + step, n_rows)) for start in range(0, n_rows, step))


def with_prefix(observe: Observe | None, prefix: str) -> Observe | None:
    """`observe`, given sites whose linears have `prefix` before their names."""
    if observe is None:
        return None
    return lambda site, x: observe(tuple(prefix + name for name in site), x)


def feed_forward(
    x: Array, weights: Weights, observe: Observe | None, activation: Callable[[Array], Array] | None = None
) -> Array:
    """A gated feed-forward layer, SwiGLU unless another `activation` is given: [..., n_tok, d_model] to the same."""
    gate, up = apply_linears(x, weights, ("ffn_gate", "ffn_up"), observe)  # [..., n_tok, n_ff]
    gate = elementwise(activation or silu, gate)
    gate *= up
    del up
    (down,) = apply_linears(gate, weights, ("ffn_down",), observe)
    return down


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """Every vector of x [..., n] divided by its root mean square, times weight [n]."""
    mean_square = np.einsum("...i,...i->...", x, x)[..., None] / np.float32(x.shape[-1])
    y: Array = x / np.sqrt(mean_square + np.float32(eps))
    y *= weight
    return y


def elementwise(function: Callable[[Array], Array], x: Array) -> Array:
    """`function` of every value of the contiguous array x, in its place and block by block."""
    flat = x.reshape(-1)
    for block in tiles(flat.size, 1, CACHED_VALUES):
        flat[block] = function(flat[block])
    return x


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x)), without overflow."""
    y: Array = np.tanh(np.float32(0.5) * x)
    y += 1
    y *= np.float32(0.5)
    return y


def silu(x: Array) -> Array:
    """The swish function, x · sigmoid(x)."""
    y = sigmoid(x)
    y *= x
    return y


def gelu(x: Array) -> Array:
    """The Gaussian error linear unit in the tanh form."""
    y: Array = np.tanh(np.float32((2 / np.pi) ** 0.5) * (x + np.float32(0.044715) * x * x * x))
    y += 1
    y *= x
    y *= np.float32(0.5)
    return y


def softplus(x: Array) -> Array:
    """log(1 + exp(x)), without overflow."""
    y: Array = np.logaddexp(np.float32(0), x)
    return y
