"""Llama and what is built alike: Mistral, Qwen2 (with biases), Qwen3 (with norms of the heads)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sq_stream.models.forward import Decoder
from sq_stream.models.parts import Attention, Branch, FeedForward
from sq_stream.models.rotary import Rotary


def make_decoder(arch: str, keys: Mapping[str, Any]) -> Decoder:
    """A pre-norm transformer; see `forward.find_decoder`."""
    head_dim = keys.get("attention.key_length", keys["embedding_length"] // keys["attention.head_count"])
    rotary = Rotary.from_keys(keys, keys.get("rope.dimension_count", head_dim), neighbors=arch == "llama")
    eps = keys["attention.layer_norm_rms_epsilon"]
    attention = Branch("attn_norm", Attention(head_dim=head_dim, eps=eps, rotary=rotary), eps)
    layer = attention, Branch("ffn_norm", FeedForward(), eps)
    return Decoder(layers=(layer,) * keys["block_count"], eps=eps)
