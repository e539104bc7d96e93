"""What an interrupted job left behind: found and gone on with, if it is of the same plan."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sq_stream import __version__
from sq_stream.errors import BadInputError, UsageError, VerificationError
from sq_stream.events import Note, OnEvent
from sq_stream.formats.atomic import partial_path
from sq_stream.formats.gguf_read import GGUFReader
from sq_stream.formats.gguf_write import GGUFFile
from sq_stream.formats.journal import Journal, read_journal
from sq_stream.job.encode import remove_streams
from sq_stream.job.plan import Plan, refuse_existing
from sq_stream.job.verify import check_tensors

HEADER = "header (tokenizer or model card)"


def open_job(plan: Plan, on_event: OnEvent) -> tuple[GGUFFile, Journal]:
    """The partial file, locked, and its journal: those of an interrupted run of the same plan, or new ones.

    Raises:
        BadInputError: the partial file or its journal is damaged.
        InterruptedJobError: another process is writing the same file.
        StorageError: reading or writing failed.
        UsageError: the output exists, or the interrupted run was of another plan.
    """
    file = GGUFFile.open(plan.settings.output, plan.layout)
    try:
        refuse_existing(plan.settings)  # another process may just have finished it
        journal = None if file.is_empty or plan.settings.fresh else _find(plan)
        if journal is None:
            return file, _start(plan, file)
        try:
            file.check()
            n_done = len(checksums_in(journal.path, journal.records))
        except BaseException:
            journal.close()
            raise
    except BaseException:
        file.close()
        raise
    on_event(Note(f"resuming: {n_done} of {len(plan.tensors)} tensors are done"))
    return file, journal


def was_finished(plan: Plan, on_event: OnEvent) -> bool:
    """Whether the output is there, whole, from a run that was killed before it could remove its journal; now it is."""
    output = plan.settings.output
    if plan.settings.fresh or not output.is_file():
        return False
    path = _journal_path(plan)
    if partial_path(output).exists() or not path.is_file():
        return False
    try:
        header, records, _ = read_journal(path)
        _refuse_other(plan, header)
        with GGUFReader.open(output) as reader:
            check_tensors(reader, plan.budget.tile_weights, on_event, checksums=checksums_in(path, records))
    except (BadInputError, UsageError, VerificationError):
        return False
    path.unlink(missing_ok=True)
    return True


def checksums_in(path: Path, records: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """CRC-32 of the tensors that are in the file, by name, from the records of the journal at `path`.

    Raises:
        BadInputError: they are not records of a job.
    """
    found = [(record["tensor"], record.get("crc32")) for record in records if "tensor" in record]
    if not all(isinstance(name, str) and type(crc) is int for name, crc in found):
        raise BadInputError(f"{path} is damaged: start over with --fresh")
    return dict(found)


def _find(plan: Plan) -> Journal | None:
    """The journal of an interrupted run, if it has got anywhere."""
    path = _journal_path(plan)
    if not path.exists():
        return None
    header, records, _ = read_journal(path)
    _refuse_other(plan, header)
    return Journal.open(path) if records else None


def _start(plan: Plan, file: GGUFFile) -> Journal:
    """A new journal, which replaces an older one before anything of what that tells of is overwritten."""
    journal = Journal.create(_journal_path(plan), _identity(plan))
    try:
        remove_streams(plan.settings.output)
        file.start()
    except BaseException:
        journal.remove()
        raise
    return journal


def _refuse_other(plan: Plan, header: Mapping[str, Any]) -> None:
    """Raise UsageError, which says what differs, unless `header` is that of a journal of the same plan."""
    identity = _identity(plan)
    differing = [key for key in identity if header.get(key) != identity[key]]
    if differing:
        named = [key for key in differing if key != HEADER] or differing  # most of them change the header too
        raise UsageError(
            f"{partial_path(plan.settings.output)} is the work of an interrupted run that differs in "
            f"{', '.join(named)}: repeat that run to finish it, start over with --fresh, or name another file with -o"
        )


def _journal_path(plan: Plan) -> Path:
    return plan.settings.output.with_name(plan.settings.output.name + ".journal")


def _identity(plan: Plan) -> dict[str, Any]:
    """Everything that the bytes of the file depend on, by the names that the user is told: JSON values."""
    digests = plan.statistics.digests if plan.statistics else {}
    ranks = [streamed.ranks for streamed in plan.statistics.passes] if plan.statistics else []
    accuracy = [{str(width): rank for width, rank in of.items()} for of in ranks]
    return {
        "version of sq-stream": __version__,
        "checkpoint": plan.checkpoint.fingerprint(),
        **plan.settings.choices(),
        "calibration text": digests.get("calib"),
        "importance matrix": digests.get("imatrix"),
        "accuracy of the calibration (--max-ram)": accuracy,
        "linears shaped two-sidedly (--max-ram)": len(plan.turns.two_sided) if plan.turns else 0,
        "rounds of refinement (--max-ram)": plan.turns.refining.n_rounds if plan.turns and plan.turns.refining else 0,
        HEADER: hashlib.sha256(plan.layout.header).hexdigest(),
    }
