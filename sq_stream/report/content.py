"""What a report says, as plain JSON values: the one source of the page and of the JSON file (docs/report.md)."""

from __future__ import annotations

import math
import platform
import re
import shlex
import statistics
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from sq_stream.calibrate.spectrum import COUNTS
from sq_stream.evaluate.results import Evaluation
from sq_stream.evaluate.settings import Settings as EvaluationSettings
from sq_stream.job.plan import Plan, PlannedTensor
from sq_stream.job.record import Record, SiteRecord
from sq_stream.job.settings import Settings
from sq_stream.job.summary import TensorSummary, count_types
from sq_stream.quantize.measure import OutputError
from sq_stream.versions import versions

FORMAT = "sq-stream report"
VERSION = 1
"""Of the JSON form; a field may be added without a new one."""

_LAYER = re.compile(r"blk\.(\d+)\.(.+)")


def quantize_content(plan: Plan, record: Record) -> dict[str, Any]:
    """The content of the report of a quantize job."""
    command = quantize_command(plan.settings)
    hashes = {
        plan.settings.output.name: record.sha256,
        "checkpoint": plan.checkpoint.fingerprint(),
        **({f"text: {name}": digest for name, digest in plan.statistics.digests.items()} if plan.statistics else {}),
    }
    return {**_head(plan.settings.output.name, command, hashes), "quantization": _quantization(plan, record)}


def evaluation_content(settings: EvaluationSettings, evaluation: Evaluation) -> dict[str, Any]:
    """The content of the report of an evaluation."""
    title = next(model.name for model in evaluation.models if model.role == "candidate")
    hashes = {f"text: {suite.name}": suite.sha256 for suite in evaluation.suites}
    return {**_head(title, evaluation_command(settings), hashes), "evaluation": asdict(evaluation)}


def _head(title: str, command: str, hashes: Mapping[str, str]) -> dict[str, Any]:
    """What every report begins with; its parts are filled in by the caller."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "title": title,
        "quantization": None,
        "evaluation": None,
        "reproduce": {
            "command": command,
            "sha256": dict(hashes),
            "versions": versions(),
            "platform": platform.platform(terse=True),
            "machine": platform.machine(),
        },
    }


def _quantization(plan: Plan, record: Record) -> dict[str, Any]:
    settings = plan.settings
    return {
        "model": {
            "name": plan.checkpoint.folder.resolve().name,
            "path": str(settings.model_dir),
            "architecture": plan.spec.arch,
            "n_layers": plan.spec.n_layer,
            "n_weights": plan.n_weights,
        },
        "file": {
            "name": settings.output.name,
            "path": str(settings.output),
            "n_bytes": plan.layout.total_bytes,
            "tensor_bytes": plan.tensor_bytes,
            "bits_per_weight": plan.bits_per_weight,
            "types": _types(plan.tensors),
        },
        "options": {**settings.choices(), "threads": settings.threads},
        "tensors": [_tensor(tensor, record.errors.get(tensor.source.name)) for tensor in plan.tensors],
        "layers": _layers(record.errors),
        "error_ratio": _median_ratio(record.errors.values()),
        "inputs": {"directions": list(COUNTS), "sites": [_site(site) for site in record.sites]},
        "calibration": _calibration(plan, record),
        "run": {
            "max_ram": settings.max_ram,
            "planned_ram": plan.budget.peak_ram,
            "peak_ram": max(run.peak_ram for run in record.runs),
            "seconds": sum(run.seconds for run in record.runs),
            "runs": [asdict(run) for run in record.runs],
        },
        "notes": list(plan.notes),
    }


def _types(tensors: Sequence[PlannedTensor]) -> list[dict[str, Any]]:
    summaries = [TensorSummary(t.layout.name, t.type.name, t.layout.shape, t.layout.n_bytes) for t in tensors]
    weights: Counter[str] = Counter()
    for t in summaries:
        weights[t.type] += math.prod(t.shape)
    return [
        {"type": name, "n_tensors": count, "n_weights": weights[name], "n_bytes": size}
        for name, count, size in count_types(summaries)
    ]


def _tensor(tensor: PlannedTensor, error: OutputError | None) -> dict[str, Any]:
    return {
        "name": tensor.layout.name,
        "type": tensor.type.name,
        "shape": list(tensor.layout.shape),
        "n_bytes": tensor.layout.n_bytes,
        "reason": tensor.reason,
        "error": None if error is None else asdict(error),
    }


def _layers(errors: Mapping[str, OutputError]) -> list[dict[str, Any]]:
    """The errors of all linears of a layer that were measured on its outputs, weighted by the energy of these."""
    layers: dict[int, list[OutputError]] = {}
    for name, error in errors.items():
        if (match := _LAYER.fullmatch(name)) and error.energy > 0:
            layers.setdefault(int(match[1]), []).append(error)
    return [
        {
            "layer": layer,
            "plain": sum(e.plain * e.energy for e in members) / sum(e.energy for e in members),
            "stored": sum(e.stored * e.energy for e in members) / sum(e.energy for e in members),
        }
        for layer, members in sorted(layers.items())
    ]


def _median_ratio(errors: Iterable[OutputError]) -> float | None:
    """Median over tensors of the error in the file relative to that of plain rounding, where inputs were known."""
    ratios = [error.stored / error.plain for error in errors if error.basis != "weights" and error.plain > 0]
    return statistics.median(ratios) if ratios else None


def _site(site: SiteRecord) -> dict[str, Any]:
    return {**asdict(site), "linears": list(site.linears), "leading_energy": list(site.leading_energy)}


def _calibration(plan: Plan, record: Record) -> dict[str, Any] | None:
    """The text and what it reached; None where nothing was computed from text."""
    calibration = plan.calibration
    if calibration is None or plan.statistics is None:
        return None
    settings = plan.settings
    n_windows, n_ctx = calibration.windows.shape
    return {
        "packaged_text": not settings.calib or settings.calib_extend,
        "files": [str(path) for path in settings.calib],
        "n_windows": n_windows,
        "n_ctx": n_ctx,
        "n_tokens": calibration.windows.size,
        "coverage": [
            {"text": text, "n_windows": n} for text, n in sorted(plan.statistics.coverage.items(), key=lambda x: -x[1])
        ],
        "found_in_cache": calibration.found,
        "linears_without_data": list(record.unseen),
        "dead_channels": [{"linears": list(s.linears), "n_dead": s.n_dead} for s in record.sites if s.n_dead],
    }


def quantize_command(settings: Settings) -> str:
    """The command that makes the same file again, wherever it is to be written."""
    left_out = {"model_dir", "output", "cache", "overwrite", "fresh"}
    options = _options(
        settings, Settings(settings.model_dir, Path()), left_out, {"recipe": "type", "tensor_types": "tensor-type"}
    )
    return shlex.join(["sq-stream", "quantize", str(settings.model_dir), *options])


def evaluation_command(settings: EvaluationSettings) -> str:
    """The command that evaluates the same again."""
    names = {"baselines": "baseline", "texts": "text", "suites": "suite"}
    default = EvaluationSettings((), Path())
    options = _options(settings, default, {"files", "cache", "calib_windows"}, names)
    return shlex.join(["sq-stream", "eval", *map(str, settings.files), *options])


def _options(settings: Any, default: Any, left_out: Collection[str], names: Mapping[str, str]) -> Iterator[str]:
    """The options of a command in which `settings` differs from `default`; `names` of options that are not fields'."""
    for field in fields(settings):
        value = getattr(settings, field.name)
        if field.name in left_out or value == getattr(default, field.name):
            continue
        option = f"--{names.get(field.name, field.name).replace('_', '-')}"
        for item in value if isinstance(value, tuple) else (value,):
            yield option
            if item is not True:
                yield str(item)
