"""Plans, summaries and checks as text for people and as JSON for machines."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sq_stream.calibrate.calibration import Calibration
from sq_stream.calibrate.store import Summary
from sq_stream.job.plan import Plan
from sq_stream.job.summary import CheckpointSummary, GGUFSummary, TensorSummary, count_types
from sq_stream.job.verify import TensorCheck
from sq_stream.units import format_duration, format_size


def to_json(value: Any) -> str:
    """A dataclass, or a list or dict of such, as indented JSON."""
    return json.dumps(value, indent=2, ensure_ascii=False, default=asdict)


def table(rows: Sequence[Sequence[str]]) -> str:
    """Left-aligned columns, the first row being the header; columns that end in `bytes` or `error` align right."""
    right = [title.endswith(("bytes", "error", "tensors")) for title in rows[0]]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)) for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


def _shape(shape: Sequence[int]) -> str:
    return "×".join(str(n) for n in shape)


def plan_fields(plan: Plan) -> dict[str, Any]:
    """The plan as plain values; bytes and seconds."""
    return {
        "model_dir": str(plan.settings.model_dir),
        "output": str(plan.settings.output),
        "architecture": plan.spec.arch,
        "options": plan.settings.choices(),
        "n_weights": plan.n_weights,
        "tensor_bytes": plan.tensor_bytes,
        "output_bytes": plan.layout.total_bytes,
        "bits_per_weight": plan.bits_per_weight,
        "max_ram": plan.settings.max_ram,
        "peak_ram": plan.budget.peak_ram,
        "peak_disk": plan.budget.peak_disk,
        "calibration": _pass_fields(plan.calibration),
        "gradients": _pass_fields(plan.sensitivity),
        "in_turn": sorted(plan.turns.pairing.linears) if plan.turns else [],
        "by_gradients": sorted(plan.turns.two_sided) if plan.turns else [],
        "refining_rounds": plan.turns.refining.n_rounds if plan.turns and plan.turns.refining else 0,
        "estimated_seconds": plan.budget.seconds,
        "tensors": [
            {
                "name": t.layout.name,
                "source": t.source.source or None,
                "shape": list(t.layout.shape),
                "type": t.type.name,
                "offset": t.layout.offset,
                "n_bytes": t.layout.n_bytes,
                "reason": t.reason,
            }
            for t in plan.tensors
        ],
        "left_out": {reason: list(names) for reason, names in plan.spec.left_out.items()},
    }


def _pass_fields(streamed: Calibration | None) -> dict[str, Any] | None:
    if streamed is None:
        return None
    return {
        "n_tokens": streamed.windows.size,
        "found": streamed.found,
        "ranks": {str(width): rank for width, rank in streamed.ranks.items()},
        "peak_ram": streamed.peak_ram,
        "peak_disk": streamed.peak_disk,
    }


def plan_text(plan: Plan) -> str:
    """The plan as a table of tensors and a summary."""
    rows = [("tensor", "source", "shape", "type", "bytes", "why")]
    for t in plan.tensors:
        source = t.source.source or "(computed)"
        rows.append((t.layout.name, source, _shape(t.layout.shape), t.type.name, str(t.layout.n_bytes), t.reason))
    summary = [
        f"model      {plan.settings.model_dir} ({plan.spec.arch}, {plan.n_weights / 1e6:.1f} M weights)",
        f"output     {plan.settings.output}, {format_size(plan.layout.total_bytes)}",
        f"tensors    {format_size(plan.tensor_bytes)}, {plan.bits_per_weight:.2f} bits per weight",
        *(f"           {line}" for line in _type_lines([_summary(t) for t in plan.tensors])),
        *(f"note       {note}" for note in plan.notes),
        *_pass_lines("calibrate", plan.calibration),
        *_pass_lines("gradients", plan.sensitivity),
        *_turns_lines(plan),
        f"peak RAM   {format_size(plan.budget.peak_ram)} of {format_size(plan.settings.max_ram)}",
        f"peak disk  {format_size(plan.budget.peak_disk)}",
        f"time       roughly {format_duration(plan.budget.seconds)} on {plan.settings.threads} threads",
    ]
    return table(rows) + "\n\n" + "\n".join(summary)


def _pass_lines(what: str, streamed: Calibration | None) -> list[str]:
    if streamed is None:
        return []
    widths = ", ".join(f"{width} values at rank {rank}" for width, rank in streamed.ranks.items())
    kind = f"sketches of sites of {widths}, else exact" if widths else "exact second moments"
    lines = [f"{what}  {streamed.windows.size} tokens, {kind}{' (in the cache)' if streamed.found else ''}"]
    if streamed.pending:
        needs = f"{format_size(streamed.peak_ram)} of memory, {format_size(streamed.peak_disk)} of disk"
        lines.append(f"           {needs} in {streamed.store.folder}")
    return lines


def _turns_lines(plan: Plan) -> list[str]:
    if plan.turns is None:
        return []
    turns, size = plan.turns, format_size(plan.turns.pairing.peak_disk)
    lines = [f"in turn    {len(turns.pairing.linears)} tensors, {len(turns.two_sided)} by gradients, {size} of disk"]
    if turns.refining:
        n_tokens = turns.refining.of_round(1).size
        lines.append(f"refine     up to {turns.refining.n_rounds} rounds of {n_tokens} tokens")
    return lines


def _summary(t: Any) -> TensorSummary:
    return TensorSummary(t.layout.name, t.type.name, t.layout.shape, t.layout.n_bytes)


def _type_lines(tensors: Sequence[TensorSummary]) -> list[str]:
    return [f"{name:<5} {count:>4} tensors  {format_size(size)}" for name, count, size in count_types(tensors)]


def summary_text(summary: CheckpointSummary | GGUFSummary) -> str:
    """A checkpoint or a GGUF file as text."""
    if isinstance(summary, CheckpointSummary):
        size = f"{summary.n_layer} layers, {summary.n_parameters / 1e6:.1f} M weights to convert"
        head = [f"{summary.path}: {summary.architecture}, {size}"]
        head += [f"not converted: {count} tensors ({reason})" for reason, count in summary.left_out.items()]
    else:
        head = [
            f"{summary.path}: {format_size(summary.n_bytes)}, {summary.n_parameters / 1e6:.1f} M weights, "
            f"{summary.bits_per_weight:.2f} bits per weight",
            "",
            *(f"{key} = {_cut(value)}" for key, value in summary.metadata.items()),
        ]
    return "\n".join([*head, "", tensors_text(summary.tensors)])


def tensors_text(tensors: Sequence[TensorSummary]) -> str:
    """Tensors by type, and each by itself."""
    rows = [("tensor", "type", "shape", "bytes")]
    rows += [(t.name, t.type, _shape(t.shape), str(t.n_bytes)) for t in tensors]
    return "\n".join([*_type_lines(tensors), "", table(rows)])


def _cut(value: Any) -> str:
    if isinstance(value, dict):
        return f"[{', '.join(repr(v) for v in value['first'])}, … {value['length']} in all]"
    text = repr(value)
    return text if len(text) <= 100 else text[:99] + "…"


def checks_text(checks: Sequence[TensorCheck]) -> str:
    """The result of a verification, with errors where there was a source to compare with."""
    if any(c.relative_error is not None for c in checks):
        rows = [("tensor", "type", "shape", "rms error", "relative error")]
        rows += [(c.name, c.type, _shape(c.shape), f"{c.rms_error:.3e}", f"{c.relative_error:.4%}") for c in checks]
        return table(rows) + f"\n\n{len(checks)} tensors: every block decodes to finite values"
    return f"{len(checks)} tensors: every block decodes to finite values"


def cache_text(folder: Path, calibrations: Sequence[Summary]) -> str:
    """The calibrations in the cache as a table."""
    rows = [("key", "model", "tokens", "of", "state", "bytes")]
    rows += [(c.key, c.model, str(c.n_tokens), c.of, _state(c), str(c.n_bytes)) for c in calibrations]
    return f"{folder}\n\n{table(rows)}" if calibrations else f"{folder} is empty"


def _state(calibration: Summary) -> str:
    return "complete" if calibration.complete else f"{calibration.done} of {calibration.steps} steps"
