"""Qwen3 (dense): no biases, normalized query and key heads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sq_stream.models.base import ModelSpec, TensorMap
from sq_stream.models.config import Config
from sq_stream.models.decoder import (
    Dims,
    attention,
    describe_uniform,
    feed_forward,
    head_keys,
    read_dims,
    refuse_mtp,
    refuse_variants,
    sliding_window_note,
)
from sq_stream.models.rope import read_rope, rope_keys
from sq_stream.models.tensors import Shapes, norm

ARCHITECTURES = ("Qwen3ForCausalLM",)
ARCH = "qwen3"
_DEFAULTS = {"head_dim": 128}  # of transformers' Qwen3Config


def describe(config: Mapping[str, Any], shapes: Shapes, *, mtp: bool = False) -> ModelSpec:
    """See `base.ModelFile.describe`."""
    c = Config(config, _DEFAULTS)
    refuse_mtp(mtp)
    refuse_variants(c)
    c.only("hidden_act", "silu")
    dims = read_dims(c)
    rope = read_rope(c, "linear", "yarn")

    keys = [*head_keys(ARCH, dims), *rope_keys(ARCH, rope, dims.n_context)]
    notes = sliding_window_note(c) if c.flag("use_sliding_window", False) else ()
    return describe_uniform(ARCH, c, dims, shapes, layer=_layer(dims), keys=keys, notes=notes)


def _layer(dims: Dims) -> list[TensorMap]:
    return [
        norm("attn_norm", "input_layernorm", dims.d_model),
        *attention(dims),
        norm("attn_q_norm", "self_attn.q_norm", dims.head_dim),
        norm("attn_k_norm", "self_attn.k_norm", dims.head_dim),
        norm("ffn_norm", "post_attention_layernorm", dims.d_model),
        *feed_forward(dims),
    ]
