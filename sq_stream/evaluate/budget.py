"""How an evaluation fits into memory and onto the disk; what cannot work is refused here."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

from sq_stream.calibrate.budget import (
    BYTES_PER_VOCABULARY_BYTE,
    MIB,
    Layer,
    computing_bytes,
    measure_layers,
    windows_per_batch,
)
from sq_stream.calibrate.gguf_weights import CHUNK_WEIGHTS
from sq_stream.calibrate.streamed import into_batches
from sq_stream.errors import DoesNotFitError
from sq_stream.evaluate.compare import SLICE, TILES_HELD
from sq_stream.evaluate.models import Model
from sq_stream.evaluate.suites import Suite
from sq_stream.job.budget import PROGRAM_BYTES, compiling_bytes, decoder_uses
from sq_stream.job.budget import kernel_uses as encoder_uses
from sq_stream.models.forward import layer_names
from sq_stream.models.layers import TILE_WEIGHTS
from sq_stream.units import format_size

BYTES_PER_ENCODED_WEIGHT = 20
"""Of the rows that are encoded together, where a baseline is made in memory."""
BYTES_PER_SCORE = 64
"""Of one position of one model: the sums of a comparison and what scores are made of."""
BLAS_BYTES = 4 * MIB
"""Packed panels that BLAS keeps for each thread at the output matrix."""
MOST_TOKENS = 4096
"""Rows of the output matrix in a tile."""


@dataclass(frozen=True)
class Budget:
    """How to run an evaluation, and what it will take."""

    threads: int
    resident: bool  # a layer's weights are in memory as float32; else large matrices are decoded for every batch
    peak_ram: int
    peak_disk: int


def vocabulary_tile(n_embd: int) -> int:
    """Rows of the output matrix, each of `n_embd` values, that are multiplied at a time."""
    return max(1, min(MOST_TOKENS, TILE_WEIGHTS // n_embd))


def choose_budget(
    models: Sequence[Model],
    suites: Sequence[Suite],
    *,
    vocabulary_bytes: int,
    before: int,
    threads: int,
    max_ram: int,
    kept: Collection[str] = (),
) -> Budget:
    """The fastest way to run that `max_ram` bytes allow, even if kernels must be compiled, or else if they need not.

    Args:
        models: the reference first.
        suites: what to score.
        vocabulary_bytes: size of the tokenizer's files.
        before: peak resident bytes of what comes before, the calibration of a baseline.
        threads: at most.
        max_ram: bytes of resident memory that the process may use at its peak.
        kept: those of `kernel_uses` whose kernels need not be compiled.

    Raises:
        DoesNotFitError: `max_ram` is too small; the message names the smallest that works.
    """
    uses = kernel_uses(models)
    fixed = PROGRAM_BYTES + BYTES_PER_VOCABULARY_BYTE * vocabulary_bytes
    largest, likely = (
        list(_ways(models, suites, fixed + compiling_bytes(missing), before, threads))
        for missing in (uses, uses - set(kept))
    )
    deciding = [largest, likely] if uses <= set(kept) else [largest]
    for ways in deciding:
        for way, stated in zip(ways, likely, strict=True):
            if way.peak_ram <= max_ram:
                return stated
    smallest = min(way.peak_ram for way in deciding[-1])
    raise DoesNotFitError(
        f"--max-ram {format_size(max_ram)} is too small for these models and texts: "
        f"the smallest that works is --max-ram {-(-smallest // MIB)}M"
    )


def kernel_uses(models: Sequence[Model]) -> set[str]:
    """What kernels are used for, as `kernels.cache` remembers it."""
    types = {block_type for model in models for block_type in (model.types or {}).values()}
    rounded = {t for model in models if model.rounded is not None for t in (model.types or {}).values()}
    return decoder_uses(types) | encoder_uses(rounded, shaped=False)


def _ways(models: Sequence[Model], suites: Sequence[Suite], fixed: int, before: int, threads: int) -> Iterator[Budget]:
    """All ways to run, the fastest first; `fixed` are the bytes that are there before anything of a model."""
    n_embd, n_models = models[0].reader.n_embd, len(models)
    n_tokens = sum(suite.windows.size for suite in suites)
    is_rounding = any(model.rounded is not None for model in models)
    contexts = {suite.windows.shape[1] for suite in suites}
    n_batches = sum(len(into_batches(suite.windows)) for suite in suites)
    layers = [
        (4 * n_embd * n_ctx * windows_per_batch(n_ctx), layer)
        for n_ctx in contexts
        for layer in set(measure_layers(models[0].decoder, models[0].reader, n_ctx))
    ]
    scores = BYTES_PER_SCORE * n_tokens * n_models
    encoding = BYTES_PER_ENCODED_WEIGHT * CHUNK_WEIGHTS if is_rounding else 0
    for n_threads in range(threads, 0, -1):
        busy = min(n_threads, n_batches)
        for resident in (True, False):
            working = max(_layer_bytes(chunk, layer, busy, resident, encoding) for chunk, layer in layers)
            working += 0 if resident else max(map(_kept_bytes, models))
            head = _head_bytes(models, max(chunk for chunk, _ in layers), n_threads)
            yield Budget(
                n_threads,
                resident,
                peak_ram=max(before, fixed + scores + max(working, head)),
                peak_disk=4 * n_tokens * n_embd * (n_models + 1),
            )


def _layer_bytes(chunk: int, layer: Layer, threads: int, resident: bool, encoding: int) -> int:
    """While a layer is read, `encoding` bytes being those of rounding, or runs; `chunk`: residual stream of a batch."""
    weights = 4 * (layer.weights if resident else layer.small_weights)
    return weights + max(encoding, threads * computing_bytes(layer, chunk, resident))


def _head_bytes(models: Sequence[Model], chunk: int, threads: int) -> int:
    """While the output matrices are multiplied, tile by tile."""
    n_embd = models[0].reader.n_embd
    step = vocabulary_tile(n_embd)
    tiles = (len(models) + 1) * 4 * step * n_embd
    kept = sum(_blocks_bytes(model, [model.head]) for model in models)
    comparing = TILES_HELD * 4 * SLICE * step + BLAS_BYTES
    return (2 * len(models) + 2) * chunk + tiles + kept + threads * comparing


def _kept_bytes(model: Model) -> int:
    """Blocks of the layer that is kept encoded."""
    return max(_blocks_bytes(model, layer_names(model.reader.names, i).values()) for i in range(model.decoder.n_layer))


def _blocks_bytes(model: Model, names: Iterable[str]) -> int:
    if model.rounded is None or model.types is None:
        return 0
    return sum(model.types[name].tensor_bytes(model.reader.shape(name)) for name in names)
