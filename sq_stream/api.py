"""The jobs of sq-stream as functions: what the command line calls, and what Python programs may call.

>>> from sq_stream import api
>>> api.quantize("models/SmolLM2-135M", "smollm2.gguf", recipe="q4_k_m", pure=True, max_ram="512M")  # doctest: +SKIP
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sq_stream.calibrate.imatrix import export_imatrix
from sq_stream.errors import BadInputError, UsageError
from sq_stream.evaluate.results import Evaluation
from sq_stream.events import Finished, Note, OnEvent, ignore
from sq_stream.job.plan import Plan, check_place, make_plan
from sq_stream.job.record import Record
from sq_stream.job.run import run
from sq_stream.job.settings import DEFAULT_MAX_RAM, Options, parse_settings
from sq_stream.job.statistics import gather
from sq_stream.job.summary import CheckpointSummary, GGUFSummary, summarize_checkpoint, summarize_gguf
from sq_stream.job.verify import TensorCheck, verify_file
from sq_stream.report.content import evaluation_content, quantize_content
from sq_stream.report.files import check_paths, write_reports
from sq_stream.units import parse_size

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from sq_stream.evaluate.settings import Options as EvaluateOptions

PathLike = str | os.PathLike[str]

__all__ = [
    "CheckpointSummary",
    "Evaluation",
    "Finished",
    "GGUFSummary",
    "Plan",
    "TensorCheck",
    "calibrate",
    "evaluate",
    "inspect",
    "plan",
    "quantize",
    "verify",
]


def plan(model_dir: PathLike, output: PathLike | None = None, **options: Unpack[Options]) -> Plan:
    """Plan a quantization from headers alone; nothing is written.

    Args:
        model_dir: folder with config.json, *.safetensors and a tokenizer.
        output: the GGUF file to write; by default NAME-Q4_K_M.gguf in the current folder.
        options: the command line's, as `recipe`, `pure`, `effort`, `max_ram` (bytes, or text as "4G"), `threads`: all
            are listed in `sq_stream.job.settings.Options`.

    Raises:
        SqStreamError: the job cannot be done; the class says why.
    """
    return make_plan(parse_settings(model_dir, output, **options))


def quantize(
    model_dir: PathLike,
    output: PathLike | None = None,
    *,
    report: Sequence[PathLike] = (),
    on_event: OnEvent = ignore,
    **options: Unpack[Options],
) -> Finished:
    """Quantize a checkpoint into a GGUF file; takes what `plan` takes, and resumes what was interrupted.

    Args:
        model_dir: as for `plan`.
        output: as for `plan`.
        report: files to write a report to, *.html or *.json; older ones are replaced. The GGUF file is the same.
        on_event: called with everything that happens.
        options: as for `plan`.

    Raises:
        SqStreamError: the job cannot be done or was stopped; nothing that looks finished is left behind.
    """
    reports = [Path(path) for path in report]
    check_paths(reports, [Path(model_dir)])
    job = plan(model_dir, output, **options)

    def publish(record: Record) -> None:
        write_reports(reports, quantize_content(job, record))

    with job.checkpoint:
        return run(job, on_event, publish if reports else None)


def calibrate(
    model_dir: PathLike,
    *,
    imatrix_out: PathLike | None = None,
    on_event: OnEvent = ignore,
    **options: Unpack[Options],
) -> None:
    """Gather the statistics that `quantize` uses and keep them in the cache.

    Args:
        model_dir: as for `quantize`.
        imatrix_out: also write them here as a GGUF importance matrix.
        on_event: as for `quantize`.
        options: those of `quantize` that say what text to use, where to keep the result, and with what memory and
            threads.

    Raises:
        SqStreamError: it cannot be done or was stopped; finished layers are kept.
    """
    if imatrix_out is not None:
        check_place(Path(imatrix_out))
    job = plan(model_dir, **options)
    if job.statistics is None or job.calibration is None:
        raise UsageError("there is nothing to calibrate with --effort fast or --imatrix")
    for note in job.notes:
        on_event(Note(note))
    with job.checkpoint, gather(job.statistics, job.settings, job.spec, on_event) as sketches:
        if imatrix_out is not None:
            n_windows, n_ctx = job.calibration.windows.shape
            datasets = [str(path) for path in job.settings.calib] or ["sq-stream calib360"]
            export_imatrix(Path(imatrix_out), sketches, n_windows=n_windows, n_ctx=n_ctx, datasets=datasets)


def evaluate(
    files: PathLike | Sequence[PathLike],
    ref: PathLike,
    *,
    report: Sequence[PathLike] = (),
    on_event: OnEvent = ignore,
    **options: Unpack[EvaluateOptions],
) -> Evaluation:
    """Compare the predictions of GGUF files, or of checkpoints, with those of the checkpoint they were made from.

    >>> api.evaluate("x.gguf", "models/x", baselines=["rtn", "other.gguf"], suites=["general"])  # doctest: +SKIP

    Args:
        files: GGUF files or folders of checkpoints.
        ref: folder of the reference.
        report: as for `quantize`.
        on_event: as for `quantize`.
        options: the command line's, all listed in `sq_stream.evaluate.settings.Settings`.

    Raises:
        SqStreamError: it cannot be done or was stopped; nothing is left behind.
    """
    from sq_stream.evaluate.run import run as run_evaluation
    from sq_stream.evaluate.settings import parse_settings as parse_evaluation

    reports = [Path(path) for path in report]
    settings = parse_evaluation([files] if isinstance(files, str | os.PathLike) else files, ref, **options)
    check_paths(reports, [path for path in (settings.ref, *settings.files) if path.is_dir()])
    evaluation = run_evaluation(settings, on_event)
    write_reports(reports, evaluation_content(settings, evaluation))
    return evaluation


def verify(
    path: PathLike, against: PathLike | None = None, *, max_ram: int | str = DEFAULT_MAX_RAM, on_event: OnEvent = ignore
) -> list[TensorCheck]:
    """Check a GGUF file: structure, offsets, every block decodes; with `against`, the error of each tensor.

    Raises:
        SqStreamError: the file is damaged or was not made from `against`.
    """
    bytes_ = parse_size(max_ram) if isinstance(max_ram, str) else max_ram
    return verify_file(
        _existing(path),
        None if against is None else Path(against),
        max_ram=bytes_,
        on_event=on_event,
    )


def inspect(path: PathLike) -> CheckpointSummary | GGUFSummary:
    """Say what a checkpoint folder or a GGUF file holds, from its headers.

    Raises:
        SqStreamError: it cannot be read.
    """
    path = _existing(path)
    return summarize_checkpoint(path) if path.is_dir() else summarize_gguf(path)


def _existing(path: PathLike) -> Path:
    if not Path(path).exists():
        raise BadInputError(f"{path} does not exist")
    return Path(path)
