"""Printing, so that names out of a file do nothing to the terminal."""

from __future__ import annotations

import re

import click

_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    r"""The text with control characters, and those that turn its direction, as \uXXXX; lines and tabs stay."""
    return _UNPRINTABLE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def echo(text: str, *, err: bool = False) -> None:
    """Print a line to standard output or standard error."""
    click.echo(printable(text), err=err)
