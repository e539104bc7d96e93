"""The parts of a decoder layer: gated feed-forward nets, softmax attention, and the norms around them.

Every part maps activations [..., n_tok, d_model] to the same shape and has two methods: `forward`, and `vjp`, which
goes backward: it recomputes the inside from the same input and returns the input's gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np

from sq_stream.models.attention import causal_attention, causal_attention_vjp
from sq_stream.models.layers import (
    Array,
    Observe,
    ObserveGradients,
    Site,
    Weights,
    apply_linears,
    apply_linears_vjp,
    elementwise,
    rms_norm,
    rms_norm_vjp,
    sigmoid,
    silu,
    silu_slope,
)
from sq_stream.models.rotary import Rotary


class Part(Protocol):
    """Anything that adds to the residual stream."""

    @property
    def entry(self) -> Site:
        """The linears that its input enters."""
        ...

    @property
    def exit(self) -> Site:
        """The linear that its output comes from."""
        ...

    def forward(self, x: Array, weights: Weights, observe: Observe | None = None) -> Array:
        """Output for the input x, with the tensors of a layer."""
        ...

    def vjp(self, dy: Array, x: Array, weights: Weights, observe: ObserveGradients | None = None) -> Array:
        """Gradient of the input x, from that of the output."""
        ...


@dataclass(frozen=True)
class Branch:
    """A part behind the norm `norm`, and before the norm `norm_after` where there is one."""

    norm: str
    part: Part
    eps: float
    norm_after: str | None = None

    @property
    def exit(self) -> Site | None:
        """The linear whose output is added to the residual stream as it is."""
        return None if self.norm_after else self.part.exit

    def forward(self, x: Array, weights: Weights, observe: Observe | None = None) -> Array:
        """What is added to the residual stream x."""
        y = self.part.forward(rms_norm(x, weights[f"{self.norm}.weight"], self.eps), weights, observe)
        return rms_norm(y, weights[f"{self.norm_after}.weight"], self.eps) if self.norm_after else y

    def vjp(self, dy: Array, x: Array, weights: Weights, observe: ObserveGradients | None = None) -> Array:
        """Gradient of the residual stream x, from that of what is added to it."""
        inner = rms_norm(x, weights[f"{self.norm}.weight"], self.eps)
        if self.norm_after:
            dy = rms_norm_vjp(dy, self.part.forward(inner, weights), weights, self.norm_after, self.eps, observe)
        d_inner = self.part.vjp(dy, inner, weights, observe)
        return rms_norm_vjp(d_inner, x, weights, self.norm, self.eps, observe)


@dataclass(frozen=True)
class FeedForward:
    """A gated feed-forward net: SwiGLU, unless another activation is given with its derivative."""

    activation: Callable[[Array], Array] = silu
    slope: Callable[[Array], Array] = silu_slope
    entry: Site = ("ffn_gate", "ffn_up")
    exit: Site = ("ffn_down",)
    product: ClassVar[tuple[str, str]] = (
        "ffn_up",
        "ffn_down",
    )  # outputs of one, multiplied by something, are the inputs of the other

    def forward(self, x: Array, weights: Weights, observe: Observe | None = None) -> Array:
        """See `Part`."""
        gate, up = apply_linears(x, weights, self.entry, observe)  # [..., n_tok, n_ff]
        gate = elementwise(self.activation, gate)
        gate *= up
        del up
        (down,) = apply_linears(gate, weights, self.exit, observe)
        return down

    def vjp(self, dy: Array, x: Array, weights: Weights, observe: ObserveGradients | None = None) -> Array:
        """See `Part`."""
        gate, up = apply_linears(x, weights, self.entry, None)
        active = elementwise(self.activation, gate.copy())
        dy = apply_linears_vjp([dy], active * up, weights, self.exit, observe)
        up *= elementwise(self.slope, gate)
        up *= dy
        active *= dy
        return apply_linears_vjp([up, active], x, weights, self.entry, observe)


@dataclass(frozen=True, kw_only=True)
class Attention:
    """Grouped-query attention with rotary positions; biases and norms of the heads where the layer has them."""

    head_dim: int
    eps: float  # of the heads' norms
    rotary: Rotary
    scale: float | None = None  # of the scores; None: 1 / √head_dim
    window: int | None = None  # tokens that a token sees; None: all
    gated: bool = False  # attn_q gives each head a query and a gate of its output
    entry: Site = ("attn_q", "attn_k", "attn_v")
    exit: Site = ("attn_output",)

    def forward(self, x: Array, weights: Weights, observe: Observe | None = None) -> Array:
        """See `Part`."""
        q, k, v, gate = self._project(x, weights, observe)
        q, k = (self._place(heads, weights, norm) for heads, norm in ((q, "attn_q_norm"), (k, "attn_k_norm")))
        out = causal_attention(q, k, v, scale=self.scale, window=self.window, inputs=x, observe=observe)
        if gate is not None:
            out *= sigmoid(gate)
        (out,) = apply_linears(out.reshape(*x.shape[:-1], -1), weights, self.exit, observe)
        return out

    def vjp(self, dy: Array, x: Array, weights: Weights, observe: ObserveGradients | None = None) -> Array:
        """See `Part`."""
        flat = (*x.shape[:-1], -1)
        raw_q, raw_k, v, gate = self._project(x, weights, None)
        q, k = self._place(raw_q, weights, "attn_q_norm"), self._place(raw_k, weights, "attn_k_norm")
        out = causal_attention(q, k, v, scale=self.scale, window=self.window)
        share = None if gate is None else sigmoid(gate)
        gated = out if share is None else out * share
        d_out = apply_linears_vjp([dy], gated.reshape(flat), weights, self.exit, observe).reshape(out.shape)
        if share is not None:
            d_gate = d_out * gated * (1 - share)
            d_out *= share
        dq, dk, dv = causal_attention_vjp(d_out, q, k, v, scale=self.scale, window=self.window)
        dq = self._place_vjp(dq, raw_q, weights, "attn_q_norm", observe)
        dk = self._place_vjp(dk, raw_k, weights, "attn_k_norm", observe)
        if share is not None:
            dq = np.concatenate([dq, d_gate], axis=-1)
        dx = apply_linears_vjp([dq.reshape(flat), dk.reshape(flat)], x, weights, ("attn_q", "attn_k"), observe)
        dx += apply_linears_vjp([dv.reshape(flat)], x, weights, ("attn_v",), observe)
        return dx

    def _project(self, x: Array, weights: Weights, observe: Observe | None) -> tuple[Array, Array, Array, Array | None]:
        """Queries, keys and values [..., n_tok, n_head or n_kv_head, head_dim], and gates like queries if gated."""
        heads, gate = (*x.shape[:-1], -1, self.head_dim), None
        q, k = apply_linears(x, weights, ("attn_q", "attn_k"), observe)
        (v,) = apply_linears(x, weights, ("attn_v",), None)  # observed behind the attention
        if self.gated:
            q, gate = np.split(q.reshape(*heads[:-1], 2 * self.head_dim), 2, axis=-1)
        return q.reshape(heads), k.reshape(heads), v.reshape(heads), gate

    def _place(self, heads: Array, weights: Weights, norm: str) -> Array:
        """Queries or keys, normalized where the layer does so, turned to their positions."""
        if f"{norm}.weight" in weights:
            heads = rms_norm(heads, weights[f"{norm}.weight"], self.eps)
        return self.rotary.turn(heads, weights.get("rope_freqs.weight"))

    def _place_vjp(
        self, dy: Array, heads: Array, weights: Weights, norm: str, observe: ObserveGradients | None
    ) -> Array:
        dy = self.rotary.turn(dy, weights.get("rope_freqs.weight"), back=True)
        return rms_norm_vjp(dy, heads, weights, norm, self.eps, observe) if f"{norm}.weight" in weights else dy
