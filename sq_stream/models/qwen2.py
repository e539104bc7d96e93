"""Qwen2 and Qwen2.5 (dense): biases on the query, key and value projections."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sq_stream.errors import UnsupportedModelError
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

ARCHITECTURES = ("Qwen2ForCausalLM",)
ARCH = "qwen2"


def describe(config: Mapping[str, Any], shapes: Shapes, *, mtp: bool = False) -> ModelSpec:
    """See `base.ModelFile.describe`."""
    c = Config(config)
    refuse_mtp(mtp)
    refuse_variants(c)
    c.only("hidden_act", "silu")
    dims = read_dims(c)
    if dims.n_q != dims.d_model:
        raise UnsupportedModelError(
            f"config.json: llama.cpp's {ARCH} needs attention heads that fill hidden_size {dims.d_model}; "
            f"{dims.n_head} heads of {dims.head_dim} make {dims.n_q}"
        )
    rope = read_rope(c, "linear", "yarn")

    keys = rope_keys(ARCH, rope, dims.n_context)
    if "head_dim" in c:
        keys += head_keys(ARCH, dims)
    notes = sliding_window_note(c) if c.flag("use_sliding_window", False) else ()
    return describe_uniform(ARCH, c, dims, shapes, layer=_layer(dims), keys=keys, notes=notes)


def _layer(dims: Dims) -> list[TensorMap]:
    return [
        norm("attn_norm", "input_layernorm", dims.d_model),
        *attention(dims),
        TensorMap("attn_q.bias", (dims.n_q,), "self_attn.q_proj.bias"),
        TensorMap("attn_k.bias", (dims.n_kv,), "self_attn.k_proj.bias"),
        TensorMap("attn_v.bias", (dims.n_kv,), "self_attn.v_proj.bias"),
        norm("ffn_norm", "post_attention_layernorm", dims.d_model),
        *feed_forward(dims),
    ]
