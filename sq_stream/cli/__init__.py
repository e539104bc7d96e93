"""The command line: click commands that call `sq_stream.api` and print what it says."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from sq_stream import __version__
from sq_stream.cli.console import Console
from sq_stream.cli.options import (
    as_json,
    cache,
    evaluate_options,
    job_options,
    log_format,
    max_ram,
    model_dir,
    report,
    text_options,
    threads,
)
from sq_stream.errors import RESUMES

EPILOG = """\b
Exit codes:
   0  done
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


@cli.command()
@model_dir
@job_options
@click.option("--overwrite", is_flag=True, help="Replace the output if it exists.")
@click.option("--fresh", is_flag=True, help="Start over instead of resuming an interrupted run.")
@report
@log_format
def quantize(model_dir: Path, log_format: str, **options: Any) -> None:
    """Quantize the checkpoint in MODEL_DIR into a GGUF file.

    MODEL_DIR holds config.json, *.safetensors and a tokenizer. The file appears under its name only when it is
    complete and has been read back; an interrupted run is resumed by the same command.
    """
    with Console(log_format, when_interrupted=RESUMES) as console:
        from sq_stream import api

        api.quantize(model_dir, on_event=console, **options)


@cli.command()
@model_dir
@job_options
@as_json
def plan(model_dir: Path, as_json: bool, **options: Any) -> None:
    """Show what quantize would do: every tensor's source, type and size, and what the job needs."""
    with Console():
        from sq_stream import api
        from sq_stream.cli import tables

        job = api.plan(model_dir, **options)
        click.echo(tables.to_json(tables.plan_fields(job)) if as_json else tables.plan_text(job))


@cli.command()
@click.argument("path", type=click.Path(path_type=Path))
@as_json
def inspect(path: Path, as_json: bool) -> None:
    """Show what PATH, a checkpoint folder or a GGUF file, holds."""
    with Console():
        from sq_stream import api
        from sq_stream.cli import tables

        summary = api.inspect(path)
        click.echo(tables.to_json(summary) if as_json else tables.summary_text(summary))


@cli.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--against",
    type=click.Path(path_type=Path),
    metavar="MODEL_DIR",
    help="Checkpoint that the file was made from: show the error of each tensor.",
)
@max_ram
@as_json
@log_format
def verify(file: Path, against: Path | None, max_ram: str, as_json: bool, log_format: str) -> None:
    """Check that every block of a GGUF FILE decodes to finite values, and compare it with its source."""
    with Console(log_format) as console:
        from sq_stream import api
        from sq_stream.cli import tables

        checks = api.verify(file, against, max_ram=max_ram, on_event=console)
        click.echo(tables.to_json(checks) if as_json else tables.checks_text(checks))


@cli.command("eval")
@evaluate_options
@report
@as_json
@log_format
def evaluate(files: tuple[Path, ...], as_json: bool, log_format: str, **options: Any) -> None:
    """Compare the predictions of FILES with those of the checkpoint that they were made from.

    FILES are GGUF files, of whatever block types and makers, or folders of checkpoints. Each is scored on packaged or
    given text by loss and KL divergence; with a baseline, also by how much of the loss between the baseline and the
    checkpoint it recovers.
    """
    with Console(log_format) as console:
        from sq_stream import api
        from sq_stream.cli import scores, tables

        evaluation = api.evaluate(files, on_event=console, **options)
        click.echo(tables.to_json(evaluation) if as_json else scores.evaluation_text(evaluation))


@cli.command()
@click.option("-o", "--output", type=click.Path(path_type=Path), metavar="FILE", help="Keep the quantized file here.")
@click.option(
    "--prompt", default="It was", show_default=True, help="Beginning of the text that the quantized model continues."
)
@click.option("--tokens", type=click.IntRange(1, 200), default=48, show_default=True, help="Tokens to generate.")
@log_format
def demo(output: Path | None, prompt: str, tokens: int, log_format: str) -> None:
    """Quantize the small model that ships with sq-stream, and let the result write a sentence."""
    with Console(log_format) as console:
        from sq_stream.cli.demo import run_demo

        run_demo(output, prompt, tokens, console)


@cli.command()
@model_dir
@text_options
@max_ram
@threads
@click.option(
    "--imatrix-out", type=click.Path(path_type=Path), metavar="FILE", help="Also write a GGUF importance matrix here."
)
@log_format
def calibrate(model_dir: Path, log_format: str, **options: Any) -> None:
    """Gather the statistics of MODEL_DIR's linears that quantize uses, and keep them in the cache."""
    with Console(log_format, when_interrupted=RESUMES) as console:
        from sq_stream import api

        api.calibrate(model_dir, on_event=console, **options)


@cli.group("cache")
def cache_group() -> None:
    """Show or clear the cache of calibrations."""


@cache_group.command("list")
@cache
@as_json
def cache_list(cache: Path | None, as_json: bool) -> None:
    """Show the calibrations in the cache."""
    with Console():
        from sq_stream.calibrate.store import Store
        from sq_stream.cli import tables

        store = Store(cache)
        click.echo(tables.to_json(store.list()) if as_json else tables.cache_text(store.folder, store.list()))


@cache_group.command("clear")
@click.argument("keys", nargs=-1)
@cache
def cache_clear(keys: tuple[str, ...], cache: Path | None) -> None:
    """Remove the calibrations with these KEYS, or all."""
    with Console():
        from sq_stream.calibrate.store import Store
        from sq_stream.units import format_size

        click.echo(f"freed {format_size(Store(cache).clear(keys or None))}")


def main() -> None:
    """Entry point of the `sq-stream` script."""
    sys.exit(cli())


if __name__ == "__main__":
    main()
