"""Llama 2, 3, 3.1 to 3.3 and what shares their architecture (SmolLM2, TinyLlama, Yi, ...)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from sq_stream.formats.metadata import u32
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
)
from sq_stream.models.rope import llama3_factors, paired_rows, read_rope, rope_keys
from sq_stream.models.tensors import Shapes, norm

ARCHITECTURES = ("LlamaForCausalLM",)
ARCH = "llama"


def describe(config: Mapping[str, Any], shapes: Shapes, *, mtp: bool = False) -> ModelSpec:
    """See `base.ModelFile.describe`."""
    return describe_llama(Config(config), shapes, mtp=mtp)


def describe_llama(c: Config, shapes: Shapes, *, mtp: bool, notes: tuple[str, ...] = ()) -> ModelSpec:
    """Any model that llama.cpp runs as its architecture `llama`, with its config already read.

    Raises:
        BadInputError, UnsupportedModelError, UsageError: as `base.ModelFile.describe` does.
    """
    refuse_mtp(mtp)
    refuse_variants(c)
    c.only("hidden_act", "silu")
    dims = read_dims(c)
    rope = read_rope(c, "linear", "llama3", "yarn")

    keys = [
        *head_keys(ARCH, dims),
        *rope_keys(ARCH, rope, dims.n_context),
        u32(f"{ARCH}.rope.dimension_count", dims.head_dim),
        u32(f"{ARCH}.vocab_size", dims.n_vocab),
    ]
    computed = [llama3_factors(rope, dims.head_dim)] if rope.kind == "llama3" else []
    return describe_uniform(ARCH, c, dims, shapes, layer=_layer(dims), keys=keys, computed=computed, notes=notes)


def _layer(dims: Dims) -> list[TensorMap]:
    q, k, *others = attention(dims)
    return [
        norm("attn_norm", "input_layernorm", dims.d_model),
        replace(q, row_order=paired_rows(dims.n_head, dims.head_dim)),
        replace(k, row_order=paired_rows(dims.n_head_kv, dims.head_dim)),
        *others,
        norm("ffn_norm", "post_attention_layernorm", dims.d_model),
        *feed_forward(dims),
    ]
