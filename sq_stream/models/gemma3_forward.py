"""Gemma 3: norms before and after each part, GeGLU, and mostly layers that see a window only."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from sq_stream.models.forward import Decoder
from sq_stream.models.gemma3 import N_LAYER_27B, PATTERN
from sq_stream.models.layers import gelu, gelu_slope
from sq_stream.models.parts import Attention, Branch, FeedForward
from sq_stream.models.rotary import Rotary


def make_decoder(arch: str, keys: Mapping[str, Any]) -> Decoder:
    """Every sixth layer attends to everything, the others to a window; see `forward.find_decoder`."""
    head_dim, d_model, n_layer = keys["attention.key_length"], keys["embedding_length"], keys["block_count"]
    eps, window = keys["attention.layer_norm_rms_epsilon"], keys.get("attention.sliding_window")
    scaled_by = d_model // keys["attention.head_count"] if n_layer == N_LAYER_27B else head_dim
    local_rotary = Rotary.from_keys(keys, head_dim, theta=keys.get("rope.freq_base_swa", 10_000.0))

    def branch(rotary: Rotary, window: int | None) -> Branch:
        scale = 1 / math.sqrt(scaled_by)
        attention = Attention(head_dim=head_dim, eps=eps, rotary=rotary, scale=scale, window=window)
        return Branch("attn_norm", attention, eps, norm_after="post_attention_norm")

    everything = branch(Rotary.from_keys(keys, head_dim), None)
    nearby = everything if window is None else branch(local_rotary, window)
    feed_forward = Branch("ffn_norm", FeedForward(gelu, gelu_slope), eps, norm_after="post_ffw_norm")
    mixers = (everything if i % PATTERN == PATTERN - 1 else nearby for i in range(n_layer))
    return Decoder(
        layers=tuple((mixer, feed_forward) for mixer in mixers),
        eps=eps,
        embedding_scale=math.sqrt(d_model),
        soft_cap=keys.get("final_logit_softcapping", 0.0),
    )
