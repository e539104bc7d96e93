"""Values to blocks and back, for every block type: the one entrance to the kernels.

The bytes of a row depend on its own values and on the importance alone: not on the number of threads, nor on which
rows are encoded together, nor on the machine.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sq_stream.errors import BadInputError
from sq_stream.formats.blocks import BF16, F16, F32, Q4_K, Q5_0, Q5_1, Q5_K, Q6_K, Q8_0, BlockType
from sq_stream.kernels import decode as decoders
from sq_stream.kernels import floats
from sq_stream.kernels.affine import encode_q4_k, encode_q5_k
from sq_stream.kernels.q5 import encode_q5_0, encode_q5_1
from sq_stream.kernels.q6_k import encode_q6_k
from sq_stream.kernels.q8_0 import encode_q8_0

_ENCODERS = {
    Q4_K: encode_q4_k,
    Q5_0: encode_q5_0,
    Q5_1: encode_q5_1,
    Q5_K: encode_q5_k,
    Q6_K: encode_q6_k,
    Q8_0: encode_q8_0,
}
_DECODERS = {
    Q4_K: decoders.decode_q4_k,
    Q5_0: decoders.decode_q5_0,
    Q5_1: decoders.decode_q5_1,
    Q5_K: decoders.decode_q5_k,
    Q6_K: decoders.decode_q6_k,
    Q8_0: decoders.decode_q8_0,
}


def encode(
    x: NDArray[np.float32], block_type: BlockType, importance: NDArray[np.float32] | None = None
) -> NDArray[np.uint8]:
    """Store `x` as blocks, with a small squared error where values must be rounded.

    Args:
        x: float32 [n_rows, n_in], all finite, n_in a multiple of the block size.
        block_type: the type to store.
        importance: float32 [n_in], not negative: the weight of each column's squared error, in the types whose encoder
            takes it (all but Q8_0). None weighs all columns alike.

    Returns:
        uint8 [n_rows, row_bytes]; for F32 a view of `x`.

    Raises:
        BadInputError: a value is too large for F16 or BF16, or one of `importance` is negative, infinite or NaN.
        ValueError: n_in is not a multiple of the block size, or `importance` is not of shape [n_in].
    """
    x = _read_only(x, np.float32)
    if block_type == F32:
        return x.view(np.uint8)
    if block_type in (F16, BF16):
        return _encode_float(x, block_type)
    return _ENCODERS[block_type](x, importance)


def decode(data: NDArray[np.uint8], block_type: BlockType) -> NDArray[np.float32]:
    """Values of blocks, bit for bit those that ggml gives.

    Args:
        data: uint8 [n_rows, row_bytes], whole blocks.
        block_type: the type stored.

    Returns:
        float32 [n_rows, n_in], the caller's own.

    Raises:
        ValueError: row_bytes is not a multiple of the block's bytes.
    """
    data = _read_only(data, np.uint8)
    n_rows, row_bytes = data.shape
    n_blocks, rest = divmod(row_bytes, block_type.block_bytes)
    if rest:
        raise ValueError(f"{block_type.name} rows have a multiple of {block_type.block_bytes} bytes, not {row_bytes}")
    x = np.empty((n_rows, n_blocks * block_type.block_size), np.float32)
    if block_type == F32:
        x[:] = data.view(np.float32)
    elif block_type == F16:
        floats.decode_f16(data.view(np.uint16), x)
    elif block_type == BF16:
        floats.decode_bf16(data.view(np.uint16), x.view(np.uint32))
    else:
        blocks = data.reshape(n_rows, n_blocks, block_type.block_bytes)
        _DECODERS[block_type](blocks, x.reshape(n_rows, n_blocks, block_type.block_size))
    return x


def _encode_float(x: NDArray[np.float32], block_type: BlockType) -> NDArray[np.uint8]:
    overflow = floats.FP16_OVERFLOW if block_type == F16 else floats.BF16_OVERFLOW
    if (too_large := np.abs(x) >= overflow).any():
        row, column = np.argwhere(too_large)[0]
        raise BadInputError(
            f"the value {x[row, column]} in row {row}, column {column} is too large for {block_type.name}, which ends "
            f"below {overflow}: store this tensor as F32"
        )
    bits = np.empty(x.shape, np.uint16)
    if block_type == F16:
        floats.encode_f16(x, bits)
    else:
        floats.encode_bf16(x.view(np.uint32), bits)
    return bits.view(np.uint8)


def _read_only(array: NDArray, dtype: type) -> NDArray:
    """`array` contiguous and not writable: one Numba type, and so one compilation, for all that callers pass."""
    array = np.ascontiguousarray(array, dtype).view()
    array.flags.writeable = False
    return array
