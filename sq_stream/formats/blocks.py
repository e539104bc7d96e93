"""The ggml block types that sq-stream writes: ids, block sizes, bytes.

Source: `ggml_type` and the `block_*` structs of llama.cpp's ggml-common.h.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class BlockType:
    """A way of storing values: `block_size` consecutive values of a row in `block_bytes` bytes."""

    name: str
    ggml_id: int
    block_size: int
    block_bytes: int
    scales: tuple[int, ...] = ()
    """Bytes in a block at which its fp16 scales are, d and dmin or m; its values are linear in each."""

    @property
    def bits_per_weight(self) -> float:
        """Stored bits for one value."""
        return 8 * self.block_bytes / self.block_size

    def row_bytes(self, n_in: int) -> int:
        """Bytes of one row of `n_in` values.

        Raises:
            ValueError: `n_in` is not a multiple of the block size.
        """
        n_blocks, rest = divmod(n_in, self.block_size)
        if rest:
            raise ValueError(f"{self.name} needs rows of a multiple of {self.block_size} values, not {n_in}")
        return n_blocks * self.block_bytes

    def tensor_bytes(self, shape: Sequence[int]) -> int:
        """Bytes of a tensor of row-major `shape` (last dimension: values of one row)."""
        return math.prod(shape[:-1]) * self.row_bytes(shape[-1])


F32 = BlockType("F32", 0, 1, 4)
F16 = BlockType("F16", 1, 1, 2)
BF16 = BlockType("BF16", 30, 1, 2)
Q5_0 = BlockType("Q5_0", 6, 32, 22, (0,))
Q5_1 = BlockType("Q5_1", 7, 32, 24, (0, 2))
Q8_0 = BlockType("Q8_0", 8, 32, 34, (0,))
Q4_K = BlockType("Q4_K", 12, 256, 144, (0, 2))
Q5_K = BlockType("Q5_K", 13, 256, 176, (0, 2))
Q6_K = BlockType("Q6_K", 14, 256, 210, (208,))

BLOCK_TYPES = {t.name: t for t in (F32, F16, BF16, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K, Q6_K)}
