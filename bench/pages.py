"""Markdown and charts from the figures of `recovery.py`, as they come from its JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from bars import BASELINE, REFERENCE
from chart import Bar, draw

MIB = 2**20
Rows = Sequence[Mapping[str, Any]]

INTRODUCTION = """# Results

<!-- Written by bench/recovery.py; edit its figures by measuring. -->

The same weights, quantized by sq-stream and by llama.cpp, compared with BF16 by llama.cpp's logits: what the columns
mean and how files and texts were made is said in [the comparison](comparison.md).
"Recovered" is the part of the KL divergence, or of the loss gap to BF16, of "{baseline}" that is gone; more
than all of a loss gap is a loss under that of BF16, which is chance or fitting, and no merit.

"""
COMMAND = """```sh
{command}
```"""
REUSED = "The files lay in the folder already (`--reuse`): some were made by earlier versions of the source."


def document(report: Mapping[str, Any]) -> str:
    """The page docs/results.md."""
    start = INTRODUCTION.format(baseline=BASELINE)
    return start + "".join(_section(model, f"results-{model['model']}.svg") for model in report["models"])


def markdown(report: Mapping[str, Any]) -> str:
    """All tables."""
    return "".join(_section(model) for model in report["models"])


def charts(report: Mapping[str, Any], stem: str) -> dict[str, str]:
    """An SVG of each model by file name, of the last text."""
    return {f"{stem}-{model['model']}.svg": _chart(model) for model in report["models"]}


def _chart(model: Mapping[str, Any]) -> str:
    text = model["texts"][-1]["name"]
    rows = [row for row in model["results"] if row["text"] == text and row["name"] != REFERENCE]
    bars = [
        Bar(row["name"], row["bits_per_weight"], row["mean_kl"], row["mean_kl_interval"], "sq-stream" in row["name"])
        for row in rows
    ]
    return draw(f"{model['model']}, {text}", bars)


def _section(model: Mapping[str, Any], chart: str | None = None) -> str:
    parts = [f"## {model['model']}", *([f"![Mean KL divergence of every file]({chart})"] if chart else [])]
    parts += [COMMAND.format(command=model["command"]), *([REUSED] if model["reuse"] else []), _release_table(model)]
    for text in model["texts"]:
        rows = [row for row in model["results"] if row["text"] == text["name"]]
        title = f"### {text['name']}: {text['n_windows']} windows of {text['n_ctx']} tokens"
        parts += [title, _results_table(rows, model["skip"])]
    parts += ["### Bars", bars_table(model["bars"], model["skip"])]
    parts += [f"### Our commands, with `--max-ram {model['max_ram']}`", _costs_table(model["files"])]
    return "\n\n".join(parts) + "\n\n"


def _table(columns: Sequence[str], rows: Iterator[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _release_table(model: Mapping[str, Any]) -> str:
    texts = [text["name"] for text in model["texts"]]
    found = {(row["name"], row["text"]): row for row in model["results"]}

    def rows() -> Iterator[list[str]]:
        for name in dict.fromkeys(row["name"] for row in model["results"]):
            own = [found[name, text] for text in texts]
            figures = [f"{row[key]:.4f}" for row in own for key in ("mean_kl", "loss")]
            yield [name, f"{own[0]['bits_per_weight']:.2f}", f"{own[0]['tensor_mib']:.1f}", *figures]

    columns = [f"{what}, {text}" for text in texts for what in ("mean KL", "loss")]
    return _table(["file", "bits/weight", "MiB", *columns], rows())


def _results_table(results: Rows, skip: int) -> str:
    columns = ["file", "mean KL (95%)", f"mean KL from position {skip} on", "median KL", "99% KL", "KL recovered"]
    columns += ["top-1 agreement", "loss", "loss gap recovered", "perplexity"]

    def rows() -> Iterator[list[str]]:
        for r in results:
            low, high = r["mean_kl_interval"]
            yield [
                r["name"],
                f"{r['mean_kl']:.4f} ({low:.4f} to {high:.4f})",
                f"{r['mean_kl_later']:.4f}",
                f"{r['median_kl']:.4f}",
                f"{r['kl_99']:.3f}",
                _percent(r["kl_recovered"]),
                f"{r['top1_agreement']:.1%}",
                f"{r['loss']:.4f}",
                _percent(r["loss_recovered"]),
                f"{r['perplexity']:.2f}",
            ]

    return _table(columns, rows())


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


def bars_table(bars: Rows, skip: int) -> str:
    """What we ask of ourselves, and what was measured."""

    def rows() -> Iterator[list[str]]:
        for b in bars:
            low, high = b["interval"]
            yield [
                b["text"],
                b["bar"],
                f"{b['figure']:.3f} ({low:.3f} to {high:.3f})",
                f"{b['figure_later']:.3f}",
                f"{'≥' if b['at_least'] else '≤'} {b['limit']:g}",
                "yes" if b["met"] else "**no**",
            ]

    return _table(["text", "bar", "figure (95%)", f"from position {skip} on", "limit", "met"], rows())


def _costs_table(files: Rows) -> str:
    """What our commands took."""
    rows = (
        [file["name"], _seconds(file["seconds"]), _seconds(file["cpu_seconds"]), f"{file['peak_bytes'] / MIB:.0f}"]
        for file in files
        if file["peak_bytes"] is not None
    )
    return _table(["command's file", "seconds", "processor seconds", "peak memory, MiB"], rows)


def _seconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds:.0f}"
