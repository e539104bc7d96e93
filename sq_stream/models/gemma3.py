"""Gemma 3: the text model alone, from text-only and from multimodal checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sq_stream.errors import BadInputError, UnsupportedModelError
from sq_stream.formats.metadata import Entry, f32, u32
from sq_stream.models.base import ModelSpec, TensorMap
from sq_stream.models.config import Config
from sq_stream.models.decoder import (
    Dims,
    attention,
    common_keys,
    feed_forward,
    head_keys,
    leave_out_inverse_frequencies,
    read_dims,
    refuse_mtp,
    refuse_variants,
    take_ends,
)
from sq_stream.models.rope import read_rope, rope_keys
from sq_stream.models.tensors import Shapes, TensorTable, norm, text_prefix

ARCHITECTURES = ("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration")
ARCH = "gemma3"
_DEFAULTS = {  # of transformers' Gemma3TextConfig: published multimodal configs state only what differs
    "vocab_size": 262208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131072,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "rms_norm_eps": 1e-6,
}
PATTERN = 6  # every sixth layer attends to everything: llama.cpp's gemma3 knows no other interval
N_LAYER_27B = 62  # llama.cpp tells the one model with another attention scale by its number of layers
_VISION = r"(model\.)?(vision_tower|multi_modal_projector)\..*"


def describe(config: Mapping[str, Any], shapes: Shapes, *, mtp: bool = False) -> ModelSpec:
    """See `base.ModelFile.describe`."""
    c = Config(config, _DEFAULTS)
    refuse_mtp(mtp)
    refuse_variants(c)
    c.only("hidden_activation", "gelu_pytorch_tanh")
    c.only("attn_logit_softcapping")
    dims = read_dims(c)
    _check_attention_scale(c, dims)
    prefix = text_prefix(shapes, "model.", "model.language_model.", "language_model.model.")

    table = TensorTable(shapes)
    leave_out_inverse_frequencies(table)
    table.leave_out("vision", _VISION)
    head = "language_model.lm_head.weight" if prefix == "language_model.model." else "lm_head.weight"
    take_ends(table, dims, prefix, tied=c.flag("tie_word_embeddings", True), head=head, norms="add_one")
    layer = _layer(dims)
    for i in range(dims.n_layer):
        table.take(*layer, into=f"blk.{i}.", source=f"{prefix}layers.{i}.")
    tensors, left_out = table.close()

    keys = [*common_keys(ARCH, dims, c), *head_keys(ARCH, dims), *_position_keys(c, dims)]
    if "final_logit_softcapping" in c:
        keys.append(f32(f"{ARCH}.final_logit_softcapping", c.number("final_logit_softcapping")))
    return ModelSpec(ARCH, dims.n_layer, tensors, tuple(keys), left_out=left_out)


def _layer(dims: Dims) -> list[TensorMap]:
    return [
        norm("attn_norm", "input_layernorm", dims.d_model, "add_one"),
        *attention(dims),
        norm("attn_q_norm", "self_attn.q_norm", dims.head_dim, "add_one"),
        norm("attn_k_norm", "self_attn.k_norm", dims.head_dim, "add_one"),
        norm("post_attention_norm", "post_attention_layernorm", dims.d_model, "add_one"),
        norm("ffn_norm", "pre_feedforward_layernorm", dims.d_model, "add_one"),
        *feed_forward(dims),
        norm("post_ffw_norm", "post_feedforward_layernorm", dims.d_model, "add_one"),
    ]


def _check_attention_scale(c: Config, dims: Dims) -> None:
    scalar = c.number("query_pre_attn_scalar")
    assumed = dims.d_model // dims.n_head if dims.n_layer == N_LAYER_27B else dims.head_dim
    if scalar != assumed:
        raise UnsupportedModelError(
            f"config.json: query_pre_attn_scalar is {scalar:g}; llama.cpp's {ARCH} scales attention by {assumed} "
            f"in a model of {dims.n_layer} layers"
        )


def _position_keys(c: Config, dims: Dims) -> list[Entry]:
    keys = rope_keys(ARCH, read_rope(c, "linear", theta=1e6), dims.n_context)
    nested = c.section("rope_parameters")
    local = nested.section("sliding_attention") if nested else None
    if local is not None:
        local.only("rope_type", "default")
    theta = c.number("rope_local_base_freq", 10_000.0)
    keys.append(f32(f"{ARCH}.rope.freq_base_swa", local.number("rope_theta", theta) if local else theta))
    if _has_sliding_layers(c, dims):
        keys.append(u32(f"{ARCH}.attention.sliding_window", c.integer("sliding_window", at_most=2**31)))
    return keys


def _has_sliding_layers(c: Config, dims: Dims) -> bool:
    """Whether some layers attend to a window only; layers otherwise than llama.cpp assumes are refused."""
    if "layer_types" in c:
        kinds = c.texts("layer_types")
        if len(kinds) != dims.n_layer:
            raise BadInputError(f"config.json: layer_types has {len(kinds)} entries for {dims.n_layer} layers")
    else:
        interval = c.integer("sliding_window_pattern", PATTERN)
        kinds = ["sliding_attention" if i % interval else "full_attention" for i in range(1, dims.n_layer + 1)]
    usual = ["sliding_attention" if i % PATTERN else "full_attention" for i in range(1, dims.n_layer + 1)]
    if "sliding_attention" not in kinds:
        return False
    if kinds != usual:
        raise UnsupportedModelError(
            f"config.json: llama.cpp's {ARCH} has full attention in every {PATTERN}th layer or in all; "
            "this model's layer_types differ"
        )
    return True
