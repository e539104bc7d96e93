"""The files of a report: where they may be, and writing them whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sq_stream.errors import StorageError, UsageError
from sq_stream.formats.atomic import atomic_write

FORMATS = (".html", ".json")
_FOR = {".html": ".html for a page", ".json": ".json for data"}


def check_paths(
    paths: Sequence[Path], model_dirs: Sequence[Path], option: str = "--report", formats: Sequence[str] = FORMATS
) -> None:
    """Refuse, before any work, reports that could not be written.

    Args:
        paths: of the reports; an older report may be there and is then replaced.
        model_dirs: folders whose files are not reports.
        option: that names them.
        formats: ends of their names.

    Raises:
        UsageError: a path does not end as it should, is a folder, or lies in one of `model_dirs`.
        StorageError: its folder does not exist or cannot be written.
    """
    for path in paths:
        if path.suffix.lower() not in formats:
            ends = " or in ".join(_FOR[end] for end in formats)
            raise UsageError(f"{option} {path}: the name must end in {ends}")
        if path.is_dir():
            raise UsageError(f"{option} {path} is a folder: name the file to write")
        folder = path.parent
        if not folder.is_dir():
            raise StorageError(f"{option} {path}: there is no folder {folder} to write it into")
        if any(folder.resolve() == model_dir.resolve() for model_dir in model_dirs):
            raise UsageError(f"{option} {path} would lie among the files of the checkpoint: name another folder")
        if not os.access(folder, os.W_OK):
            raise StorageError(f"{option} {path}: {folder} cannot be written: choose another folder")


def write_reports(paths: Sequence[Path], content: Mapping[str, Any]) -> None:
    """Write `content` to each path in the format that its name says.

    Raises:
        StorageError: writing fails; no unfinished file is left.
    """
    from sq_stream.report.page import render

    for path in paths:
        is_page = path.suffix.lower() == ".html"
        text = render(content) if is_page else json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        with atomic_write(path) as file:
            file.write(text.encode())
