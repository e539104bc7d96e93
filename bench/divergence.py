"""KL divergence of models from a reference, both run by llama.cpp, file by file, with everything kept in a folder.

The reference's logits of each window are stored as 16-bit codes between the least and the greatest of their position,
in steps of about 0.0005. On 256 positions of SmolLM2-135M and its Q4_K file that changed the mean KL divergence of 0.27
by 6e-8, and no position's by more than 1e-4 (`tests/test_bench_comparison.py` bounds it on random logits).
The other files' logits are used as they come.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
from candidates import File, write_atomically
from numpy.typing import NDArray
from oracles.llamacpp import LlamaModel

from sq_stream.calibrate.corpus import digest

VERSION = 1  # of the stored logits and scores
MAX_CODE = 2**16 - 1
ROWS_AT_ONCE = 16  # positions


@dataclass(frozen=True, eq=False)
class Text:
    """Windows of token ids `[n_windows, n_ctx]`, int32."""

    name: str
    windows: NDArray[np.int32]

    @property
    def digest(self) -> str:
        return digest(self.windows)


@dataclass(frozen=True, eq=False)
class Scores:
    """What a file says of a text, by window and position."""

    kl: NDArray[np.float64]  # [n_windows, n_ctx], nats
    agrees: NDArray[np.bool_]  # [n_windows, n_ctx], whether the likeliest token is the reference's
    loss: NDArray[np.float64]  # [n_windows, n_ctx - 1], of the next token, nats


@dataclass(frozen=True, eq=False)
class Logits:
    """Logits of one window, `low + step * codes`; `top` and `loss` were taken before they were rounded."""

    codes: NDArray[np.uint16]  # [n_ctx, n_vocab]
    low: NDArray[np.float32]  # [n_ctx]
    step: NDArray[np.float32]  # [n_ctx]
    top: NDArray[np.int64]  # [n_ctx], the likeliest token
    loss: NDArray[np.float64]  # [n_ctx - 1]

    @classmethod
    def pack(cls, logits: NDArray[np.float32], tokens: NDArray[np.int32]) -> Logits:
        """From `logits` [n_ctx, n_vocab] at each of `tokens` [n_ctx]."""
        low = logits.min(axis=-1)
        step = np.maximum((logits.max(axis=-1) - low) / np.float32(MAX_CODE), np.float32(1e-30))
        codes = np.empty(logits.shape, np.uint16)
        for rows in _slices(len(logits)):
            np.rint((logits[rows] - low[rows, None]) / step[rows, None], out=codes[rows], casting="unsafe")
        return cls(codes, low, step, logits.argmax(axis=-1), next_token_loss(logits, tokens))

    def unpack(self, rows: slice) -> NDArray[np.float32]:
        return self.codes[rows] * self.step[rows, None] + self.low[rows, None]


def _slices(n: int) -> Iterator[slice]:
    return (slice(start, min(start + ROWS_AT_ONCE, n)) for start in range(0, n, ROWS_AT_ONCE))


def log_sums(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Log of the sum of the exponentials of each row: [n]."""
    top = logits.max(axis=-1, keepdims=True)
    return np.log(np.exp(logits - top).sum(axis=-1, dtype=np.float64)) + top[:, 0]


def next_token_loss(logits: NDArray[np.float32], tokens: NDArray[np.int32]) -> NDArray[np.float64]:
    """Minus the log-probability of each token after the first: [n_ctx - 1]."""
    log_z = np.concatenate([log_sums(logits[rows]) for rows in _slices(len(logits))])
    return log_z[:-1] - logits[np.arange(len(tokens) - 1), tokens[1:]]


def kl_divergence(reference: Logits, logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """KL(reference, logits) at each position: [n_ctx], nats."""
    kl = np.empty(len(logits))
    for rows in _slices(len(logits)):
        theirs, ours = reference.unpack(rows), logits[rows]
        p = np.exp(theirs - theirs.max(axis=-1, keepdims=True))
        expected = (p * (theirs - ours)).sum(axis=-1, dtype=np.float64) / p.sum(axis=-1, dtype=np.float64)
        kl[rows] = expected - log_sums(theirs) + log_sums(ours)
    return kl


class Scorer:
    """Scores files against one reference; what is in the folder already is not computed again.

    Args:
        folder: keeps scores, and the reference's logits (2 bytes for each position and token of the vocabulary).
        reference: the GGUF file of the reference.
        threads: of llama.cpp.
    """

    def __init__(self, folder: Path, reference: File, threads: int) -> None:
        self.folder, self.reference, self.threads = folder, reference, threads

    def score(self, file: File, text: Text) -> Scores:
        """What `file` says of `text`."""
        path = self.folder / "scores" / f"{self._key(text, file)}.npz"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            scores = self._reference_scores(text) if file is self.reference else self._compute(file, text)
            write_atomically(path, lambda partial: _save(partial, vars(scores)))
        with np.load(path) as stored:
            return Scores(**stored)

    def _reference_scores(self, text: Text) -> Scores:
        loss = np.stack([window.loss for window in self._reference_logits(text)])
        return Scores(np.zeros(text.windows.shape), np.ones(text.windows.shape, np.bool_), loss)

    def _compute(self, file: File, text: Text) -> Scores:
        for _ in self._reference_logits(text):  # all there before another model is loaded
            pass
        kl, agrees, loss = [], [], []
        start = time.monotonic()
        with self._load(file, text) as model:
            for tokens, reference in zip(text.windows, self._reference_logits(text), strict=True):
                logits = model.logits(tokens)
                kl.append(kl_divergence(reference, logits))
                agrees.append(logits.argmax(axis=-1) == reference.top)
                loss.append(next_token_loss(logits, tokens))
                _show(f"{file.name}, {text.name}", len(kl), len(text.windows), start)
        return Scores(np.stack(kl), np.stack(agrees), np.stack(loss))

    def _reference_logits(self, text: Text) -> Iterator[Logits]:
        """Those of each window, computed where the folder lacks them."""
        folder = self.folder / "logits" / self._key(text)
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / f"{i}.npz" for i in range(len(text.windows))]
        if not all(path.exists() for path in paths):
            start = time.monotonic()
            with self._load(self.reference, text) as model:
                for i, (path, tokens) in enumerate(zip(paths, text.windows, strict=True), 1):
                    if not path.exists():
                        packed = Logits.pack(model.logits(tokens), tokens)
                        write_atomically(path, lambda partial, packed=packed: _save(partial, vars(packed)))
                    _show(f"{self.reference.name}, {text.name}", i, len(paths), start)
        for path in paths:
            with np.load(path) as stored:
                yield Logits(**stored)

    def _load(self, file: File, text: Text) -> LlamaModel:
        return LlamaModel(file.path, n_ctx=text.windows.shape[1], n_batch=256, n_threads=self.threads)

    def _key(self, text: Text, file: File | None = None) -> str:
        parts = [VERSION, version("xllamacpp"), self.reference.sha256, text.digest, file and file.sha256]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _save(path: Path, arrays: dict[str, NDArray]) -> None:
    with open(path, "wb") as file:
        np.savez(file, **arrays)


def _show(what: str, done: int, total: int, start: float) -> None:
    if done % 8 == 0 or done == total:
        print(f"{what}: window {done} of {total}, {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
