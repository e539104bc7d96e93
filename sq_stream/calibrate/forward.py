"""The streamed forward pass: layer by layer over all windows, the residual stream on disk in between."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from sq_stream.calibrate.budget import Budget, Layer
from sq_stream.calibrate.store import Entry
from sq_stream.calibrate.streamed import Add, Residuals, Step, into_batches, run_steps
from sq_stream.calibrate.weights import LayerReader
from sq_stream.events import OnEvent, ignore
from sq_stream.models.forward import Decoder, head_name
from sq_stream.models.layers import with_prefix

STAGE = "calibrate"


def run_forward(
    reader: LayerReader,
    decoder: Decoder,
    windows: NDArray[np.int32],
    layers: Sequence[Layer],
    entry: Entry,
    budget: Budget,
    *,
    energy: float = 1.0,
    on_event: OnEvent = ignore,
) -> None:
    """Fill `entry` with the sketches of every site, going on after its last finished layer.

    Args:
        reader: the weights.
        decoder: the maths.
        windows: token ids [n_windows, n_ctx].
        layers: what each layer observes.
        entry: where the sketches go, and the residual stream until the end.
        budget: how to run.
        energy: share of a second moment's trace that its factor keeps.
        on_event: told of the progress.

    Raises:
        BadInputError: weights or activations are NaN or infinite.
        LostWorkError: the residual stream of an earlier run is damaged.
        StorageError: reading or writing failed; the finished layers are kept.
    """
    residuals = Residuals(entry.pass_folder, into_batches(windows), reader, decoder)

    def make_step(i: int) -> Step:
        residuals.keep_only([i])
        return _head(residuals) if i == decoder.n_layer else _layer(residuals, layers[i], i, budget)

    n_steps = decoder.n_layer + 1
    run_steps(STAGE, n_steps, make_step, residuals.batches, entry, budget, energy=energy, on_event=on_event)


def _layer(residuals: Residuals, layer: Layer, i: int, budget: Budget) -> Step:
    decoder, prefix = residuals.decoder, f"blk.{i}."
    weights = residuals.reader.layer(i, resident=budget.resident)

    def compute(batch: int, add: Add) -> None:
        x = decoder.layer(residuals.read(i, batch), weights, i, with_prefix(add, prefix))
        residuals.write(i + 1, batch, x)

    sites = {tuple(prefix + name for name in site): width for site, width in layer.sites}
    return Step(f"layer {i + 1} of {decoder.n_layer}", sites, compute)


def _head(residuals: Residuals) -> Step:
    """The output matrix is not needed: only what enters it."""
    decoder, reader = residuals.decoder, residuals.reader
    name, weights = head_name(reader.names), {"output_norm.weight": reader.read("output_norm.weight")}

    def compute(batch: int, add: Add) -> None:
        add((name,), decoder.final_norm(residuals.read(decoder.n_layer, batch), weights))

    return Step("output", {(name,): reader.n_embd}, compute)
