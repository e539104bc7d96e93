"""An evaluation from start to end: open and check everything, plan memory and disk, stream, sum up."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Literal, cast

import numpy as np
from numpy.typing import NDArray

from sq_stream import __version__
from sq_stream.calibrate.calibration import Calibration
from sq_stream.calibrate.shingles import overlap, sample
from sq_stream.calibrate.sketch import Sketch
from sq_stream.calibrate.sketches import is_linear
from sq_stream.errors import BadInputError, DoesNotFitError, InterruptedJobError, StorageError
from sq_stream.evaluate.budget import Budget, choose_budget, kernel_uses
from sq_stream.evaluate.models import Model, Reference, labels, open_model, open_reference, round_reference
from sq_stream.evaluate.results import SCHEMA, Evaluation, Role
from sq_stream.evaluate.settings import MADE, Settings
from sq_stream.evaluate.statistics import N_SAMPLES, SEED, summarize
from sq_stream.evaluate.stream import score
from sq_stream.evaluate.suites import Suite, make_suites
from sq_stream.events import Note, OnEvent, ignore
from sq_stream.formats.storage import make_folder, open_locked, storage_errors, user_cache
from sq_stream.job import settings as job_settings
from sq_stream.job.budget import PROGRAM_BYTES
from sq_stream.job.statistics import Statistics, find_statistics, gather
from sq_stream.job.timeline import peak_ram
from sq_stream.kernels.cache import kept_kernels, mark_kept
from sq_stream.text.encode import ConfinedTokenizer
from sq_stream.text.vocabulary import tokenizer_bytes
from sq_stream.units import format_size

Importance = dict[str, NDArray[np.float32]]

_SCRATCH = "evaluation-"


def run(settings: Settings, on_event: OnEvent = ignore) -> Evaluation:
    """Score files, folders and baselines against a reference.

    Raises:
        BadInputError: a file is damaged or another model's, or a text is in the calibration record of a file.
        DoesNotFitError: memory or disk are too small.
        StorageError: reading or writing failed.
        UnsupportedModelError: there is no forward pass for the architecture.
        UsageError: a baseline cannot be made, or a text is not there.
    """
    started = time.monotonic()
    with ExitStack() as opened:
        reference = open_reference(settings.ref)
        opened.enter_context(reference.model)
        given = [opened.enter_context(model) for model in _open_given(settings, reference)]
        statistics = _statistics(settings, reference)
        suites = _suites(settings, reference, given, statistics)
        importance: Importance = {}
        models = [reference.model, *given, *_made(settings, reference, given[0], importance)]
        budget = _budget(settings, models, suites, statistics)
        notes = tuple(note for model in models for note in model.notes)
        for note in notes:
            on_event(Note(note))
        with _scratch(settings.cache or user_cache()) as folder:
            _check_disk(folder, budget)
            if statistics is not None:
                importance |= _importance(statistics, settings, reference, on_event)
            scores = score(models, suites, folder, budget, on_event)
        _remember_kernels(models)
        names = {role: [m.info.name for m in models if m.info.role == role] for role in ("candidate", "baseline")}
        results = (
            summarize(
                suite,
                scores[suite.name],
                reference=reference.model.info.name,
                candidates=names["candidate"],
                baselines=names["baseline"],
            )
            for suite in suites
        )
        return Evaluation(
            schema=SCHEMA,
            sq_stream=__version__,
            models=tuple(model.info for model in models),
            suites=tuple(results),
            notes=notes,
            n_samples=N_SAMPLES,
            seed=SEED,
            threads=budget.threads,
            max_ram=settings.max_ram,
            planned_ram=budget.peak_ram,
            peak_ram=peak_ram(),
            seconds=time.monotonic() - started,
        )


def _open_given(settings: Settings, reference: Reference) -> Iterator[Model]:
    """The files and folders that were named: candidates, then baselines."""
    files = [Path(baseline) for baseline in settings.baselines if baseline not in MADE]
    paths = [*settings.files, *files]
    for i, (path, name) in enumerate(zip(paths, labels(paths, reference.model.info.name), strict=True)):
        role: Role = "candidate" if i < len(settings.files) else "baseline"
        yield open_model(path, name, role, reference)


def _suites(
    settings: Settings, reference: Reference, models: Sequence[Model], statistics: Statistics | None
) -> list[Suite]:
    """What to score, none of which a model was fitted to."""
    suites = make_suites(
        settings.suites, settings.texts, ConfinedTokenizer(settings.ref), reference.vocabulary, ctx=settings.ctx
    )
    records = {model.info.path: model.record for model in models if model.record is not None}
    if statistics is not None and statistics.calibration is not None:
        records["the baseline imatrix"] = sample(statistics.calibration.windows)
    for where, record in records.items():
        for suite in suites:
            _refuse_fitted(suite, where, record)
    return [suite.first(settings.windows) for suite in suites]


def _made(settings: Settings, reference: Reference, like: Model, importance: Importance) -> list[Model]:
    """The baselines made in memory; `importance` may be filled in before they are read."""
    return [
        round_reference(
            cast("Literal['rtn', 'imatrix']", kind),
            like,
            reference,
            importance if kind == "imatrix" else {},
            name=f"{kind} of {like.info.name}",
        )
        for kind in settings.baselines
        if kind in MADE
    ]


def _refuse_fitted(suite: Suite, where: str, record: NDArray[np.uint32]) -> None:
    """Refuse to score a text that a model was calibrated on."""
    found = overlap(suite.windows, record)
    if found.is_repetition:
        raise BadInputError(
            f"{suite.name} is in the calibration text of {where}, wholly or in part: {found.n_found} of the "
            f"{found.n_text} passages that were looked up ({found.n_found / found.n_text:.0%}) are in its record. A "
            "score on text that a model was fitted to says nothing of other text: score another text, or one "
            "without those parts"
        )


def _statistics(settings: Settings, reference: Reference) -> Statistics | None:
    """Where the importance of the baseline `imatrix` comes from; None if there is no such baseline."""
    if "imatrix" not in settings.baselines:
        return None
    widths = {t.n_in for t in reference.spec.tensors if is_linear(t.name, t.shape)}

    def afterwards(calibration: Calibration, held: NDArray[np.int32]) -> int:
        return PROGRAM_BYTES + max(Sketch.needed_bytes(n, calibration.ranks.get(n, n)) for n in widths)

    job = job_settings.parse_settings(
        settings.ref,
        cache=settings.cache,
        windows=settings.calib_windows,
        max_ram=settings.max_ram,
        threads=settings.threads,
    )
    return find_statistics(job, reference.checkpoint, reference.spec, reference.vocabulary, afterwards)


def _importance(statistics: Statistics, settings: Settings, reference: Reference, on_event: OnEvent) -> Importance:
    """Mean squares of the inputs of the layers' linears, as llama-imatrix has them.

    It has none for the output matrix, nor for the token embedding; and attn_v sees what attn_q sees.
    """
    job = job_settings.parse_settings(settings.ref)
    with gather(statistics, job, reference.spec, on_event) as sketches:
        importance = {}
        for name in sketches:
            sketch = sketches[name.replace("attn_v", "attn_q")]
            if name.startswith("blk.") and sketch.n_tokens:
                importance[name] = sketch.diagonal()
        return importance


def _budget(
    settings: Settings, models: Sequence[Model], suites: Sequence[Suite], statistics: Statistics | None
) -> Budget:
    calibration = statistics.calibration if statistics else None
    return choose_budget(
        models,
        suites,
        vocabulary_bytes=tokenizer_bytes(settings.ref),
        before=calibration.peak_ram if calibration else 0,
        threads=settings.threads,
        max_ram=settings.max_ram,
        kept=kept_kernels(kernel_uses(models)),
    )


def _remember_kernels(models: Sequence[Model]) -> None:
    """Let the next plan know what need not be compiled again."""
    from sq_stream.kernels.jit import cache_failure

    if cache_failure() is None:
        with suppress(OSError):
            mark_kept(kernel_uses(models))


@contextmanager
def _scratch(parent: Path) -> Iterator[Path]:
    """A locked folder that is gone in the end; what a killed process has left of its own is removed too."""
    make_folder(parent)
    for left in parent.glob(f"{_SCRATCH}*"):
        with suppress(InterruptedJobError, StorageError):  # it is in use, or just gone
            _remove(left, open_locked(left, os.O_RDONLY))
    folder, lock = _new_folder(parent)
    try:
        yield folder
    finally:
        _remove(folder, lock)


def _new_folder(parent: Path) -> tuple[Path, int]:
    """Made and locked; another process may take it for left over in between."""
    while True:
        with storage_errors("making a folder in", parent):
            folder = Path(tempfile.mkdtemp(prefix=_SCRATCH, dir=parent))
        with suppress(InterruptedJobError, FileNotFoundError):
            return folder, open_locked(folder, os.O_RDONLY)


def _remove(folder: Path, lock: int) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    os.close(lock)


def _check_disk(folder: Path, budget: Budget) -> None:
    free = shutil.disk_usage(folder).free
    if free < budget.peak_disk:
        raise DoesNotFitError(
            f"{folder.parent}: the evaluation needs {format_size(budget.peak_disk)} of disk space for its work, and "
            f"{format_size(free)} are free: make room, or choose another place with --cache"
        )
