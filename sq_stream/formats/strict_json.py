"""JSON objects out of files that may be damaged or hostile."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from sq_stream.errors import BadInputError

LFS_POINTER = b"version https://git-lfs"


def refuse_lfs_pointer(start: bytes, path: Path) -> None:
    """Raise BadInputError when a file that begins with `start` is a Git-LFS pointer and not the file itself."""
    if start.startswith(LFS_POINTER):
        raise BadInputError(
            f"{path} is a Git-LFS pointer, not the file itself: run `git lfs pull` in its folder, or download the file"
        )


def parse_object(data: bytes, path: Path, *, unique_names: bool = False) -> dict[str, Any]:
    """The JSON object in `data`, which was read from `path`.

    Raises:
        BadInputError: it is not JSON, not an object, or (with `unique_names`) an object in it names something twice.
    """
    refuse_lfs_pointer(data, path)

    def to_dict(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if unique_names and len(result) < len(pairs):
            twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
            raise BadInputError(f"{path} names {twice!r} twice: the file is damaged, download it again")
        return result

    try:
        parsed = json.loads(data, object_pairs_hook=to_dict)
    except (ValueError, RecursionError) as error:
        raise BadInputError(f"{path} is not valid JSON ({error}): the file is damaged, download it again") from error
    if not isinstance(parsed, dict):
        raise BadInputError(f"{path} holds a JSON {type(parsed).__name__} where an object is expected")
    return parsed
