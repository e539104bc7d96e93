"""What all commands share: where settings are from, what is shown, what is left behind, how it ends."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import click

from sq_stream.cli.config import NAME, option_name, read_defaults
from sq_stream.cli.console import LOG_FORMATS, Console
from sq_stream.errors import RESTARTS, RESUMES, UsageError
from sq_stream.events import Note

PATH = click.Path(path_type=Path)


class Command(click.Command):
    """A command that is run inside a `Console`, which it gets as its first argument; its result goes to `--summary`."""

    def __init__(self, *args: Any, resumes: bool = False, **kwargs: Any) -> None:
        """One that `resumes` goes on from where an interrupted run was."""
        super().__init__(*args, **kwargs)
        self._when_interrupted = RESUMES if resumes else RESTARTS
        self.params += [_summary(), _log_format(), _quiet(), _config()]

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """As click does, but that an error is a line of JSON where the log is."""
        given = list(args)
        try:
            return super().parse_args(ctx, args)
        except click.UsageError as error:
            if ctx.params.get("log_format") != "json" and not _asks_for_json(given):
                raise
            Console("json").fail(UsageError(error.format_message()))
            raise click.exceptions.Exit(UsageError.exit_code) from error

    def invoke(self, ctx: click.Context) -> Any:
        """Call the command's function, without the parameters that are used here."""
        own = {name: ctx.params[name] for name in ("summary", "log_format", "quiet", "config")}
        with Console(own["log_format"], quiet=own["quiet"], when_interrupted=self._when_interrupted) as console:
            if own["summary"] is not None:
                from sq_stream.cli.summary import RunSummary

                console.summary = RunSummary(own["summary"], ctx)
            if own["config"] is not None:
                console(Note(f"settings from {own['config']}: {', '.join(_from_config(ctx)) or 'none'}"))
            assert self.callback is not None
            others = {name: value for name, value in ctx.params.items() if name not in own}
            console.result = ctx.invoke(self.callback, console, **others)


def _asks_for_json(args: list[str]) -> bool:
    return "--log-format=json" in args or ("--log-format", "json") in pairwise(args)


def _from_config(ctx: click.Context) -> list[str]:
    from click.core import ParameterSource

    params = [p for p in ctx.command.params if ctx.get_parameter_source(str(p.name)) is ParameterSource.DEFAULT_MAP]
    return [option_name(param) for param in params]


def _find_config(ctx: click.Context, _param: click.Parameter, path: Path | None) -> Path | None:
    """Let a file's values take the place of defaults; the path of the file, if there is one."""
    if path is None and Path(NAME).is_file():
        path = Path(NAME)
    if path is not None and not ctx.resilient_parsing:
        ctx.default_map = read_defaults(ctx, path)
    return path


def _config() -> click.Option:
    return click.Option(
        ["--config"],
        type=PATH,
        metavar="FILE",
        is_eager=True,
        callback=_find_config,
        help=f"Settings that are not given here. Default: {NAME} in the current folder, if it is there.",
    )


def _summary() -> click.Option:
    return click.Option(
        ["--summary"],
        type=PATH,
        metavar="FILE",
        help="Write what was run and how it ended (FILE.json), also where it failed, replacing an older one.",
    )


def _log_format() -> click.Option:
    return click.Option(
        ["--log-format"],
        type=click.Choice(LOG_FORMATS),
        default="auto",
        show_default=True,
        help="Progress on standard error: auto is a bar on a terminal and plain lines elsewhere; json is JSON lines.",
    )


def _quiet() -> click.Option:
    return click.Option(["-q", "--quiet"], is_flag=True, help="Show nothing on standard error but an error.")
