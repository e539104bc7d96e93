"""Key-value metadata of a GGUF file, as plain typed entries.

Source: the GGUF specification (docs/gguf.md of the ggml project).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Any


class ValueType(IntEnum):
    """GGUF metadata value types, by their number in the file."""

    UINT8 = 0
    INT8 = 1
    UINT16 = 2
    INT16 = 3
    UINT32 = 4
    INT32 = 5
    FLOAT32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    UINT64 = 10
    INT64 = 11
    FLOAT64 = 12


@dataclass(frozen=True)
class Entry:
    """One key with its value; an array's elements all have type `element`."""

    key: str
    type: ValueType
    value: Any
    element: ValueType | None = None


def u32(key: str, value: int) -> Entry:
    """An unsigned 32-bit entry."""
    return Entry(key, ValueType.UINT32, int(value))


def f32(key: str, value: float) -> Entry:
    """A 32-bit float entry."""
    return Entry(key, ValueType.FLOAT32, float(value))


def boolean(key: str, value: bool) -> Entry:
    """A truth value."""
    return Entry(key, ValueType.BOOL, bool(value))


def string(key: str, value: str) -> Entry:
    """A UTF-8 string."""
    return Entry(key, ValueType.STRING, str(value))


def array(key: str, element: ValueType, values: Any) -> Entry:
    """A one-dimensional array of `element` values."""
    return Entry(key, ValueType.ARRAY, list(values), element)
