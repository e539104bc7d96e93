"""The chart of the release table: mean KL divergence of each file as a bar, in an SVG for light and dark pages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

WIDTH, ROW, TOP, BOTTOM = 820, 26, 64, 16
BARS_FROM, BARS_TO = 330, 740
STYLE = """
text { font: 13px system-ui, sans-serif; fill: #57606a } .title { font-size: 15px; font-weight: 600; fill: #1f2328 }
.ours { fill: #0969da } .theirs { fill: #8c959f } text.ours { font-weight: 600; fill: #0969da }
text.theirs { fill: #57606a } line { stroke: #1f2328; stroke-width: 1.5 }
@media (prefers-color-scheme: dark) {
  text, text.theirs { fill: #9198a1 } .title { fill: #f0f6fc } .theirs { fill: #656c76 }
  .ours, text.ours { fill: #4493f8 } line { stroke: #f0f6fc }
}
""".strip()


@dataclass(frozen=True)
class Bar:
    """One file; the interval is 95%."""

    label: str
    bits_per_weight: float
    mean_kl: float
    interval: tuple[float, float]
    is_ours: bool


def draw(title: str, bars: Sequence[Bar]) -> str:
    """An SVG of the files, smaller ones first, the worst of a size first."""
    ordered = sorted(bars, key=lambda bar: (round(bar.bits_per_weight, 2), -bar.mean_kl))
    scale = (BARS_TO - BARS_FROM) / max(bar.interval[1] for bar in bars)
    height = TOP + ROW * len(bars) + BOTTOM
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img">',
        f"<title>{escape(title)}</title>",
        f"<style>{STYLE}</style>",
        f'<text class="title" x="12" y="24">{escape(title)}</text>',
        f'<text x="{BARS_FROM}" y="48">mean KL divergence from BF16, nats per token (95% interval)</text>',
        f'<text x="{BARS_FROM - 16}" y="48" text-anchor="end">bits per weight</text>',
        *(part for i, bar in enumerate(ordered) for part in _row(bar, TOP + ROW * i, scale)),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _row(bar: Bar, top: int, scale: float) -> Iterator[str]:
    kind, base = "ours" if bar.is_ours else "theirs", top + 17
    low, high = (BARS_FROM + scale * value for value in bar.interval)
    middle = top + ROW / 2 - 1
    yield f'<text class="{kind}" x="12" y="{base}">{escape(bar.label)}</text>'
    yield f'<text class="{kind}" x="{BARS_FROM - 16}" y="{base}" text-anchor="end">{bar.bits_per_weight:.2f}</text>'
    yield f'<rect class="{kind}" x="{BARS_FROM}" y="{top + 4}" width="{scale * bar.mean_kl:.1f}" height="{ROW - 10}"/>'
    yield f'<line x1="{low:.1f}" x2="{high:.1f}" y1="{middle:.1f}" y2="{middle:.1f}"/>'
    yield f'<text class="{kind}" x="{high + 8:.1f}" y="{base}">{bar.mean_kl:.4f}</text>'
