"""Where the statistics of a job's linears come from: a calibration, found in the store or computed, or an imatrix."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from sq_stream.calibrate.calibration import Calibration, plan_calibration
from sq_stream.calibrate.corpus import WINDOWS, build_corpus
from sq_stream.calibrate.imatrix import MAX_BYTES, import_imatrix
from sq_stream.calibrate.sensitivity import Sensitivity, plan_sensitivity
from sq_stream.calibrate.shingles import sample
from sq_stream.calibrate.sketches import Sketches
from sq_stream.calibrate.store import Store
from sq_stream.errors import DoesNotFitError, UsageError
from sq_stream.events import Note, OnEvent
from sq_stream.formats.checkpoint import Checkpoint
from sq_stream.formats.metadata import Entry, ValueType, array, string, u32
from sq_stream.formats.storage import read_input
from sq_stream.job.settings import Settings
from sq_stream.models.base import ModelSpec
from sq_stream.text.encode import ConfinedTokenizer
from sq_stream.text.vocabulary import Vocabulary, tokenizer_bytes

SENSITIVITY_WINDOWS = 96
"""Of the text, for the backward pass: on its disk are the inputs of all layers."""


@dataclass(frozen=True, eq=False)
class Statistics:
    """What a job will use, known before it runs: a calibration, or an importance matrix."""

    calibration: Calibration | None
    imatrix: Sketches | None
    convergence: NDArray[np.int32] | None  # windows of text that nothing is fitted to and that may stop a fit
    digests: Mapping[str, str]  # SHA-256 of each part of the text, or of the importance matrix
    notes: tuple[str, ...] = ()
    sensitivity: Sensitivity | None = None  # of the effort best, if there is memory for it
    coverage: Mapping[str, int] = field(default_factory=dict)  # windows of the calibration by what their text is

    @property
    def passes(self) -> tuple[Calibration, ...]:
        """What runs the model on text, in turn."""
        return tuple(streamed for streamed in (self.calibration, self.sensitivity) if streamed is not None)

    @property
    def entries(self) -> list[Entry]:
        """What the file says of them, so that nobody scores it on the text that it was fitted to."""
        entries = [string(f"sq_stream.{name}.sha256", digest) for name, digest in self.digests.items()]
        if self.calibration is not None:
            windows = self.calibration.windows
            entries.append(u32("sq_stream.calib.tokens", windows.size))
            if ranks := self.calibration.ranks:
                widths = ",".join(f"{width}:{rank}" for width, rank in sorted(ranks.items()))
                entries.append(string("sq_stream.calib.ranks", widths))
            entries.append(array("sq_stream.calib.shingles", ValueType.UINT32, sample(windows).tolist()))
        if self.sensitivity is not None:
            entries.append(u32("sq_stream.sensitivity.tokens", self.sensitivity.windows.size))
        return entries


def find_statistics(
    settings: Settings,
    checkpoint: Checkpoint,
    spec: ModelSpec,
    vocabulary: Vocabulary,
    afterwards: Callable[[Calibration, NDArray[np.int32]], int],
) -> Statistics | None:
    """The statistics that these settings ask for; None for weights alone.

    `afterwards` is that of `plan_calibration`, given the windows that may stop a fit besides.

    Raises:
        BadInputError: the text is too short or not this vocabulary's, or the importance matrix not this model's.
        DoesNotFitError: memory is too small.
        StorageError: a file cannot be read.
        UsageError: a file is not there, or the windows are too small or too large.
    """
    if settings.effort == "fast":
        return None
    if settings.imatrix is not None:
        if not settings.imatrix.exists():
            raise UsageError(f"{settings.imatrix}: no such importance matrix")
        imatrix = import_imatrix(settings.imatrix, spec)
        digest = hashlib.sha256(read_input(settings.imatrix, MAX_BYTES)).hexdigest()
        return Statistics(None, imatrix, None, {"imatrix": digest})
    corpus = build_corpus(
        ConfinedTokenizer(settings.model_dir),
        vocabulary,
        ctx=settings.ctx,
        files=settings.calib,
        extend=settings.calib_extend,
        windows=(settings.windows, *WINDOWS[1:]),
    )
    calibration = plan_calibration(
        checkpoint,
        spec,
        corpus.calib,
        Store(settings.cache),
        max_ram=settings.max_ram,
        threads=settings.threads,
        vocabulary_bytes=tokenizer_bytes(settings.model_dir),
        afterwards=lambda calibration: afterwards(calibration, corpus.convergence),
    )
    statistics = Statistics(
        calibration, None, corpus.convergence, corpus.digests, corpus.notes, coverage=corpus.coverage
    )
    return _with_sensitivity(statistics, checkpoint, settings) if settings.effort == "best" else statistics


def _with_sensitivity(statistics: Statistics, checkpoint: Checkpoint, settings: Settings) -> Statistics:
    """The same and the second moments of output gradients, where memory is not too small for them."""
    assert statistics.calibration is not None
    calibration, all_windows = statistics.calibration, statistics.calibration.windows
    n = min(len(all_windows), SENSITIVITY_WINDOWS)
    try:
        sensitivity = plan_sensitivity(
            checkpoint,
            calibration.spec,
            all_windows[np.linspace(0, len(all_windows) - 1, n).astype(int)],
            calibration.store,
            max_ram=settings.max_ram,
            threads=settings.threads,
            vocabulary_bytes=tokenizer_bytes(settings.model_dir),
        )
    except DoesNotFitError as error:
        note = f"shaped by the inputs of linears alone, not by the gradients of their outputs: {error}"
        return replace(statistics, notes=(*statistics.notes, note))
    return replace(statistics, sensitivity=sensitivity)


def gather(statistics: Statistics, settings: Settings, spec: ModelSpec, on_event: OnEvent) -> Sketches:
    """The sketches themselves; a calibration that the store lacks is computed.

    Raises:
        SqStreamError: as `calibrate.calibration.Calibration.run`.
    """
    if statistics.imatrix is not None:
        sketches = statistics.imatrix
    else:
        assert statistics.calibration is not None
        sketches = statistics.calibration.run(on_event)
    if sketches.unseen:
        more = f" and {len(sketches.unseen) - 3} more" if len(sketches.unseen) > 3 else ""
        on_event(Note(f"no statistics, plain rounding: {', '.join(sketches.unseen[:3])}{more}"))
    if sketches.dead:
        site, n = next(iter(sketches.dead.items()))
        on_event(Note(f"inputs that were zero in every token: {sum(sketches.dead.values())} (at {site}: {n})"))
    return sketches
