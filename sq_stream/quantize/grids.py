"""The stored scales of each block type, as arrays that shaping can read, improve and pack.

A panel of rows [n, p] has one `Scales`. Its values are `scale·code + offset`, the same for all codes of a group of
columns. Bit layouts: `block_*` of llama.cpp's ggml-common.h and `dequantize_row_*` of ggml-quants.c.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from sq_stream.formats.blocks import BlockType
from sq_stream.kernels import regrid, rescale
from sq_stream.kernels.codec import encode

Array = NDArray[np.float32]
Bytes = NDArray[np.uint8]


class Scales(ABC):
    """The scales of one panel; a subclass for each family of block types."""

    group_size: ClassVar[int]  # columns that share a scale

    @classmethod
    @abstractmethod
    def unpack(cls, blocks: Bytes, block_type: BlockType) -> Scales:
        """The scales stored in `blocks` [n, p's bytes]."""

    @abstractmethod
    def values(self) -> tuple[Array, Array]:
        """Scale and offset of every group: float32 [n, p / group_size] each."""

    def choose(self, x: Array, factor: Array) -> None:  # noqa: B027 -- by default as they are
        """Adapt to what `descent.round_with_feedback` will do with x [n, p] and `factor`."""

    @abstractmethod
    def improve(self, rows: NDArray[np.int64], gradient: Array, metric: Array, codes: Array, moves: Array) -> None:
        """One round of descent on the scales of some rows; arguments as in `kernels.rescale`."""

    @abstractmethod
    def arranged(self, runs: NDArray[np.int64]) -> Scales:
        """The same for the columns in another order: `runs` of 32, by their numbers."""

    @abstractmethod
    def pack(self, codes: Array) -> Bytes:
        """The blocks with these scales and codes [n, p]."""


@dataclass
class AffineSuperScales(Scales):
    """Q4_K, Q5_K: d·sc·q − dmin·m."""

    group_size = 32

    d: Array  # [n]
    dmin: Array  # [n]
    sc: Array  # [n, 8], whole
    m: Array  # [n, 8], whole
    has_fifth_bit: bool

    @classmethod
    def unpack(cls, blocks: Bytes, block_type: BlockType) -> AffineSuperScales:
        """The scales stored in `blocks` [n, 144 or 176]."""
        low, mins, high = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
        return cls(
            d=_fp16(blocks[:, 0:2])[:, 0],
            dmin=_fp16(blocks[:, 2:4])[:, 0],
            sc=np.hstack([low & 63, (high & 15) | (low >> 6) << 4]).astype(np.float32),
            m=np.hstack([mins & 63, (high >> 4) | (mins >> 6) << 4]).astype(np.float32),
            has_fifth_bit=block_type.block_bytes > 144,
        )

    def values(self) -> tuple[Array, Array]:
        """Scale d·sc, offset −dmin·m."""
        return self.d[:, None] * self.sc, -self.dmin[:, None] * self.m

    @property
    def _highest(self) -> np.float32:
        """The greatest code."""
        highest: np.float32 = np.float32(31 if self.has_fifth_bit else 15)
        return highest

    def choose(self, x: Array, factor: Array) -> None:
        """The best sc and m around what they are."""
        regrid.choose_first(x, factor, self._highest, self.d, self.dmin, self.sc, self.m)

    def improve(self, rows: NDArray[np.int64], gradient: Array, metric: Array, codes: Array, moves: Array) -> None:
        """One round of descent on sc and m, with the codes, then on d and dmin."""
        size = self.group_size
        blocks = [metric[i : i + size, i : i + size].astype(np.float64) for i in range(0, len(metric), size)]
        inverse = np.linalg.inv(blocks)
        factor = np.linalg.cholesky(inverse).transpose(0, 2, 1)
        regrid.choose_again(
            rows, gradient, metric, inverse.astype(np.float32), np.ascontiguousarray(factor, np.float32),
            self._highest, codes, self.d, self.dmin, self.sc, self.m, moves,
        )  # fmt: skip
        rescale.rescale_affine(rows, gradient, metric, codes, self.d, self.dmin, self.sc, self.m, moves)

    def arranged(self, runs: NDArray[np.int64]) -> AffineSuperScales:
        """The same for `runs` in another order."""
        return replace(self, sc=self.sc[:, runs], m=self.m[:, runs])

    def pack(self, codes: Array) -> Bytes:
        """Blocks [n, 144 or 176]."""
        sc, m = self.sc.astype(np.uint8), self.m.astype(np.uint8)
        q = codes.astype(np.uint8).reshape(-1, 8, 32)
        nibbles = (q[:, 0::2] & 15) | (q[:, 1::2] & 15) << 4  # [n, 4, 32]
        fifth = np.bitwise_or.reduce((q >> 4) << np.arange(8, dtype=np.uint8)[:, None], axis=1)  # [n, 32]
        parts = [
            _fp16_bytes(self.d[:, None]),
            _fp16_bytes(self.dmin[:, None]),
            sc[:, :4] | (sc[:, 4:] >> 4) << 6,
            m[:, :4] | (m[:, 4:] >> 4) << 6,
            (sc[:, 4:] & 15) | (m[:, 4:] & 15) << 4,
            *([fifth] if self.has_fifth_bit else []),
            nibbles.reshape(-1, 128),
        ]
        return np.hstack(parts)


@dataclass
class ScaledSuperScales(Scales):
    """Q6_K: d·sc·q."""

    group_size = 16

    d: Array  # [n]
    sc: Array  # [n, 16], whole

    @classmethod
    def unpack(cls, blocks: Bytes, block_type: BlockType) -> ScaledSuperScales:
        """The scales stored in `blocks` [n, 210]."""
        return cls(d=_fp16(blocks[:, 208:210])[:, 0], sc=blocks[:, 192:208].view(np.int8).astype(np.float32))

    def values(self) -> tuple[Array, Array]:
        """Scale d·sc, no offset."""
        return self.d[:, None] * self.sc, np.zeros_like(self.sc)

    def improve(self, rows: NDArray[np.int64], gradient: Array, metric: Array, codes: Array, moves: Array) -> None:
        """One round of descent on sc, then on d."""
        rescale.rescale_scaled(rows, gradient, metric, codes, self.d, self.sc, moves)

    def arranged(self, runs: NDArray[np.int64]) -> ScaledSuperScales:
        """The same for `runs` in another order."""
        return replace(self, sc=self.sc.reshape(len(self.sc), -1, 2)[:, runs].reshape(self.sc.shape))

    def pack(self, codes: Array) -> Bytes:
        """Blocks [n, 210]."""
        q = (codes + 32).astype(np.uint8).reshape(-1, 2, 4, 32)  # halves of 128 values, four runs of 32 in each
        low = (q[:, :, :2] & 15) | (q[:, :, 2:] & 15) << 4  # [n, 2, 2, 32]
        high = np.bitwise_or.reduce((q >> 4) << np.arange(0, 8, 2, dtype=np.uint8)[:, None], axis=2)  # [n, 2, 32]
        sc = self.sc.astype(np.int8).view(np.uint8)
        return np.hstack([low.reshape(-1, 128), high.reshape(-1, 64), sc, _fp16_bytes(self.d[:, None])])


@dataclass
class BlockScales(Scales):
    """Q8_0, Q5_0, Q5_1: d·q + m, with m only in Q5_1."""

    group_size = 32

    d: Array  # [n, p / 32]
    m: Array  # [n, p / 32]
    block_type: BlockType

    @classmethod
    def unpack(cls, blocks: Bytes, block_type: BlockType) -> BlockScales:
        """The scales stored in `blocks` [n, p / 32 · block bytes]."""
        b = blocks.reshape(len(blocks), -1, block_type.block_bytes)
        d = _fp16(b[:, :, 0:2])[:, :, 0]
        return cls(d, _fp16(b[:, :, 2:4])[:, :, 0] if block_type.name == "Q5_1" else np.zeros_like(d), block_type)

    def values(self) -> tuple[Array, Array]:
        """Scale d, offset m."""
        return self.d, self.m

    def improve(self, rows: NDArray[np.int64], gradient: Array, metric: Array, codes: Array, moves: Array) -> None:
        """One round of descent on d and m."""
        rescale.rescale_blocks(rows, gradient, metric, codes, self.d, self.m, self.block_type.name == "Q5_1", moves)

    def arranged(self, runs: NDArray[np.int64]) -> BlockScales:
        """The same for `runs` in another order."""
        return replace(self, d=self.d[:, runs], m=self.m[:, runs])

    def pack(self, codes: Array) -> Bytes:
        """Blocks [n, p / 32 · block bytes]."""
        name = self.block_type.name
        q = codes.reshape(len(codes), -1, 32)
        parts = [_fp16_bytes(self.d[:, :, None])]
        if name == "Q8_0":
            parts.append(q.astype(np.int8).view(np.uint8))
        else:
            u = (q + 16 if name == "Q5_0" else q).astype(np.uint8)
            parts += [_fp16_bytes(self.m[:, :, None])] if name == "Q5_1" else []
            parts += [np.packbits(u >> 4, axis=2, bitorder="little"), _nibbles(u)]
        return np.concatenate(parts, axis=2).reshape(len(codes), -1)


@dataclass(frozen=True)
class Grid:
    """A block type that can be shaped: its family of scales and the range of its codes."""

    scales: type[Scales]
    lowest: float
    highest: float


GRIDS = {
    "Q4_K": Grid(AffineSuperScales, 0, 15),
    "Q5_K": Grid(AffineSuperScales, 0, 31),
    "Q6_K": Grid(ScaledSuperScales, -32, 31),
    "Q8_0": Grid(BlockScales, -127, 127),
    "Q5_0": Grid(BlockScales, -16, 15),
    "Q5_1": Grid(BlockScales, 0, 31),
}
"""The block types that shaping knows, by name."""


def fit_scales(x: Array, block_type: BlockType, importance: Array) -> Scales:
    """Scales for wanted values x [n, p] of least error weighted by importance [p], from the plain encoder."""
    blocks = encode(np.ascontiguousarray(x), block_type, importance)
    return GRIDS[block_type.name].scales.unpack(blocks, block_type)


def _nibbles(q: Bytes) -> Bytes:
    """The low four bits of blocks [..., 32]: of values 0 to 15 in the low halves of 16 bytes, then of 16 to 31."""
    low = q & np.uint8(15)
    packed: Bytes = low[..., :16] | low[..., 16:] << np.uint8(4)
    return packed


def _fp16(raw: Bytes) -> Array:
    """Halves in the last axis, two bytes each, as float32."""
    return np.ascontiguousarray(raw).view(np.float16).astype(np.float32)


def _fp16_bytes(x: NDArray[Any]) -> Bytes:
    """The bytes of x as halves, along the last axis."""
    return np.ascontiguousarray(x.astype(np.float16)).view(np.uint8)
