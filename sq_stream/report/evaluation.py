"""The charts and tables of an evaluation, from its content."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import takewhile, zip_longest
from typing import Any, Literal

from markupsafe import Markup

from sq_stream.report.charts import Axis, Line, linear_axis, log_axis, plot
from sq_stream.report.numbers import integer, significant

Content = Mapping[str, Any]
Points = Sequence[tuple[float, float]]
_plot = partial(plot, width=360, height=210)
SHARES = (0.5, 0.9, 0.99, 0.999, 0.9999)
SEPARATORS = ("", "-", "_", ".", " ", "/")
_LONGEST = 18  # characters of a label beside a chart


def labels(evaluation: Content) -> dict[str, str]:
    """Short names of the models, for charts: without what the names of all files and folders begin with."""
    names = [str(model["name"]) for model in evaluation["models"] if not model["made"]]
    same = takewhile(lambda characters: len(set(characters)) == 1, zip_longest(*names, fillvalue="-"))
    shared = "".join(characters[0] for characters in same) if len(names) > 1 else ""
    start = max((i for i in range(len(shared) + 1) if all(name[i : i + 1] in SEPARATORS for name in names)), default=0)
    short = {name: name[start:].strip("".join(SEPARATORS)).removesuffix(".gguf") or name for name in names}
    return {m["name"]: _cut(short.get(m["name"], m["name"])) for m in evaluation["models"]}


def _cut(name: str) -> str:
    return name if len(name) <= _LONGEST else f"{name[: _LONGEST - 1]}…"


def compared(evaluation: Content, suite: Content) -> list[tuple[Content, Content]]:
    """Model and score of all but the reference, candidates first."""
    models = {model["name"]: model for model in evaluation["models"]}
    pairs = [(models[score["model"]], score) for score in suite["scores"]]
    return [pair for role in ("candidate", "baseline") for pair in pairs if pair[0]["role"] == role]


def interval(estimate: Content, write: Callable[[float], str]) -> str:
    """The 95% interval in words; nothing where there is none."""
    if estimate["low"] is None or estimate["high"] is None:
        return ""
    return f"{write(estimate['low'])} to {write(estimate['high'])}"


def signed(value: float) -> str:
    """With its sign, a real minus, and three digits after the point: `+0.012`."""
    return f"{value:+.3f}".replace("-", "−")


def size_chart(evaluation: Content, suite: Content) -> Markup | None:
    """Mean KL of every model against its bits per weight."""
    pairs = [(model, score) for model, score in compared(evaluation, suite) if score["mean_kl"]["value"] > 0]
    if len(pairs) < 2:
        return None
    names = labels(evaluation)
    values = [score["mean_kl"]["value"] for _, score in pairs]
    bits = [model["bits_per_weight"] for model, _ in pairs]
    low, high = math.floor(2 * min(bits) - 0.2) / 2, math.ceil(2 * max(bits) + 0.2) / 2
    ticks = [low + 0.5 * i for i in range(round(2 * (high - low)) + 1)]
    lines, descriptions = [], []
    for model, score in pairs:
        point = model["bits_per_weight"], score["mean_kl"]["value"]
        lines.append(Line([point], names[model["name"]], "main points" if model["role"] == "candidate" else "points"))
        descriptions.append(f"{model['name']}: {point[0]:.2f} bits per weight, KL {significant(point[1])}")
    return _plot(
        lines,
        Axis(low, high, tuple((t, f"{t:g}") for t in ticks[:: max(1, len(ticks) // 6)]), "bits per weight"),
        log_axis(0.85 * min(values), max(values), short, label="mean KL, nats"),
        title="Size and mean KL",
        description="; ".join(descriptions),
    )


def position_chart(evaluation: Content, suite: Content) -> Markup | None:
    """Mean KL of every model by place in the window."""
    curves = []
    for model, score in compared(evaluation, suite):
        places = [((b["first"] + b["last"]) / 2 + 1, b["mean_kl"]) for b in score["kl_by_position"]]
        curves.append((model, places))
    if not curves or len(curves[0][1]) < 2:
        return None
    n_ctx = suite["n_ctx"]
    highest = max(kl for _, places in curves for _, kl in places)
    ticks = tuple((4.0**i, integer(4**i)) for i in range(int(math.log(n_ctx, 4)) + 1))
    return _chart(
        evaluation,
        curves,
        Axis(1, n_ctx, ticks, "position", log=True),
        linear_axis(highest, short, label="mean KL, nats"),
        "KL by position in the window",
    )


def quantile_chart(evaluation: Content, suite: Content) -> Markup | None:
    """KL of tokens by rank: what share of them is below it."""
    pairs = [(m, quantiles(s["kl_histogram"], last=1 - SHARES[-1])) for m, s in compared(evaluation, suite)]
    end = min((places[-1][0] for _, places in pairs if places), default=0.0)
    curves = [(model, [place for place in places if place[0] <= end]) for model, places in pairs if places]
    values = [kl for _, places in curves for _, kl in places]
    if not values:
        return None
    ticks = tuple((-math.log10(1 - share), f"{100 * share:g}%") for share in SHARES if -math.log10(1 - share) <= end)
    return _chart(
        evaluation,
        curves,
        Axis(0, end, ticks, "tokens with a smaller KL"),
        log_axis(max(min(values), max(values) / 1e4), max(values), short, label="KL, nats"),
        "Distribution of token KL",
    )


def quantiles(histogram: Content, last: float) -> list[tuple[float, float]]:
    """(-log10 of the share of tokens above an edge, the edge), for the edges with at least the share `last` above."""
    total, below, points = sum(histogram["counts"]), 0, []
    for count, edge in zip(histogram["counts"], histogram["edges"][1:], strict=True):
        below += count
        above = 1 - below / max(total, 1)
        if count and above >= max(last, 0.5 / max(total, 1)):
            points.append((-math.log10(above), edge))
    return points


def short(value: float) -> str:
    """For ticks: as few digits as it takes, and no exponent."""
    return f"{value:.6f}".rstrip("0").rstrip(".")


def _chart(evaluation: Content, curves: Sequence[tuple[Content, Points]], x: Axis, y: Axis, title: str) -> Markup:
    """A line for each model, named at its end."""
    names, lines, descriptions = labels(evaluation), [], []
    for model, places in curves:
        kind: Literal["main", "other"] = "main" if model["role"] == "candidate" else "other"
        lines.append(Line(places, names[model["name"]], kind))
        descriptions.append(f"{model['name']}: {significant(places[-1][1])} nats at the right end")
    return _plot(lines[::-1], x, y, title=title, description="; ".join(descriptions))


def recovered(share: float) -> str:
    """A recovery as a percentage without decimals, negative where it got worse."""
    return f"{100 * share:.0f}%".replace("-", "−")


def best_recovery(evaluation: Content) -> Content | None:
    """The first suite's first recovery of KL: that of the first candidate against the first baseline."""
    recoveries = [r for suite in evaluation["suites"][:1] for r in suite["recoveries"] if r["kl"]]
    return recoveries[0] if recoveries else None
