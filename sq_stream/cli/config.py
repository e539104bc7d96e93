"""Settings from a file: a table for each command, with the names of its options."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import click

from sq_stream.errors import SqStreamError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

NAME = "sq-stream.toml"
FOLLOWERS = ("plan", "calibrate", "cache")
"""Commands that take what they share with `quantize` from its table, where their own does not say otherwise."""
OF_ONE_RUN = frozenset(("quiet", "log_format", "summary"))
"""Parameters that each command has for itself."""
MAX_BYTES = 2**16
MAX_INTEGER = 2**63
"""Whole numbers of TOML are below it; Python reads larger ones too."""

Commands = tuple[str, ...]


def read_defaults(ctx: click.Context, path: Path) -> dict[str, Any]:
    """What the file at `path` says for the command of `ctx`, by the names of its parameters.

    Raises:
        click.UsageError: the file cannot be read, or anything in it is not what a command or option takes.
    """
    tables = dict(_tables(ctx, path, ctx.find_root().command, _read(path), ()))
    commands = command_names(ctx)
    theirs = tables.get(("quantize",), {}) if commands[0] in FOLLOWERS else {}
    names = {param.name for param in ctx.command.params} - OF_ONE_RUN
    return {name: value for name, value in theirs.items() if name in names} | tables.get(commands, {})


def option_name(param: click.Parameter) -> str:
    """`max-ram` of `--max-ram`: its longest name, which is its key in the file."""
    return max(param.opts, key=len).lstrip("-")


def command_names(ctx: click.Context) -> Commands:
    """`("cache", "list")` of `sq-stream cache list`."""
    return (*command_names(ctx.parent), str(ctx.info_name)) if ctx.parent else ()


def _read(path: Path) -> dict[str, Any]:
    from sq_stream.formats.storage import read_input
    from sq_stream.formats.strict_json import shown

    if str(path) == os.devnull:  # no settings at all
        return {}
    try:
        table: dict[str, Any] = tomllib.loads(read_input(path, MAX_BYTES).decode())
    except SqStreamError as error:
        raise click.UsageError(str(error)) from error
    except (ValueError, RecursionError) as error:
        raise click.UsageError(f"{path} is no TOML file: {shown(str(error))}") from error
    return table


def _tables(
    ctx: click.Context, path: Path, command: click.Command, table: Mapping[str, Any], commands: Commands
) -> Iterator[tuple[Commands, dict[str, Any]]]:
    """The checked tables of `command` and its subcommands: values by parameter."""
    from sq_stream.formats.strict_json import shown

    if isinstance(command, click.Group):
        for name, value in table.items():
            where = ".".join((*commands, shown(name)))
            if not isinstance(value, dict):
                example = ".".join((*commands, next(iter(command.commands))))
                raise click.UsageError(f"{path}: {where} is outside of a command's table, such as [{example}]")
            if name not in command.commands:
                raise click.UsageError(f"{path}: [{where}] is no command{_nearest(name, command.commands)}")
            yield from _tables(ctx, path, command.commands[name], value, (*commands, name))
        return
    options = {option_name(p): p for p in command.params if isinstance(p, click.Option) and p.name != "config"}
    where = f"{path}: [{'.'.join(commands)}]"
    for key in table:
        if key not in options:
            raise click.UsageError(f"{where} {shown(key)} is no option of this command{_nearest(key, options)}")
    yield commands, {str(options[key].name): _value(ctx, f"{where} {key}", options[key], v) for key, v in table.items()}


def _value(ctx: click.Context, where: str, option: click.Option, value: Any) -> Any:
    """`value` as it is in the file, if the option takes it."""
    from sq_stream.formats.strict_json import brief, shown

    if option.is_flag:
        fits, expected = isinstance(value, bool), "true or false"
    elif option.multiple:
        fits = isinstance(value, list) and all(isinstance(item, str) for item in value)
        expected = 'a list of texts, as in ["a", "b"]'
    elif isinstance(option.type, click.types.IntParamType):
        fits, expected = type(value) is int and abs(value) < MAX_INTEGER, "a whole number"
    else:
        fits, expected = isinstance(value, str), "a text in quotes"
    if not fits:
        raise click.UsageError(f"{where} = {brief(value)}: expected {expected}")
    try:
        option.type_cast_value(ctx, value)
    except click.BadParameter as error:
        raise click.UsageError(f"{where}: {shown(error.message)}") from error
    return value


def _nearest(name: str, known: Mapping[str, Any]) -> str:
    close = get_close_matches(name, known, n=1)
    return f": did you mean {close[0]}?" if close else f": there are {', '.join(known)}"
