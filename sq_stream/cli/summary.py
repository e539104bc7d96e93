"""The run summary: what was run, with what, and how it ended, in a file for whoever looks in the morning."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from sq_stream.cli.config import command_names, option_name
from sq_stream.cli.console import error_fields
from sq_stream.formats.atomic import atomic_write
from sq_stream.formats.storage import open_locked, sha256_of
from sq_stream.job.timeline import peak_ram
from sq_stream.report.files import check_paths
from sq_stream.versions import machine, versions

FORMAT = "sq-stream run"
VERSION = 1
"""Of the JSON form (summary.schema.json); a field may be added without a new one."""

WRITERS = ("quantize", "calibrate", "demo")
"""Commands whose result names the file that they have written as `output`."""

_SOURCES = {ParameterSource.COMMANDLINE: "command line", ParameterSource.DEFAULT_MAP: "config file"}


class RunSummary:
    """A file that is written when a run begins, and again when it ends; FILE.json.lock is locked in between.

    Whoever finds only the beginning, `exit_code` being null, knows that the run goes on or was killed.
    """

    def __init__(self, path: Path, ctx: click.Context) -> None:
        """Write the beginning.

        Raises:
            UsageError: `path` does not end in .json, is a folder, or lies among the files of a checkpoint.
            InterruptedJobError: it is the summary of another process that runs.
            StorageError: it cannot be written.
        """
        folders = (ctx.params.get(name) for name in ("model_dir", "ref"))
        check_paths([path], [folder for folder in folders if folder is not None], "--summary", (".json",))
        self._path = path
        self._lock_path = path.with_name(path.name + ".lock")
        self._lock = open_locked(self._lock_path, os.O_RDWR | os.O_CREAT)
        self._start = datetime.now(timezone.utc)
        self._beginning = {
            "format": FORMAT,
            "version": VERSION,
            "command": " ".join(command_names(ctx)),
            "folder": str(Path.cwd()),
            "config": None if ctx.params["config"] is None else str(ctx.params["config"]),
            "settings": {_key(param): _setting(ctx, param) for param in ctx.command.params if param.name != "config"},
            "versions": versions(),
            "started": self._start.isoformat(timespec="milliseconds"),
        }
        try:
            self._write(ended=None, seconds=None, exit_code=None, error=None, result=None, peak_ram=None, notes=[])
        except BaseException:
            self._unlock()
            raise

    def end(self, exit_code: int, error: BaseException | None, result: Any, notes: Sequence[str]) -> None:
        """Write how the run ended.

        Raises:
            StorageError: it cannot be written.
        """
        try:
            self._end(exit_code, error, result, notes)
        finally:
            self._unlock()

    def _end(self, exit_code: int, error: BaseException | None, result: Any, notes: Sequence[str]) -> None:
        now = datetime.now(timezone.utc)
        if error is None and result is not None and self._beginning["command"] in WRITERS:
            result["sha256"] = sha256_of(Path(result["output"]))
        self._write(
            ended=now.isoformat(timespec="milliseconds"),
            seconds=(now - self._start).total_seconds(),
            exit_code=exit_code,
            error=None if error is None else error_fields(error),
            result=None if error is not None else result,
            peak_ram=peak_ram(),
            notes=list(notes),
        )

    def _unlock(self) -> None:
        with suppress(OSError):
            self._lock_path.unlink()
        os.close(self._lock)

    def _write(self, **end: Any) -> None:
        fields = {**self._beginning, "machine": machine(), **end}
        with atomic_write(self._path) as file:
            file.write(json.dumps(fields, indent=2, ensure_ascii=False, default=_plain).encode() + b"\n")


def _key(param: click.Parameter) -> str:
    return option_name(param) if isinstance(param, click.Option) else str(param.name)


def _setting(ctx: click.Context, param: click.Parameter) -> dict[str, Any]:
    """The value that holds, and where it is from."""
    source = ctx.get_parameter_source(str(param.name))
    return {"value": ctx.params[str(param.name)], "from": _SOURCES.get(source, "default")}  # type: ignore[arg-type]


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else asdict(value)
