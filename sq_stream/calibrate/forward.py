"""The streamed forward pass: layer by layer over all windows, the residual stream on disk in between."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sq_stream.calibrate.budget import Budget, Layer, windows_per_batch
from sq_stream.calibrate.moments import Moment
from sq_stream.calibrate.ordered import InOrder
from sq_stream.calibrate.sketch import Factored
from sq_stream.calibrate.store import Entry
from sq_stream.calibrate.weights import LayerReader
from sq_stream.errors import BadInputError, StorageError
from sq_stream.events import OnEvent, Progress, StageStarted, ignore
from sq_stream.formats.chunks import read_chunk, write_chunk
from sq_stream.formats.storage import storage_errors
from sq_stream.models.forward import Decoder, head_name
from sq_stream.models.layers import Array, Observe, Site, with_prefix
from sq_stream.parallel import Workers

Compute = Callable[[Array, Observe], Array | None]
"""From the residual stream [n_window, n_ctx, n_embd] that enters a step to the one that leaves it, if any does."""

STAGE = "calibrate"


class LostWorkError(BadInputError):
    """What an earlier run left on disk cannot be gone on with."""


class Residuals:
    """The residual stream on disk: one generation is what enters a layer, in one file for each batch of windows.

    The first generation is not stored: it is rows of the token embedding.
    """

    def __init__(
        self, folder: Path, batches: Sequence[NDArray[np.int32]], reader: LayerReader, decoder: Decoder
    ) -> None:
        self.batches = batches  # token ids [n_window, n_ctx] of each
        self._folder, self._reader, self._decoder = folder, reader, decoder
        with storage_errors("making", folder):
            folder.mkdir(exist_ok=True)

    def read(self, layer: int, batch: int) -> Array:
        """What enters `layer`: [n_window, n_ctx, n_embd].

        Raises:
            LostWorkError: it is missing or damaged.
        """
        tokens = self.batches[batch]
        if layer == 0:
            return self._decoder.embed(self._reader.rows("token_embd.weight", tokens))
        try:
            return read_chunk(self._path(layer, batch), np.float32, (*tokens.shape, self._reader.n_embd))
        except (BadInputError, StorageError) as error:
            raise LostWorkError(str(error)) from error

    def write(self, layer: int, batch: int, x: Array) -> None:
        """Keep what enters `layer`.

        Raises:
            StorageError: writing fails.
        """
        write_chunk(self._path(layer, batch), x)

    def keep_only(self, layer: int) -> None:
        """Delete all generations but the one that enters `layer`."""
        with storage_errors("deleting files in", self._folder):
            for path in self._folder.glob("*.zst"):
                if not path.name.startswith(f"{layer}-"):
                    path.unlink()

    def remove(self) -> None:
        """Delete everything: the pass is done."""
        with storage_errors("deleting", self._folder):
            shutil.rmtree(self._folder)

    def _path(self, layer: int, batch: int) -> Path:
        return self._folder / f"{layer}-{batch:06d}.zst"


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
    n, n_steps = windows_per_batch(windows.shape[1]), decoder.n_layer + 1
    batches = [windows[start : start + n] for start in range(0, len(windows), n)]
    residuals = Residuals(entry.pass_folder, batches, reader, decoder)
    on_event(StageStarted(STAGE, windows.size, "tokens"))
    with Workers(budget.threads) as workers:
        for i in range(entry.done, n_steps):
            residuals.keep_only(i)
            step = _head(reader, decoder) if i == decoder.n_layer else _layer(reader, decoder, layers[i], i, budget)
            for done, _ in enumerate(step.run(i, residuals, budget, workers), 1):
                tokens = windows.size * (i + done / len(batches)) / n_steps
                on_event(Progress(STAGE, step.name, int(tokens), windows.size))
            entry.finish_step(step.finish(energy, workers))
    residuals.remove()


class _Step:
    """One layer, or what comes after the last one, over all windows."""

    def __init__(self, name: str, sites: Mapping[Site, int], compute: Compute) -> None:
        self.name = name
        self._sites = sites
        self._compute = compute
        self._moments: dict[Site, Moment] = {}

    def run(self, i: int, residuals: Residuals, budget: Budget, workers: Workers) -> Iterator[None]:
        """Compute all batches of step i, yielding after each in turn."""
        order = InOrder()
        self._moments = {site: budget.moment(width, order) for site, width in self._sites.items()}

        def run_batch(batch: int) -> None:
            def observe(site: Site, x: Array) -> None:
                self._moments[site].add(batch, x.reshape(-1, x.shape[-1]))

            try:
                with np.errstate(over="ignore", invalid="ignore"):  # found in the end, by `finish`
                    y = self._compute(residuals.read(i, batch), observe)
                if y is not None:
                    residuals.write(i + 1, batch, y)
            except BaseException:
                order.fail(batch)
                raise

        try:
            yield from workers.stream(run_batch, range(len(residuals.batches)))
        finally:
            order.fail(-1)

    def finish(self, energy: float, workers: Workers) -> dict[Site, Factored]:
        """The sketches of all sites."""

        def finish_site(site: Site) -> Factored:
            try:
                return self._moments.pop(site).finish(energy)
            except FloatingPointError:
                raise BadInputError(
                    f"the activations that enter {site[0]}.weight are not finite: the weights are damaged, or they "
                    "are too large for float32"
                ) from None

        return dict(zip(self._sites, workers.map(finish_site, self._sites), strict=True))


def _layer(reader: LayerReader, decoder: Decoder, layer: Layer, i: int, budget: Budget) -> _Step:
    weights = reader.layer(i, resident=budget.resident)
    prefix = f"blk.{i}."

    def compute(x: Array, observe: Observe) -> Array:
        return decoder.layer(x, weights, i, with_prefix(observe, prefix))

    sites = {tuple(prefix + name for name in site): width for site, width in layer.sites}
    return _Step(f"layer {i + 1} of {decoder.n_layer}", sites, compute)


def _head(reader: LayerReader, decoder: Decoder) -> _Step:
    """The output matrix is not needed: only what enters it."""
    name = head_name(reader.names)
    weights = {"output_norm.weight": reader.read("output_norm.weight")}

    def compute(x: Array, observe: Observe) -> None:
        observe((name,), decoder.final_norm(x, weights))

    return _Step("output", {(name,): reader.n_embd}, compute)
