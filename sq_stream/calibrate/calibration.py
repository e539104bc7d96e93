"""From a checkpoint and text to the statistics of every linear: computed once, then found in the store."""

from __future__ import annotations

import hashlib
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
from numpy.typing import NDArray

from sq_stream.calibrate.budget import MIB, Budget, Layer, budgets, measure_layers, rank_choices
from sq_stream.calibrate.forward import run_forward
from sq_stream.calibrate.sketch import Sketch
from sq_stream.calibrate.sketches import Sketches
from sq_stream.calibrate.store import Entry, Store
from sq_stream.calibrate.streamed import LostWorkError
from sq_stream.calibrate.weights import LayerReader
from sq_stream.errors import BadInputError, DoesNotFitError, StorageError
from sq_stream.events import Note, OnEvent, ignore
from sq_stream.formats.checkpoint import Checkpoint
from sq_stream.formats.storage import is_missing
from sq_stream.formats.strict_json import brief
from sq_stream.models.base import ModelSpec
from sq_stream.models.forward import Decoder, find_decoder
from sq_stream.models.layers import Site
from sq_stream.units import format_size

VERSION = 2
"""Of the maths and the file format: sketches of another one are not used."""


@dataclass(frozen=True, eq=False)
class Calibration:
    """A calibration that the store has or that can be computed; made by `plan_calibration`."""

    spec: ModelSpec
    reader: LayerReader
    decoder: Decoder
    layers: Sequence[Layer]
    windows: NDArray[np.int32]
    store: Store
    identity: Mapping[str, Any]  # everything that the sketches depend on
    model: str  # name of the checkpoint's folder
    ranks: Mapping[int, int]  # width of a site -> rank of its sketch, for sites that are not exact
    found: bool  # in the store
    budget: Budget | None  # of computing it; None: it does not fit

    @property
    def pending(self) -> Budget | None:
        """How it will be computed; None if there is nothing to compute."""
        return None if self.found else self.budget

    @property
    def n_tokens(self) -> int:
        """Tokens to compute."""
        return self.windows.size if self.pending else 0

    @property
    def peak_ram(self) -> int:
        """Resident bytes at the peak of computing it."""
        return self.pending.peak_ram if self.pending else 0

    @property
    def peak_disk(self) -> int:
        """Bytes that computing it puts into the store's folder, at the peak."""
        return self.pending.peak_disk if self.pending else 0

    def check_disk(self, output: Path | None = None, output_bytes: int = 0) -> None:
        """Make sure that there is room for what is to be computed.

        Args:
            output: folder of a file that is written besides.
            output_bytes: that it will yet take, on the same disk perhaps.

        Raises:
            DoesNotFitError: the disk is too small.
        """
        folder = next(path for path in (self.store.folder, *self.store.folder.absolute().parents) if path.exists())
        free, needed = shutil.disk_usage(folder).free, self.peak_disk - self.store.n_bytes(self.identity)
        what = f"calibration needs up to {format_size(needed)} of disk space"
        if output is not None and output.stat().st_dev == folder.stat().st_dev:
            needed += output_bytes
            what += f", the file on the same disk {format_size(output_bytes)},"
        if free < needed:
            raise DoesNotFitError(
                f"{self.store.folder}: {what} and {format_size(free)} are free: "
                "make room, or choose another place with --cache"
            )

    def run(self, on_event: OnEvent = ignore) -> Sketches:
        """The sketches, computed only if the store does not have them, and again if they are damaged when needed.

        Raises:
            BadInputError: NaN or infinite weights or activations.
            DoesNotFitError: the disk is too small, or the memory after all, for what was found is damaged.
            InterruptedJobError: another process is computing the same.
            StorageError: reading or writing failed; finished layers are kept.
        """
        entry = self._complete(on_event)
        widths = {t.name: t.n_rows if self.of_outputs else t.n_in for t in self.spec.tensors}

        def load(site: Site) -> Sketch:
            nonlocal entry
            try:
                n = widths.get(f"{site[0]}.weight")
                if n is None:
                    raise BadInputError(f"{entry.folder} has statistics of {brief(site)}, not this model's")
                return entry.load(site, (self.ranks.get(n, n), n))
            except (BadInputError, StorageError) as error:
                if isinstance(error, StorageError) and not is_missing(error):
                    raise
                on_event(Note(f"{error}; calibrating anew"))
                entry.discard()
                entry = self._complete(on_event)
                return entry.load(site)

        def close() -> None:
            entry.close()

        sites = {site.linears: site.n_dead for site in entry.sites}
        return Sketches(self.spec, sites, load, close, of_outputs=self.of_outputs)

    def _complete(self, on_event: OnEvent) -> Entry:
        """The entry of the store, with all of its steps done."""
        about = {"model": self.model, "n_tokens": self.windows.size, "of": "outputs" if self.of_outputs else "inputs"}
        entry = self.store.open(self.identity, about, self.n_steps, on_event)
        resumed = entry.done > 0
        try:
            if not entry.complete:
                self._compute(entry, on_event)
            return entry
        except LostWorkError as error:
            entry.discard()
            if not resumed:
                raise
            on_event(Note(f"{error}; calibrating from the first layer on"))
            return self._complete(on_event)
        except BadInputError:
            entry.discard()
            raise
        except BaseException:
            entry.close()
            raise

    def _compute(self, entry: Entry, on_event: OnEvent) -> None:
        if self.budget is None:
            raise DoesNotFitError(
                f"{entry.folder} is damaged, and computing it again needs more memory than --max-ram gives: raise it, "
                "or run the same command again to make do with a coarser calibration"
            )
        replace(self, found=False).check_disk()
        self._pass(entry, self.budget, on_event)

    # What another kind of pass does otherwise

    of_outputs: ClassVar[bool] = False
    """Whether the statistics are of what linears put out, not of what enters them."""
    forward_passes: ClassVar[int] = 1
    """That it takes as long as."""

    @staticmethod
    def measure(decoder: Decoder, reader: LayerReader, n_ctx: int) -> Sequence[Layer]:
        """What each layer needs with windows of `n_ctx` tokens."""
        return measure_layers(decoder, reader, n_ctx)

    @staticmethod
    def n_stored(decoder: Decoder) -> int:
        """Arrays of the residual stream's shape, of all windows, that are on disk together."""
        return 2

    @property
    def n_steps(self) -> int:
        """Steps that can be resumed after."""
        return self.decoder.n_layer + 1

    def _pass(self, entry: Entry, budget: Budget, on_event: OnEvent) -> None:
        run_forward(
            self.reader,
            self.decoder,
            self.windows,
            self.layers,
            entry,
            budget,
            energy=self.identity["energy"],
            on_event=on_event,
        )


Pass = TypeVar("Pass", bound=Calibration)


def plan_calibration(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    windows: NDArray[np.int32],
    store: Store,
    *,
    max_ram: int,
    threads: int,
    energy: float = 1.0,
    vocabulary_bytes: int = 0,
    afterwards: Callable[[Calibration], int] = lambda calibration: 0,
) -> Calibration:
    """The most accurate statistics of every linear of a model on a text that memory allows.

    The same checkpoint, windows and settings give the same bits for any number of threads; `max_ram` only matters
    where it is so small that wide sites are sketched. What the store has need not be computed.

    Args:
        checkpoint: the weights.
        spec: the model.
        windows: token ids [n_windows, n_ctx].
        store: where sketches are kept; an interrupted calibration goes on from there.
        max_ram: bytes of resident memory that the process may use at its peak.
        threads: at most.
        energy: share of a second moment's trace that its factor keeps; 1 keeps all of the matrix.
        vocabulary_bytes: size of the tokenizer's files, whose vocabulary is in memory.
        afterwards: resident bytes, at the peak, of what is done with the sketches of a calibration.

    Raises:
        BadInputError: ids outside the vocabulary, or no windows.
        UnsupportedModelError: the architecture has no forward pass.
        DoesNotFitError: `max_ram` is too small; the message names the smallest that works.
    """
    return plan_pass(
        Calibration,
        checkpoint,
        spec,
        windows,
        store,
        max_ram=max_ram,
        threads=threads,
        energy=energy,
        vocabulary_bytes=vocabulary_bytes,
        afterwards=afterwards,
    )


def plan_pass(
    kind: type[Pass],
    checkpoint: Checkpoint,
    spec: ModelSpec,
    windows: NDArray[np.int32],
    store: Store,
    *,
    max_ram: int,
    threads: int,
    energy: float,
    afterwards: Callable[[Calibration], int],
    settings: Mapping[str, Any] | None = None,
    vocabulary_bytes: int = 0,
) -> Pass:
    """See `plan_calibration`; for any `kind` of pass, with `settings` that its results depend on besides."""
    reader = LayerReader(spec, checkpoint)
    _check_windows(windows, reader.n_vocab)
    decoder = find_decoder(spec.arch, spec.metadata)
    layers = kind.measure(decoder, reader, windows.shape[1])
    smallest = sys.maxsize
    for ranks in rank_choices(layers, reader.n_embd):
        identity = {**_identity(checkpoint, windows, energy, ranks), **(settings or {})}
        found = store.has(identity)
        ways = list(
            budgets(
                layers,
                windows.shape,
                reader.n_embd,
                ranks=ranks,
                threads=threads,
                n_stored=kind.n_stored(decoder),
                vocabulary_bytes=vocabulary_bytes,
            )
        )
        budget = next((way for way in ways if way.peak_ram <= max_ram), None)
        model = checkpoint.folder.resolve().name
        planned = kind(
            spec, reader, decoder, layers, windows, store, identity, model, ranks, found=found, budget=budget
        )
        later = afterwards(planned)
        if later <= max_ram and (found or budget):
            return planned
        smallest = min(smallest, max(later, 0 if found else min(way.peak_ram for way in ways)))
    raise DoesNotFitError(
        f"--max-ram {format_size(max_ram)} is too small for this model and windows of {windows.shape[1]} tokens: "
        f"the smallest that works is --max-ram {-(-smallest // MIB)}M"
    )


def _identity(
    checkpoint: Checkpoint, windows: NDArray[np.int32], energy: float, ranks: Mapping[int, int]
) -> dict[str, Any]:
    """Everything that the sketches depend on."""
    return {
        "version": VERSION,
        "checkpoint": checkpoint.fingerprint(),
        "text": hashlib.sha256(np.ascontiguousarray(windows, "<i4").tobytes()).hexdigest(),
        "windows": list(windows.shape),
        "energy": energy,
        "ranks": {str(width): rank for width, rank in ranks.items()},
    }


def _check_windows(windows: NDArray[np.int32], n_vocab: int) -> None:
    if windows.ndim != 2 or windows.size == 0:
        raise BadInputError(f"calibration needs windows of token ids [n_windows, n_ctx]; these are {windows.shape}")
    lowest, highest = int(windows.min()), int(windows.max())
    if lowest < 0 or highest >= n_vocab:
        raise BadInputError(
            f"the calibration text has token id {lowest if lowest < 0 else highest}, the model's vocabulary "
            f"{n_vocab} tokens: the ids are of another tokenizer"
        )
