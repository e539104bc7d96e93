"""The newcomer's first minute: the shipped model, quantized by the real job, writes a sentence."""

from __future__ import annotations

import tempfile
from pathlib import Path

import click

from sq_stream import api
from sq_stream.cli.console import Console
from sq_stream.cli.tables import tensors_text
from sq_stream.demo import model_folder
from sq_stream.demo.generate import generate

WINDOWS = 32  # a small part of the packaged text, for a small model


def run_demo(output: Path | None, prompt: str, n_tokens: int, console: Console) -> None:
    """Quantize the shipped model to `output` (or to a temporary file), show it, and generate `n_tokens` tokens."""
    with tempfile.TemporaryDirectory(prefix="sq-stream-demo-") as folder:
        file = output or Path(folder) / "demo-Q4_K_M.gguf"
        click.echo(f"Quantizing the shipped model, {model_folder()}")
        click.echo("(the first run also compiles the kernels, which takes a while)\n")
        api.quantize(
            model_folder(),
            file,
            windows=WINDOWS,
            cache=Path(folder) / "cache",
            overwrite=output is not None,
            on_event=console,
        )
        click.echo("\n" + tensors_text(api.inspect(file).tensors))
        click.echo(f"\nThe quantized model continues {prompt!r}:\n")
        click.echo(f"  {prompt}", nl=False)
        for piece in generate(file, prompt, n_tokens):
            click.echo(piece.replace("\n", "\n  "), nl=False)
        click.echo()
        if output:
            click.echo(f"\nThe file is {output}: try it with llama-cli -m {output}")
