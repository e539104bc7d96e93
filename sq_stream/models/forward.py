"""The forward pass of a model: one `Decoder` for each architecture, on weights in GGUF's names and conventions."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from sq_stream.errors import UnsupportedModelError
from sq_stream.formats.metadata import Entry
from sq_stream.models.layers import (
    Array,
    Observe,
    ObserveGradients,
    Site,
    Weights,
    apply_linears,
    rms_norm,
    rms_norm_vjp,
    with_prefix,
)
from sq_stream.models.parts import Branch, FeedForward

MODULES = {  # GGUF architecture -> module here with a function `make_decoder(arch, keys)`, the keys without `ARCH.`
    "llama": "transformer_forward",
    "qwen2": "transformer_forward",
    "qwen3": "transformer_forward",
    "qwen35": "qwen35_forward",
    "gemma3": "gemma3_forward",
}
SHARED = ("rope_freqs.weight",)
"""Tensors that are no layer's own and that every layer may need."""


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """The maths of one model; sizes and constants come from its GGUF keys, weights are handed in."""

    layers: tuple[tuple[Branch, Branch], ...]  # what mixes tokens, then the feed-forward net
    eps: float
    embedding_scale: float = 1.0
    soft_cap: float = 0.0  # of the logits; 0: none

    @property
    def n_layer(self) -> int:
        """Layers, without those of multi-token prediction."""
        return len(self.layers)

    def branch(self, b: int) -> Branch:
        """Half of layer b // 2: in the order in which they add to the residual stream."""
        return self.layers[b // 2][b % 2]

    def layer(self, x: Array, weights: Weights, i: int, observe: Observe | None = None) -> Array:
        """Layer i's map of the residual stream x [..., n_tok, d_model], given its tensors without their `blk.N.`."""
        mixer, feed_forward = self.layers[i]
        x = x + mixer.forward(x, weights, observe)
        x += feed_forward.forward(x, weights, observe)
        return x

    def layer_vjp(
        self, dy: Array, x: Array, weights: Weights, i: int, observe: ObserveGradients | None = None
    ) -> Array:
        """Gradient of the residual stream x that enters layer i, from that of what leaves it; both stay as they are.

        Args:
            dy: [..., n_tok, d_model].
            x: what enters the layer, [..., n_tok, d_model].
            weights: the layer's tensors without their `blk.N.`.
            i: the layer.
            observe: sees the inputs of every linear and norm with the gradients of their outputs; for attn_v they are
                those of the linear itself, not of what attention makes of them.
        """
        mixer, feed_forward = self.layers[i]
        dy = dy + feed_forward.vjp(dy, x + mixer.forward(x, weights), weights, observe)
        dy += mixer.vjp(dy, x, weights, observe)
        return dy

    def norms(self, i: int) -> dict[str, Site]:
        """The linears of layer i that enter right behind a norm, all that do, by the norm's name."""
        return {branch.norm: branch.part.entry for branch in self.layers[i]}

    def embed(self, rows: Array) -> Array:
        """The residual stream that enters layer 0, from rows [..., n_tok, d_model] of the token embedding.

        The same map takes the gradient of that stream to the gradient of the rows.
        """
        return rows * self.embedding_scale if self.embedding_scale != 1 else rows

    def final_norm(self, x: Array, weights: Weights) -> Array:
        """What enters the output matrix, [..., n_tok, d_model], from the last layer's output."""
        return rms_norm(x, weights["output_norm.weight"], self.eps)

    def final_norm_vjp(self, dy: Array, x: Array, weights: Weights, observe: ObserveGradients | None = None) -> Array:
        """Gradient of the last layer's output x, from that of what enters the output matrix."""
        return rms_norm_vjp(dy, x, weights, "output_norm", self.eps, observe)

    def cap(self, logits: Array) -> Array:
        """Logits as the model gives them, in the place of those of the output matrix."""
        if self.soft_cap:
            logits /= self.soft_cap
            np.tanh(logits, out=logits)
            logits *= self.soft_cap
        return logits

    def cap_slope(self, capped: Array) -> Array | float:
        """The derivative of `cap` where it gives `capped`."""
        return 1 - (capped / self.soft_cap) ** 2 if self.soft_cap else 1.0


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
    module = importlib.import_module(f"sq_stream.models.{MODULES[arch]}")
    return cast("Decoder", module.make_decoder(arch, keys))


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


def linears_by_product(decoder: Decoder, names: Iterable[str]) -> dict[str, str]:
    """Among the tensors `names`, the linears whose outputs are multiplied by something before they enter another."""
    pairs = (tuple(f"blk.{i}.{name}.weight" for name in FeedForward.product) for i in range(decoder.n_layer))
    known = set(names)
    return {before: after for before, after in pairs if {before, after} <= known}


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
