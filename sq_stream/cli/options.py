"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any, TypeVar

import click

from sq_stream.cli.command import PATH
from sq_stream.evaluate.settings import SUITES
from sq_stream.job.settings import DEFAULT_CTX, DEFAULT_EFFORT, DEFAULT_WINDOWS, EFFORTS
from sq_stream.quantize.recipe import RECIPES

Command = TypeVar("Command", bound=Callable[..., Any])

model_dir = click.argument("model_dir", type=PATH)
as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
max_ram = click.option(
    "--max-ram",
    metavar="SIZE",
    default="4G",
    show_default=True,
    help="Most resident memory at the peak, as in 512M or 4G.",
)
threads = click.option("--threads", type=int, metavar="N", help="Threads. Default: all that the process may use.")
cache = click.option(
    "--cache",
    type=PATH,
    metavar="DIR",
    help="Where calibrations are kept. Default: sq-stream in the user's cache folder.",
)
report = click.option(
    "--report",
    type=PATH,
    multiple=True,
    metavar="FILE",
    help="Also write a report, as a page (FILE.html) or as JSON (FILE.json), replacing an older one. Repeatable.",
)
_TEXT = (
    click.option(
        "--calib",
        type=PATH,
        multiple=True,
        metavar="FILE",
        help="Text (UTF-8) or token ids (.npy, .json) to calibrate on in place of the packaged text. Repeatable.",
    ),
    click.option("--calib-extend", is_flag=True, help="Calibrate on the packaged text too, half and half."),
    click.option("--ctx", type=int, default=DEFAULT_CTX, show_default=True, help="Tokens in a window of text."),
    click.option(
        "--windows", type=int, default=DEFAULT_WINDOWS, show_default=True, help="Windows to calibrate on, at most."
    ),
    cache,
)

_JOB = (
    click.option(
        "-o",
        "--output",
        type=PATH,
        metavar="FILE",
        help="File to write. Default: NAME-TYPE.gguf in the current folder.",
    ),
    click.option(
        "--type",
        "recipe",
        type=click.Choice(list(RECIPES)),
        default="q4_k_m",
        show_default=True,
        help="Recipe of block types, as llama-quantize names them.",
    ),
    click.option(
        "--pure", is_flag=True, help="The recipe's base type for every quantized tensor, without its mixture."
    ),
    click.option(
        "--tensor-type",
        "tensor_types",
        multiple=True,
        metavar="PATTERN=TYPE",
        help="Block type of the tensors whose name matches a regular expression, as in 'ffn_down=q6_k'. "
        "Repeatable; the first match holds.",
    ),
    click.option(
        "--effort",
        type=click.Choice(EFFORTS),
        default=DEFAULT_EFFORT,
        show_default=True,
        help="fast: weights only. balanced: calibrate, and shape the error. best: linears also make up for the "
        "errors of those before them, and scales and norms are refined, which takes several times as long.",
    ),
    click.option("--mtp", is_flag=True, help="Keep the multi-token-prediction layers, if the checkpoint has any."),
    click.option("--pre", metavar="NAME", help="Pre-tokenizer name, where it is not recognized from the tokenizer."),
    *_TEXT,
    click.option(
        "--imatrix",
        type=PATH,
        metavar="FILE",
        help="Use this importance matrix (GGUF or legacy) instead of calibrating.",
    ),
    max_ram,
    threads,
)

_EVALUATE = (
    click.argument("files", type=PATH, nargs=-1, required=True),
    click.option("--ref", type=PATH, required=True, metavar="MODEL_DIR", help="The checkpoint to compare with."),
    click.option(
        "--baseline",
        "baselines",
        multiple=True,
        metavar="FILE|rtn|imatrix",
        help="What recovery is measured from: a GGUF file, or made in memory with the block types of the first of "
        "FILES, plain rounding (rtn) or rounding with an importance matrix of packaged text. Repeatable.",
    ),
    click.option(
        "--suite",
        "suites",
        type=click.Choice(SUITES),
        multiple=True,
        help="Packaged text to score: heldout120 (default) and convergence60, windows of 512 tokens of the parts that "
        "no file is fitted to, or general, 64 windows of 256 tokens of running text, or of --text. Repeatable.",
    ),
    click.option("--text", "texts", type=PATH, multiple=True, metavar="FILE", help="UTF-8 text to score. Repeatable."),
    click.option("--ctx", type=int, default=DEFAULT_CTX, show_default=True, help="Tokens in a window of --text."),
    click.option("--windows", type=int, metavar="N", help="Windows of each text to score, at most. Default: all."),
    click.option(
        "--cache",
        type=PATH,
        metavar="DIR",
        help="Where calibrations and work in progress are kept. Default: sq-stream in the user's cache folder.",
    ),
    max_ram,
    threads,
)


def evaluate_options(command: Command) -> Command:
    """Add the options of `eval` that say what to compare, on what text and how."""
    return _add(_EVALUATE, command)


def text_options(command: Command) -> Command:
    """Add the options that say what text to calibrate on and where the result is kept."""
    return _add(_TEXT, command)


def job_options(command: Command) -> Command:
    """Add the options that say what to make and how, shared by `quantize` and `plan`."""
    return _add(_JOB, command)


def _add(options: tuple[Callable[[Any], Any], ...], command: Command) -> Command:
    return reduce(lambda wrapped, option: option(wrapped), reversed(options), command)
