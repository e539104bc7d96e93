"""Rotary position embeddings, applied to queries and keys as llama.cpp applies them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sq_stream.errors import UnsupportedModelError

Array = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Rotary:
    """Which values of a head turn together, and how fast.

    Source: RoFormer (arXiv:2104.09864); YaRN (arXiv:2309.00071) in the form of ggml's `rope_yarn`.
    """

    frequencies: NDArray[np.float64]  # [n_rotary / 2], radians per token
    neighbors: bool  # value 2i turns with 2i + 1 (ggml's "norm"), otherwise i with i + n_rotary / 2 ("neox")
    magnitude: float = 1.0  # of the turned values

    @classmethod
    def from_keys(
        cls, keys: Mapping[str, Any], n_rotary: int, *, neighbors: bool = False, theta: float | None = None
    ) -> Rotary:
        """What the `rope.*` keys say; a `theta` given is that of a layer whose positions are not scaled.

        Raises:
            UnsupportedModelError: positions are scaled in an unknown way.
        """
        base = keys["rope.freq_base"] if theta is None else theta
        frequencies = base ** (-np.arange(0, n_rotary, 2) / n_rotary)
        kind = keys.get("rope.scaling.type", "none") if theta is None else "none"
        if kind == "none":
            return cls(frequencies, neighbors)
        factor = keys["rope.scaling.factor"]
        if kind == "linear":
            return cls(frequencies / factor, neighbors)
        if kind != "yarn":
            raise UnsupportedModelError(f"rotary embeddings scaled by {kind!r} are not supported")
        keep = _yarn_ramp(keys, n_rotary, base) * keys.get("rope.scaling.yarn_ext_factor", 1.0)
        magnitude = (1 + 0.1 * math.log(factor)) * keys.get("rope.scaling.attn_factor", 1.0)
        return cls(frequencies * (keep + (1 - keep) / factor), neighbors, magnitude)

    def turn(self, x: Array, factors: Array | None = None, *, back: bool = False) -> Array:
        """Queries or keys x [..., n_tok, n_head, head_dim] at positions 0, 1, ...; values from n_rotary on stay.

        `factors` [n_rotary / 2] divide the frequencies (the tensor `rope_freqs.weight` of Llama 3). Turned `back`,
        the gradient of what was turned becomes that of x: of the same magnitude, in the opposite direction.
        """
        frequencies = self.frequencies if factors is None else self.frequencies / factors
        angles = np.arange(x.shape[-3])[:, None, None] * frequencies  # [n_tok, 1, n_rotary / 2], float64
        cos = (np.cos(angles) * self.magnitude).astype(x.dtype)
        sin = (np.sin(-angles if back else angles) * self.magnitude).astype(x.dtype)
        half = len(frequencies)
        step, apart = (2, 1) if self.neighbors else (1, half)
        a, b = (np.s_[..., start : start + step * half : step] for start in (0, apart))
        out: Array = x.copy()
        out[a] = x[a] * cos - x[b] * sin
        out[b] = x[b] * cos + x[a] * sin
        return out


def _yarn_ramp(keys: Mapping[str, Any], n_rotary: int, base: float) -> NDArray[np.float64]:
    """How much of each frequency [n_rotary / 2] is kept: 1 for those that turn often in the original context."""
    n_original = keys["rope.scaling.original_context_length"]

    def dimension(n_turns: float) -> float:
        return n_rotary * math.log(n_original / (n_turns * 2 * math.pi)) / (2 * math.log(base))

    low = max(0, math.floor(dimension(keys.get("rope.scaling.yarn_beta_fast", 32.0))))
    high = min(n_rotary - 1, math.ceil(dimension(keys.get("rope.scaling.yarn_beta_slow", 1.0))))
    ramp: NDArray[np.float64] = np.clip((np.arange(n_rotary // 2) - low) / max(0.001, high - low), 0, 1)
    return 1 - ramp
