"""Sizes and durations, between the text that people write and numbers."""

from __future__ import annotations

import re

from sq_stream.errors import UsageError

_FACTORS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = re.compile(r"\s*(\d{1,18}(?:\.\d{1,18})?)\s*([KMGT]?)(?:I?B)?\s*", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Bytes meant by `text`: a number with an optional binary unit (`512M`, `1.5GiB`, `4g`).

    Raises:
        UsageError: `text` is not a positive size.
    """
    match = _SIZE.fullmatch(text)
    size = int(float(match[1]) * _FACTORS[match[2].upper()]) if match else 0
    if size <= 0:
        raise UsageError(
            f"{text[:80]!r} is not a size: write a positive number with an optional K, M, G or T, as in 4G or 512M"
        )
    return size


def format_size(n_bytes: float) -> str:
    """`n_bytes` with a binary unit and three significant digits: `415.7 MiB`."""
    size = float(n_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def format_duration(seconds: float) -> str:
    """`seconds` as a short duration: `42 s`, `3 min 05 s`, `2 h 10 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
