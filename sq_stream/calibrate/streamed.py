"""What the streamed passes are made of: activations on disk between the layers, and steps over all windows."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sq_stream.allocator import release_freed
from sq_stream.calibrate.budget import Budget, windows_per_batch
from sq_stream.calibrate.moments import Moment
from sq_stream.calibrate.ordered import InOrder
from sq_stream.calibrate.sketch import Factored
from sq_stream.calibrate.store import Entry
from sq_stream.calibrate.weights import LayerReader
from sq_stream.errors import BadInputError, StorageError
from sq_stream.events import OnEvent, Progress, StageStarted
from sq_stream.formats.chunks import read_chunk, write_chunk
from sq_stream.formats.storage import is_missing, make_folder, storage_errors, sync
from sq_stream.models.forward import Decoder
from sq_stream.models.layers import Array, Site
from sq_stream.parallel import Workers

Add = Callable[[Site, Array], None]
"""Adds vectors [..., n] to the second moment of a site."""


class LostWorkError(StorageError):
    """What was left on disk between the layers is missing or damaged: it cannot be gone on with."""


def into_batches(windows: NDArray[np.int32]) -> list[NDArray[np.int32]]:
    """Token ids [n_windows, n_ctx], divided into what is computed together."""
    n = windows_per_batch(windows.shape[1])
    return [windows[start : start + n] for start in range(0, len(windows), n)]


class Chunks:
    """Arrays in a folder, float32, in generations: what one step makes of those before it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        make_folder(folder)

    def read_array(self, generation: int, key: str, shape: tuple[int, ...]) -> Array:
        """The array `key` of a generation.

        Raises:
            LostWorkError: it is missing or damaged.
            StorageError: reading fails.
        """
        try:
            return read_chunk(self._path(generation, key), np.float32, shape)
        except BadInputError as error:
            raise LostWorkError(str(error)) from error
        except StorageError as error:
            raise LostWorkError(str(error)) if is_missing(error) else error from error.__cause__

    def write_array(self, generation: int, key: str, x: Array) -> None:
        """Keep an array.

        Raises:
            StorageError: writing fails.
        """
        write_chunk(self._path(generation, key), x)

    def sync(self) -> None:
        """Make all that is kept survive a power cut.

        Raises:
            StorageError: syncing fails.
        """
        for path in (*self._folder.glob("*.zst"), self._folder):
            sync(path)

    def keep_only(self, generations: Collection[int]) -> None:
        """Delete all others."""
        with storage_errors("deleting files in", self._folder):
            for path in self._folder.glob("*.zst"):
                if int(path.name.split("-")[0]) not in generations:
                    path.unlink()

    def _path(self, generation: int, key: str) -> Path:
        return self._folder / f"{generation}-{key}.zst"


class Stream(Chunks):
    """Activations or gradients on disk: a generation is what enters one layer, one file for each batch of windows."""

    def __init__(self, folder: Path, batches: Sequence[NDArray[np.int32]], n_embd: int) -> None:
        super().__init__(folder)
        self.batches = batches  # token ids [n_window, n_ctx] of each
        self._n_embd = n_embd

    def read(self, layer: int, batch: int) -> Array:
        """What enters `layer`: [n_window, n_ctx, n_embd]; raises as `read_array`."""
        return self.read_array(layer, f"{batch:06d}", (*self.batches[batch].shape, self._n_embd))

    def write(self, layer: int, batch: int, x: Array) -> None:
        """Keep what enters `layer`; raises as `write_array`."""
        self.write_array(layer, f"{batch:06d}", x)


class Residuals(Stream):
    """The residual stream; its first generation is not stored: it is rows of the token embedding."""

    def __init__(
        self, folder: Path, batches: Sequence[NDArray[np.int32]], reader: LayerReader, decoder: Decoder
    ) -> None:
        super().__init__(folder, batches, reader.n_embd)
        self.reader, self.decoder = reader, decoder

    def read(self, layer: int, batch: int) -> Array:
        """See `Stream.read`."""
        if layer == 0:
            return self.decoder.embed(self.reader.rows("token_embd.weight", self.batches[batch]))
        return super().read(layer, batch)


class Step:
    """One layer, or what comes after the last one, over all windows, with the second moments of its sites."""

    def __init__(
        self,
        name: str,
        sites: Mapping[Site, int],
        compute: Callable[[int, Add], None],
        vectors: str = "the activations that enter",
    ) -> None:
        """`compute` does the work of the batch whose number it is given; `sites` have `vectors` of the widths given."""
        self.name = name
        self._vectors = vectors
        self._sites = sites
        self._compute = compute
        self._moments: dict[Site, Moment] = {}

    def run(self, n_batches: int, budget: Budget, workers: Workers) -> Iterator[None]:
        """Compute all batches, yielding after each in turn."""
        order = InOrder()
        self._moments = {site: budget.moment(width, order) for site, width in self._sites.items()}

        def compute(batch: int) -> None:
            def add(site: Site, x: Array) -> None:
                self._moments[site].add(batch, x.reshape(-1, x.shape[-1]))

            self._compute(batch, add)

        yield from order.run(workers, compute, n_batches)

    def finish(self, energy: float, workers: Workers) -> dict[Site, Factored]:
        """The sketches of all sites."""

        def finish_site(site: Site) -> Factored:
            try:
                return self._moments.pop(site).finish(energy)
            except FloatingPointError:
                raise BadInputError(
                    f"{self._vectors} {site[0]}.weight are not finite: the weights are damaged, or they are too large "
                    "for float32"
                ) from None

        return dict(zip(self._sites, workers.map(finish_site, self._sites), strict=True))


def run_steps(
    stage: str,
    n_steps: int,
    make_step: Callable[[int], Step],
    batches: Sequence[NDArray[np.int32]],
    entry: Entry,
    budget: Budget,
    *,
    energy: float,
    on_event: OnEvent,
) -> None:
    """Do the steps that `entry` lacks, each over all `batches` and each kept when it is done.

    Args:
        stage: what the progress calls it.
        n_steps: number of steps, those that are done included.
        make_step: the step with the number given, made just before it is run.
        batches: token ids [n_window, n_ctx] of each.
        entry: where the sketches go; what lies between the steps is removed from it in the end.
        budget: how to run.
        energy: share of a second moment's trace that its factor keeps.
        on_event: told of the progress.
    """
    n_tokens, n_batches = sum(tokens.size for tokens in batches), len(batches)
    on_event(StageStarted(stage, n_tokens, "tokens"))
    with Workers(budget.threads) as workers:
        for number in range(entry.done, n_steps):
            release_freed()
            step = make_step(number)
            for done, _ in enumerate(step.run(n_batches, budget, workers), 1):
                on_event(Progress(stage, step.name, int(n_tokens * (number + done / n_batches) / n_steps), n_tokens))
            entry.finish_step(step.finish(energy, workers))
            del step  # and with it its weights, before those of the next one are read
    release_freed()
    entry.remove_pass()
