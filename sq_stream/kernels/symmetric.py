"""Encode Q8_0 and Q5_0: blocks of 32 values, x ≈ d·q with an fp16 d and codes q around zero.

Which d is best is a matter of luck, since it decides how every value rounds: a block tries 16 of them, which put its
value of greatest magnitude, its peak, at 16 different levels of the code range.

Source of the layouts: `block_q8_0`, `block_q5_0` in llama.cpp's ggml-common.h.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numba import njit, prange
from numpy.typing import NDArray

from sq_stream.formats.blocks import Q5_0, Q8_0, BlockType
from sq_stream.kernels.floats import fp16_value, storable_bits
from sq_stream.kernels.trials import TRIALS, lowest, reciprocal, signed_peak

BLOCK = 32

# Levels are whole numbers among others, so that what has been decoded is encoded without loss.
_Q8_0_LEVELS = (127 - np.arange(TRIALS) / 2).astype(np.float32)
_Q5_0_LEVELS = (np.arange(TRIALS) / 5 - 16.4).astype(np.float32)
_ZERO = np.float32(0)

_leaf = njit(cache=True, error_model="numpy")
_driver = njit(cache=True, parallel=True, error_model="numpy")


def encode_q8_0(x: NDArray[np.float32], importance: NDArray[np.float32] | None = None) -> NDArray[np.uint8]:
    """Q8_0 blocks of `x` with a small squared error.

    Args:
        x: float32 [n_rows, n_in], finite, n_in a multiple of 32. Values beyond the format's range are clipped.
        importance: accepted for the sake of a common signature, and not used.

    Returns:
        uint8 [n_rows, n_in / 32 · 34].

    Raises:
        ValueError: n_in is not a multiple of 32.
    """
    return encode_rows(x, Q8_0, _encode_q8_0)


@_driver
def _encode_q8_0(x, blocks):
    """Encode x [n_rows, n_blocks, 32] into blocks [n_rows, n_blocks, 34]."""
    n_blocks, x_bits = x.shape[1], x.view(np.uint32)
    for row in prange(len(x)):
        d, d_bits = np.empty(n_blocks, np.float32), np.empty(n_blocks, np.uint16)
        best_scales(x[row], x_bits[row], _Q8_0_LEVELS, np.float32(127), d)
        store_scales(d, d_bits)
        for b in range(n_blocks):
            inverse = reciprocal(d[b])
            blocks[row, b, 0], blocks[row, b, 1] = d_bits[b] & 0xFF, d_bits[b] >> 8
            for i in range(BLOCK):
                code = min(max(np.rint(x[row, b, i] * inverse), np.float32(-127)), np.float32(127))
                blocks[row, b, 2 + i] = np.uint8(np.int32(code))


def encode_q5_0(x: NDArray[np.float32], importance: NDArray[np.float32] | None = None) -> NDArray[np.uint8]:
    """Q5_0 blocks of `x` with a small squared error.

    Args:
        x: float32 [n_rows, n_in], finite, n_in a multiple of 32. Values beyond the format's range are clipped.
        importance: accepted for the sake of a common signature, and not used.

    Returns:
        uint8 [n_rows, n_in / 32 · 22].

    Raises:
        ValueError: n_in is not a multiple of 32.
    """
    return encode_rows(x, Q5_0, _encode_q5_0)


@_driver
def _encode_q5_0(x, blocks):
    """Encode x [n_rows, n_blocks, 32] into blocks [n_rows, n_blocks, 22]."""
    n_blocks, x_bits = x.shape[1], x.view(np.uint32)
    for row in prange(len(x)):
        codes = np.empty(BLOCK, np.int32)
        d, d_bits = np.empty(n_blocks, np.float32), np.empty(n_blocks, np.uint16)
        best_scales(x[row], x_bits[row], _Q5_0_LEVELS, np.float32(15), d)
        store_scales(d, d_bits)
        for b in range(n_blocks):
            inverse = reciprocal(d[b])
            for i in range(BLOCK):
                codes[i] = np.int32(min(max(np.rint(x[row, b, i] * inverse) + np.float32(16), _ZERO), np.float32(31)))
            blocks[row, b, 0], blocks[row, b, 1] = d_bits[b] & 0xFF, d_bits[b] >> 8
            pack_5_bits(codes, blocks[row, b, 2:6], blocks[row, b, 6:22])


def encode_rows(
    x: NDArray[np.float32], block_type: BlockType, driver: Callable[[NDArray[np.float32], NDArray[np.uint8]], None]
) -> NDArray[np.uint8]:
    """Rows x [n_rows, n_in] as bytes [n_rows, row_bytes], made by a driver that takes both as blocks."""
    n_rows, n_in = x.shape
    data = np.empty((n_rows, block_type.row_bytes(n_in)), np.uint8)
    n_blocks = n_in // block_type.block_size
    driver(x.reshape(n_rows, n_blocks, block_type.block_size), data.reshape(n_rows, n_blocks, block_type.block_bytes))
    return data


@_leaf
def best_scales(x, x_bits, levels, highest, d):
    """For each block the scale d [n_blocks] that has the least error among those that put its peak at `levels`.

    Args:
        x: float32 [n_blocks, 32].
        x_bits: uint32 [n_blocks, 32], the same.
        levels: float32 [TRIALS].
        highest: float32, the largest code.
        d: out, float32 [n_blocks].
    """
    cost = np.empty(TRIALS, np.float32)
    for k in range(TRIALS):
        cost[k] = np.float32(1) / (levels[k] * levels[k])
    for b in range(len(x)):
        d[b] = signed_peak(x_bits[b], BLOCK)
    errors = np.empty(TRIALS, np.float32)
    for b in range(len(x)):
        try_levels(x[b], reciprocal(d[b]), levels, cost, highest, errors)
        d[b] /= levels[lowest(errors)]


@_leaf
def try_levels(x, inverse_peak, levels, cost, highest, errors):
    """Errors of x [32] in each trial k, in units of the squared peak; four sums each, for the processor's sake."""
    for k in range(TRIALS):
        inverse = levels[k] * inverse_peak
        e0 = e1 = e2 = e3 = _ZERO
        for i in range(8):
            e0 += _squared_rest(x[i] * inverse, highest)
            e1 += _squared_rest(x[8 + i] * inverse, highest)
            e2 += _squared_rest(x[16 + i] * inverse, highest)
            e3 += _squared_rest(x[24 + i] * inverse, highest)
        errors[k] = ((e0 + e1) + (e2 + e3)) * cost[k]


@_leaf
def _squared_rest(u, highest):
    rest = u - min(np.rint(u), highest)
    return rest * rest


@_leaf
def store_scales(d, d_bits):
    """Round d [n_blocks] to the halves d_bits [n_blocks] that are stored for it."""
    for b in range(len(d)):
        d_bits[b] = storable_bits(d[b])
        d[b] = fp16_value(d_bits[b])


@_leaf
def pack_5_bits(codes, fifth_bits, nibbles):
    """Pack codes 0..31, int32 [32], into uint8 [4] of their highest bits and uint8 [16] of nibbles."""
    fifths = np.uint32(0)
    for i in range(BLOCK):
        fifths |= np.uint32(codes[i] >> 4) << np.uint32(i)
    for k in range(4):
        fifth_bits[k] = np.uint8(fifths >> np.uint32(8 * k))
    for i in range(16):
        nibbles[i] = np.uint8((codes[i] & 15) | (codes[16 + i] & 15) << 4)
