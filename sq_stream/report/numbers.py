"""Numbers as people read them."""

from __future__ import annotations

import math

from sq_stream.units import format_duration


def significant(value: float, digits: int = 3) -> str:
    """`value` with so many significant digits and no exponent: `0.0512`, `12.3`, `1234`."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    text = f"{value:,.{decimals}f}"
    return text if float(text.replace(",", "")) else "0"


def percent(share: float, digits: int = 3) -> str:
    """A share of 1 as a percentage: `0.452%`."""
    return f"{significant(100 * share, digits)}%"


def integer(value: float) -> str:
    """With thousands separated: `184,320`."""
    return f"{value:,.0f}"


def duration(seconds: float) -> str:
    """As `units.format_duration`, with tenths where it is short: `0.2 s`."""
    return f"{seconds:.1f} s" if seconds < 9.95 else format_duration(seconds)
