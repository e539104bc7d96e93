"""Runs of tokens as hashes: whether two texts share passages, also when only a sample of one's hashes is known."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int32]

SHINGLE = 32
"""Tokens in a run. Shorter ones would find ordinary phrases in scripts that the tokenizer knows only as bytes."""
MOST_SAMPLED = 4096
"""Hashes that a record of a text keeps: 16 KiB. Of the 360 calibration windows that is one in 42, 11 a window."""
REPEATED = 0.02
"""A text repeats a recorded one when this part of its shingles is in the record, or of the record's in it.

Of the packaged sets for scoring less than 0.5% is in the record of the packaged calibration: formulas and boilerplate.
"""
FEWEST_FOUND = 4
"""Shingles in common that are no coincidence; fewer where a text has fewer."""
_WINDOWS_AT_ONCE = 128


def shingles(tokens: Ids) -> npt.NDArray[np.uint64]:
    """A hash of each `SHINGLE` successive tokens: `[n, ctx]` to `[n, ctx - SHINGLE + 1]`."""
    factors = np.frombuffer(hashlib.shake_256(b"shingle").digest(8 * SHINGLE), "<u8") | np.uint64(1)
    wide, n = (tokens + 1).astype(np.uint64), tokens.shape[1] - SHINGLE + 1
    hashes = np.zeros((len(tokens), n), np.uint64)
    for i, factor in enumerate(factors):
        hashes += factor * wide[:, i : i + n]
    return hashes


def found(values: npt.NDArray[np.unsignedinteger], among: npt.NDArray[np.unsignedinteger]) -> npt.NDArray[np.bool_]:
    """Which of `values` are in the sorted `among`."""
    if not len(among):
        return np.zeros(values.shape, np.bool_)
    at = np.minimum(np.searchsorted(among, values), len(among) - 1)
    equal: npt.NDArray[np.bool_] = among[at] == values
    return equal


def sample(windows: Ids) -> npt.NDArray[np.uint32]:
    """The record of a text: the least `MOST_SAMPLED` of its shingles' hashes, sorted; all of them if they are fewer.

    Whether a shingle is sampled depends on its hash alone, so that the same passage gives the same hashes in any text
    (Broder, "On the resemblance and containment of documents", 1997).

    Args:
        windows: `[n, ctx]`, ctx at least `SHINGLE`.
    """
    least = np.empty(0, np.uint32)
    for hashes in _hashes(windows):
        least = np.union1d(least, hashes)[:MOST_SAMPLED]
    return least


@dataclass(frozen=True)
class Overlap:
    """What a text and a recorded one have in common, in distinct sampled shingles."""

    n_found: int
    n_text: int
    n_record: int

    @property
    def is_repetition(self) -> bool:
        """Whether the one is, in part, the other."""
        n = min(self.n_text, self.n_record)
        return self.n_found >= max(1, min(FEWEST_FOUND, n)) and self.n_found >= REPEATED * n


def overlap(windows: Ids, record: npt.NDArray[np.uint32]) -> Overlap:
    """What the text of `windows` [n, ctx] has in common with that whose `sample` is `record`."""
    last = record[-1] if len(record) >= MOST_SAMPLED else np.uint32(2**32 - 1)
    text = np.unique(np.concatenate([hashes[hashes <= last] for hashes in _hashes(windows)]))
    return Overlap(int(found(text, record).sum()), len(text), len(record))


def _hashes(windows: Ids) -> Iterator[npt.NDArray[np.uint32]]:
    """Evenly distributed hashes of the shingles of some windows at a time.

    The sums of `shingles` are mixed as SplitMix64 mixes its counter: low bits of theirs depend on low bits only.
    """
    for start in range(0, len(windows), _WINDOWS_AT_ONCE):
        x = shingles(windows[start : start + _WINDOWS_AT_ONCE])
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        yield ((x ^ (x >> np.uint64(31))) >> np.uint64(32)).astype(np.uint32)
