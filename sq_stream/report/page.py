"""The content of a report as one HTML page that needs nothing else: no network, no script, no font, no image file."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

import jinja2

from sq_stream.report import evaluation, quantization
from sq_stream.report.numbers import duration, integer, percent, significant
from sq_stream.units import format_size

FILTERS = {
    "duration": duration,
    "integer": integer,
    "percent": percent,
    "quote": shlex.quote,
    "significant": significant,
    "size": format_size,
}


def render(content: Mapping[str, Any]) -> str:
    """The page, for content as `content.quantize_content` or `content.evaluation_content` makes it."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("sq_stream.report", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= FILTERS
    environment.globals |= {"charts": quantization, "scores": evaluation, **FILTERS}
    return environment.get_template("page.html").render(content)
