"""How events and errors are shown on standard error: a progress bar on a terminal, plain lines, or JSON lines."""

from __future__ import annotations

import json
import os
import re
import sys
import time
import traceback
from dataclasses import asdict
from types import TracebackType
from typing import TYPE_CHECKING, Any

import click

from sq_stream.cli.echo import echo, printable
from sq_stream.cli.interrupt import Interrupts
from sq_stream.errors import RESTARTS, DoesNotFitError, InterruptedJobError, SqStreamError, StorageError
from sq_stream.events import Event, Finished, Note, Progress, StageStarted, TensorFinished
from sq_stream.units import format_duration, format_size

if TYPE_CHECKING:
    from sq_stream.cli.summary import RunSummary

LOG_FORMATS = ("auto", "plain", "json")
PLAIN_INTERVAL = 10.0  # seconds between progress lines where there is no terminal
JSON_INTERVAL = 1.0  # the same for machines


class Console:
    """Shows events, and turns the errors raised inside its `with` block into a message and an exit code."""

    summary: RunSummary | None = None
    """Told how it ends, with `result`."""
    result: Any = None

    def __init__(self, log_format: str = "auto", *, quiet: bool = False, when_interrupted: str = RESTARTS) -> None:
        """Where it is `quiet`, only errors are shown; `when_interrupted` says how to go on."""
        self._view = _view(log_format)
        self._quiet = quiet
        self._notes: list[str] = []
        self._interruption = InterruptedJobError(when_interrupted)
        self._interrupts = Interrupts(self._give_up)

    def __call__(self, event: Event) -> None:
        """Show one event."""
        if isinstance(event, Note):
            self._notes.append(event.text)
        if not self._quiet:
            self._view.show(event)

    def __enter__(self) -> Console:
        self._interrupts.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            is_unread = isinstance(error, BrokenPipeError)
            error = self._summarize(None if is_unread else self._known(error))
        except KeyboardInterrupt:
            error = self._interruption
        self._interrupts.__exit__()
        self._view.close()
        if is_unread:
            sys.stderr.close()  # the reader of our output has left: nothing to say, nobody to say it to
            raise click.exceptions.Exit(_exit_code(error))
        if isinstance(error, Exception) and self.fail(error):
            raise click.exceptions.Exit(_exit_code(error)) from error

    def fail(self, error: Exception) -> bool:
        """Show an error; false if Python shall, with the place in our code that it is from."""
        return self._view.fail(error)

    def _known(self, error: BaseException | None) -> BaseException | None:
        """The same as one of our errors, where it is the system's or the user's doing."""
        if isinstance(error, KeyboardInterrupt):
            return self._interruption
        if isinstance(error, MemoryError):
            return DoesNotFitError("the system gives no more memory: lower --max-ram, or raise the limit (ulimit -v)")
        if isinstance(error, OSError):
            return StorageError(f"{error.filename or 'input or output'}: {error.strerror or error}")
        return error

    def _summarize(self, error: BaseException | None) -> BaseException | None:
        """Write how the run ends, if it is asked for; `error`, or why that cannot be written."""
        if self.summary is not None:
            try:
                self.summary.end(_exit_code(error), error, self.result, self._notes)
            except SqStreamError as failure:
                return error or failure
        return error

    def _give_up(self) -> None:
        """End the process here and now: nothing that is on disk depends on its end."""
        self._view.close()
        self._summarize(self._interruption)
        self.fail(self._interruption)
        sys.stderr.flush()
        os._exit(self._interruption.exit_code)


def _exit_code(error: BaseException | None) -> int:
    return 0 if error is None else getattr(error, "exit_code", 1)


class View:
    """One way of showing events; this one shows nothing."""

    def show(self, event: Event) -> None:
        """Show one event."""

    def fail(self, error: Exception) -> bool:
        """Show the error that ended the command, if that is for us to do."""
        if isinstance(error, SqStreamError):
            echo(f"error: {error}", err=True)
        return isinstance(error, SqStreamError)

    def close(self) -> None:
        """Leave the terminal in order."""


class PlainView(View):
    """Lines of text, for logs: every tensor, and the state of a long one now and then."""

    def __init__(self) -> None:
        self._next_line = time.monotonic() + PLAIN_INTERVAL

    def show(self, event: Event) -> None:
        """Print the event's line."""
        line = describe(event)
        if isinstance(event, Progress):
            if time.monotonic() < self._next_line:
                return
            line = f"{event.stage}: {100 * event.done / max(event.total, 1):.0f}%, {event.tensor}"
        self._next_line = time.monotonic() + PLAIN_INTERVAL
        if line:
            echo(line, err=True)


class BarView(View):
    """One progress bar for each stage, with rate and remaining time."""

    def __init__(self) -> None:
        self._bar: Any = None

    def show(self, event: Event) -> None:
        """Advance the bar, or print the event's line above it."""
        if isinstance(event, StageStarted):
            self.close()
            self._bar = self._new_bar(event)
        elif isinstance(event, Progress) and self._bar is not None:
            self._bar.set_postfix_str(printable(event.tensor), refresh=False)
            self._bar.update(event.done - self._bar.n)
        elif isinstance(event, (Note, Finished)):
            self.close()
            echo(describe(event), err=True)

    @staticmethod
    def _new_bar(stage: StageStarted) -> Any:
        from tqdm import tqdm

        return tqdm(
            total=stage.total, desc=stage.stage, unit=f" {stage.unit}", unit_scale=True, dynamic_ncols=True, leave=False
        )

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class JsonView(View):
    """JSON lines, for machines: `event` is the kind, `time` the seconds since the epoch, then the event's fields."""

    def __init__(self) -> None:
        self._next_progress = 0.0

    def show(self, event: Event) -> None:
        """Print the event as one JSON object; of progress, one a second and the last of a stage."""
        if isinstance(event, Progress) and event.done < event.total:
            if time.monotonic() < self._next_progress:
                return
            self._next_progress = time.monotonic() + JSON_INTERVAL
        self._write(_snake_case(type(event).__name__), asdict(event))

    def fail(self, error: Exception) -> bool:
        """Print the error as one JSON object."""
        self._write("error", error_fields(error))
        return True

    @staticmethod
    def _write(event: str, fields: dict[str, Any]) -> None:
        click.echo(json.dumps({"event": event, "time": round(time.time(), 3), **fields}), err=True)


def _view(log_format: str) -> View:
    if log_format == "json":
        return JsonView()
    is_terminal = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
    return BarView() if log_format == "auto" and is_terminal else PlainView()


def error_fields(error: BaseException) -> dict[str, Any]:
    """An error as JSON values; with a `traceback` where it is none that we raise on purpose."""
    if isinstance(error, SqStreamError):
        kind = _snake_case(type(error).__name__.removesuffix("Error"))
        return {"kind": kind, "exit_code": error.exit_code, "message": str(error)}
    message = f"{type(error).__name__}: {error}: a fault of sq-stream, please report it"
    return {
        "kind": "internal",
        "exit_code": 1,
        "message": message,
        "traceback": "".join(traceback.format_exception(error)),
    }


def _snake_case(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


def describe(event: Event) -> str:
    """The line of text for an event; empty for those that are only progress."""
    if isinstance(event, Note):
        return event.text
    if isinstance(event, StageStarted):
        return f"{event.stage}: {event.total:,} {event.unit}"
    if isinstance(event, TensorFinished):
        return f"  {event.name}: {event.type}, {format_size(event.n_bytes)}"
    if isinstance(event, Finished):
        return (
            f"{event.output}: {format_size(event.n_bytes)}, {event.bits_per_weight:.2f} bits per weight, "
            f"{format_duration(event.seconds)}, peak memory {format_size(event.peak_ram)}"
        )
    return ""
