"""JSON files of a checkpoint folder, read with clear errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sq_stream.errors import BadInputError
from sq_stream.formats.storage import storage_errors


def read_text(path: Path) -> str | None:
    """The UTF-8 text of `path`, or None when there is no such file.

    Raises:
        BadInputError: the file is not UTF-8 text, or is a Git-LFS pointer.
        StorageError: the file cannot be read.
    """
    with storage_errors("reading", path):
        data = path.read_bytes() if path.exists() else None
    if data is None:
        return None
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadInputError(
            f"{path}: not UTF-8 text (byte {error.start}): convert it to UTF-8, or download it again"
        ) from error
    if text.startswith("version https://git-lfs.github.com/spec/"):
        raise BadInputError(f"{path}: a Git-LFS pointer, not the file itself: fetch it with `git lfs pull`")
    return text


def read_json_object(path: Path) -> dict[str, Any] | None:
    """The JSON object in `path`, or None when there is no such file.

    Raises:
        BadInputError: the file does not hold one JSON object.
        StorageError: the file cannot be read.
    """
    text = read_text(path)
    if text is None:
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadInputError(f"{path}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise BadInputError(f"{path}: holds a JSON {type(value).__name__}, not an object")
    return value
