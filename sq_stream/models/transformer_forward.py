"""The forward pass of Llama and what is built alike: Mistral, Qwen2 (with biases), Qwen3 (with norms of the heads)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sq_stream.models.attention import causal_attention
from sq_stream.models.forward import Decoder
from sq_stream.models.layers import Array, Observe, Weights, apply_linears, feed_forward, rms_norm
from sq_stream.models.rotary import Rotary


@dataclass(frozen=True, kw_only=True)
class Model(Decoder):
    """A pre-norm transformer; biases and head norms are applied where the layer has them."""

    head_dim: int
    rotary: Rotary

    @classmethod
    def from_keys(cls, arch: str, keys: Mapping[str, Any]) -> Model:
        """See `Decoder.from_keys`."""
        head_dim = keys.get("attention.key_length", keys["embedding_length"] // keys["attention.head_count"])
        return cls(
            n_layer=keys["block_count"],
            eps=keys["attention.layer_norm_rms_epsilon"],
            head_dim=head_dim,
            rotary=Rotary.from_keys(keys, keys.get("rope.dimension_count", head_dim), neighbors=arch == "llama"),
        )

    def layer(self, x: Array, weights: Weights, i: int, observe: Observe | None = None) -> Array:
        """See `Decoder.layer`."""
        x = x + self._attention(rms_norm(x, weights["attn_norm.weight"], self.eps), weights, observe)
        x += feed_forward(rms_norm(x, weights["ffn_norm.weight"], self.eps), weights, observe)
        return x

    def _attention(self, x: Array, weights: Weights, observe: Observe | None) -> Array:
        heads = (*x.shape[:-1], -1, self.head_dim)  # [..., n_tok, n_head or n_kv_head, head_dim]
        q, k = apply_linears(x, weights, ("attn_q", "attn_k"), observe)
        (v,) = apply_linears(x, weights, ("attn_v",), None)  # observed behind the attention
        q, k = (self._place(y.reshape(heads), weights, norm) for y, norm in ((q, "attn_q_norm"), (k, "attn_k_norm")))
        out = causal_attention(q, k, v.reshape(heads), inputs=x, observe=observe)
        (out,) = apply_linears(out.reshape(*x.shape[:-1], -1), weights, ("attn_output",), observe)
        return out

    def _place(self, heads: Array, weights: Weights, norm: str) -> Array:
        """Queries or keys, normalized where the model does so, turned to their positions."""
        if f"{norm}.weight" in weights:
            heads = rms_norm(heads, weights[f"{norm}.weight"], self.eps)
        return self.rotary.turn(heads, weights.get("rope_freqs.weight"))
