"""Conversion of float32 to and from half precision and BF16 by integer arithmetic: Numba has neither on CPUs.

Source of the branch-free conversions: F. Giesen, "Float->half variants" and "Half->float done quick" (public domain).
"""

from __future__ import annotations

import numpy as np

from sq_stream.kernels.jit import jit

FP16_MAX = np.float32(65504.0)
FP16_OVERFLOW = np.float32(65520.0)  # rounds to infinity, as all beyond
BF16_OVERFLOW = np.uint32(0x7F7F_8000).view(np.float32)  # likewise

_SIGN = np.uint32(0x8000_0000)
_OVERFLOW = np.uint32(143 << 23)  # bits of 2**16, beyond the largest half and all that rounds to it
_MIN_NORMAL = np.uint32(113 << 23)  # bits of 2**-14
_ALIGN_SUBNORMAL = np.float32(0.5)  # adding it moves a subnormal half's bits to the bottom of the mantissa
_ALIGN_SUBNORMAL_BITS = np.uint32(126 << 23)
_REBIAS = np.uint32(2**32 - (112 << 23) + 0xFFF)  # exponent bias 127 -> 15, and just under half a unit
_INFINITY = np.uint32(0x7C00)
_INFINITY_F32 = np.uint32(0x7F80_0000)
_QUIET_NAN = np.uint32(0x7E00)
_WIDEN = np.float32(2.0**112)

_leaf = jit(inline="always")


@_leaf
def fp16_bits(x):
    """Bits (uint16) of the half nearest to `x` (float32), ties to even; beyond 65504 infinity, as IEEE 754 has it."""
    bits = np.float32(x).view(np.uint32)
    sign = bits & _SIGN
    magnitude = np.uint32(bits ^ sign)
    aligned = np.uint32(magnitude).view(np.float32) + _ALIGN_SUBNORMAL
    subnormal = np.uint32(np.float32(aligned).view(np.uint32) - _ALIGN_SUBNORMAL_BITS)
    odd = (magnitude >> np.uint32(13)) & np.uint32(1)
    normal = np.uint32(magnitude + _REBIAS + odd) >> np.uint32(13)
    half = subnormal if magnitude < _MIN_NORMAL else normal
    if magnitude >= _OVERFLOW:
        half = _QUIET_NAN if magnitude > _INFINITY_F32 else _INFINITY
    return np.uint16(half | (sign >> np.uint32(16)))


@_leaf
def fp16_value(bits):
    """Value (float32) of the half with these bits (uint16)."""
    wide_bits = np.uint32(np.uint32(bits & np.uint32(0x7FFF)) << np.uint32(13))
    scaled = np.uint32(wide_bits).view(np.float32) * _WIDEN
    magnitude = np.float32(scaled).view(np.uint32)
    if (bits & _INFINITY) == _INFINITY:
        magnitude = wide_bits | _INFINITY_F32
    return np.uint32(magnitude | (np.uint32(bits & np.uint32(0x8000)) << np.uint32(16))).view(np.float32)


@_leaf
def fp16_nearest(x):
    """The finite half nearest to `x`, as float32."""
    return fp16_value(fp16_bits(min(max(x, -FP16_MAX), FP16_MAX)))


@_leaf
def storable_bits(x):
    """Bits (uint16) of the half to store for a scale `x`: the largest finite one at most, and 0 only for 0."""
    bits = np.uint32(fp16_bits(min(max(x, -FP16_MAX), FP16_MAX)))
    vanished = (np.uint32(bits & np.uint32(0x7FFF)) == np.uint32(0)) and (x != np.float32(0))
    return np.uint16(bits | np.uint32(1)) if vanished else np.uint16(bits)


_driver = jit(nogil=True)  # serial, as in `decode`


@_driver
def encode_f16(x, bits):
    """Round x [n_rows, n_in] to bits, uint16 [n_rows, n_in]."""
    for row in range(len(x)):
        for i in range(x.shape[1]):
            bits[row, i] = fp16_bits(x[row, i])


@_driver
def decode_f16(bits, x):
    """Values of bits, uint16 [n_rows, n_in], in x [n_rows, n_in]."""
    for row in range(len(x)):
        for i in range(x.shape[1]):
            x[row, i] = fp16_value(bits[row, i])


@_driver
def encode_bf16(x_bits, bits):
    """Round x_bits, uint32 [n_rows, n_in] of float32 values, to nearest even in bits, uint16 [n_rows, n_in]."""
    for row in range(len(x_bits)):
        for i in range(x_bits.shape[1]):
            odd = (x_bits[row, i] >> np.uint32(16)) & np.uint32(1)
            bits[row, i] = np.uint16(np.uint32(x_bits[row, i] + np.uint32(0x7FFF) + odd) >> np.uint32(16))


@_driver
def decode_bf16(bits, x_bits):
    """Widen bits, uint16 [n_rows, n_in], to x_bits, uint32 [n_rows, n_in] of float32 values."""
    for row in range(len(bits)):
        for i in range(bits.shape[1]):
            x_bits[row, i] = np.uint32(bits[row, i]) << np.uint32(16)
