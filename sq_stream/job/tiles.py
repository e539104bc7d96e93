"""Row tiles: the unit in which tensors pass through memory."""

from __future__ import annotations

from collections.abc import Iterator


def row_tiles(n_rows: int, n_in: int, tile_weights: int) -> Iterator[slice]:
    """Consecutive row ranges of at most `tile_weights` values, at least one row each."""
    step = max(1, tile_weights // n_in)
    for start in range(0, n_rows, step):
        yield slice(start, min(start + step, n_rows))
