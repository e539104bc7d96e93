"""The forward pass of a model: one `Decoder` for each architecture, on weights in GGUF's names and conventions."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from sq_stream.errors import UnsupportedModelError
from sq_stream.formats.metadata import Entry
from sq_stream.models.layers import Array, Observe, Weights, apply_linears, rms_norm, with_prefix

MODULES = {  # GGUF architecture -> module here with a class `Model`
    "llama": "transformer_forward",
    "qwen2": "transformer_forward",
    "qwen3": "transformer_forward",
    "qwen35": "qwen35_forward",
    "gemma3": "gemma3_forward",
}
SHARED = ("rope_freqs.weight",)
"""Tensors that are no layer's own and that every layer may need."""


@dataclass(frozen=True, kw_only=True)
class Decoder(ABC):
    """The maths of one model; sizes and constants come from its GGUF keys, weights are handed in."""

    n_layer: int  # without multi-token prediction
    eps: float
    embedding_scale: float = 1.0
    soft_cap: float = 0.0  # of the logits; 0: none

    @classmethod
    @abstractmethod
    def from_keys(cls, arch: str, keys: Mapping[str, Any]) -> Decoder:
        """Read the keys of a model, given without their `ARCH.`.

        Raises:
            UnsupportedModelError: a variant that the forward pass does not know.
        """

    @abstractmethod
    def layer(self, x: Array, weights: Weights, i: int, observe: Observe | None = None) -> Array:
        """Layer i's map of the residual stream x [..., n_tok, d_model], given its tensors without their `blk.N.`."""

    def norms(self, i: int) -> dict[str, tuple[str, ...]]:
        """The linears of layer i that enter right behind a norm, all that do, by the norm's name."""
        return {"attn_norm": ("attn_q", "attn_k", "attn_v"), "ffn_norm": ("ffn_gate", "ffn_up")}

    def embed(self, rows: Array) -> Array:
        """The residual stream that enters layer 0, from rows [..., n_tok, d_model] of the token embedding."""
        return rows * np.float32(self.embedding_scale) if self.embedding_scale != 1 else rows

    def final_norm(self, x: Array, weights: Weights) -> Array:
        """What enters the output matrix, [..., n_tok, d_model], from the last layer's output."""
        return rms_norm(x, weights["output_norm.weight"], self.eps)

    def cap(self, logits: Array) -> Array:
        """Logits as the model gives them, from those of the output matrix."""
        return np.tanh(logits / np.float32(self.soft_cap)) * np.float32(self.soft_cap) if self.soft_cap else logits


def find_decoder(arch: str, metadata: Iterable[Entry]) -> Decoder:
    """The decoder of a model with these GGUF keys; only its module is imported.

    Raises:
        UnsupportedModelError: the architecture or a variant of it is not supported.
    """
    if arch not in MODULES:
        raise UnsupportedModelError(
            f"there is no forward pass for architecture {arch!r}, only for {', '.join(MODULES)}"
        )
    keys = {entry.key.removeprefix(f"{arch}."): entry.value for entry in metadata}
    model = cast("type[Decoder]", importlib.import_module(f"sq_stream.models.{MODULES[arch]}").Model)
    return model.from_keys(arch, keys)


def head_name(names: Iterable[str]) -> str:
    """The output matrix among the tensors `names`, without its `.weight`: the token embedding where it is tied."""
    return "output" if "output.weight" in names else "token_embd"


def linears_by_norm(decoder: Decoder, names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """The linears among the tensors `names` whose inputs are the outputs of a norm, by the norm's tensor."""
    groups = {
        f"blk.{i}.{norm}.weight": tuple(f"blk.{i}.{name}.weight" for name in linears)
        for i in range(decoder.n_layer)
        for norm, linears in decoder.norms(i).items()
    }
    if "output.weight" in names:  # a tied one is a table too
        groups["output_norm.weight"] = ("output.weight",)
    return groups


def layer_names(names: Iterable[str], i: int) -> dict[str, str]:
    """GGUF name of every tensor among `names` that layer i needs, by its name without `blk.N.`."""
    prefix = f"blk.{i}."
    return {name.removeprefix(prefix): name for name in names if name.startswith(prefix) or name in SHARED}


def forward(
    tokens: NDArray[np.integer[Any]], weights: Weights, decoder: Decoder, observe: Observe | None = None
) -> Array:
    """Logits after every token, for a model that is in memory as a whole.

    Args:
        tokens: ids [..., n_tok].
        weights: all tensors by GGUF name.
        decoder: the model.
        observe: sees the activations that enter every linear, named as in `weights`.

    Returns:
        float32 [..., n_tok, n_vocab].
    """
    x = decoder.embed(weights["token_embd.weight"][tokens])  # [..., n_tok, d_model]
    for i in range(decoder.n_layer):
        own = {short: weights[name] for short, name in layer_names(weights, i).items()}
        x = decoder.layer(x, own, i, with_prefix(observe, f"blk.{i}."))
    (out,) = apply_linears(decoder.final_norm(x, weights), weights, (head_name(weights),), observe)
    return decoder.cap(out)
