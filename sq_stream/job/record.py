"""What a report tells of a job, measured only where one is asked for, and kept in the journal until the job is done."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sq_stream.calibrate.sketches import Sketches
from sq_stream.calibrate.spectrum import leading_energy
from sq_stream.errors import BadInputError, SqStreamError
from sq_stream.events import OnEvent, Progress, StageStarted
from sq_stream.formats.gguf_read import GGUFReader
from sq_stream.formats.journal import Journal
from sq_stream.formats.storage import sha256_of
from sq_stream.job.plan import Plan, PlannedTensor
from sq_stream.job.tiles import row_tiles
from sq_stream.job.timeline import Recorder, Stage, Timeline
from sq_stream.parallel import Workers
from sq_stream.quantize.measure import ErrorMeter, OutputError
from sq_stream.quantize.smooth import UNSCALED, Scaling

STAGE = "measure"
EXACT_TYPES = frozenset(("F32",))  # in which a tensor has no error


@dataclass(frozen=True)
class SiteRecord:
    """What is known of the inputs of some linears."""

    linears: tuple[str, ...]  # tensors
    n_in: int
    rank: int  # of the sketch's factor; as large as n_in, less its dead channels, where the second moment is exact
    n_tokens: int
    n_dead: int  # channels that were zero in every token
    energy_kept: float  # share of the second moment's trace that is in the factor, and not in the diagonal alone
    leading_energy: tuple[float, ...]  # share of the trace in the strongest 1, 2, 4, … directions


@dataclass(frozen=True)
class Record:
    """A job that is done but for its file's name."""

    sha256: str  # of the file
    errors: Mapping[str, OutputError]  # by tensor; not of those that are stored exactly
    sites: tuple[SiteRecord, ...]  # empty where nothing but the weights was known, or mean squares alone
    unseen: tuple[str, ...]  # linears without statistics, in a job that has any
    runs: tuple[Timeline, ...]  # the interrupted ones and the last


def measure(
    plan: Plan, sketches: Sketches | None, scalings: Mapping[str, Scaling], journal: Journal,
    partial: Path, on_event: OnEvent,
) -> None:  # fmt: skip
    """Measure the errors of all tensors in the file at `partial`, and their inputs; what the journal has stays.

    Raises:
        StorageError: reading or writing failed; what is measured is kept.
    """
    done = {record["measured"] for record in journal.records if "measured" in record}
    seen = {linear for record in journal.records if "site" in record for linear in record["site"]["linears"]}
    if not any("unseen" in record for record in journal.records):
        journal.append({"unseen": list(sketches.unseen if sketches else ())})
    on_event(StageStarted(STAGE, plan.n_weights))
    if sketches is not None:
        sketches.smooth({})  # the inputs as they are
    n_done = 0
    with Workers(plan.settings.threads) as workers, GGUFReader.open(partial) as reader:
        for tensor in plan.tensors:
            name = tensor.source.name
            if tensor.type.name not in EXACT_TYPES and name not in done:
                site = _site(name, sketches, workers) if sketches is not None and name not in seen else None
                if site is not None:
                    seen.update(site.linears)
                    journal.append({"site": asdict(site)})
                error = _error(plan, tensor, sketches, scalings.get(name, UNSCALED), reader, workers)
                journal.append({"measured": name, "error": asdict(error)})
            n_done += tensor.source.n_rows * tensor.source.n_in
            on_event(Progress(STAGE, name, n_done, plan.n_weights))


def is_measured(plan: Plan, journal: Journal) -> bool:
    """Whether there is nothing left for `measure` to do."""
    done = {record.get("measured") for record in journal.records}
    return all(tensor.source.name in done for tensor in plan.tensors if tensor.type.name not in EXACT_TYPES)


def _error(
    plan: Plan, tensor: PlannedTensor, sketches: Sketches | None, scaling: Scaling,
    reader: GGUFReader, workers: Workers,
) -> OutputError:  # fmt: skip
    source = tensor.source
    meter = ErrorMeter(tensor.type, sketches.get(source.name) if sketches else None, scaling, workers)
    for rows in row_tiles(source.n_rows, source.n_in, plan.budget.tile_weights):
        w = source.read(plan.checkpoint, rows.start, rows.stop)
        meter.add(w, reader.read_rows(source.name, rows.start, rows.stop), rows)
    return meter.result()


def _site(name: str, sketches: Sketches, workers: Workers) -> SiteRecord | None:
    """Of the inputs of linear `name`, if they have a second moment."""
    linears = sketches.site(name)
    if not linears or not (sketch := sketches[name]).rank:
        return None
    diagonal = sketch.diagonal()
    trace = float(diagonal.sum(dtype=np.float64)) or 1.0
    return SiteRecord(
        linears=linears,
        n_in=sketch.n_in,
        rank=sketch.rank,
        n_tokens=sketch.n_tokens,
        n_dead=int(np.count_nonzero(diagonal == 0)),
        energy_kept=1 - float(sketch.residual.sum(dtype=np.float64)) / trace,
        leading_energy=tuple(leading_energy(sketch, workers)),
    )


@contextmanager
def recording(journal: Journal, on_event: OnEvent) -> Iterator[Recorder]:
    """Records the timeline of the block, which is kept in the journal if the block is left by an exception."""
    with Recorder(on_event) as recorder:
        try:
            yield recorder
        except BaseException:
            with suppress(SqStreamError):
                journal.append({"run": asdict(recorder.timeline())})
            raise


def read_record(journal: Journal, partial: Path, last: Timeline) -> Record:
    """The record of a job whose tensors are measured and whose `last` run is this one.

    Raises:
        BadInputError: the journal holds something else.
        StorageError: the file cannot be read.
    """
    records = journal.records
    try:
        return Record(
            sha256=sha256_of(partial),
            errors={record["measured"]: OutputError(**record["error"]) for record in records if "measured" in record},
            sites=tuple(_parse_site(record["site"]) for record in records if "site" in record),
            unseen=tuple(name for record in records for name in record.get("unseen", ())),
            runs=(*(_parse_timeline(record["run"]) for record in records if "run" in record), last),
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise BadInputError(f"{journal.path} is damaged: start over with --fresh") from error


def _parse_site(fields: dict[str, Any]) -> SiteRecord:
    lists = {key: tuple(fields[key]) for key in ("linears", "leading_energy")}
    return SiteRecord(**{**fields, **lists})


def _parse_timeline(fields: dict[str, Any]) -> Timeline:
    stages = tuple(Stage(**stage) for stage in fields["stages"])
    return Timeline(fields["seconds"], fields["peak_ram"], stages, tuple(map(tuple, fields["samples"])))
