"""What refinement moves: the fp16 scales of blocks, and the weights of norms. Codes and 6-bit scales stay.

The values of a block are linear in each of its fp16 scales: of w = d·a − dmin·b, say, the part d·a is what the block
decodes to with dmin = 0. Gradients are those of the logarithm of a scale, so that a step is a relative change whatever
the scale's size, and no scale changes its sign: of d it is the sum over the block of ∂L/∂w · d·a.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sq_stream.formats.blocks import BlockType
from sq_stream.models.layers import Array

Blocks = NDArray[np.uint8]

GREATEST = np.float32(65504)
"""Of the values of fp16."""


def scales_of(data: Blocks, block_type: BlockType) -> Array:
    """The scales of stored rows `data` [n_rows, row_bytes]: float32 [n_rows, n_blocks, n_scales]."""
    fields = [_field(data, block_type, at).view(np.float16)[..., 0] for at in block_type.scales]
    return np.stack(fields, axis=-1).astype(np.float32)


def with_scales(data: Blocks, block_type: BlockType, scales: Array) -> Blocks:
    """Rows `data` [n_rows, row_bytes] with other scales [n_rows, n_blocks, n_scales], rounded to fp16."""
    changed: Blocks = data.copy()
    stored = np.clip(scales, -GREATEST, GREATEST).astype(np.float16)
    blocks = changed.reshape(len(data), -1, block_type.block_bytes)
    for i, at in enumerate(block_type.scales):
        blocks[..., at : at + 2] = np.ascontiguousarray(stored[..., i, None]).view(np.uint8)
    return changed


def gradient(d_rows: Array, data: Blocks, block_type: BlockType) -> Array:
    """Gradient of the logarithms of some rows' scales.

    Args:
        d_rows: that of the rows' values, float32 [n_rows, n_in].
        data: the rows, uint8 [n_rows, row_bytes].
        block_type: their type.

    Returns:
        float32 [n_rows, n_blocks, n_scales].
    """
    from sq_stream.kernels.codec import decode

    scales = scales_of(data, block_type)
    found, d_blocks = np.empty_like(scales), d_rows.reshape(*scales.shape[:2], block_type.block_size)
    for i in range(scales.shape[-1]):
        only = np.zeros_like(scales)
        only[..., i] = scales[..., i]
        part = decode(with_scales(data, block_type, only), block_type).reshape(d_blocks.shape)
        np.einsum("rbi,rbi->rb", d_blocks, part, out=found[..., i])
    return found


def _field(data: Blocks, block_type: BlockType, at: int) -> Blocks:
    blocks = data.reshape(len(data), -1, block_type.block_bytes)
    return np.ascontiguousarray(blocks[..., at : at + 2])
