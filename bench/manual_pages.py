"""The text of HTML manuals, for `make_calibration_text.py`."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path


class Page(HTMLParser):
    """The text of a manual page, paragraph by paragraph."""

    BLOCKS = frozenset(
        ["p", "li", "dt", "dd", "h1", "h2", "h3", "h4", "tr", "pre", "div", "ul", "ol", "table", "blockquote"]
    )
    SKIPPED = frozenset(["script", "style", "button", "svg", "title"])

    def __init__(self, html: str) -> None:
        super().__init__()
        self.paragraphs: list[tuple[str, str]] = []  # tag, text
        self._tag, self._parts, self._skip = "div", [""], 0
        self.feed(html)
        self._flush("div")

    def _flush(self, tag: str) -> None:
        text = "".join(self._parts)
        text = text.strip("\n") if self._tag == "pre" else " ".join(text.split())
        if text.strip():
            self.paragraphs.append((self._tag, text))
        self._tag, self._parts = tag, []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._skip += tag in self.SKIPPED
        if tag in self.BLOCKS and not (tag == "p" and self._tag in ("li", "dd") and not "".join(self._parts).strip()):
            self._flush(tag)

    def handle_endtag(self, tag: str) -> None:
        self._skip = max(0, self._skip - (tag in self.SKIPPED))
        if tag in self.BLOCKS:
            self._flush("div")

    def handle_data(self, data: str) -> None:
        if not self._skip:
            self._parts.append(data)

    def text(self) -> str:
        marks = {"h1": "# ", "h2": "## ", "h3": "### ", "li": "- "}
        return "\n\n".join(marks.get(tag, "") + text for tag, text in self.paragraphs)


def httpd_page(path: Path) -> Page:
    raw = path.read_bytes()
    html = raw.decode("euc-kr" if b"charset=EUC-KR" in raw else "utf-8", errors="replace")
    html = html[max(html.find("<h1>"), 0) :].partition('<div class="bottomlang">')[0]
    return Page(re.sub(r'<div (?:class="(?:toplang|top)"|id="quickview")>.*?</div>', "", html, flags=re.DOTALL))


def sqlite_body(path: Path) -> str:
    html = path.read_text("utf-8", errors="replace")
    start = html.find("<h1")
    return html[start if start > 0 else html.find("fancy_title") :]
