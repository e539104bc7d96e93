"""Qwen3.5, on weights in GGUF's names, order and conventions (norm weights with the 1 added)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from sq_stream.models.forward import Decoder
from sq_stream.models.gated_delta import gated_delta, gated_delta_vjp
from sq_stream.models.layers import (
    CACHED_VALUES,
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
    softplus,
    tiles,
)
from sq_stream.models.parts import Attention, Branch, FeedForward
from sq_stream.models.qwen35 import DEFAULT_INTERVAL
from sq_stream.models.rotary import Rotary


def make_decoder(arch: str, keys: Mapping[str, Any]) -> Decoder:
    """Gated delta nets, with gated full attention in between; see `forward.find_decoder`."""
    n_layer = keys["block_count"] - keys.get("nextn_predict_layers", 0)
    interval = keys.get("full_attention_interval", DEFAULT_INTERVAL)
    is_delta = keys.get("attention.recurrent_layers", [(i + 1) % interval != 0 for i in range(n_layer)])
    eps = keys["attention.layer_norm_rms_epsilon"]
    rotary = Rotary.from_keys(keys, keys["rope.dimension_count"])
    attention = Attention(head_dim=keys["attention.key_length"], eps=eps, rotary=rotary, gated=True)
    delta_net = DeltaNet(
        n_key_head=keys["ssm.group_count"],
        n_value_head=keys["ssm.time_step_rank"],
        head_dim=keys["ssm.state_size"],
        eps=eps,
    )
    mixers = [Branch("attn_norm", part, eps) for part in (attention, delta_net)]
    feed_forward = Branch("post_attention_norm", FeedForward(), eps)
    return Decoder(layers=tuple((mixers[bool(delta)], feed_forward) for delta in is_delta[:n_layer]), eps=eps)


@dataclass(frozen=True, kw_only=True)
class DeltaNet:
    """A gated delta net with its short convolution.

    Value head h belongs to key head h modulo n_key_head: ggml repeats the key heads as a whole.
    """

    n_key_head: int
    n_value_head: int
    head_dim: int  # of keys and values
    eps: float
    entry: Site = ("attn_qkv", "attn_gate", "ssm_beta", "ssm_alpha")
    exit: Site = ("ssm_out",)

    def forward(self, x: Array, weights: Weights, observe: Observe | None = None) -> Array:
        """See `parts.Part`."""
        qkv, z, beta, alpha = apply_linears(x, weights, self.entry, observe)
        qkv = elementwise(silu, causal_convolution(qkv, weights["ssm_conv1d.weight"]))
        q, k, v = self._split(qkv)
        log_decay = weights["ssm_a"] * softplus(alpha + weights["ssm_dt.bias"])  # [..., n_tok, n_value_head]
        out = rms_norm(gated_delta(q, k, v, log_decay, sigmoid(beta)), weights["ssm_norm.weight"], self.eps)
        out *= elementwise(silu, z).reshape(out.shape)
        (out,) = apply_linears(out.reshape(*x.shape[:-1], -1), weights, self.exit, observe)
        return out

    def vjp(self, dy: Array, x: Array, weights: Weights, observe: ObserveGradients | None = None) -> Array:
        """See `parts.Part`."""
        conv, a = weights["ssm_conv1d.weight"], weights["ssm_a"]
        qkv, z, beta, alpha = apply_linears(x, weights, self.entry, None)
        qkv = causal_convolution(qkv, conv)
        alpha += weights["ssm_dt.bias"]
        beta = sigmoid(beta)
        delta = (*self._split(elementwise(silu, qkv.copy())), a * softplus(alpha), beta)
        read = gated_delta(*delta)
        out = rms_norm(read, weights["ssm_norm.weight"], self.eps)
        gate = elementwise(silu, z.copy()).reshape(out.shape)
        d_out = apply_linears_vjp([dy], (out * gate).reshape(z.shape), weights, self.exit, observe)
        d_z = elementwise(silu_slope, z) * d_out * out.reshape(z.shape)
        gate *= d_out.reshape(gate.shape)
        d_read = rms_norm_vjp(gate, read, weights, "ssm_norm", self.eps, observe)
        dq, dk, dv, d_log_decay, d_beta = gated_delta_vjp(d_read, *delta)
        d_qkv = self._join(dq, dk, dv)
        d_qkv *= elementwise(silu_slope, qkv)
        d_qkv = causal_convolution(d_qkv[..., ::-1, :], conv)[..., ::-1, :]  # backward in time
        d_beta *= beta * (1 - beta)
        d_alpha = d_log_decay * a * sigmoid(alpha)
        return apply_linears_vjp([d_qkv, d_z, d_beta, d_alpha], x, weights, self.entry, observe)

    def _split(self, qkv: Array) -> tuple[Array, Array, Array]:
        """Queries, keys and values [..., n_tok, n_value_head, head_dim], those of key heads repeated."""
        n_key, n_repeat = self.n_key_head * self.head_dim, self.n_value_head // self.n_key_head
        heads = (*qkv.shape[:-1], -1, self.head_dim)
        q, k, v = (part.reshape(heads) for part in np.split(qkv, [n_key, 2 * n_key], axis=-1))
        if n_repeat > 1:
            q, k = (np.concatenate([part] * n_repeat, axis=-2) for part in (q, k))
        return q, k, v

    def _join(self, dq: Array, dk: Array, dv: Array) -> Array:
        """What `_split` split, for gradients: those of a key head's copies are added up."""
        flat = (*dv.shape[:-2], -1)
        copies = (*dv.shape[:-2], -1, self.n_key_head, self.head_dim)
        dq, dk = (part.reshape(copies).sum(axis=-3) for part in (dq, dk))
        return np.concatenate([part.reshape(flat) for part in (dq, dk, dv)], axis=-1)


def causal_convolution(x: Array, weight: Array) -> Array:
    """Each channel of x [..., n_tok, n] convolved with its taps, weight [n, n_tap], the last for the token itself."""
    taps = np.ascontiguousarray(weight.T[::-1])  # [n_tap, n], the newest first
    out: Array = x * taps[0]
    for block in tiles(x.shape[-2], x.shape[-1], CACHED_VALUES):
        for age, tap in enumerate(taps[1:], 1):
            tokens = slice(max(block.start, age), block.stop)
            out[..., tokens, :] += x[..., tokens.start - age : max(tokens.stop - age, 0), :] * tap
    return out
