"""The command line: click commands that call `sq_stream.api` and print what it says."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from sq_stream import __version__
from sq_stream.cli.command import Command
from sq_stream.cli.console import Console
from sq_stream.cli.echo import echo
from sq_stream.cli.options import (
    as_json,
    cache,
    evaluate_options,
    job_options,
    max_ram,
    model_dir,
    report,
    text_options,
    threads,
)

EPILOG = """\b
Exit codes:
   0  done
   1  a fault of sq-stream itself: please report it
   2  wrong usage: an option, or an output that exists
   3  unsupported architecture or tokenizer
   4  bad input: a damaged, foreign or unusable file
   5  does not fit the memory or the disk it may use
   6  reading or writing failed
   7  verification failed
  75  interrupted or locked: the same command resumes the job
"""


@click.group(epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="sq-stream")
def cli() -> None:
    """Quantize Hugging Face checkpoints to llama.cpp GGUF files on a CPU, in bounded memory."""


@cli.command(cls=Command, resumes=True)
@model_dir
@job_options
@click.option("--overwrite", is_flag=True, help="Replace the output if it exists.")
@click.option("--fresh", is_flag=True, help="Start over instead of resuming an interrupted run.")
@report
def quantize(console: Console, model_dir: Path, **options: Any) -> Any:
    """Quantize the checkpoint in MODEL_DIR into a GGUF file.

    MODEL_DIR holds config.json, *.safetensors and a tokenizer. The file appears under its name only when it is
    complete and has been read back; an interrupted run is resumed by the same command.
    """
    from sq_stream import api

    return asdict(api.quantize(model_dir, on_event=console, **options))


@cli.command(cls=Command)
@model_dir
@job_options
@as_json
def plan(_console: Console, model_dir: Path, as_json: bool, **options: Any) -> Any:
    """Show what quantize would do: every tensor's source, type and size, and what the job needs."""
    from sq_stream import api
    from sq_stream.cli import tables

    job = api.plan(model_dir, **options)
    fields = tables.plan_fields(job)
    echo(tables.to_json(fields) if as_json else tables.plan_text(job))
    return fields


@cli.command(cls=Command)
@click.argument("path", type=click.Path(path_type=Path))
@as_json
def inspect(_console: Console, path: Path, as_json: bool) -> Any:
    """Show what PATH, a checkpoint folder or a GGUF file, holds."""
    from sq_stream import api
    from sq_stream.cli import tables

    summary = api.inspect(path)
    echo(tables.to_json(summary) if as_json else tables.summary_text(summary))
    return asdict(summary)


@cli.command(cls=Command)
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--against",
    type=click.Path(path_type=Path),
    metavar="MODEL_DIR",
    help="Checkpoint that the file was made from: show the error of each tensor.",
)
@max_ram
@as_json
def verify(console: Console, file: Path, against: Path | None, max_ram: str, as_json: bool) -> Any:
    """Check that every block of a GGUF FILE decodes to finite values, and compare it with its source."""
    from sq_stream import api
    from sq_stream.cli import tables

    checks = api.verify(file, against, max_ram=max_ram, on_event=console)
    echo(tables.to_json(checks) if as_json else tables.checks_text(checks))
    return checks


@cli.command("eval", cls=Command)
@evaluate_options
@report
@as_json
def evaluate(console: Console, files: tuple[Path, ...], as_json: bool, **options: Any) -> Any:
    """Compare the predictions of FILES with those of the checkpoint that they were made from.

    FILES are GGUF files, of whatever block types and makers, or folders of checkpoints. Each is scored on packaged or
    given text by loss and KL divergence; with a baseline, also by how much of the loss between the baseline and the
    checkpoint it recovers.
    """
    from sq_stream import api
    from sq_stream.cli import scores, tables

    evaluation = api.evaluate(files, on_event=console, **options)
    echo(tables.to_json(evaluation) if as_json else scores.evaluation_text(evaluation))
    return asdict(evaluation)


@cli.command(cls=Command)
@click.option("-o", "--output", type=click.Path(path_type=Path), metavar="FILE", help="Keep the quantized file here.")
@click.option(
    "--prompt", default="It was", show_default=True, help="Beginning of the text that the quantized model continues."
)
@click.option("--tokens", type=click.IntRange(1, 200), default=48, show_default=True, help="Tokens to generate.")
def demo(console: Console, output: Path | None, prompt: str, tokens: int) -> Any:
    """Quantize the small model that ships with sq-stream, and let the result write a sentence."""
    from sq_stream.cli.demo import run_demo

    run_demo(output, prompt, tokens, console)
    return None if output is None else {"output": str(output)}


@cli.command(cls=Command, resumes=True)
@model_dir
@text_options
@max_ram
@threads
@click.option(
    "--imatrix-out", type=click.Path(path_type=Path), metavar="FILE", help="Also write a GGUF importance matrix here."
)
def calibrate(console: Console, model_dir: Path, imatrix_out: Path | None, **options: Any) -> Any:
    """Gather the statistics of MODEL_DIR's linears that quantize uses, and keep them in the cache."""
    from sq_stream import api

    api.calibrate(model_dir, imatrix_out=imatrix_out, on_event=console, **options)
    return None if imatrix_out is None else {"output": str(imatrix_out)}


@cli.group("cache")
def cache_group() -> None:
    """Show or clear the cache of calibrations."""


@cache_group.command("list", cls=Command)
@cache
@as_json
def cache_list(_console: Console, cache: Path | None, as_json: bool) -> Any:
    """Show the calibrations in the cache."""
    from sq_stream.calibrate.store import Store
    from sq_stream.cli import tables

    store = Store(cache)
    calibrations = store.list()
    echo(tables.to_json(calibrations) if as_json else tables.cache_text(store.folder, calibrations))
    return calibrations


@cache_group.command("clear", cls=Command)
@click.argument("keys", nargs=-1)
@cache
def cache_clear(_console: Console, keys: tuple[str, ...], cache: Path | None) -> Any:
    """Remove the calibrations with these KEYS, or all."""
    from sq_stream.calibrate.store import Store
    from sq_stream.units import format_size

    freed = Store(cache).clear(keys or None)
    echo(f"freed {format_size(freed)}")
    return {"freed_bytes": freed}


def main() -> None:
    """Entry point of the `sq-stream` script."""
    sys.exit(cli())


if __name__ == "__main__":
    main()
