"""Encode Q4_K and Q5_K, the affine super-block types: x ≈ d·sc·q − dmin·m with 4-bit or 5-bit codes q.

Source of the layouts: `block_q4_K`, `block_q5_K` in llama.cpp's ggml-common.h and their rows in ggml-quants.c.
"""

from __future__ import annotations

import numpy as np
from numba import prange
from numpy.typing import NDArray

from sq_stream.formats.blocks import Q4_K, Q5_K, BlockType
from sq_stream.kernels.affine_fit import BLOCK, BLOCKS, DMIN, N_LANES, SC, X_MAX, D, M, fit_super_blocks
from sq_stream.kernels.floats import fp16_bits
from sq_stream.kernels.importance import column_weights
from sq_stream.kernels.jit import jit

_TILE = N_LANES // BLOCKS  # super-blocks fitted side by side


def encode_q4_k(x: NDArray[np.float32], importance: NDArray[np.float32] | None = None) -> NDArray[np.uint8]:
    """Q4_K blocks of `x` with a small squared error, weighted by column where `importance` is given.

    Args:
        x: float32 [n_rows, n_in], finite, n_in a multiple of 256. Values beyond the format's range are clipped.
        importance: float32 [n_in], not negative; None weighs all columns alike.

    Returns:
        uint8 [n_rows, n_in / 256 · 144]. A super-block's bytes depend on its own values and weights alone.

    Raises:
        BadInputError: a weight is negative, infinite or NaN.
        ValueError: n_in is not a multiple of 256, or `importance` is not of length n_in.
    """
    return _encode(x, importance, Q4_K, 15)


def encode_q5_k(x: NDArray[np.float32], importance: NDArray[np.float32] | None = None) -> NDArray[np.uint8]:
    """Q5_K blocks of `x`, uint8 [n_rows, n_in / 256 · 176]; all else as `encode_q4_k`."""
    return _encode(x, importance, Q5_K, 31)


def _encode(
    x: NDArray[np.float32], importance: NDArray[np.float32] | None, block_type: BlockType, q_max: int
) -> NDArray[np.uint8]:
    n_rows, n_in = x.shape
    blocks = np.empty((n_rows, block_type.row_bytes(n_in)), np.uint8)
    super_blocks = np.ascontiguousarray(x, np.float32).reshape(-1, block_type.block_size)
    super_blocks.flags.writeable = False  # one Numba type, and so one compilation, whatever the caller's array is
    weights = column_weights(importance, n_in).reshape(-1, block_type.block_size)
    _encode_tiles(super_blocks, weights, np.float32(q_max), blocks.reshape(-1, block_type.block_bytes))
    return blocks


@jit(parallel=True)
def _encode_tiles(x, weights, q_max, blocks):
    """Encode super-blocks x [n, 256] with weights [n_in / 256, 256] into blocks [n, block_bytes]."""
    for tile in prange((len(x) + _TILE - 1) // _TILE):
        _encode_tile(x, weights, q_max, tile * _TILE, blocks)


@jit(inline="always")
def _encode_tile(x, weights, q_max, first, blocks):
    """Encode super-blocks `first` to `first + _TILE`, as far as there are."""
    lanes_x, lanes_w = np.zeros((BLOCK, N_LANES), np.float32), np.ones((BLOCK, N_LANES), np.float32)
    sign = np.ones(_TILE, np.float32)
    n = min(_TILE, len(x) - first)
    for s in range(n):
        values, column_weights = x[first + s], weights[(first + s) % len(weights)]
        sign[s] = _orientation(values)
        for b in range(BLOCKS):
            for i in range(BLOCK):
                value = sign[s] * values[b * BLOCK + i]
                lanes_x[i, s * BLOCKS + b] = min(max(value, -X_MAX), X_MAX)
                lanes_w[i, s * BLOCKS + b] = column_weights[b * BLOCK + i]
    grid, codes = np.empty((4, N_LANES), np.float32), np.empty((BLOCK, N_LANES), np.uint8)
    fit_super_blocks(lanes_x, lanes_w, q_max, grid, codes)
    for s in range(n):
        _pack(grid, codes, s * BLOCKS, sign[s], blocks[first + s])


@jit()
def _orientation(x):
    """−1 where −x [256] suits the format better: its offset −dmin·m is meant for blocks that reach below zero.

    Negative d and dmin turn that around, for super-blocks with more of their blocks' span above zero than below.
    """
    above = below = np.float32(0)
    for start in range(0, len(x), BLOCK):
        smallest = largest = x[start]
        for i in range(start, start + BLOCK):
            smallest = min(smallest, x[i])
            largest = max(largest, x[i])
        above += max(smallest, np.float32(0))
        below -= min(largest, np.float32(0))
    return np.float32(-1) if above > below else np.float32(1)


@jit()
def _pack(grid, codes, first, sign, block):
    """Write the super-block in lanes first to first + 7 as Q4_K or Q5_K: the length of `block` says which."""
    largest_sc = largest_m = np.float32(0)
    for j in range(first, first + BLOCKS):
        largest_sc, largest_m = max(largest_sc, grid[SC, j]), max(largest_m, grid[M, j])
    d = fp16_bits(sign * grid[D, first]) if largest_sc > 0 else np.uint16(0)
    dmin = fp16_bits(sign * grid[DMIN, first]) if largest_m > 0 else np.uint16(0)
    block[0], block[1], block[2], block[3] = d & 0xFF, d >> 8, dmin & 0xFF, dmin >> 8
    for j in range(4):
        sc, next_sc = np.uint8(grid[SC, first + j]), np.uint8(grid[SC, first + j + 4])
        m, next_m = np.uint8(grid[M, first + j]), np.uint8(grid[M, first + j + 4])
        block[4 + j] = sc | (next_sc >> 4) << 6
        block[8 + j] = m | (next_m >> 4) << 6
        block[12 + j] = (next_sc & 15) | (next_m & 15) << 4
    nibbles = len(block) - 128
    for pair in range(4):
        for i in range(BLOCK):
            low, high = codes[i, first + 2 * pair], codes[i, first + 2 * pair + 1]
            block[nibbles + pair * BLOCK + i] = (low & 15) | (high & 15) << 4
    if nibbles > 16:
        for i in range(BLOCK):
            fifth_bits = 0
            for j in range(BLOCKS):
                fifth_bits |= (codes[i, first + j] >> 4) << j
            block[16 + i] = fifth_bits
