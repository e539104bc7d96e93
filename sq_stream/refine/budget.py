"""How refinement fits into memory and onto the disk."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sq_stream.calibrate.budget import Layer, Tracing, computing_bytes, measure_layers, windows_per_batch
from sq_stream.calibrate.calibration import Calibration
from sq_stream.calibrate.weights import LayerReader, Zeros
from sq_stream.models.backward import divergence_vjp
from sq_stream.models.forward import Decoder
from sq_stream.models.layers import TILE_WEIGHTS, Array, Observe, Site
from sq_stream.parallel import Workers
from sq_stream.refine.rounds import TILE

ROUND_TOKENS = 4096
"""Of a round: two batches."""
CHECK_TOKENS = 4096
"""Of the text that decides when rounds stop."""


@dataclass(frozen=True, eq=False)
class Refining:
    """How to refine a file, and what it will take."""

    windows: NDArray[np.int32]  # of the text that is fitted to
    held: NDArray[np.int32]  # windows of other text, which decide when to stop
    threads: int
    resident: bool  # a layer's weights are in memory; else large matrices are read tile by tile
    working_ram: int  # resident bytes at the peak, besides those of the program
    peak_disk: int

    @property
    def n_rounds(self) -> int:
        """Rounds until all of the text has been seen once."""
        return -(-self.windows.size // ROUND_TOKENS)

    def of_round(self, number: int) -> NDArray[np.int32]:
        """The windows of round `number`, from 1 on: in an order that mixes the kinds of text."""
        order = np.random.RandomState(0).permutation(len(self.windows))
        size = max(1, ROUND_TOKENS // self.windows.shape[1])
        own: NDArray[np.int32] = self.windows[order[np.arange((number - 1) * size, number * size) % len(order)]]
        return own


def refinings(calibration: Calibration, held: NDArray[np.int32], n_parameters: int, threads: int) -> Iterator[Refining]:
    """All ways to refine, the fastest first.

    Args:
        calibration: its text is what is fitted to.
        held: windows of other text.
        n_parameters: of the largest group of tensors, at most.
        threads: at most.
    """
    decoder, reader, windows = calibration.decoder, calibration.reader, calibration.windows
    n_ctx, n_embd = windows.shape[1], reader.n_embd
    layers, head = measure_layers(decoder, reader, n_ctx, _layer_vjp), _head_bytes(decoder, reader, n_ctx)
    chunk = 4 * n_ctx * windows_per_batch(n_ctx) * n_embd
    n_tokens = max(ROUND_TOKENS, n_ctx)
    peak_disk = (decoder.n_layer + 5) * 4 * n_tokens * n_embd + 3 * 3 * 4 * n_parameters * (decoder.n_layer + 1)
    state = 4 * n_parameters * (12 + 2 * -(-n_tokens // (n_ctx * windows_per_batch(n_ctx))))
    for n_threads in range(threads, 0, -1):
        for resident in (True, False):
            worst = max(_layer_bytes(layer, chunk, n_threads, resident) for layer in layers)
            working_ram = state + max(worst, n_threads * head)
            yield Refining(windows, held[: max(1, CHECK_TOKENS // n_ctx)], n_threads, resident, working_ram, peak_disk)


def _layer_bytes(layer: Layer, chunk: int, threads: int, resident: bool) -> int:
    looking = max(layer.observing, default=0) + 3 * 4 * TILE  # a tile's gradient, its values, and a part of them
    weights = 4 * (layer.weights if resident else layer.small_weights)
    return weights + threads * computing_bytes(layer, chunk, resident, looking)


def _layer_vjp(
    decoder: Decoder, new_input: Callable[[], Array], weights: Mapping[str, Any], i: int, observe: Observe
) -> None:
    def see(site: Site, x: Array, dys: Sequence[Array]) -> None:
        observe(site, x)

    decoder.layer_vjp(new_input(), new_input(), weights, i, see)


def _head_bytes(decoder: Decoder, reader: LayerReader, n_ctx: int) -> int:
    """Of one thread at the output matrix."""
    x = np.zeros((windows_per_batch(n_ctx) * n_ctx, reader.n_embd), np.float32)
    n_rows = min(reader.n_vocab, 2 * TILE_WEIGHTS // reader.n_embd)  # more tiles need no more memory
    matrix = Zeros((n_rows, reader.n_embd))
    with Workers(1), Tracing() as tracing:
        divergence_vjp(x, matrix, (x, matrix), decoder, lambda rows, d_rows: None)
    tile = 4 * min(TILE_WEIGHTS, math.prod(reader.shape("token_embd.weight")))
    return tracing.peak + 4 * x.nbytes + 5 * tile  # a tile of both models, as it is read, and two parts of its values
