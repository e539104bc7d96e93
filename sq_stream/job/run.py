"""Run a plan: encode tensor by tensor into a partial file, read it back, and only then give it its name."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress

from sq_stream.calibrate.sketches import Sketches
from sq_stream.errors import RESUMES, InterruptedJobError, StorageError
from sq_stream.events import Finished, Note, OnEvent, ignore
from sq_stream.formats.blocks import BlockType
from sq_stream.formats.gguf_read import GGUFReader
from sq_stream.formats.gguf_write import GGUFFile
from sq_stream.formats.journal import Journal
from sq_stream.job.budget import SHAPED_TYPES, decoder_uses, kernel_uses
from sq_stream.job.encode import Encoding, remove_streams
from sq_stream.job.plan import Plan, check_output, refuse_existing
from sq_stream.job.record import Record, is_measured, measure, read_record, recording
from sq_stream.job.resume import checksums_in, open_job, was_finished
from sq_stream.job.statistics import gather
from sq_stream.job.timeline import peak_ram
from sq_stream.job.verify import check_tensors
from sq_stream.kernels.cache import mark_kept
from sq_stream.models.forward import linears_by_norm, linears_by_product
from sq_stream.quantize.smooth import Scaling, find_scalings

Publish = Callable[[Record], None]
"""Told of a job that is done but for its file's name; if it raises, the same command comes back to this point."""


def run(plan: Plan, on_event: OnEvent = ignore, publish: Publish | None = None) -> Finished:
    """Write the file of `plan`, resuming an interrupted run of the same plan; with `publish`, measure it too.

    Raises:
        InterruptedJobError: stopped by SIGINT, or another process is writing the same file; running again resumes.
        UsageError: the output exists, or an interrupted run with other settings is in the way.
        BadInputError: a weight is NaN or infinite.
        StorageError: reading or writing failed; what is done is kept.
        VerificationError: what was read back is not what was written.
    """
    started = time.monotonic()
    try:
        if not was_finished(plan, on_event):
            check_output(plan)
            for note in plan.notes:
                on_event(Note(note))
            _write(plan, on_event, publish)
    except KeyboardInterrupt:
        raise InterruptedJobError(RESUMES) from None
    finished = Finished(
        output=str(plan.settings.output),
        n_bytes=plan.layout.total_bytes,
        bits_per_weight=plan.bits_per_weight,
        seconds=time.monotonic() - started,
        peak_ram=peak_ram(),
    )
    on_event(finished)
    return finished


def _write(plan: Plan, on_event: OnEvent, publish: Publish | None) -> None:
    file, journal = open_job(plan, on_event)
    with file, journal:
        if publish is None:
            _produce(plan, file, journal, on_event)
        else:
            with recording(journal, on_event) as recorder:
                _produce(plan, file, journal, recorder, measured=True)
                publish(read_record(journal, file.partial, recorder.timeline()))
        refuse_existing(plan.settings)
        remove_streams(plan.settings.output)
        file.commit()
        with suppress(StorageError):  # the file has its name: a journal that stays does no harm
            journal.remove()


def _produce(plan: Plan, file: GGUFFile, journal: Journal, on_event: OnEvent, *, measured: bool = False) -> None:
    """Fill the partial file and read it back; if it is to be `measured`, put into the journal what was found."""
    checksums = checksums_in(journal.path, journal.records)
    types = [tensor.type for tensor in plan.tensors if tensor.source.name not in checksums]
    to_measure = measured and not is_measured(plan, journal)
    sketches = gradients = None
    with ExitStack() as stack:
        if plan.statistics is not None and (len(checksums) < len(plan.tensors) or to_measure):
            sketches = stack.enter_context(gather(plan.statistics, plan.settings, plan.spec, on_event))
        scalings = _smooth(plan, sketches)
        if plan.turns is not None and not checksums.keys() >= plan.turns.two_sided.keys():
            gradients = stack.enter_context(_gradients(plan, scalings, on_event))
        Encoding(plan, sketches, gradients, scalings, file, journal, checksums, on_event).run()
        if to_measure:
            measure(plan, sketches, scalings, journal, file.partial, on_event)
    with GGUFReader.open(file.partial) as reader:
        check_tensors(reader, plan.budget.tile_weights, on_event, checksums=checksums)
    _remember_kernels(types, shaped=plan.calibration is not None, on_event=on_event)


def _remember_kernels(types: Sequence[BlockType], *, shaped: bool, on_event: OnEvent) -> None:
    """Let the next plan know what need not be compiled again, or tell why it has to be."""
    from sq_stream.kernels.jit import cache_failure

    failure = cache_failure()
    if failure is None:
        with suppress(OSError):
            mark_kept(kernel_uses(types, shaped=shaped) | decoder_uses(types))
    else:
        on_event(Note(f"compiled kernels could not be kept ({failure}): the next run compiles them again"))


def _gradients(plan: Plan, scalings: Mapping[str, Scaling], on_event: OnEvent) -> Sketches:
    """Statistics of what the outputs of linears get, as their rows are scaled."""
    assert plan.statistics is not None
    assert plan.statistics.sensitivity is not None
    gradients = plan.statistics.sensitivity.run(on_event)
    gradients.smooth({name: scaling.rows for name, scaling in scalings.items() if scaling.rows is not None})
    return gradients


def _smooth(plan: Plan, sketches: Sketches | None) -> dict[str, Scaling]:
    """Scalings of tensors by name, which `sketches` then take into account."""
    if sketches is None or plan.calibration is None:
        return {}
    decoder, names = plan.calibration.decoder, [tensor.source.name for tensor in plan.tensors]
    shaped = {tensor.source.name for tensor in plan.tensors if tensor.type.name in SHAPED_TYPES}
    scalings = find_scalings(linears_by_norm(decoder, names), linears_by_product(decoder, names), shaped, sketches)
    sketches.smooth({name: scaling.columns for name, scaling in scalings.items() if scaling.columns is not None})
    return scalings
