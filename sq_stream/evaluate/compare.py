"""Predictions of several models compared on the same positions, from one tile of the vocabulary after the other.

What a position needs are sums over the vocabulary: with reference logits r and a model's logits l,

    KL = Σ exp(r) (r - l) / Σ exp(r) - log Σ exp(r) + log Σ exp(l)

Each sum of exponentials is kept relative to the greatest logit so far, and scaled down when a greater one comes
(Milakov and Gimelshein, "Online normalizer calculation for softmax", arXiv:1805.02867). So there is never more of the
logits in memory than a tile of `SLICE` positions and some thousand tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sq_stream.models.layers import Array

Floats = NDArray[np.float64]

SLICE = 256
"""Positions that one thread compares at a time: fixed, so that results do not depend on the number of threads."""
TILES_HELD = 5
"""Arrays of a tile of logits that `add` has at its peak: logits and exponentials of the reference, of the model before,
and logits of the next."""


@dataclass(frozen=True, eq=False)
class Comparison:
    """Sums so far; the first axis is the model, the reference being 0, the others are positions."""

    targets: NDArray[np.int32]  # [...], the token that follows
    top: Floats  # [n_model, ...], greatest logit
    best: NDArray[np.int64]  # [n_model, ...], its token
    mass: Floats  # [n_model, ...], Σ exp(logit - top)
    cross: Floats  # [n_model, ...], Σ exp(r - top of r) (r - l)
    target: Floats  # [n_model, ...], logit of the token that follows

    @classmethod
    def empty(cls, n_models: int, targets: NDArray[np.int32]) -> Comparison:
        """Nothing added yet, for positions that the tokens `targets` [n] follow."""
        shape = n_models, len(targets)
        top = np.full(shape, -np.inf)
        return cls(targets, top, np.zeros(shape, np.int64), np.zeros(shape), np.zeros(shape), np.zeros(shape))

    @classmethod
    def joined(cls, parts: Sequence[Comparison], shape: tuple[int, ...]) -> Comparison:
        """Successive parts as one, whose positions are arranged in `shape`."""
        targets = np.concatenate([part.targets for part in parts]).reshape(shape)
        top, best, mass, cross, target = (
            np.concatenate(arrays, axis=1).reshape(-1, *shape)
            for arrays in zip(*((p.top, p.best, p.mass, p.cross, p.target) for p in parts), strict=True)
        )
        return cls(targets, top, best, mass, cross, target)

    def add(self, first: int, logits: Iterable[Array]) -> None:
        """Take in a tile of the vocabulary from token `first` on: of each model in turn float32 [n, n_tile]."""
        reference = shares = np.empty(0, np.float32)
        for m, own in enumerate(logits):
            shrink, p = self._add_exponentials(m, first, own)
            if m == 0:
                self.cross[:] *= shrink
                reference, shares = own, p
            else:
                np.subtract(reference, own, out=p)
                p *= shares
                self.cross[m] += p.sum(axis=1, dtype=np.float64)
            here = np.flatnonzero((self.targets >= first) & (self.targets < first + own.shape[1]))
            self.target[m, here] = own[here, self.targets[here] - first]

    def _add_exponentials(self, m: int, first: int, own: Array) -> tuple[Floats, Array]:
        """By what the sums so far were scaled, [n], and exp(logit - top), [n, n_tile]."""
        best = own.argmax(axis=1)
        greatest = own[np.arange(len(own)), best]
        is_greater = greatest > self.top[m]
        top = np.where(is_greater, greatest, self.top[m])
        shrink = np.exp(self.top[m] - top)
        p = own - top[:, None].astype(np.float32)
        np.exp(p, out=p)
        self.top[m], self.best[m] = top, np.where(is_greater, best + first, self.best[m])
        self.mass[m] = self.mass[m] * shrink + p.sum(axis=1, dtype=np.float64)
        return shrink, p

    def loss(self, m: int) -> Floats:
        """Minus the log-probability of the token that follows, [...]."""
        loss: Floats = np.log(self.mass[m]) + self.top[m] - self.target[m]
        return loss

    def kl(self, m: int) -> Floats:
        """KL(reference || model), [...]."""
        log_sums = np.log(self.mass) + self.top
        kl: Floats = self.cross[m] / self.mass[0] - log_sums[0] + log_sums[m]
        return kl
