"""From a checkpoint and text to the statistics of every linear: computed once, then found in the store."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sq_stream.calibrate.budget import Budget, make_budget, measure_layers
from sq_stream.calibrate.forward import LostWorkError, run_forward
from sq_stream.calibrate.sketch import Sketch
from sq_stream.calibrate.sketches import Sketches
from sq_stream.calibrate.store import Entry, Store
from sq_stream.calibrate.weights import LayerReader
from sq_stream.errors import BadInputError, DoesNotFitError, StorageError
from sq_stream.events import Note, OnEvent, ignore
from sq_stream.formats.checkpoint import Checkpoint
from sq_stream.models.base import ModelSpec
from sq_stream.models.forward import find_decoder
from sq_stream.models.layers import Site
from sq_stream.units import format_size

VERSION = 1
"""Of the maths and the file format: sketches of another one are not used."""


def calibrate(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    windows: NDArray[np.int32],
    store: Store,
    *,
    max_ram: int,
    threads: int,
    energy: float = 1.0,
    exact_up_to: int | None = None,
    on_event: OnEvent = ignore,
) -> Sketches:
    """The statistics of every linear of a model on a text; computed only if the store does not have them.

    The same checkpoint, windows and settings give the same bits for any number of threads; `max_ram` only matters
    where it is so small that wide sites are sketched.

    Args:
        checkpoint: the weights.
        spec: the model.
        windows: token ids [n_windows, n_ctx].
        store: where sketches are kept; an interrupted calibration goes on from there.
        max_ram: bytes of resident memory that the process may use at its peak.
        threads: at most.
        energy: share of a second moment's trace that its factor keeps; 1 keeps all of the matrix.
        exact_up_to: the widest site whose statistics may be exact, wider ones are sketched; None: as memory allows.
        on_event: told of the progress.

    Raises:
        BadInputError: ids outside the vocabulary, no windows, NaN or infinite weights or activations.
        UnsupportedModelError: the architecture has no forward pass.
        DoesNotFitError: memory or disk are too small.
        InterruptedJobError: another process is computing the same.
        StorageError: reading or writing failed; finished layers are kept.
    """
    reader = LayerReader(spec, checkpoint)
    _check_windows(windows, reader.n_vocab)
    decoder = find_decoder(spec.arch, spec.metadata)
    layers = measure_layers(decoder, reader)
    budget = make_budget(
        layers, windows.shape, reader.n_embd, max_ram=max_ram, threads=threads, exact_up_to=exact_up_to
    )
    exact, planned = (_identity(checkpoint, windows, energy, ranks) for ranks in ({}, budget.ranks))
    about = {"model": checkpoint.folder.resolve().name, "n_tokens": windows.size}
    steps = decoder.n_layer + 1

    def begin() -> Entry:
        found = store.find(exact, about, steps, on_event) if exact_up_to is None else None
        return found or store.open(planned, about, steps, on_event)

    def forward(entry: Entry) -> None:
        _check_disk(entry, budget)
        run_forward(reader, decoder, windows, layers, entry, budget, energy=energy, on_event=on_event)

    return _sketches(spec, partial(_complete, begin, forward, on_event), on_event)


def _complete(begin: Callable[[], Entry], forward: Callable[[Entry], None], on_event: OnEvent) -> Entry:
    """The entry that `begin` opens, with all of its steps done by `forward` where they are not yet."""
    entry = begin()
    resumed = entry.done > 0
    try:
        if not entry.complete:
            forward(entry)
        return entry
    except LostWorkError as error:
        entry.discard()
        if not resumed:
            raise
        on_event(Note(f"{error}; calibrating from the first layer on"))
        return _complete(begin, forward, on_event)
    except BadInputError:
        entry.discard()
        raise
    except BaseException:
        entry.close()
        raise


def _sketches(spec: ModelSpec, compute: Callable[[], Entry], on_event: OnEvent) -> Sketches:
    """The statistics in the entry that `compute` finds or makes, and makes anew if they are damaged when needed."""
    entry = compute()

    def load(site: Site) -> Sketch:
        nonlocal entry
        try:
            return entry.load(site)
        except (BadInputError, StorageError) as error:
            on_event(Note(f"{error}; calibrating anew"))
            entry.discard()
            entry = compute()
            return entry.load(site)

    def close() -> None:
        entry.close()

    return Sketches(spec, {site.linears: site.n_dead for site in entry.sites}, load, close)


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


def _check_disk(entry: Entry, budget: Budget) -> None:
    free, needed = shutil.disk_usage(entry.folder).free, budget.peak_disk - entry.n_bytes
    if free < needed:
        raise DoesNotFitError(
            f"{entry.folder}: calibration needs up to {format_size(needed)} of disk space and "
            f"{format_size(free)} are free: make room, or choose another place with --cache"
        )
