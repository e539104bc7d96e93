"""JSON files of a checkpoint folder, read with clear errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sq_stream.errors import BadInputError
from sq_stream.formats.storage import read_input, storage_errors
from sq_stream.formats.strict_json import parse_object

MAX_BYTES = 2**26
"""Of a file: the tokenizer.json of 262,144 tokens has some 2**25."""
MAX_VALUES = 2**22
"""In a JSON file: that tokenizer.json has some 2**21."""


def read_text(path: Path) -> str | None:
    """The UTF-8 text of `path`, or None when there is no such file.

    Raises:
        BadInputError: the file is not UTF-8 text, or is a Git-LFS pointer.
        StorageError: the file cannot be read.
    """
    with storage_errors("reading", path):
        if not path.exists():
            return None
    data = read_input(path, MAX_BYTES)
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
        BadInputError: the file does not hold one JSON object, or an absurd one.
        StorageError: the file cannot be read.
    """
    text = read_text(path)
    if text is None:
        return None
    return parse_object(text.encode(), path, most_values=MAX_VALUES)
