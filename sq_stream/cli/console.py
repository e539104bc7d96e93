"""How events and errors are shown on standard error: a progress bar on a terminal, plain lines, or JSON lines."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from dataclasses import asdict
from types import TracebackType
from typing import Any

import click

from sq_stream.cli.interrupt import Interrupts
from sq_stream.errors import RESTARTS, InterruptedJobError, SqStreamError, StorageError
from sq_stream.events import Event, Finished, Note, Progress, StageStarted, TensorFinished
from sq_stream.units import format_duration, format_size

LOG_FORMATS = ("auto", "plain", "json")
PLAIN_INTERVAL = 10.0  # seconds between progress lines where there is no terminal


class Console:
    """Shows events, and turns the errors raised inside its `with` block into a message and an exit code."""

    def __init__(self, log_format: str = "auto", *, when_interrupted: str = RESTARTS) -> None:
        self._interruption = InterruptedJobError(when_interrupted)
        self._interrupts = Interrupts(self._give_up)
        if log_format == "json":
            self._view: View = JsonView()
        elif log_format == "auto" and sys.stderr.isatty():
            self._view = BarView()
        else:
            self._view = PlainView()

    def __call__(self, event: Event) -> None:
        """Show one event."""
        self._view.show(event)

    def __enter__(self) -> Console:
        self._interrupts.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._interrupts.__exit__()
        self._view.close()
        if isinstance(error, KeyboardInterrupt):
            error = self._interruption
        elif isinstance(error, BrokenPipeError):
            sys.stderr.close()  # the reader of our output has left: nothing to say, nobody to say it to
            raise click.exceptions.Exit(0) from error
        elif isinstance(error, OSError):
            error = StorageError(f"{error.filename or 'input or output'}: {error.strerror or error}")
        if isinstance(error, SqStreamError):
            self._view.fail(error)
            raise click.exceptions.Exit(error.exit_code) from error

    def _give_up(self) -> None:
        """End the process here and now: nothing that is on disk depends on its end."""
        self._view.close()
        self._view.fail(self._interruption)
        sys.stderr.flush()
        os._exit(self._interruption.exit_code)


class View:
    """One way of showing events; this one shows nothing."""

    def show(self, event: Event) -> None:
        """Show one event."""

    def fail(self, error: SqStreamError) -> None:
        """Show the error that ended the command."""
        click.echo(f"error: {error}", err=True)

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
            click.echo(line, err=True)


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
            self._bar.set_postfix_str(event.tensor, refresh=False)
            self._bar.update(event.done - self._bar.n)
        elif isinstance(event, (Note, Finished)):
            self.close()
            click.echo(describe(event), err=True)

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

    def show(self, event: Event) -> None:
        """Print the event as one JSON object."""
        self._write(_snake_case(type(event).__name__), asdict(event))

    def fail(self, error: SqStreamError) -> None:
        """Print the error as one JSON object."""
        kind = _snake_case(type(error).__name__.removesuffix("Error"))
        self._write("error", {"kind": kind, "exit_code": error.exit_code, "message": str(error)})

    @staticmethod
    def _write(event: str, fields: dict[str, Any]) -> None:
        click.echo(json.dumps({"event": event, "time": round(time.time(), 3), **fields}), err=True)


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
