"""Qwen3.5's forward pass, on weights in GGUF's names, order and conventions (norm weights with the 1 added)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from sq_stream.models.attention import causal_attention
from sq_stream.models.forward import Decoder
from sq_stream.models.gated_delta import gated_delta
from sq_stream.models.layers import (
    CACHED_VALUES,
    Array,
    Observe,
    Weights,
    apply_linears,
    elementwise,
    feed_forward,
    rms_norm,
    sigmoid,
    silu,
    softplus,
    tiles,
)
from sq_stream.models.qwen35 import DEFAULT_INTERVAL
from sq_stream.models.rotary import Rotary


@dataclass(frozen=True, kw_only=True)
class Model(Decoder):
    """Gated delta nets, with gated full attention in between."""

    head_dim: int
    rotary: Rotary
    n_key_head: int  # of the delta nets; their value heads number n_value_head
    n_value_head: int
    delta_dim: int  # of a delta net's keys and values
    is_delta: tuple[bool, ...]  # for each layer

    @classmethod
    def from_keys(cls, arch: str, keys: Mapping[str, Any]) -> Model:
        """See `Decoder.from_keys`."""
        n_layer = keys["block_count"] - keys.get("nextn_predict_layers", 0)
        interval = keys.get("full_attention_interval", DEFAULT_INTERVAL)
        is_delta = keys.get("attention.recurrent_layers", [(i + 1) % interval != 0 for i in range(n_layer)])
        return cls(
            n_layer=n_layer,
            eps=keys["attention.layer_norm_rms_epsilon"],
            head_dim=keys["attention.key_length"],
            rotary=Rotary.from_keys(keys, keys["rope.dimension_count"]),
            n_key_head=keys["ssm.group_count"],
            n_value_head=keys["ssm.time_step_rank"],
            delta_dim=keys["ssm.state_size"],
            is_delta=tuple(map(bool, is_delta[:n_layer])),
        )

    def layer(self, x: Array, weights: Weights, i: int, observe: Observe | None = None) -> Array:
        """See `Decoder.layer`."""
        mix = self._delta_net if self.is_delta[i] else self._attention
        x = x + mix(rms_norm(x, weights["attn_norm.weight"], self.eps), weights, observe)
        x += feed_forward(rms_norm(x, weights["post_attention_norm.weight"], self.eps), weights, observe)
        return x

    def norms(self, i: int) -> dict[str, tuple[str, ...]]:
        """See `Decoder.norms`."""
        delta = ("attn_qkv", "attn_gate", "ssm_beta", "ssm_alpha")
        mixer = delta if self.is_delta[i] else ("attn_q", "attn_k", "attn_v")
        return {"attn_norm": mixer, "post_attention_norm": ("ffn_gate", "ffn_up")}

    def _attention(self, x: Array, weights: Weights, observe: Observe | None) -> Array:
        """Full attention with normalized queries and keys and a gated output: [..., n_tok, d_model] to the same."""
        heads = (*x.shape[:-1], -1, self.head_dim)  # [..., n_tok, n_head or n_kv_head, head_dim]
        q_and_gate, k = apply_linears(x, weights, ("attn_q", "attn_k"), observe)
        (v,) = apply_linears(x, weights, ("attn_v",), None)  # observed behind the attention
        q, gate = np.split(q_and_gate.reshape(*heads[:-1], 2 * self.head_dim), 2, axis=-1)
        q = self.rotary.turn(rms_norm(q, weights["attn_q_norm.weight"], self.eps))
        k = self.rotary.turn(rms_norm(k.reshape(heads), weights["attn_k_norm.weight"], self.eps))
        out = causal_attention(q, k, v.reshape(heads), inputs=x, observe=observe)  # [..., n_tok, n_head, head_dim]
        out *= sigmoid(gate)
        (out,) = apply_linears(out.reshape(*x.shape[:-1], -1), weights, ("attn_output",), observe)
        return out

    def _delta_net(self, x: Array, weights: Weights, observe: Observe | None) -> Array:
        """Gated delta net: [..., n_tok, d_model] to the same.

        Value head h belongs to key head h modulo n_key_head: ggml repeats the key heads as a whole.
        """
        heads = (*x.shape[:-1], -1, self.delta_dim)  # [..., n_tok, n_key_head or n_value_head, delta_dim]
        n_key = self.n_key_head * self.delta_dim
        qkv, z, beta, alpha = apply_linears(x, weights, ("attn_qkv", "attn_gate", "ssm_beta", "ssm_alpha"), observe)
        qkv = elementwise(silu, causal_convolution(qkv, weights["ssm_conv1d.weight"]))
        q, k, v = (part.reshape(heads) for part in np.split(qkv, [n_key, 2 * n_key], axis=-1))
        n_repeat = self.n_value_head // self.n_key_head
        if n_repeat > 1:
            q, k = (np.concatenate([part] * n_repeat, axis=-2) for part in (q, k))
        log_decay = weights["ssm_a"] * softplus(alpha + weights["ssm_dt.bias"])  # [..., n_tok, n_value_head]
        out = rms_norm(gated_delta(q, k, v, log_decay, sigmoid(beta)), weights["ssm_norm.weight"], self.eps)
        out *= elementwise(silu, z).reshape(out.shape)
        (out,) = apply_linears(out.reshape(*x.shape[:-1], -1), weights, ("ssm_out",), observe)
        return out


def causal_convolution(x: Array, weight: Array) -> Array:
    """Each channel of x [..., n_tok, n] convolved with its taps, weight [n, n_tap], the last for the token itself."""
    taps = np.ascontiguousarray(weight.T[::-1])  # [n_tap, n], the newest first
    out: Array = x * taps[0]
    for block in tiles(x.shape[-2], x.shape[-1], CACHED_VALUES):
        for age, tap in enumerate(taps[1:], 1):
            tokens = slice(max(block.start, age), block.stop)
            out[..., tokens, :] += x[..., tokens.start - age : max(tokens.stop - age, 0), :] * tap
    return out
