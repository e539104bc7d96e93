"""How a calibration fits into memory and onto the disk: threads, weights in memory or not, which sites are exact."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sq_stream.calibrate.moments import ExactMoment, Moment, Needs, SketchedMoment
from sq_stream.calibrate.ordered import InOrder
from sq_stream.calibrate.sketch import PANEL
from sq_stream.calibrate.weights import LayerReader, is_large, zeros
from sq_stream.models.forward import Decoder
from sq_stream.models.layers import TILE_WEIGHTS, Array, Observe, Site
from sq_stream.parallel import Workers

MIB = 2**20

BATCH_TOKENS = 2048
"""Tokens of the windows that are computed together: fixed, so that results depend neither on threads nor memory."""
FIXED_BYTES = 68 * MIB
"""Resident bytes before anything of the model: interpreter, NumPy, the packaged text and what its windows took."""
BYTES_PER_VOCABULARY_BYTE = 12
"""Resident bytes for one byte of the tokenizer's files: the vocabulary, and what allocators keep of reading it."""
BLAS_BYTES = 4 * MIB
"""Packed panels of each thread, beyond what freed memory takes in."""
RANKS = (2048, 1024, 512, 256, 128)
"""Of the sketches of sites whose exact second moment does not fit."""


@dataclass(frozen=True)
class Layer:
    """What one layer needs, measured on a batch of zeros; the layer's input is one of the activations."""

    sites: tuple[tuple[Site, int], ...]  # with the values of an activation vector, in the order of observation
    observing: tuple[int, ...]  # bytes of activations while each site is observed
    activations: int  # bytes, at the peak
    weights: int  # values in its tensors
    small_weights: int  # values in those that are always in memory


@dataclass(frozen=True)
class Budget:
    """How to run a calibration, and what it will take."""

    threads: int
    resident: bool  # a layer's weights are in memory; else large matrices are read tile by tile for every batch
    ranks: Mapping[int, int]  # width of a site -> rank of its sketch, for sites that are not exact
    peak_ram: int
    peak_disk: int

    def moment(self, n_in: int, order: InOrder) -> Moment:
        """An empty second moment for a site of `n_in` values."""
        return SketchedMoment(n_in, self.ranks[n_in], order) if n_in in self.ranks else ExactMoment(n_in, order)


Run = Callable[[Decoder, Callable[[], Array], Mapping[str, Any], int, Observe], object]
"""Runs layer i of a decoder on weights, showing what enters the sites; its inputs come from the function given."""


def run_layer(
    decoder: Decoder, new_input: Callable[[], Array], weights: Mapping[str, Any], i: int, observe: Observe
) -> object:
    """Forward; nothing but the layer holds its input, which it lets go of behind its first branch."""
    return decoder.layer(new_input(), weights, i, observe)


def measure_layers(decoder: Decoder, reader: LayerReader, n_ctx: int, run: Run = run_layer) -> list[Layer]:
    """Every layer's needs with windows of `n_ctx` tokens, in order; layers with the same tensors are measured once."""
    known: dict[object, Layer] = {}
    layers = []
    with Workers(1):
        for i in range(decoder.n_layer):
            shapes = reader.shapes(i)
            key = tuple(shapes.items())
            if key not in known:
                known[key] = _measure(decoder, i, shapes, (windows_per_batch(n_ctx), n_ctx), run)
            layers.append(known[key])
    return layers


def _measure(
    decoder: Decoder, i: int, shapes: Mapping[str, tuple[int, ...]], windows: tuple[int, int], run: Run
) -> Layer:
    weights, shape = zeros(shapes), (*windows, shapes["attn_norm.weight"][0])
    sites: dict[Site, int] = {}
    observing: list[int] = []
    with Tracing() as tracing:

        def observe(site: Site, x: Array) -> None:
            sites[site] = x.shape[-1]
            observing.append(tracing.allocated())

        run(decoder, lambda: np.zeros(shape, np.float32), weights, i, observe)
    sizes = {name: int(np.prod(shape)) for name, shape in shapes.items()}
    return Layer(
        sites=tuple(sites.items()),
        observing=tuple(observing),
        activations=tracing.peak,
        weights=sum(sizes.values()),
        small_weights=sum(n for name, n in sizes.items() if not is_large(shapes[name])),
    )


class Tracing:
    """Bytes that are allocated within a `with` block, whose maths may well be of zeros and not sensible."""

    def __enter__(self) -> Tracing:
        self._errors = np.errstate(all="ignore")
        self._errors.__enter__()
        self._was_tracing = tracemalloc.is_tracing()
        tracemalloc.start()
        tracemalloc.reset_peak()
        self._before = tracemalloc.get_traced_memory()[0]
        return self

    def allocated(self) -> int:
        """At the moment."""
        return tracemalloc.get_traced_memory()[0] - self._before

    def __exit__(self, *error: object) -> None:
        self.peak = tracemalloc.get_traced_memory()[1] - self._before
        if not self._was_tracing:
            tracemalloc.stop()
        self._errors.__exit__(None, None, None)


def budgets(
    layers: Sequence[Layer],
    windows: tuple[int, ...],
    n_embd: int,
    *,
    ranks: Mapping[int, int],
    threads: int,
    n_stored: int = 2,
    vocabulary_bytes: int = 0,
) -> Iterator[Budget]:
    """All ways to run with sketches of these ranks, the fastest first.

    Args:
        layers: from `measure_layers`.
        windows: number of windows of text, tokens of each.
        n_embd: values of the residual stream.
        ranks: one of `rank_choices`.
        threads: at most.
        n_stored: such arrays of all windows that are on disk together, at most.
        vocabulary_bytes: size of the tokenizer's files.
    """
    fixed = FIXED_BYTES + BYTES_PER_VOCABULARY_BYTE * vocabulary_bytes
    n_windows, n_ctx = windows
    batch_tokens = n_ctx * windows_per_batch(n_ctx)
    peak_disk = n_stored * 4 * n_windows * n_ctx * n_embd + sum(
        _file_bytes(width) for layer in layers for _, width in layer.sites
    )
    for n_threads in range(threads, 0, -1):
        for resident in (True, False):
            peak_ram = fixed + _peak(layers, ranks, n_threads, resident, batch_tokens, n_embd)
            yield Budget(n_threads, resident, ranks, peak_ram, peak_disk)


def windows_per_batch(n_ctx: int) -> int:
    """Windows that are computed together."""
    return max(1, BATCH_TOKENS // n_ctx)


def rank_choices(layers: Sequence[Layer], n_embd: int) -> Iterator[dict[int, int]]:
    """`Budget.ranks` from all sites exact to all of them narrow sketches, the widest giving way first."""
    widths = sorted({n_embd} | {width for layer in layers for _, width in layer.sites}, reverse=True)
    yield {}
    for n_sketched in range(1, len(widths) + 1):
        for rank in RANKS:
            ranks = {width: rank for width in widths[:n_sketched] if 2 * rank < width}
            if ranks:
                yield ranks


def _peak(
    layers: Sequence[Layer],
    ranks: Mapping[int, int],
    threads: int,
    resident: bool,
    batch_tokens: int,
    n_embd: int,
) -> int:
    """Resident bytes of the worst layer at its peak."""
    chunk = 4 * batch_tokens * n_embd
    worst = 0
    for layer in layers:
        moments = [_needs(width, ranks, batch_tokens) for _, width in layer.sites]
        weights = 4 * (layer.weights if resident else layer.small_weights)
        sums = sum(moment.resident for moment in moments)
        observing = max((own + moment.adding for own, moment in zip(layer.observing, moments, strict=True)), default=0)
        computing = computing_bytes(layer, chunk, resident, observing)
        finishing = sum(sorted(moment.finishing for moment in moments)[-threads:])
        worst = max(worst, weights + sums + max(threads * computing, finishing))
    return worst


def computing_bytes(layer: Layer, chunk: int, resident: bool, observing: int = 0) -> int:
    """Resident bytes of one thread at work on a batch.

    Args:
        layer: what it computes.
        chunk: bytes of the batch's residual stream, which is there three times while it is read or written.
        resident: the layer's weights are in memory; else they are read tile by tile.
        observing: bytes of activations, at the peak of what looks at them.
    """
    tile = 0 if resident else 2 * 4 * TILE_WEIGHTS
    activations = max(layer.activations + tile, observing, 3 * chunk)
    return activations + activations // 16 + BLAS_BYTES  # a sixteenth of it freed, and kept by the allocator


def _needs(width: int, ranks: Mapping[int, int], n: int) -> Needs:
    return SketchedMoment.needs(width, ranks[width], n) if width in ranks else ExactMoment.needs(width)


def _file_bytes(width: int) -> int:
    return width * (width + PANEL)
