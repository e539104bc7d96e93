"""Qwen3.5's forward pass, on weights in GGUF's names, order and conventions (norm weights with the 1 added)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sq_stream.errors import UnsupportedModelError
from sq_stream.formats.metadata import Entry
from sq_stream.models.gated_delta import gated_delta
from sq_stream.models.layers import (
    Array,
    Observe,
    Weights,
    apply_linears,
    causal_attention,
    feed_forward,
    rms_norm,
    rotate,
    sigmoid,
    silu,
    softplus,
    with_prefix,
)
from sq_stream.models.qwen35 import ARCH, DEFAULT_INTERVAL


@dataclass(frozen=True)
class Dims:
    """Sizes and constants of a model, from its GGUF keys."""

    n_layer: int  # without multi-token prediction
    n_head: int
    n_kv_head: int
    head_dim: int
    n_rotary: int
    theta: float
    eps: float
    n_key_head: int  # of the delta nets; their value heads number n_value_head
    n_value_head: int
    delta_dim: int  # of a delta net's keys and values
    is_delta: tuple[bool, ...]  # for each layer

    @classmethod
    def from_metadata(cls, entries: Iterable[Entry]) -> Dims:
        """Read the `qwen35.*` keys.

        Raises:
            UnsupportedModelError: another architecture, or scaled rotary embeddings.
        """
        keys: dict[str, Any] = {entry.key.removeprefix(f"{ARCH}."): entry.value for entry in entries}
        if "ssm.group_count" not in keys:
            raise UnsupportedModelError(f"the forward pass is {ARCH}'s; this is {keys.get('general.architecture')!r}")
        if keys.get("rope.scaling.type", "none") != "none":
            raise UnsupportedModelError(f"rotary embeddings scaled by {keys['rope.scaling.type']!r} are not supported")
        n_layer = keys["block_count"] - keys.get("nextn_predict_layers", 0)
        interval = keys.get("full_attention_interval", DEFAULT_INTERVAL)
        is_delta = keys.get("attention.recurrent_layers", [(i + 1) % interval != 0 for i in range(n_layer)])
        return cls(
            n_layer=n_layer,
            n_head=keys["attention.head_count"],
            n_kv_head=keys["attention.head_count_kv"],
            head_dim=keys["attention.key_length"],
            n_rotary=keys["rope.dimension_count"],
            theta=keys["rope.freq_base"],
            eps=keys["attention.layer_norm_rms_epsilon"],
            n_key_head=keys["ssm.group_count"],
            n_value_head=keys["ssm.time_step_rank"],
            delta_dim=keys["ssm.state_size"],
            is_delta=tuple(map(bool, is_delta[:n_layer])),
        )


def forward(tokens: NDArray[np.integer[Any]], weights: Weights, dims: Dims, observe: Observe | None = None) -> Array:
    """Logits after every token, for a model that is in memory as a whole.

    Args:
        tokens: ids [..., n_tok].
        weights: all tensors by GGUF name.
        dims: sizes.
        observe: sees the activations that enter every linear, named as in `weights`.

    Returns:
        float32 [..., n_tok, n_vocab].
    """
    x = weights["token_embd.weight"][tokens]  # [..., n_tok, d_model]
    for i in range(dims.n_layer):
        prefix = f"blk.{i}."
        own = {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}
        x = layer(x, own, dims, is_delta=dims.is_delta[i], observe=with_prefix(observe, prefix))
    return logits(x, weights, dims, observe)


def layer(x: Array, weights: Weights, dims: Dims, *, is_delta: bool, observe: Observe | None = None) -> Array:
    """One layer's map of the residual stream x [..., n_tok, d_model], given its tensors without their `blk.N.`."""
    mix = delta_net if is_delta else attention
    x = x + mix(rms_norm(x, weights["attn_norm.weight"], dims.eps), weights, dims, observe)
    return x + feed_forward(rms_norm(x, weights["post_attention_norm.weight"], dims.eps), weights, observe)


def logits(x: Array, weights: Weights, dims: Dims, observe: Observe | None = None) -> Array:
    """The last layer's output [..., n_tok, d_model] to logits [..., n_tok, n_vocab]; the embedding may be tied."""
    name = "output" if "output.weight" in weights else "token_embd"
    x = rms_norm(x, weights["output_norm.weight"], dims.eps)
    (out,) = apply_linears(x, weights, (name,), observe)
    return out


def attention(x: Array, weights: Weights, dims: Dims, observe: Observe | None) -> Array:
    """Full attention with normalized queries and keys and a gated output: [..., n_tok, d_model] to the same."""
    heads = (*x.shape[:-1], -1, dims.head_dim)  # [..., n_tok, n_head or n_kv_head, head_dim]
    q_and_gate, k, v = apply_linears(x, weights, ("attn_q", "attn_k", "attn_v"), observe)
    q, gate = np.split(q_and_gate.reshape(*heads[:-1], 2 * dims.head_dim), 2, axis=-1)
    q = rotate(rms_norm(q, weights["attn_q_norm.weight"], dims.eps), dims.theta, dims.n_rotary)
    k = rotate(rms_norm(k.reshape(heads), weights["attn_k_norm.weight"], dims.eps), dims.theta, dims.n_rotary)
    out = causal_attention(q, k, v.reshape(heads)) * sigmoid(gate)  # [..., n_tok, n_head, head_dim]
    (out,) = apply_linears(out.reshape(*x.shape[:-1], -1), weights, ("attn_output",), observe)
    return out


def delta_net(x: Array, weights: Weights, dims: Dims, observe: Observe | None) -> Array:
    """Gated delta net: [..., n_tok, d_model] to the same.

    Value head h belongs to key head h modulo n_key_head: ggml repeats the key heads as a whole.
    """
    heads = (*x.shape[:-1], -1, dims.delta_dim)  # [..., n_tok, n_key_head or n_value_head, delta_dim]
    n_key = dims.n_key_head * dims.delta_dim
    qkv, z, beta, alpha = apply_linears(x, weights, ("attn_qkv", "attn_gate", "ssm_beta", "ssm_alpha"), observe)
    qkv = silu(causal_convolution(qkv, weights["ssm_conv1d.weight"]))
    q, k, v = (part.reshape(heads) for part in np.split(qkv, [n_key, 2 * n_key], axis=-1))
    n_repeat = dims.n_value_head // dims.n_key_head
    q, k = (np.concatenate([part] * n_repeat, axis=-2) for part in (q, k))
    log_decay = weights["ssm_a"] * softplus(alpha + weights["ssm_dt.bias"])  # [..., n_tok, n_value_head]
    out = gated_delta(q, k, v, log_decay, sigmoid(beta))
    out = rms_norm(out, weights["ssm_norm.weight"], dims.eps) * silu(z.reshape(heads))
    (out,) = apply_linears(out.reshape(*x.shape[:-1], -1), weights, ("ssm_out",), observe)
    return out


def causal_convolution(x: Array, weight: Array) -> Array:
    """Each channel of x [..., n_tok, n] convolved with its taps, weight [n, n_tap], the last for the token itself."""
    n_tok, n_tap = x.shape[-2], weight.shape[-1]
    padding = np.zeros((*x.shape[:-2], n_tap - 1, x.shape[-1]), np.float32)
    x = np.concatenate([padding, x], axis=-2)
    out: Array = np.sum([x[..., i : i + n_tok, :] * weight[:, i] for i in range(n_tap)], axis=0)
    return out
