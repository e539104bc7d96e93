"""Charts as SVG text. Colors come from the page's style; what a line is stands beside its end, not in a legend.

All sizes are in user units of the drawing, which the page scales to the width it has.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from markupsafe import Markup

Point = tuple[float, float]
FONT = 12.0
_CHARACTER = 0.6 * FONT  # average width, of a wide font
_BOLD = 0.7 * FONT  # the same of labels of main lines
_LINE = 1.15 * FONT  # height of a line of text


@dataclass(frozen=True)
class Axis:
    """A scale with its ticks (value, text)."""

    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]
    label: str = ""
    log: bool = False

    def place(self, value: float) -> float:
        """Where `value` lies between the ends, 0 to 1, or at an end if it is beyond."""
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(max(value, self.low))
        return min(1.0, max(0.0, (value - low) / (high - low)))


@dataclass(frozen=True)
class Line:
    """One line, or with `kind` "points" separate marks; `label` may have several lines."""

    points: Sequence[Point]
    label: str = ""
    kind: Literal["main", "other", "faint", "limit", "points", "main points"] = "main"
    filled: bool = False  # down to the axis


@dataclass(frozen=True)
class Frame:
    """The plot's rectangle in a drawing of `width` × `height`."""

    width: float
    height: float
    left: float
    right: float
    top: float
    bottom: float
    x: Axis
    y: Axis

    def at(self, point: Point) -> Point:
        """The place of a pair of values in the drawing."""
        right, bottom = self.width - self.right, self.height - self.bottom
        return (
            self.left + self.x.place(point[0]) * (right - self.left),
            bottom - self.y.place(point[1]) * (bottom - self.top),
        )


def plot(
    lines: Sequence[Line],
    x: Axis,
    y: Axis,
    *,
    title: str,
    description: str,
    width: float = 420,
    height: float = 220,
    bands: Sequence[tuple[float, str]] = (),
) -> Markup:
    """Lines in a frame.

    Args:
        lines: the last is drawn on top.
        x: horizontal scale.
        y: vertical scale; its label stands above the plot.
        title: for readers who do not see the drawing.
        description: the same, of what it shows.
        width: of the drawing.
        height: of the drawing.
        bands: where parts of the horizontal axis begin, and their names, in order.
    """
    label_width = max((_label_width(line) for line in lines), default=0.0)
    frame = Frame(
        width,
        height,
        left=6 + _CHARACTER * max(len(text) for _, text in y.ticks),
        right=8 + label_width,
        top=_LINE * (bool(y.label) + bool(bands)) + 8,
        bottom=(2 if x.label else 1) * _LINE + 6,
        x=x,
        y=y,
    )
    parts = [_y_axis(frame), _x_axis(frame), _bands(frame, bands)]
    parts += [_line(frame, line) for line in lines]
    parts.append(_labels(frame, lines))
    return _svg(width, height, title, description, parts)


def _label_width(line: Line) -> float:
    return max(map(len, line.label.split("\n"))) * (_BOLD if _is_main(line) else _CHARACTER)


def _is_main(line: Line) -> bool:
    return line.kind.startswith("main")


def _svg(width: float, height: float, title: str, description: str, parts: Iterable[str]) -> Markup:
    return Markup('<svg role="img" viewBox="0 0 {} {}"><title>{}</title><desc>{}</desc>{}</svg>').format(
        _n(width), _n(height), title, description, Markup("").join(parts)
    )


def _y_axis(frame: Frame) -> Markup:
    parts = []
    if frame.y.label:
        parts.append(_text(0, 0.9 * FONT, frame.y.label))
    right = frame.width - frame.right
    for value, text in frame.y.ticks:
        _, y = frame.at((frame.x.low, value))
        parts.append(_path([(frame.left, y), (right, y)], "axis" if value == frame.y.low else "grid"))
        parts.append(_text(frame.left - 4, y + 0.35 * FONT, text, anchor="end"))
    return Markup("").join(parts)


def _x_axis(frame: Frame) -> Markup:
    base, parts = frame.height - frame.bottom, []
    right = frame.width - frame.right
    for value, text in frame.x.ticks:
        x, _ = frame.at((value, frame.y.low))
        half = len(text) * _CHARACTER / 2
        anchor = "start" if x - half < frame.left else "end" if x + half > frame.width else "middle"
        parts.append(_path([(x, base), (x, base + 4)], "axis"))
        parts.append(_text(x, base + 4 + FONT, text, anchor=anchor))
    if frame.x.label:
        parts.append(_text(right, frame.height - 3, frame.x.label, anchor="end"))
    return Markup("").join(parts)


def _bands(frame: Frame, bands: Sequence[tuple[float, str]]) -> Markup:
    """Boundaries, each with its name where there is room for it before the next."""
    places = [frame.at((start, frame.y.low))[0] for start, _ in bands] + [frame.width - frame.right]
    parts = []
    for (_, name), (start, end) in zip(bands, pairwise(places), strict=True):
        if start > frame.left + 1:
            parts.append(_path([(start, frame.top - _LINE), (start, frame.height - frame.bottom)], "grid"))
        if len(name) * _CHARACTER + 6 < end - start:
            parts.append(_text(start + 3, frame.top - 3, name))
    return Markup("").join(parts)


def _line(frame: Frame, line: Line) -> Markup:
    places = [frame.at(point) for point in line.points]
    if not places:
        return Markup("")
    if line.kind.endswith("points"):
        kind = "main" if _is_main(line) else "other"
        return Markup("").join(
            Markup('<circle class="{}" cx="{}" cy="{}" r="4.5"/>').format(kind, _n(x), _n(y)) for x, y in places
        )
    parts = []
    if line.filled:
        base = frame.height - frame.bottom
        parts.append(_path([(places[0][0], base), *places, (places[-1][0], base)], "area"))
    if len(places) == 1:
        parts.append(Markup('<circle class="{}" cx="{}" cy="{}" r="3"/>').format(line.kind, *map(_n, places[0])))
    parts.append(_path(places, line.kind))
    return Markup("").join(parts)


def _labels(frame: Frame, lines: Sequence[Line]) -> Markup:
    """The labels at the ends of lines, moved apart where they would overlap."""
    labelled = sorted((line for line in lines if line.label and line.points), key=lambda line: _end(frame, line)[1])
    heights = [_LINE * (line.label.count("\n") + 1) for line in labelled]
    tops = spread([_end(frame, line)[1] - h / 2 for line, h in zip(labelled, heights, strict=True)], heights,
                  frame.top - _LINE, frame.height - frame.bottom + 4)  # fmt: skip
    parts = []
    for line, top in zip(labelled, tops, strict=True):
        points = line.kind.endswith("points")
        x = _end(frame, line)[0] + 8 if points else frame.width - frame.right + 6
        kind = "label main" if _is_main(line) else "label"
        for i, text in enumerate(line.label.split("\n")):
            parts.append(_text(x, top + i * _LINE + 0.85 * FONT, text, kind))
    return Markup("").join(parts)


def _end(frame: Frame, line: Line) -> Point:
    return frame.at(line.points[-1])


def spread(tops: Sequence[float], heights: Sequence[float], low: float, high: float) -> list[float]:
    """Tops of labels in the order given, moved as little as needed so that none overlap, within `low` to `high`."""
    placed = list(tops)
    for i in range(len(placed)):
        placed[i] = max(placed[i], low if i == 0 else placed[i - 1] + heights[i - 1])
    for i in reversed(range(len(placed))):
        limit = high if i + 1 == len(placed) else placed[i + 1]
        placed[i] = min(placed[i], limit - heights[i])
    return placed


def _path(points: Sequence[Point], kind: str) -> Markup:
    steps = " ".join(f"{_n(x)},{_n(y)}" for x, y in points)
    return Markup('<polyline class="{}" points="{}"/>').format(kind, steps)


def _text(x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> Markup:
    return Markup('<text{} x="{}" y="{}"{}>{}</text>').format(
        _attribute("class", kind), _n(x), _n(y), _attribute("text-anchor", anchor if anchor != "start" else ""), text
    )


def _attribute(name: str, value: str) -> Markup:
    return Markup(' {}="{}"').format(Markup(name), value) if value else Markup("")


def _n(value: float) -> str:
    """A coordinate: at most one decimal."""
    return f"{value:.1f}".removesuffix(".0")


def linear_axis(
    high: float, text: Callable[[float], str], *, low: float = 0.0, label: str = "", n_ticks: int = 4
) -> Axis:
    """An axis from `low` to at least `high` with at most `n_ticks` round steps, ticks written by `text`."""
    span = high - low if high > low else 1.0
    size = 10.0 ** math.floor(math.log10(span / n_ticks))
    step = next(size * m for m in (1, 2, 2.5, 5, 10) if math.ceil(span / (size * m) - 1e-9) <= n_ticks)
    n = math.ceil(span / step - 1e-9)
    ticks = tuple((low + i * step, text(low + i * step)) for i in range(n + 1))
    return Axis(low, low + n * step, ticks, label)


def log_axis(low: float, high: float, text: Callable[[float], str], *, label: str = "") -> Axis:
    """A logarithmic axis around `low` and `high`, both positive, with ticks at powers of ten, and between if few."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    ticks = [10.0**i * step for i in range(first, last + 1) for step in ((1, 2, 5) if high < 50 * low else (1,))]
    start = max((tick for tick in ticks if tick <= low), default=ticks[0])
    end = min((tick for tick in ticks if tick >= high and tick > start), default=ticks[-1])
    return Axis(start, end, tuple((tick, text(tick)) for tick in ticks if start <= tick <= end), label, log=True)
