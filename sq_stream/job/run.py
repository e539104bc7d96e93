"""Run a plan: encode tensor by tensor into a partial file, read it back, and only then give it its name."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress

from sq_stream import __version__
from sq_stream.calibrate.sketches import Sketches
from sq_stream.errors import BadInputError, InterruptedJobError, UsageError
from sq_stream.events import Finished, Note, OnEvent, ignore
from sq_stream.formats.atomic import partial_path
from sq_stream.formats.blocks import BlockType
from sq_stream.formats.gguf_read import GGUFReader
from sq_stream.formats.gguf_write import GGUFFile
from sq_stream.formats.journal import Journal
from sq_stream.job.budget import SHAPED_TYPES, decoder_uses, kernel_uses
from sq_stream.job.encode import Encoding, remove_streams
from sq_stream.job.plan import Plan, check_output
from sq_stream.job.record import Record, is_measured, measure, read_record, recording
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
    output = plan.settings.output
    check_output(plan)
    for note in plan.notes:
        on_event(Note(note))
    try:
        _write(plan, on_event, publish)
    except KeyboardInterrupt:
        raise InterruptedJobError(
            f"interrupted: the finished tensors are in {partial_path(output)}; the same command goes on from there"
        ) from None
    finished = Finished(
        output=str(output),
        n_bytes=plan.layout.total_bytes,
        bits_per_weight=plan.bits_per_weight,
        seconds=time.monotonic() - started,
        peak_ram=peak_ram(),
    )
    on_event(finished)
    return finished


def _write(plan: Plan, on_event: OnEvent, publish: Publish | None) -> None:
    file, journal = _open(plan, on_event)
    with file, journal:
        if publish is None:
            _produce(plan, file, journal, on_event)
        else:
            with recording(journal, on_event) as recorder:
                _produce(plan, file, journal, recorder, measured=True)
                publish(read_record(journal, file.partial, recorder.timeline()))
        remove_streams(plan.settings.output)
        file.commit()
        journal.remove()


def _produce(plan: Plan, file: GGUFFile, journal: Journal, on_event: OnEvent, *, measured: bool = False) -> None:
    """Fill the partial file and read it back; if it is to be `measured`, put into the journal what was found."""
    checksums = _checksums(journal)
    types = [tensor.type for tensor in plan.tensors if tensor.source.name not in checksums]
    to_measure = measured and not is_measured(plan, journal)
    sketches = None
    if plan.statistics is not None and (len(checksums) < len(plan.tensors) or to_measure):
        sketches = gather(plan.statistics, plan.settings, plan.spec, on_event)
    with sketches or nullcontext():
        scalings = _smooth(plan, sketches)
        Encoding(plan, sketches, scalings, file, journal, checksums, on_event).run()
        if to_measure:
            measure(plan, sketches, scalings, journal, file.partial, on_event)
    with GGUFReader.open(file.partial) as reader:
        check_tensors(reader, plan.budget.tile_weights, on_event, checksums=checksums)
    _remember_kernels(types, shaped=plan.calibration is not None, on_event=on_event)


def _checksums(journal: Journal) -> dict[str, int]:
    """CRC-32 of the tensors that are in the file, by name."""
    found = [(record["tensor"], record.get("crc32")) for record in journal.records if "tensor" in record]
    if not all(isinstance(name, str) and type(crc) is int for name, crc in found):
        raise BadInputError(f"{journal.path} is damaged: start over with --fresh")
    return dict(found)


def _open(plan: Plan, on_event: OnEvent) -> tuple[GGUFFile, Journal]:
    """The partial file and its journal: those of an interrupted run of the same plan, or new ones."""
    output = plan.settings.output
    journal_path = output.with_name(output.name + ".journal")
    identity = {
        "sq_stream": __version__,
        "checkpoint": plan.checkpoint.fingerprint(),
        "header": hashlib.sha256(plan.layout.header).hexdigest(),
        **plan.settings.choices(),
    }
    partial = partial_path(output)
    resumable = journal_path.exists() and partial.exists() and not plan.settings.fresh
    if not resumable:
        remove_streams(output)
        file = GGUFFile.create(output, plan.layout)
        try:
            return file, Journal.create(journal_path, identity)
        except BaseException:
            file.abandon()
            raise
    journal = Journal.open(journal_path)
    differing = [key for key in identity if journal.header.get(key) != identity[key]]
    if differing:
        journal.close()
        raise UsageError(
            f"{partial} is the work of an interrupted run with another {', '.join(differing)}: repeat that run to "
            "finish it, start over with --fresh, or name another file with -o"
        )
    on_event(Note(f"resuming: {len(_checksums(journal))} of {len(plan.tensors)} tensors are done"))
    return GGUFFile.reopen(output, plan.layout), journal


def _remember_kernels(types: Sequence[BlockType], *, shaped: bool, on_event: OnEvent) -> None:
    """Let the next plan know what need not be compiled again, or tell why it has to be."""
    from sq_stream.kernels.jit import cache_failure

    failure = cache_failure()
    if failure is None:
        with suppress(OSError):
            mark_kept(kernel_uses(types, shaped=shaped) | decoder_uses(types))
    else:
        on_event(Note(f"compiled kernels could not be kept ({failure}): the next run compiles them again"))


def _smooth(plan: Plan, sketches: Sketches | None) -> dict[str, Scaling]:
    """Scalings of tensors by name, which `sketches` then take into account."""
    if sketches is None or plan.calibration is None:
        return {}
    decoder, names = plan.calibration.decoder, [tensor.source.name for tensor in plan.tensors]
    shaped = {tensor.source.name for tensor in plan.tensors if tensor.type.name in SHAPED_TYPES}
    scalings = find_scalings(linears_by_norm(decoder, names), linears_by_product(decoder, names), shaped, sketches)
    sketches.smooth({name: scaling.columns for name, scaling in scalings.items() if scaling.columns is not None})
    return scalings
