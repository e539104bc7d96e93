"""The second moment of a site's activations, as A ≈ diag(r) + SᵀS, in memory and in a file."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from sq_stream.errors import BadInputError
from sq_stream.formats.atomic import atomic_write
from sq_stream.formats.chunks import compress, decompress
from sq_stream.formats.storage import only_regular, storage_errors
from sq_stream.models.config import MAX_SIZE

Array = NDArray[np.float32]

MAGIC = b"sq-stream sketch 1\n"
PANEL = 1024  # columns of S that are computed, written and read together, at most
_LARGEST_CODE = 2**15 - 1
_LONGEST_HEADER = 2**20


@dataclass(frozen=True, eq=False)
class Sketch:
    """Statistics of the activations x that enter a site: the mean of x xᵀ over the tokens ≈ diag(r) + SᵀS.

    The diagonal is exact. S is any factor: a triangular one, or rows along the strongest directions.
    """

    n_tokens: int  # 0: the site was not seen, and the statistics are neutral
    residual: Array  # r [n_in], not negative
    factor: Array  # S [rank, n_in]

    @classmethod
    def with_diagonal(cls, diagonal: Array, factor: Array, n_tokens: int) -> Sketch:
        """The sketch whose diagonal is `diagonal` [n_in]: r makes up for what S lacks, columns of excess are scaled."""
        explained = np.einsum("ij,ij->j", factor, factor)
        excess = explained > diagonal
        factor[:, excess] *= np.sqrt(diagonal[excess] / explained[excess])
        return cls(n_tokens, np.where(excess, np.float32(0), diagonal - explained), factor)

    @classmethod
    def diagonal_only(cls, diagonal: Array, n_tokens: int) -> Sketch:
        """What an importance matrix knows: mean squares [n_in] alone."""
        return cls(n_tokens, diagonal, np.zeros((0, len(diagonal)), np.float32))

    @classmethod
    def neutral(cls, n_in: int) -> Sketch:
        """Statistics of a site without data: the identity."""
        return cls.diagonal_only(np.ones(n_in, np.float32), 0)

    @staticmethod
    def needed_bytes(n_in: int, rank: int) -> int:
        """Resident bytes at the peak of reading a sketch."""
        return 4 * n_in * rank + 12 * rank * min(PANEL, n_in)

    @property
    def n_in(self) -> int:
        """Values in one activation vector."""
        return len(self.residual)

    @property
    def rank(self) -> int:
        """Rows of the factor."""
        return len(self.factor)

    @property
    def n_dead(self) -> int:
        """Channels that were zero in every token."""
        return int(np.count_nonzero(self.diagonal() == 0))

    def diagonal(self) -> Array:
        """The mean squares: float32 [n_in]."""
        diagonal: Array = self.residual + np.einsum("ij,ij->j", self.factor, self.factor)
        return diagonal

    def multiplied(self, factors: Array) -> Sketch:
        """The sketch of activations multiplied by `factors` [n_in], in the place of this one."""
        self.residual[:] *= factors**2
        self.factor[:] *= factors
        return self

    def dense(self) -> Array:
        """The whole matrix: float32 [n_in, n_in]."""
        a: Array = self.factor.T @ self.factor
        a[np.diag_indices(self.n_in)] += self.residual
        return a


@dataclass(frozen=True, eq=False)
class Factored:
    """A sketch on its way to its file: the columns of S for live channels in panels, so that S is never held whole.

    Each panel is [its rank, its columns]; rows of S that it lacks at its end are zero, as in a triangular factor.
    """

    n_tokens: int
    diagonal: Array  # [n_in], zero where a channel is dead
    panels: list[Array]

    @property
    def rank(self) -> int:
        """Rows of S."""
        return max((len(panel) for panel in self.panels), default=0)

    def sketch(self) -> Sketch:
        """The sketch itself."""
        return _assemble(self.n_tokens, self.diagonal, self.rank, self.panels)


@dataclass(frozen=True)
class _Header:
    """What the file of a sketch says of itself."""

    n_tokens: int
    n_in: int
    rank: int
    panels: Sequence[tuple[int, int]]  # rank and columns of each
    frames: Sequence[int]  # bytes: of the diagonal, then of the scales and the integers of each panel

    @classmethod
    def parse(cls, text: bytes, path: Path, n_bytes: int) -> _Header:
        """The header in `text`, which `n_bytes` of frames must follow in the file."""
        try:
            header = cls(**json.loads(text))
            numbers = [header.n_tokens, header.n_in, header.rank, *header.frames]
            numbers += [number for rank, width in header.panels for number in (rank, width)]
            sound = (
                all(type(number) is int and number >= 0 for number in numbers)
                and header.n_in <= MAX_SIZE
                and max((rank for rank, _ in header.panels), default=0) == header.rank <= header.n_in
                and len(header.frames) == 1 + 2 * len(header.panels)
                and sum(header.frames) == n_bytes
            )
        except (ValueError, TypeError, RecursionError):
            sound = False
        if not sound:
            raise BadInputError(f"{path} is damaged, or no sketch of this version of sq-stream: its header is unsound")
        return header


def write_sketch(path: Path, factored: Factored) -> int:
    """Write a sketch, S as 16-bit integers with one scale a column; returns the CRC-32 of the file.

    Raises:
        StorageError: writing fails.
    """
    frames = [compress(factored.diagonal)]
    for panel in factored.panels:
        scale = np.maximum(np.abs(panel).max(axis=0, initial=0), np.float32(1e-30)) / np.float32(_LARGEST_CODE)
        frames += [compress(scale), compress(np.rint(panel / scale).astype(np.int16))]
    header = _Header(
        n_tokens=factored.n_tokens,
        n_in=len(factored.diagonal),
        rank=factored.rank,
        panels=[panel.shape for panel in factored.panels],
        frames=[len(frame) for frame in frames],
    )
    text = json.dumps(asdict(header)).encode()
    crc = 0
    with atomic_write(path) as file:
        for part in (MAGIC, b"%08x %s\n" % (zlib.crc32(text), text), *frames):
            crc = zlib.crc32(part, crc)
            file.write(part)
    return crc


def read_sketch(path: Path, largest: tuple[int, int] | None = None) -> Sketch:
    """Read what `write_sketch` wrote; `largest` is how many rows S may have, and the values of the site, if known.

    Raises:
        BadInputError: the file is damaged or is no sketch.
        StorageError: it is not there, or reading fails.
    """
    with storage_errors("reading", path), open(path, "rb", opener=only_regular) as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise BadInputError(f"{path} is no sketch of this version of sq-stream")
        line = file.readline(_LONGEST_HEADER)
        if line[:9] != b"%08x " % zlib.crc32(line[9:-1]):
            raise BadInputError(f"{path} is damaged: the checksum of its header is wrong")
        header = _Header.parse(line[9:], path, os.fstat(file.fileno()).st_size - file.tell())
        if largest is not None and (header.rank > largest[0] or header.n_in != largest[1]):
            raise BadInputError(f"{path} is of another site: {header.rank} × {header.n_in} values, not {largest}")
        sizes = iter(header.frames)

        def frame(dtype: DTypeLike, *shape: int) -> NDArray[Any]:
            return decompress(file.read(next(sizes)), dtype, shape, str(path))

        diagonal = frame(np.float32, header.n_in)
        if not np.isfinite(diagonal).all() or diagonal.min(initial=0) < 0:
            raise BadInputError(f"{path} is damaged: its diagonal holds what no mean square is")
        if np.count_nonzero(diagonal) != sum(width for _, width in header.panels):
            raise BadInputError(f"{path} is damaged: its header and its diagonal differ in the number of live channels")
        panels = (_panel(frame(np.float32, width), frame(np.int16, rank, width), path) for rank, width in header.panels)
        return _assemble(header.n_tokens, diagonal, header.rank, panels)


def _panel(scale: Array, codes: NDArray[np.int16], path: Path) -> Array:
    with np.errstate(over="ignore", invalid="ignore"):
        x: Array = scale * codes
    if not np.isfinite(x).all():
        raise BadInputError(f"{path} is damaged: its factor is not finite")
    return x


def _assemble(n_tokens: int, diagonal: Array, rank: int, panels: Iterable[Array]) -> Sketch:
    factor = np.zeros((rank, len(diagonal)), np.float32)
    live, start = np.flatnonzero(diagonal), 0
    for panel in panels:
        factor[: len(panel), live[start : start + panel.shape[1]]] = panel
        start += panel.shape[1]
    return Sketch.with_diagonal(diagonal, factor, n_tokens)
