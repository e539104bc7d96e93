"""The page and the chart of what `memory.py` measures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from sq_stream.report.charts import Axis, Line, linear_axis, plot

MIB = 2**20
WIDTH, HEIGHT = 430, 250  # of each of the two plots
KINDS = ("fast", "balanced", "best", "eval")
STYLE = """
text { font: 12px system-ui, sans-serif; fill: #57606a } .title { font-size: 14px; font-weight: 600; fill: #1f2328 }
polyline { fill: none; stroke: #8c959f; stroke-width: 1.75 } polyline.main { stroke: #0969da; stroke-width: 2.25 }
polyline.grid { stroke: #d0d7de; stroke-width: 1 } polyline.axis { stroke: #8c959f; stroke-width: 1 }
.label.main { fill: #0969da; font-weight: 600 }
@media (prefers-color-scheme: dark) {
  text { fill: #9198a1 } .title { fill: #f0f6fc } polyline { stroke: #656c76 } polyline.main { stroke: #4493f8 }
  polyline.grid { stroke: #3d444d } .label.main { fill: #4493f8 }
}
""".strip()
HEAD = """# Memory

<!-- Written by bench/memory.py; edit its figures by measuring. -->

`--max-ram` is the peak of resident memory, mapped pages included. What was planned, and what the kernel counted, in
commands that it would have killed at 5% more than they were given (a memory cgroup, swap forbidden), {limited}, kernels
being compiled already, on two threads:

"""
COMMANDS = """
Checkpoints of published shapes have random weights (`bench/make_checkpoint.py`) and, but for the whole one, few
layers, for time; that memory does not grow with their number is measured below. The reference is SmolLM2-135M at width
768. Left out are:

"""
GROWTH = """
## Depth and text

![Peak memory against the number of layers and of windows](memory.svg)

A model of width 512 with more and more layers, on 32 windows of 128 tokens (`eval`: 8 windows), and one of two layers
on more and more windows of 512 tokens (`eval`: of its suites). The residual streams, which do grow, are on disk; in
memory is what belongs to one layer and, for each thread, to one batch of 2048 tokens. `eval` keeps 64 bytes for each
token and model besides: its scores.

"""


@dataclass(frozen=True)
class Measured:
    """A finished command; bytes and seconds."""

    name: str
    kind: str  # an effort of quantize, or eval
    command: str  # without the places of this machine
    max_ram: int
    planned: int
    peak: int
    limited: bool  # the kernel would have killed it
    seconds: float

    @property
    def growth(self) -> tuple[str, int] | None:
        """What it is a point of, layers or windows, and how many of them; None for a large shape."""
        number, _, what = self.name.partition(" ")
        return (what, int(number)) if what in ("layers", "windows") else None


def line_of(m: Measured) -> str:
    """For people who watch."""
    return f"{m.name}, {m.kind}: {_mib(m.planned)} MiB planned, peak of {_mib(m.peak)} MiB, {_ratio(m)}"


def document(measured: Sequence[Measured], reduced: Mapping[str, str], command: str) -> str:
    """The page; `reduced` is what is left out of models, by name, `command` what measured it."""
    large = [m for m in measured if m.growth is None]
    limited = "all of them" if all(m.limited for m in measured) else "where it let us make one"
    rows = ["| model | command | `--max-ram`, MiB | planned, MiB | peak, MiB | planned / peak |"]
    rows += ["| --- | --- | --- | --- | --- | --- |"]
    rows += [
        f"| {m.name} | {m.kind} | {_mib(m.max_ram, 0)} | {_mib(m.planned)} | {_mib(m.peak)} | {_ratio(m)} |"
        for m in large
    ]
    names = dict.fromkeys(m.name for m in large)
    parts = [HEAD.format(limited=limited), *_lines(rows), COMMANDS]
    parts += _lines(f"- {name}: {reduced[name]}." for name in names)
    parts += [GROWTH, *_lines(_growth_table(measured)), "\n## Commands\n\n```sh\n", command, "\n```\n"]
    parts += [
        "\nwhich runs, with `--cache` and files in its folder, and `plan` with the same options before:\n\n```sh\n"
    ]
    return "".join([*parts, *_lines(m.command for m in measured), "```\n"])


def _lines(lines: Sequence[str] | Iterator[str]) -> Iterator[str]:
    return (f"{line}\n" for line in lines)


def _growth_table(measured: Sequence[Measured]) -> Iterator[str]:
    """Peaks in MiB."""
    yield "| | " + " | ".join(f"{kind}, peak (planned / peak)" for kind in KINDS) + " |"
    yield "| --- |" + " --- |" * len(KINDS)
    for name in dict.fromkeys(m.name for m in measured if m.growth):
        own = {m.kind: f"{_mib(m.peak)} ({_ratio(m)})" for m in measured if m.name == name}
        yield f"| {name} | " + " | ".join(own.get(kind, "") for kind in KINDS) + " |"


def chart(measured: Sequence[Measured]) -> str:
    """Peaks against depth and against text, beside each other, on one scale."""
    points = [m for m in measured if m.growth]
    peaks = linear_axis(max(m.peak for m in points) / MIB, lambda mib: f"{mib:.0f}", label="peak memory, MiB")
    plots = [_plot(points, what, peaks) for what in ("layers", "windows")]
    title = "Peak memory against the number of layers and of windows"
    placed = [f'<g transform="translate({10 + i * (WIDTH + 20)} 36)">{svg}</g>' for i, svg in enumerate(plots)]
    size = f"0 0 {2 * WIDTH + 40} {HEIGHT + 44}"
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{size}" role="img">',
            f"<title>{title}</title>",
            f"<style>{STYLE}</style>",
            f'<text class="title" x="10" y="20">{title}</text>',
            *placed,
            "</svg>\n",
        ]
    )


def _plot(points: Sequence[Measured], what: str, peaks: Axis) -> str:
    """A line for each kind."""
    lines, numbers = [], sorted({m.growth[1] for m in points if m.growth and m.growth[0] == what})
    for kind in KINDS:
        own = [(m.growth[1], m.peak / MIB) for m in points if m.growth and m.growth[0] == what and m.kind == kind]
        if own:
            lines.append(Line(sorted(own), kind, "main" if kind == "best" else "other"))
    ticks = tuple((float(n), str(n)) for n in numbers)
    along = Axis(numbers[0], max(numbers[-1], 2 * numbers[0]), ticks, _along(what), log=True)
    svg = plot(lines, along, peaks, title=what, description=_along(what), width=WIDTH, height=HEIGHT)
    return str(svg).replace("<svg ", f'<svg width="{WIDTH}" height="{HEIGHT}" ', 1)


def _along(what: str) -> str:
    return "layers" if what == "layers" else "windows of text"


def _mib(n_bytes: int, digits: int = 1) -> str:
    return f"{n_bytes / MIB:.{digits}f}"


def _ratio(m: Measured) -> str:
    return f"{m.planned / m.peak:.2f}"
