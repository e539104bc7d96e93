"""The streamed backward pass: second moments of the gradients that the outputs of all linears get.

The gradients are of the loss of labels sampled from the model's own predictions. First all layers' inputs are computed
and kept on disk; then the pass goes layer by layer from the end, recomputing the inside of each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sq_stream.calibrate.budget import Budget, Layer, Tracing, measure_layers, windows_per_batch
from sq_stream.calibrate.store import Entry
from sq_stream.calibrate.streamed import Add, Residuals, Step, Stream, into_batches, run_steps
from sq_stream.calibrate.weights import LayerReader, Zeros
from sq_stream.events import OnEvent, ignore
from sq_stream.models.backward import draw, sampled_loss_vjp
from sq_stream.models.forward import Decoder, head_name
from sq_stream.models.layers import TILE_WEIGHTS, Array, ObserveGradients, Site, is_norm, with_prefix
from sq_stream.parallel import Workers

STAGE = "sensitivity"
EMBEDDING = ("token_embd",)
"""The site of the gradients of what the token embedding gives."""


def n_steps(decoder: Decoder) -> int:
    """Every layer forward, the output matrix, every layer backward."""
    return 2 * decoder.n_layer + 1


def run_backward(
    reader: LayerReader,
    decoder: Decoder,
    windows: NDArray[np.int32],
    layers: Sequence[Layer],
    entry: Entry,
    budget: Budget,
    *,
    seed: int,
    energy: float = 1.0,
    on_event: OnEvent = ignore,
) -> None:
    """Fill `entry` with the sketches of every linear's output gradients, going on after its last finished step.

    Args:
        reader: the weights.
        decoder: the maths.
        windows: token ids [n_windows, n_ctx].
        layers: from `measure_backward`.
        entry: where the sketches go, and what lies between the layers until the end.
        budget: how to run.
        seed: of the labels.
        energy: share of a second moment's trace that its factor keeps.
        on_event: told of the progress.

    Raises:
        BadInputError: weights, activations or gradients are NaN or infinite.
        LostWorkError: what lies between the layers is damaged.
        StorageError: reading or writing failed; the finished steps are kept.
    """
    batches, n_layer = into_batches(windows), decoder.n_layer
    residuals = Residuals(entry.pass_folder / "inputs", batches, reader, decoder)
    gradients = Stream(entry.pass_folder / "gradients", batches, reader.n_embd)

    def make_step(number: int) -> Step:
        if number < n_layer:
            return _forward(residuals, number, budget)
        if number == n_layer:
            return _head(residuals, gradients, seed)
        i = 2 * n_layer - number
        residuals.keep_only(range(i + 1))
        gradients.keep_only([i + 1])
        return _layer(residuals, gradients, layers[i], i, budget)

    run_steps(STAGE, n_steps(decoder), make_step, batches, entry, budget, energy=energy, on_event=on_event)


def measure_backward(decoder: Decoder, reader: LayerReader, n_ctx: int) -> list[Layer]:
    """What each layer needs with windows of `n_ctx` tokens, in order, and at the end what the output matrix does."""

    def vjp(decoder: Decoder, new_input: Callable[[], Array], weights: Mapping[str, Any], i: int, add: Add) -> None:
        decoder.layer_vjp(new_input(), new_input(), weights, i, _output_gradients(add))

    layers = measure_layers(decoder, reader, n_ctx, vjp)
    x = np.zeros((windows_per_batch(n_ctx) * n_ctx, reader.n_embd), np.float32)
    n_rows = min(reader.n_vocab, 2 * TILE_WEIGHTS // reader.n_embd)  # more tiles need no more memory
    with Workers(1), Tracing() as tracing:
        sampled_loss_vjp(x, Zeros((n_rows, reader.n_embd)), decoder, np.zeros(len(x)))
    n_tile = min(TILE_WEIGHTS, reader.n_vocab * reader.n_embd)
    at_hand = 2 * x.nbytes + 8 * n_tile  # the norm's output and its gradient, and a tile as it is read
    layers[0] = replace(
        layers[0],
        sites=(*layers[0].sites, (EMBEDDING, reader.n_embd)),
        observing=(*layers[0].observing, 3 * x.nbytes),
    )
    return [*layers, Layer((), (), tracing.peak + at_hand, weights=0, small_weights=0)]


def robust(g: Array) -> Array:
    """Gradients g [n, n_out] times the root of their tokens' weights, 1 / (1 + ‖g‖² / (4 · median of ‖g‖²)).

    Few tokens have gradients so large that they alone would make up the second moment.
    """
    square = np.einsum("ij,ij->i", g, g)
    typical = 4 * max(float(np.median(square)), float(np.finfo(np.float32).tiny))
    weighted: Array = g * np.sqrt(1 / (1 + square / typical))[:, None]
    return weighted


def _output_gradients(add: Add) -> ObserveGradients:
    """Adds every linear's output gradients, to a site of its own."""

    def observe(site: Site, x: Array, dys: Sequence[Array]) -> None:
        for name, dy in zip(site, dys, strict=True):
            if not is_norm(name):
                add((name,), robust(dy.reshape(-1, dy.shape[-1])))

    return observe


def _forward(residuals: Residuals, i: int, budget: Budget) -> Step:
    decoder, weights = residuals.decoder, residuals.reader.layer(i, resident=budget.resident)

    def compute(batch: int, add: Add) -> None:
        residuals.write(i + 1, batch, decoder.layer(residuals.read(i, batch), weights, i))

    return Step(f"layer {i + 1} of {decoder.n_layer}", {}, compute)


def _head(residuals: Residuals, gradients: Stream, seed: int) -> Step:
    decoder, reader = residuals.decoder, residuals.reader
    matrix = reader.on_disk(f"{head_name(reader.names)}.weight")
    weights = {"output_norm.weight": reader.read("output_norm.weight")}
    n = len(residuals.batches[0])

    def compute(batch: int, add: Add) -> None:
        x, tokens = residuals.read(decoder.n_layer, batch), residuals.batches[batch]
        uniform = draw(seed, range(batch * n, batch * n + len(tokens)), tokens.shape[1])
        _, dy = sampled_loss_vjp(decoder.final_norm(x, weights), matrix, decoder, uniform)
        gradients.write(decoder.n_layer, batch, decoder.final_norm_vjp(dy, x, weights))

    return Step("output", {}, compute)


def _layer(residuals: Residuals, gradients: Stream, layer: Layer, i: int, budget: Budget) -> Step:
    decoder, prefix = residuals.decoder, f"blk.{i}."
    weights = residuals.reader.layer(i, resident=budget.resident)

    def compute(batch: int, add: Add) -> None:
        observe = with_prefix(_output_gradients(add), prefix)
        dx = decoder.layer_vjp(gradients.read(i + 1, batch), residuals.read(i, batch), weights, i, observe)
        if i:
            gradients.write(i, batch, dx)
        else:
            add(EMBEDDING, robust(decoder.embed(dx).reshape(-1, dx.shape[-1])))

    sites: dict[Site, int] = {site if site == EMBEDDING else (prefix + site[0],): width for site, width in layer.sites}
    name = f"layer {i + 1} of {decoder.n_layer}, backward"
    return Step(name, sites, compute, "the gradients of what comes from")
