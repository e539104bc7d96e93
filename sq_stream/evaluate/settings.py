"""The options of an evaluation, checked."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from sq_stream.errors import UsageError
from sq_stream.job.settings import DEFAULT_CTX, DEFAULT_MAX_RAM, DEFAULT_WINDOWS, parse_threads
from sq_stream.units import parse_size

if TYPE_CHECKING:
    from typing_extensions import Unpack

PathLike = str | os.PathLike[str]

SUITES = ("heldout120", "convergence60", "general")
"""Packaged sets."""
MADE = ("rtn", "imatrix")
"""Baselines that are made in memory."""


@dataclass(frozen=True)
class Settings:
    """What the user asked for."""

    files: tuple[Path, ...]  # GGUF files, or folders of checkpoints
    ref: Path
    baselines: tuple[str, ...] = ()  # of `MADE`, or files or folders
    texts: tuple[Path, ...] = ()
    suites: tuple[str, ...] = ("heldout120",)
    ctx: int = DEFAULT_CTX  # tokens in a window of `texts`
    windows: int | None = None  # of every suite, at most
    calib_windows: int = DEFAULT_WINDOWS  # of packaged text, for the importance of the baseline `imatrix`
    cache: Path | None = None  # None: the user's cache folder
    max_ram: int = DEFAULT_MAX_RAM
    threads: int = 1


class Options(TypedDict, total=False):
    """The options of `evaluate` as keywords; what they mean is said at `Settings`."""

    baselines: Sequence[PathLike]
    texts: Sequence[PathLike]
    suites: Sequence[str]
    ctx: int
    windows: int | None
    calib_windows: int
    cache: PathLike | None
    max_ram: int | str
    threads: int | None


def parse_settings(files: Sequence[PathLike], ref: PathLike, **options: Unpack[Options]) -> Settings:
    """Fill in the defaults and refuse what cannot be meant.

    Without suites and texts, the suite is heldout120.

    Raises:
        UsageError: options contradict each other, or one names what does not exist.
    """
    texts, suites = tuple(map(Path, options.get("texts", ()))), tuple(dict.fromkeys(options.get("suites", ())))
    cache, max_ram = options.get("cache"), options.get("max_ram", DEFAULT_MAX_RAM)
    settings = Settings(
        files=tuple(map(Path, files)),
        ref=Path(ref),
        baselines=tuple(map(str, options.get("baselines", ()))),
        texts=texts,
        suites=suites if suites or texts else ("heldout120",),
        ctx=options.get("ctx", DEFAULT_CTX),
        windows=options.get("windows"),
        calib_windows=options.get("calib_windows", DEFAULT_WINDOWS),
        cache=None if cache is None else Path(cache),
        max_ram=parse_size(max_ram) if isinstance(max_ram, str) else max_ram,
        threads=parse_threads(options.get("threads")),
    )
    _refuse_contradictions(settings)
    return settings


def _refuse_contradictions(settings: Settings) -> None:
    if not settings.files:
        raise UsageError("name a GGUF file, or the folder of a checkpoint, to evaluate")
    for name in settings.suites:
        if name not in SUITES:
            raise UsageError(f"--suite {name!r} is not one of {', '.join(SUITES)}")
    if settings.windows is not None and settings.windows < 1:
        raise UsageError(f"--windows {settings.windows}: at least one window is needed")
    given = [str(path) for path in settings.files] + list(settings.baselines)
    twice = next((name for name in given if given.count(name) > 1), None)
    if twice is not None:
        raise UsageError(f"{twice} is named twice: name each file, folder and baseline once")
    if len(set(settings.texts)) < len(settings.texts):
        raise UsageError("a text is named twice: name each --text once")
