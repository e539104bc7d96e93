"""Rotary position embeddings: their configuration, GGUF keys, frequency factors and row order."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sq_stream.errors import BadInputError, UnsupportedModelError
from sq_stream.formats.metadata import Entry, f32, string, u32
from sq_stream.formats.strict_json import brief
from sq_stream.models.base import TensorMap
from sq_stream.models.config import Config

_YARN_KEYS = (  # config names, GGUF key
    (("extrapolation_factor",), "yarn_ext_factor"),
    (("attention_factor", "attn_factor"), "yarn_attn_factor"),
    (("beta_fast",), "yarn_beta_fast"),
    (("beta_slow",), "yarn_beta_slow"),
)


@dataclass(frozen=True)
class Rope:
    """How positions are encoded in full-attention layers."""

    theta: float
    kind: str  # "default", "linear", "llama3" or "yarn"
    section: Config  # the other parameters of that kind


def read_rope(config: Config, *kinds: str, theta: float = 10_000.0) -> Rope:
    """The rotary embedding of `config`.

    Up to version 4, transformers writes `rope_theta` and `rope_scaling`; from 5 on `rope_parameters`, which may have an
    object per layer type.

    Raises:
        UnsupportedModelError: its kind is neither "default" nor one of `kinds`.
        BadInputError: a value is unusable.
    """
    section = config.section("rope_scaling") or config.section("rope_parameters") or Config({})
    section = section.section("full_attention") or section
    kind = section.text("rope_type", section.text("type", "default"))
    if kind not in ("default", *kinds):
        raise UnsupportedModelError(
            f"config.json: rotary embeddings are scaled by {brief(kind)}; sq-stream supports only "
            f"{', '.join(('default', *kinds))} for this architecture"
        )
    return Rope(section.number("rope_theta", config.number("rope_theta", theta)), kind, section)


def rope_keys(arch: str, rope: Rope, n_context: int) -> list[Entry]:
    """GGUF keys of `rope`, for a model of `n_context` positions."""
    keys = [f32(f"{arch}.rope.freq_base", rope.theta)]
    if rope.kind in ("linear", "yarn"):
        keys += [
            string(f"{arch}.rope.scaling.type", rope.kind),
            f32(f"{arch}.rope.scaling.factor", rope.section.number("factor")),
        ]
    if rope.kind == "yarn":
        n_original = rope.section.integer("original_max_position_embeddings", n_context, at_most=2**31)
        keys.append(u32(f"{arch}.rope.scaling.original_context_length", n_original))
        for names, key in _YARN_KEYS:
            name = next((name for name in names if name in rope.section), None)
            if name is not None:
                keys.append(f32(f"{arch}.rope.scaling.{key}", rope.section.number(name)))
    return keys


def llama3_factors(rope: Rope, head_dim: int) -> TensorMap:
    """The tensor `rope_freqs.weight` [head_dim / 2]: what llama.cpp divides each frequency by.

    Source: Llama 3.1's frequency scaling, in the float32 arithmetic of `LlamaModel.generate_extra_tensors` of
    llama.cpp's converter.

    Raises:
        BadInputError: the parameters contradict each other.
    """
    section = rope.section
    factor, low = section.number("factor", 8.0), section.number("low_freq_factor", 1.0)
    high = section.number("high_freq_factor", 4.0)
    n_original = section.integer("original_max_position_embeddings", 8192, at_most=2**31)
    if low >= high:
        raise BadInputError(
            f"config.json: rope low_freq_factor {low} is not less than high_freq_factor {high}, as llama3 scaling needs"
        )
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies = 1 / np.power(rope.theta, exponents.astype(np.float64)).astype(np.float32)
    wavelengths = np.float32(2 * math.pi) / frequencies
    smooth = (np.float32(n_original) / wavelengths - np.float32(low)) / np.float32(high - low)
    between = 1 / ((1 - smooth) / np.float32(factor) + smooth)
    values = np.select(
        [wavelengths < n_original / high, wavelengths > n_original / low],
        [np.float32(1), np.float32(factor)],
        between,
    )
    return TensorMap("rope_freqs.weight", (head_dim // 2,), values=values.astype(np.float32))


def paired_rows(n_head: int, head_dim: int) -> NDArray[np.int64]:
    """Row order [n_head * head_dim] that puts the two halves of every head's rotated pairs next to each other.

    Hugging Face rotates value j of a head with value j + head_dim / 2; ggml's "norm" kind of rotary embedding, which
    llama.cpp uses for the `llama` architecture, rotates neighbors.
    """
    rows = np.arange(n_head * head_dim, dtype=np.int64).reshape(n_head, 2, head_dim // 2)
    return np.ravel(rows.swapaxes(1, 2))
