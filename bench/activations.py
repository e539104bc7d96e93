"""Activations as llama.cpp's CPU kernels see them: rounded to 8 bits before they meet a quantized matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any
from unittest.mock import patch

import numpy as np
from numpy.typing import NDArray

from sq_stream.models import layers

Array = NDArray[np.float32]


class MetIn8Bits(np.ndarray):  # type: ignore[type-arg]
    """A matrix whose inputs are rounded to 8 bits, where a forward pass runs `as_in_the_runtime`."""


def met_in_8_bits(weights: Mapping[str, Array], names: Sequence[str]) -> dict[str, Array]:
    """The same weights, what enters some of the matrices being rounded."""
    return {**weights, **{name: weights[name].view(MetIn8Bits) for name in names}}


def as_in_the_runtime() -> AbstractContextManager[object]:
    """Within it linears meet their inputs as `MetIn8Bits` says."""
    linear = layers.linear

    def rounding(x: Array, weight: Any, bias: Array | None = None) -> Array:
        return linear(round_to_8_bits(x) if isinstance(weight, MetIn8Bits) else x, weight, bias)

    return patch.object(layers, "linear", rounding)


def round_to_8_bits(x: Array) -> Array:
    """Activations [..., n] as llama.cpp's CPU kernels see them: Q8_K blocks of 256, or Q8_0's of 32 in other rows."""
    blocks = x.reshape(*x.shape[:-1], -1, 256 if x.shape[-1] % 256 == 0 else 32)
    step = np.maximum(np.abs(blocks).max(axis=-1, keepdims=True), np.float32(1e-30)) / np.float32(127)
    rounded: Array = (np.rint(blocks / step) * step).reshape(x.shape)
    return rounded
