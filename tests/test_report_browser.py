"""Report pages in a real browser: nothing overflows on a phone, both color schemes are legible, print works."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from test_report import evaluated

from sq_stream.report.page import render

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium (apt-get install chromium)")

PROBE = """<!doctype html>
<style>body {{ margin: 0 }} iframe {{ border: 0; width: 390px; height: 3000px }}</style>
<iframe srcdoc="{page}"></iframe>
<script>addEventListener("load", () => {{
  const page = document.querySelector("iframe").contentDocument;
  const style = selector => page.defaultView.getComputedStyle(page.querySelector(selector));
  const outside = [...page.body.querySelectorAll("*")].filter(element => !element.closest(".scroll") &&
    (element.getBoundingClientRect().right > 390.5 || element.getBoundingClientRect().left < -0.5));
  document.body.textContent = JSON.stringify({{
    width: page.documentElement.scrollWidth, outside: outside.map(element => element.outerHTML.slice(0, 80)),
    paper: style("body").backgroundColor, ink: style("body").color, muted: style("figcaption").color,
    label: style("svg .label.main").fill, small: style("svg text").fill, charts: page.querySelectorAll("svg").length
  }});
}});</script>"""
"""A page in a frame as wide as a phone, for a headless window cannot be that narrow, replaced by what was found."""


def chromium(*arguments: object) -> str:
    options = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars")
    command = [str(CHROMIUM), *options, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


def probe(page: str, folder: Path, *arguments: str) -> dict[str, Any]:
    path = folder / "probe.html"
    path.write_text(PROBE.format(page=html.escape(page)))
    document = chromium(*arguments, "--dump-dom", path.as_uri())
    return json.loads(html.unescape(re.search(r"<body[^>]*>(.*)</body>", document, re.DOTALL)[1]))


def contrast(a: str, b: str) -> float:
    """Of two colors as `rgb(r, g, b)`: WCAG 2, criterion 1.4.3."""

    def luminance(color: str) -> float:
        channels = [int(c) / 255 for c in re.findall(r"\d+", color)[:3]]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_all_of_it_legibly(scheme: str, tmp_path: Path) -> None:
    found = probe(render(evaluated()), tmp_path, *(["--force-dark-mode"] if scheme == "dark" else []))
    assert found["width"] == 390
    assert found["outside"] == []
    assert found["charts"] == 6
    assert (contrast(found["paper"], "rgb(0, 0, 0)") > 10) == (scheme == "light")
    for name in ("ink", "muted", "label", "small"):
        assert contrast(found[name], found["paper"]) >= 4.5, name


def test_what_overflows_is_found(tmp_path: Path) -> None:
    page = render(evaluated()).replace("</header>", '<p style="width: 400px">wide</p></header>')
    found = probe(page, tmp_path)
    assert found["width"] > 390
    assert found["outside"]


def test_it_prints_and_paints(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(render(evaluated()))
    chromium(f"--print-to-pdf={tmp_path}/page.pdf", page.as_uri())
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")
    chromium("--window-size=1000,1000", f"--screenshot={tmp_path}/page.png", page.as_uri())
    assert (tmp_path / "page.png").stat().st_size > 20_000  # a blank one has a few thousand bytes
