"""JSON objects out of files that may be damaged or hostile."""

from __future__ import annotations

import json
import re
import reprlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from sq_stream.errors import BadInputError

LFS_POINTER = b"version https://git-lfs"
MAX_VALUES = 2**20
"""Values in one file: each takes some 100 bytes of memory, be it two bytes in the file."""
MAX_DEPTH = 64
"""Arrays and objects within each other; real files have about eight."""
_STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"')
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_DEPTH = np.zeros(256, np.int8)
_DEPTH[list(b"[{")], _DEPTH[list(b"]}")] = 1, -1


class _Brief(reprlib.Repr):
    def repr_int(self, x: int, level: int) -> str:
        bits = x.bit_length()
        return super().repr_int(x, level) if bits < 10_000 else f"an integer of {bits} bits"  # Python prints no longer


_brief = _Brief()
_brief.maxstring = _brief.maxother = _brief.maxlong = 80


def brief(value: object) -> str:
    """The value as a message shows it: in few characters, however large or deep it is."""
    text = _brief.repr(value)
    return text if len(text) <= 200 else f"{text[:197]}..."


def shown(name: str) -> str:
    """A name without quotes, unless it needs them: too long, or with characters that do something to a terminal."""
    return name if len(name) <= 200 and name.isprintable() else brief(name)


def refuse_lfs_pointer(start: bytes, path: Path) -> None:
    """Raise BadInputError when a file that begins with `start` is a Git-LFS pointer and not the file itself."""
    if start.startswith(LFS_POINTER):
        raise BadInputError(
            f"{path} is a Git-LFS pointer, not the file itself: run `git lfs pull` in its folder, or download the file"
        )


def parse_object(
    data: bytes, path: Path, *, unique_names: bool = False, most_values: int = MAX_VALUES
) -> dict[str, Any]:
    """The JSON object in `data`, which was read from `path`.

    Raises:
        BadInputError: it is not JSON, not an object, has more than `most_values` values or more than MAX_DEPTH levels,
            or text that is not Unicode, or (with `unique_names`) an object in it names something twice.
    """
    refuse_lfs_pointer(data, path)
    if (n_values := sum(map(data.count, (b",", b"[", b"{")))) > most_values:
        raise BadInputError(f"{path} holds about {n_values} values; at most {most_values} are read: it is damaged")

    def to_dict(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if unique_names and len(result) < len(pairs):
            twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
            raise BadInputError(f"{path} names {brief(twice)} twice: the file is damaged, download it again")
        return result

    try:
        parsed = json.loads(data.decode("utf-8-sig"), object_pairs_hook=to_dict)
    except (ValueError, RecursionError) as error:
        raise BadInputError(f"{path} is not valid JSON ({error}): the file is damaged, download it again") from error
    if not isinstance(parsed, dict):
        raise BadInputError(f"{path} holds a JSON {type(parsed).__name__} where an object is expected")
    _check_depth(data, path)
    if _SURROGATE.search(data):
        _check_text(parsed, path)
    return parsed


def _check_depth(data: bytes, path: Path) -> None:
    """Refuse JSON, known to be valid, that whatever goes through it by recursion could not go through."""
    steps = _DEPTH[np.frombuffer(_STRING.sub(b"", data), np.uint8)]
    steps = steps[steps != 0]
    deepest = int(np.cumsum(steps, dtype=np.int32).max(initial=0))
    if deepest > MAX_DEPTH:
        raise BadInputError(f"{path} nests {deepest} levels deep; at most {MAX_DEPTH} are read: it is damaged")


def _check_text(parsed: dict[str, Any], path: Path) -> None:
    """Refuse escapes of half a character, which no file can be written with."""
    try:
        json.dumps(parsed, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise BadInputError(f"{path} holds half of a surrogate pair: the file is damaged, download it again") from error
