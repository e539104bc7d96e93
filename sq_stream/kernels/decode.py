"""Decode every block type: one jitted leaf per type, with the operations in ggml's order so that all bits agree.

Source of the layouts: the `block_*` structs of llama.cpp's ggml-common.h and `dequantize_row_*` in ggml-quants.c.
"""

from __future__ import annotations

import numpy as np

from sq_stream.kernels.floats import fp16_value
from sq_stream.kernels.jit import jit

_leaf = jit()
_driver = jit(nogil=True)  # serial: several threads of a pass decode at once, which not every layer of Numba's may


@_leaf
def _half(block, at):
    return fp16_value(np.uint16(block[at] | np.uint16(block[at + 1]) << 8))


@_driver
def decode_q8_0(blocks, x):
    """Decode blocks [n_rows, n_blocks, 34] into x [n_rows, n_blocks, 32]."""
    for row in range(len(x)):
        for b in range(x.shape[1]):
            _decode_q8_0(blocks[row, b], x[row, b])


@_leaf
def _decode_q8_0(block, x):
    d = _half(block, 0)
    for i in range(32):
        x[i] = np.float32(np.int8(block[2 + i])) * d


@_driver
def decode_q5_0(blocks, x):
    """Decode blocks [n_rows, n_blocks, 22] into x [n_rows, n_blocks, 32]."""
    for row in range(len(x)):
        for b in range(x.shape[1]):
            _decode_q5_0(blocks[row, b], x[row, b])


@_leaf
def _decode_q5_0(block, x):
    d = _half(block, 0)
    _codes_5_bits(block[2:6], block[6:22], x)
    for i in range(32):
        x[i] = d * (x[i] - np.float32(16))


@_driver
def decode_q5_1(blocks, x):
    """Decode blocks [n_rows, n_blocks, 24] into x [n_rows, n_blocks, 32]."""
    for row in range(len(x)):
        for b in range(x.shape[1]):
            _decode_q5_1(blocks[row, b], x[row, b])


@_leaf
def _decode_q5_1(block, x):
    d, m = _half(block, 0), _half(block, 2)
    _codes_5_bits(block[4:8], block[8:24], x)
    for i in range(32):
        x[i] = d * x[i] + m


@_leaf
def _codes_5_bits(fifth_bits, nibbles, codes):
    """Codes 0..31, as float32 [32], from uint8 [4] with one bit per code and uint8 [16] with two nibbles each."""
    fifths = np.int32(0)
    for k in range(4):
        fifths |= np.int32(fifth_bits[k]) << (8 * k)
    for i in range(16):
        codes[i] = np.float32((nibbles[i] & 15) | ((fifths >> i) & 1) << 4)
        codes[16 + i] = np.float32((nibbles[i] >> 4) | ((fifths >> (16 + i)) & 1) << 4)


@_driver
def decode_q4_k(blocks, x):
    """Decode blocks [n_rows, n_blocks, 144] into x [n_rows, n_blocks, 256]."""
    for row in range(len(x)):
        for b in range(x.shape[1]):
            _decode_k(blocks[row, b], 16, x[row, b])


@_driver
def decode_q5_k(blocks, x):
    """Decode blocks [n_rows, n_blocks, 176] into x [n_rows, n_blocks, 256]."""
    for row in range(len(x)):
        for b in range(x.shape[1]):
            _decode_k(blocks[row, b], 48, x[row, b])


@_leaf
def _decode_k(block, nibbles_at, x):
    """Decode a Q4_K block (nibbles from byte 16 on) or a Q5_K block (from 48 on, after one fifth bit per code)."""
    d, dmin = _half(block, 0), _half(block, 2)
    for j in range(8):
        if j < 4:
            sc, m = block[4 + j] & 63, block[8 + j] & 63
        else:
            sc = (block[8 + j] & 15) | (block[j] >> 6) << 4
            m = (block[8 + j] >> 4) | (block[4 + j] >> 6) << 4
        scale, low = d * np.float32(sc), dmin * np.float32(m)
        for i in range(32):
            code = (block[nibbles_at + j // 2 * 32 + i] >> (j % 2 * 4)) & 15
            if nibbles_at == 48:
                code |= ((block[16 + i] >> j) & 1) << 4
            x[32 * j + i] = scale * np.float32(code) - low


@_driver
def decode_q6_k(blocks, x):
    """Decode blocks [n_rows, n_blocks, 210] into x [n_rows, n_blocks, 256]."""
    for row in range(len(x)):
        for b in range(x.shape[1]):
            _decode_q6_k(blocks[row, b], x[row, b])


@_leaf
def _decode_q6_k(block, x):
    d = _half(block, 208)
    for group in range(16):
        scale = d * np.float32(np.int8(block[192 + group]))
        half, quarter = group // 8, group // 2 % 4
        start = group % 2 * 16
        for i in range(start, start + 16):
            low = block[64 * half + quarter % 2 * 32 + i] >> (quarter // 2 * 4)
            high = block[128 + 32 * half + i] >> (2 * quarter)
            code = np.int32(low & 15) | np.int32(high & 3) << 4
            x[128 * half + 32 * quarter + i] = scale * np.float32(code - 32)
