"""Row tiles: the unit in which tensors pass through memory."""

from __future__ import annotations

from collections.abc import Iterator

from sq_stream.parallel import SLAB


def row_tiles(n_rows: int, n_in: int, tile_weights: int, slab: int = SLAB) -> Iterator[slice]:
    """Consecutive ranges of about `tile_weights` values, in whole slabs of rows: shaping works slab by slab."""
    step = max(1, tile_weights // max(n_in, 1) // slab) * slab
    for start in range(0, n_rows, step):
        yield slice(start, min(start + step, n_rows))
