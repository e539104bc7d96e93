"""Gemma 3's forward pass: norms before and after each part, and mostly layers that see a window only."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sq_stream.models.attention import causal_attention
from sq_stream.models.forward import Decoder
from sq_stream.models.gemma3 import N_LAYER_27B, PATTERN
from sq_stream.models.layers import (
    Array,
    Observe,
    Weights,
    apply_linears,
    feed_forward,
    gelu,
    rms_norm,
)
from sq_stream.models.rotary import Rotary


@dataclass(frozen=True, kw_only=True)
class Model(Decoder):
    """Sandwich norms, GeGLU, normalized heads; every sixth layer attends to everything, the others to `window`."""

    head_dim: int
    attention_scale: float
    window: int | None  # None: every layer attends to everything
    rotary: Rotary
    local_rotary: Rotary

    @classmethod
    def from_keys(cls, arch: str, keys: Mapping[str, Any]) -> Model:
        """See `Decoder.from_keys`."""
        head_dim, d_model, n_layer = keys["attention.key_length"], keys["embedding_length"], keys["block_count"]
        scaled_by = d_model // keys["attention.head_count"] if n_layer == N_LAYER_27B else head_dim
        return cls(
            n_layer=n_layer,
            eps=keys["attention.layer_norm_rms_epsilon"],
            embedding_scale=math.sqrt(d_model),
            soft_cap=keys.get("final_logit_softcapping", 0.0),
            head_dim=head_dim,
            attention_scale=1 / math.sqrt(scaled_by),
            window=keys.get("attention.sliding_window"),
            rotary=Rotary.from_keys(keys, head_dim),
            local_rotary=Rotary.from_keys(keys, head_dim, theta=keys.get("rope.freq_base_swa", 10_000.0)),
        )

    def layer(self, x: Array, weights: Weights, i: int, observe: Observe | None = None) -> Array:
        """See `Decoder.layer`."""

        def norm(y: Array, name: str) -> Array:
            return rms_norm(y, weights[f"{name}.weight"], self.eps)

        x = x + norm(self._attention(norm(x, "attn_norm"), weights, i, observe), "post_attention_norm")
        x += norm(feed_forward(norm(x, "ffn_norm"), weights, observe, gelu), "post_ffw_norm")
        return x

    def _attention(self, x: Array, weights: Weights, i: int, observe: Observe | None) -> Array:
        is_local = self.window is not None and i % PATTERN < PATTERN - 1
        rotary = self.local_rotary if is_local else self.rotary
        heads = (*x.shape[:-1], -1, self.head_dim)  # [..., n_tok, n_head or n_kv_head, head_dim]
        q, k = apply_linears(x, weights, ("attn_q", "attn_k"), observe)
        (v,) = apply_linears(x, weights, ("attn_v",), None)  # observed behind the attention
        q = rotary.turn(rms_norm(q.reshape(heads), weights["attn_q_norm.weight"], self.eps))
        k = rotary.turn(rms_norm(k.reshape(heads), weights["attn_k_norm.weight"], self.eps))
        window = self.window if is_local else None
        out = causal_attention(
            q, k, v.reshape(heads), scale=self.attention_scale, window=window, inputs=x, observe=observe
        )
        (out,) = apply_linears(out.reshape(*x.shape[:-1], -1), weights, ("attn_output",), observe)
        return out
