"""The charts and tables of a quantize job, from its content."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from markupsafe import Markup

from sq_stream.report.charts import Axis, Line, linear_axis, plot
from sq_stream.report.numbers import integer, percent
from sq_stream.units import format_duration, format_size

Content = Mapping[str, Any]
_plot_small = partial(plot, width=190, height=124)
_BLOCK = re.compile(r"blk\.(\d+)\.(.+)\.weight")


def short_percent(share: float) -> str:
    """For ticks: as few digits as it takes."""
    return f"{100 * share:.4g}%"


def layer_chart(layers: Sequence[Content], *, compared: bool) -> Markup:
    """Output error of whole layers, plain and in the file."""
    stored = [(layer["layer"], layer["stored"]) for layer in layers]
    plain = [(layer["layer"], layer["plain"]) for layer in layers]
    highest = max((error for _, error in [*stored, *plain]), default=0.0)
    lines = [Line(plain, f"plain\nmedian {_median(plain)}", "other")] if compared else []
    lines.append(Line(stored, f"this file\nmedian {_median(stored)}"))
    return plot(
        lines,
        _layer_axis([layer["layer"] for layer in layers], n_ticks=8),
        linear_axis(highest, short_percent, label="relative output error"),
        title="Output error of each layer",
        description=f"Relative output error of layers {layers[0]['layer']} to {layers[-1]['layer']}: "
        + (f"plain rounding {_median(plain)}, " if compared else "")
        + f"this file {_median(stored)} in the median.",
    )


def kind_charts(tensors: Sequence[Content]) -> list[tuple[str, Markup]]:
    """For every kind of tensor that layers have, a small chart of its error by layer, each to a scale of its own."""
    kinds: dict[str, list[tuple[int, Content]]] = {}
    for tensor in tensors:
        if tensor["error"] and (match := _BLOCK.fullmatch(tensor["name"])):
            kinds.setdefault(match[2], []).append((int(match[1]), tensor["error"]))
    layers = [layer for members in kinds.values() for layer, _ in members]
    return [(kind, _kind_chart(kind, members, _layer_axis(layers, n_ticks=3))) for kind, members in kinds.items()]


def _kind_chart(kind: str, members: Sequence[tuple[int, Content]], x: Axis) -> Markup:
    plain = [(layer, error["plain"]) for layer, error in members]
    stored = [(layer, error["stored"]) for layer, error in members]
    lines = [Line(stored, f"file\n{_median(stored)}")]
    description = f"Median error of {kind} in this file {_median(stored)}"
    if any(error["basis"] != "weights" for _, error in members):
        lines.insert(0, Line(plain, f"plain\n{_median(plain)}", "other"))
        description += f", of plain rounding {_median(plain)}"
    y = linear_axis(max(error for _, error in [*plain, *stored]), short_percent, n_ticks=2)
    return _plot_small(lines, x, y, title=f"Output error of {kind} by layer", description=description)


def _median(points: Sequence[tuple[float, float]]) -> str:
    return percent(statistics.median(value for _, value in points), 2)


def _layer_axis(layers: Sequence[int], n_ticks: int) -> Axis:
    first, last = min(layers), max(layers)
    step = max(1, -(-(last - first) // n_ticks))
    ticks = tuple((layer, str(layer)) for layer in [*range(first, last - step // 2, step), last])
    return Axis(first, max(last, first + 1), ticks, "layer" if n_ticks > 3 else "")


def spectrum_charts(inputs: Content) -> list[tuple[str, Markup]]:
    """For every kind of site, the share of its energy in the strongest directions: each layer, and the median."""
    kinds: dict[str, list[Content]] = {}
    for site in inputs["sites"]:
        kind = ", ".join(re.sub(r"^blk\.\d+\.|\.weight$", "", name) for name in site["linears"])
        kinds.setdefault(kind, []).append(site)
    return [(kind, _spectrum(kind, members, inputs["directions"])) for kind, members in kinds.items()]


def _spectrum(kind: str, sites: Sequence[Content], directions: Sequence[int]) -> Markup:
    n = min(len(site["leading_energy"]) for site in sites)
    curves = [list(zip(directions, site["leading_energy"], strict=False)) for site in sites]
    median = [(directions[i], statistics.median(site["leading_energy"][i] for site in sites)) for i in range(n)]
    count, share = median[-1]
    lines = [Line(curve, kind="faint") for curve in curves] if len(curves) > 1 else []
    width = sites[0]["n_in"]
    return _plot_small(
        [*lines, Line(median, f"{percent(share, 2)}\nof {integer(width)}")],
        Axis(1, directions[-1], tuple((d, str(d)) for d in directions[::3]), log=True),
        Axis(0, 1, ((0, "0"), (0.5, "50%"), (1, "100%"))),
        title=f"Inputs of {kind}",
        description=f"The {count} strongest of {width} directions have {percent(share, 2)} of the energy (median).",
    )


def memory_chart(run: Content) -> Markup | None:
    """Resident memory over the time of all runs, one after the other, against the promise."""
    points: list[tuple[float, float]] = []
    bands: list[tuple[float, str]] = []
    start = 0.0
    for part in run["runs"]:
        points += [(start + at, float(ram)) for at, ram in part["samples"]]
        bands += [(start + stage["start"], stage["name"]) for stage in part["stages"]]
        start += part["seconds"]
    if not points:
        return None
    unit, name = (2.0**30, "GiB") if run["max_ram"] >= 2**30 else (2.0**20, "MiB")
    second, time_unit = (60.0, "minutes") if start > 180 else (1.0, "seconds")
    promise, planned, peak = (format_size(run[key]) for key in ("max_ram", "planned_ram", "peak_ram"))
    ends = (0.0, start / second)
    return plot(
        [
            Line([(at, run["max_ram"] / unit) for at in ends], f"promise\n{promise}", "limit"),
            Line([(at, run["planned_ram"] / unit) for at in ends], f"planned\n{planned}", "other"),
            Line([(at / second, ram / unit) for at, ram in points], f"peak\n{peak}", filled=True),
        ],
        linear_axis_to(start / second, time_unit),
        linear_axis(run["max_ram"] / unit, lambda v: f"{v:g}", label=f"resident memory, {name}"),
        title="Resident memory over the run",
        description=f"Peak {peak}, planned {planned}, promised {promise}, in {format_duration(start)}.",
        bands=[(at / second, stage) for at, stage in bands],
    )


def linear_axis_to(high: float, label: str) -> Axis:
    """A horizontal axis from 0 to exactly `high`."""
    axis = linear_axis(high, lambda v: f"{v:g}", n_ticks=6)
    return Axis(0, high, tuple(tick for tick in axis.ticks if tick[0] <= high), label)


def stage_rows(run: Content) -> list[Content]:
    """Stages of all runs in order: their time, and the largest sample of their memory."""
    many = len(run["runs"]) > 1
    return [
        {
            "name": f"{stage['name']} (run {i})" if many else stage["name"],
            "seconds": stage["end"] - stage["start"],
            "peak_ram": stage["peak_ram"],
        }
        for i, part in enumerate(run["runs"], 1)
        for stage in part["stages"]
    ]
