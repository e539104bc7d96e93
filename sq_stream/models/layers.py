"""The functions that decoder layers are made of, in NumPy; weights are as GGUF stores them.

Activations are [..., n_tok, n]: any number of leading dimensions, one sequence of tokens each. They are float32, but
every function keeps the dtype that it is given. Behind a function `f(x, ...)` stands its vector-Jacobian product
`f_vjp(dy, x, ...)`: from the gradient of what f gives to the gradient of x.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
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
ObserveGradients = Callable[[Site, Array, Sequence[Array]], None]
"""Called with the activations x that enter a site and the gradient dy of each linear's output; must not change them.

The gradient of a linear's weight is the sum of dy xᵀ over all tokens, that of its bias the sum of dy. A norm is a site
too, x being the vectors divided by their root mean squares: the gradient of its weight is the sum of dy · x.
"""

TILE_WEIGHTS = 2**22
"""Weights of a matrix that are multiplied at a time. Fixed, so that results do not depend on what is in memory."""
CACHED_VALUES = 2**16
"""Worked on at a time by elementwise functions."""
_GELU = ((2 / math.pi) ** 0.5, 0.044715)


def apply_linears(x: Array, weights: Weights, site: Site, observe: Observe | None) -> list[Array]:
    """Outputs [..., n_tok, n_out] of every linear of `site`, with its bias, for activations x [..., n_tok, n_in]."""
    if observe is not None:
        observe(site, x)
    return [linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias")) for name in site]


def apply_linears_vjp(
    dys: Sequence[Array], x: Array, weights: Weights, site: Site, observe: ObserveGradients | None
) -> Array:
    """Gradient [..., n_tok, n_in] of x, from those of the outputs [..., n_tok, n_out] of every linear of `site`."""
    if observe is not None:
        observe(site, x, dys)
    dx = linear_vjp(dys[0], weights[f"{site[0]}.weight"])
    for dy, name in zip(dys[1:], site[1:], strict=True):
        dx += linear_vjp(dy, weights[f"{name}.weight"])
    return dx


def linear(x: Array, weight: Any, bias: Array | None = None) -> Array:
    """Product of x [..., n_in] and the transpose of `weight` [n_out, n_in], in tiles of its rows, plus bias [n_out]."""
    n_out, n_in = weight.shape
    rows = x.reshape(-1, n_in)
    out = np.empty((len(rows), n_out), x.dtype)
    for tile in tiles(n_out, n_in):
        np.matmul(rows, weight[tile].T, out=out[:, tile])
    if bias is not None:
        out += bias
    return out.reshape(*x.shape[:-1], n_out)


def linear_vjp(dy: Array, weight: Any) -> Array:
    """Product of dy [..., n_out] and `weight` [n_out, n_in], summed over tiles of its rows."""
    n_out, n_in = weight.shape
    rows = dy.reshape(-1, n_out)
    first, *others = tiles(n_out, n_in)
    dx: Array = np.matmul(rows[:, first], weight[first], out=np.empty((len(rows), n_in), dy.dtype))
    part = np.empty_like(dx) if others else dx
    for tile in others:
        dx += np.matmul(rows[:, tile], weight[tile], out=part)
    return dx.reshape(*dy.shape[:-1], n_in)


def tiles(n_rows: int, n_in: int, n_values: int = TILE_WEIGHTS) -> Iterator[slice]:
    """Slices that cover `n_rows` rows of `n_in` values, of about `n_values` values each."""
    step = max(1, n_values // n_in)
    return (slice(start, min(start + step, n_rows)) for start in range(0, n_rows, step))


def is_norm(name: str) -> bool:
    """Whether a site shown to `ObserveGradients` is a norm."""
    return name.endswith("norm")


def with_prefix(observe: Callable[..., None] | None, prefix: str) -> Callable[..., None] | None:
    """`observe`, given sites whose linears have `prefix` before their names."""
    if observe is None:
        return None
    return lambda site, *arrays: observe(tuple(prefix + name for name in site), *arrays)


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """Every vector of x [..., n] divided by its root mean square, times weight [n]."""
    y: Array = x / _root_mean_square(x, eps)
    y *= weight
    return y


def rms_norm_vjp(
    dy: Array, x: Array, weights: Weights, name: str, eps: float, observe: ObserveGradients | None
) -> Array:
    """Gradient of x [..., n] from that of its `rms_norm` by the weight of `name`, which is observed as a site."""
    length = _root_mean_square(x, eps)
    unit = x / length
    if observe is not None:
        observe((name,), unit, [dy])
    dx: Array = dy * weights[f"{name}.weight"]
    dx -= unit * (np.einsum("...i,...i->...", unit, dx)[..., None] / x.shape[-1])
    dx /= length
    return dx


def _root_mean_square(x: Array, eps: float) -> Array:
    """Of every vector of x [..., n], with eps under the root: [..., 1]."""
    mean_square = np.einsum("...i,...i->...", x, x)[..., None] / x.shape[-1]
    root: Array = np.sqrt(mean_square + eps)
    return root


def elementwise(function: Callable[[Array], Array], x: Array) -> Array:
    """`function` of every value of the contiguous array x, in its place and block by block."""
    flat = x.reshape(-1)
    for block in tiles(flat.size, 1, CACHED_VALUES):
        flat[block] = function(flat[block])
    return x


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x)), without overflow."""
    y: Array = np.tanh(0.5 * x)
    y += 1
    y *= 0.5
    return y


def silu(x: Array) -> Array:
    """The swish function, x · sigmoid(x)."""
    y = sigmoid(x)
    y *= x
    return y


def silu_slope(x: Array) -> Array:
    """The derivative of `silu`."""
    s = sigmoid(x)
    return s * (1 + x * (1 - s))


def gelu(x: Array) -> Array:
    """The Gaussian error linear unit in the tanh form."""
    y: Array = np.tanh(_GELU[0] * (x + _GELU[1] * x * x * x))
    y += 1
    y *= x
    y *= 0.5
    return y


def gelu_slope(x: Array) -> Array:
    """The derivative of `gelu`."""
    scale, cubic = _GELU
    t = np.tanh(scale * (x + cubic * x * x * x))
    slope: Array = 0.5 * (1 + t) + 0.5 * scale * x * (1 - t * t) * (1 + 3 * cubic * x * x)
    return slope


def softplus(x: Array) -> Array:
    """log(1 + exp(x)), without overflow."""
    y: Array = np.logaddexp(0.0, x)
    return y
