"""How one tensor's rows become blocks: plainly, weighted by importance, or shaped."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from sq_stream.calibrate.sketch import Sketch
from sq_stream.formats.blocks import BlockType
from sq_stream.kernels.codec import encode
from sq_stream.parallel import Workers
from sq_stream.quantize.grids import GRIDS
from sq_stream.quantize.shape import Shaper

Encoder = Callable[[NDArray[np.float32]], NDArray[np.uint8]]
"""From rows [n, n_in] of a tensor to their blocks [n, row_bytes]; for the same tensor, rows may come in any tiles
whose lengths are multiples of `parallel.SLAB`."""


def make_encoder(block_type: BlockType, sketch: Sketch | None, workers: Workers) -> Encoder:
    """The best encoder for a tensor, given what is known of the inputs that meet what is encoded.

    A second moment shapes, as a matrix unless a factor of less than half its rank is all that is known; mean squares
    alone (an importance matrix) weigh the columns; nothing, or statistics of a site that no token reached, leaves plain
    rounding.
    """
    if sketch is None or sketch.n_tokens == 0 or block_type.name not in GRIDS:
        return lambda x: encode(x, block_type)
    if sketch.rank == 0:
        return lambda x: encode(x, block_type, sketch.residual)
    dense = 2 * sketch.rank > sketch.n_in
    shaper = Shaper(sketch.residual, sketch.factor, block_type, workers, dense=dense)
    return lambda x: shaper.shape(x)[0]
