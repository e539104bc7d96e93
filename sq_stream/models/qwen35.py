"""Qwen3.5 (dense): gated delta net layers with gated full attention in between.

The text model alone is taken from multimodal checkpoints. Multi-token prediction layers are dropped, or kept whole as
the last blocks of the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sq_stream.errors import BadInputError, UnsupportedModelError, UsageError
from sq_stream.formats.metadata import Entry, ValueType, array, u32
from sq_stream.models.base import ModelSpec, TensorMap
from sq_stream.models.config import MAX_LAYERS, Config
from sq_stream.models.decoder import (
    Dims,
    attention,
    common_keys,
    feed_forward,
    head_keys,
    leave_out_inverse_frequencies,
    read_dims,
    refuse_variants,
    take_ends,
)
from sq_stream.models.rope import Rope, read_rope, rope_keys
from sq_stream.models.tensors import Shapes, TensorTable, linear, norm, text_prefix

ARCHITECTURES = ("Qwen3_5ForCausalLM", "Qwen3_5ForConditionalGeneration")
ARCH = "qwen35"
_DEFAULTS = {  # of transformers' Qwen3_5TextConfig
    "head_dim": 256,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
}
DEFAULT_INTERVAL = 4  # full_attention_interval where the config has none
_SECTIONS = [11, 11, 10]  # of the rotary pairs: time, height, width
_ROTARY_SHARE = 0.25
_MTP = r"(model\.)?mtp\..*"


@dataclass(frozen=True)
class DeltaDims:
    """The sizes of a gated delta net layer."""

    n_key_head: int
    n_value_head: int
    head_dim: int  # of keys and of values
    n_tap: int  # of the causal convolution

    @property
    def n_key(self) -> int:
        """Length of all keys (or queries) together."""
        return self.n_key_head * self.head_dim

    @property
    def n_value(self) -> int:
        """Length of all values together."""
        return self.n_value_head * self.head_dim

    @property
    def n_qkv(self) -> int:
        """Length of queries, keys and values together: the channels of the convolution."""
        return 2 * self.n_key + self.n_value

    def tiled(self, head_dim: int) -> NDArray[np.int64] | None:
        """Order [n_value_head * head_dim] of value heads in llama.cpp, None where it is that of the checkpoint.

        The checkpoint groups value heads by the key head that they share, k0v0 k0v1 k1v0 k1v1; ggml repeats the key
        heads as a whole, which wants k0v0 k1v0 k0v1 k1v1.
        """
        if self.n_value_head == self.n_key_head:
            return None
        order = np.arange(self.n_value_head * head_dim, dtype=np.int64)
        return np.ravel(order.reshape(self.n_key_head, -1, head_dim).swapaxes(0, 1))


def describe(config: Mapping[str, Any], shapes: Shapes, *, mtp: bool = False) -> ModelSpec:
    """See `base.ModelFile.describe`."""
    c = Config(config, _DEFAULTS)
    refuse_variants(c)
    c.only("hidden_act", "silu")
    c.only("attn_output_gate", True)
    dims, delta = read_dims(c), _read_delta_dims(c)
    is_delta = _read_layer_kinds(c, dims)
    rope = read_rope(c, "yarn")
    n_mtp = _count_mtp_layers(c, shapes) if mtp else 0
    prefix = text_prefix(shapes, "model.", "model.language_model.", "language_model.model.")

    table = TensorTable(shapes)
    leave_out_inverse_frequencies(table)
    table.leave_out("vision", r"(model\.)?visual\..*")
    if not mtp:
        table.leave_out("multi-token prediction (kept with --mtp)", _MTP)
    take_ends(table, dims, prefix, tied=c.flag("tie_word_embeddings", False), norms="add_one")
    delta_layer, attention_layer = _delta_layer(dims, delta), _attention_layer(dims)
    for i in range(dims.n_layer):
        layer = delta_layer if is_delta[i] else attention_layer
        table.take(*layer, into=f"blk.{i}.", source=f"{prefix}layers.{i}.")
    if n_mtp:
        mtp_prefix = "model.mtp." if "model.mtp.fc.weight" in shapes else "mtp."
        into = f"blk.{dims.n_layer}."
        table.take(*attention_layer, into=into, source=f"{mtp_prefix}layers.0.")
        table.take(*_mtp_ends(dims), into=f"{into}nextn.", source=mtp_prefix)
    tensors, left_out = table.close()

    n_layer = dims.n_layer + n_mtp
    keys = [
        *common_keys(ARCH, replace(dims, n_layer=n_layer), c),
        *head_keys(ARCH, dims),
        *_position_keys(c, rope, dims),
        *_delta_keys(c, delta, is_delta + [False] * n_mtp),
    ]
    if n_mtp:
        keys.append(u32(f"{ARCH}.nextn_predict_layers", n_mtp))
    return ModelSpec(ARCH, n_layer, tensors, tuple(keys), left_out=left_out)


def _read_delta_dims(c: Config) -> DeltaDims:
    head_dim, value_dim = c.integer("linear_key_head_dim", at_most=2**14), c.integer("linear_value_head_dim")
    n_key_head = c.integer("linear_num_key_heads", at_most=2**12)
    n_value_head = c.integer("linear_num_value_heads", at_most=2**12)
    if value_dim != head_dim:
        raise UnsupportedModelError(
            f"config.json: linear_value_head_dim {value_dim} differs from linear_key_head_dim {head_dim}; "
            f"llama.cpp's {ARCH} has one size for both"
        )
    if n_value_head % n_key_head:
        raise BadInputError(
            f"config.json: linear_num_value_heads {n_value_head} is not a multiple of linear_num_key_heads {n_key_head}"
        )
    return DeltaDims(n_key_head, n_value_head, head_dim, c.integer("linear_conv_kernel_dim", at_most=256))


def _read_layer_kinds(c: Config, dims: Dims) -> list[bool]:
    """For each layer, whether it is a gated delta net."""
    if "layer_types" not in c:
        interval = c.integer("full_attention_interval", DEFAULT_INTERVAL)
        return [i % interval != 0 for i in range(1, dims.n_layer + 1)]
    kinds = c.texts("layer_types")
    if len(kinds) != dims.n_layer or not set(kinds) <= {"linear_attention", "full_attention"}:
        raise BadInputError(
            f"config.json: layer_types must say linear_attention or full_attention for each of {dims.n_layer} layers; "
            f"it has {len(kinds)} entries: {', '.join(sorted(set(kinds)))[:80]}"
        )
    return [kind == "linear_attention" for kind in kinds]


def _count_mtp_layers(c: Config, shapes: Shapes) -> int:
    if not any(name.startswith(("mtp.", "model.mtp.")) for name in shapes):
        raise UsageError("this checkpoint has no multi-token prediction tensors (mtp.*): leave --mtp out")
    n = c.integer("mtp_num_hidden_layers", 1, at_most=MAX_LAYERS)
    if n > 1:
        raise UnsupportedModelError(
            f"config.json: mtp_num_hidden_layers is {n}; llama.cpp's {ARCH} keeps one: leave --mtp out"
        )
    return n


def _ends_of_layer(dims: Dims) -> list[TensorMap]:
    return [
        norm("attn_norm", "input_layernorm", dims.d_model, "add_one"),
        norm("post_attention_norm", "post_attention_layernorm", dims.d_model, "add_one"),
        *feed_forward(dims),
    ]


def _attention_layer(dims: Dims) -> list[TensorMap]:
    """Full attention; the rows of attn_q are a head's query, then its output gate, head after head."""
    _, k, v, output = attention(dims)
    return [
        linear("attn_q", "self_attn.q_proj", 2 * dims.n_q, dims.d_model),
        k,
        v,
        output,
        norm("attn_q_norm", "self_attn.q_norm", dims.head_dim, "add_one"),
        norm("attn_k_norm", "self_attn.k_norm", dims.head_dim, "add_one"),
        *_ends_of_layer(dims),
    ]


def _delta_layer(dims: Dims, delta: DeltaDims) -> list[TensorMap]:
    """A gated delta net; its own norm is stored as applied, unlike the others."""
    heads, values = delta.tiled(1), delta.tiled(delta.head_dim)
    qkv = None if values is None else np.concatenate([np.arange(2 * delta.n_key), 2 * delta.n_key + values])
    conv_shape = (delta.n_qkv, 1, delta.n_tap)
    n_head = delta.n_value_head
    return [
        replace(linear("attn_qkv", "linear_attn.in_proj_qkv", delta.n_qkv, dims.d_model), row_order=qkv),
        replace(linear("attn_gate", "linear_attn.in_proj_z", delta.n_value, dims.d_model), row_order=values),
        replace(linear("ssm_beta", "linear_attn.in_proj_b", n_head, dims.d_model), row_order=heads),
        replace(linear("ssm_alpha", "linear_attn.in_proj_a", n_head, dims.d_model), row_order=heads),
        replace(
            linear("ssm_conv1d", "linear_attn.conv1d", delta.n_qkv, delta.n_tap), source_shape=conv_shape, row_order=qkv
        ),
        TensorMap("ssm_dt.bias", (n_head,), "linear_attn.dt_bias", column_order=heads),
        TensorMap("ssm_a", (n_head,), "linear_attn.A_log", column_order=heads, function="neg_exp"),
        norm("ssm_norm", "linear_attn.norm", delta.head_dim),
        replace(linear("ssm_out", "linear_attn.out_proj", dims.d_model, delta.n_value), column_order=values),
        *_ends_of_layer(dims),
    ]


def _mtp_ends(dims: Dims) -> list[TensorMap]:
    """What joins the last hidden state and the next token's embedding, and the norm before the shared output matrix."""
    return [
        linear("eh_proj", "fc", dims.d_model, 2 * dims.d_model),
        norm("enorm", "pre_fc_norm_embedding", dims.d_model, "add_one"),
        norm("hnorm", "pre_fc_norm_hidden", dims.d_model, "add_one"),
        norm("shared_head_norm", "norm", dims.d_model, "add_one"),
    ]


def _position_keys(c: Config, rope: Rope, dims: Dims) -> list[Entry]:
    share = rope.section.number("partial_rotary_factor", c.number("partial_rotary_factor", _ROTARY_SHARE))
    sections = rope.section.integers("mrope_section", _SECTIONS, at_most_n=4)
    n_rotary = int(dims.head_dim * share)
    if share > 1 or n_rotary < 2 or n_rotary % 2:
        raise BadInputError(f"config.json: partial_rotary_factor {share:g} is not usable with head_dim {dims.head_dim}")
    return [
        *rope_keys(ARCH, rope, dims.n_context),
        u32(f"{ARCH}.rope.dimension_count", n_rotary),
        array(f"{ARCH}.rope.dimension_sections", ValueType.INT32, [*sections, 0, 0, 0][:4]),
    ]


def _delta_keys(c: Config, delta: DeltaDims, is_delta: list[bool]) -> list[Entry]:
    return [
        u32(f"{ARCH}.ssm.conv_kernel", delta.n_tap),
        u32(f"{ARCH}.ssm.state_size", delta.head_dim),
        u32(f"{ARCH}.ssm.group_count", delta.n_key_head),
        u32(f"{ARCH}.ssm.time_step_rank", delta.n_value_head),
        u32(f"{ARCH}.ssm.inner_size", delta.n_value),
        array(f"{ARCH}.attention.recurrent_layers", ValueType.BOOL, is_delta),
        u32(f"{ARCH}.full_attention_interval", c.integer("full_attention_interval", DEFAULT_INTERVAL)),
    ]
