"""The options of a quantize job, checked."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from sq_stream.errors import UsageError
from sq_stream.units import parse_size

if TYPE_CHECKING:
    from typing_extensions import Unpack

EFFORTS = ("fast", "balanced", "best")
DEFAULT_EFFORT = "balanced"
DEFAULT_RECIPE = "q4_k_m"
DEFAULT_MAX_RAM = 4 * 2**30
DEFAULT_CTX = 512
DEFAULT_WINDOWS = 360


@dataclass(frozen=True)
class Settings:
    """What the user asked for; `choices()` are the options that decide the bytes of the file."""

    model_dir: Path
    output: Path
    recipe: str = DEFAULT_RECIPE
    pure: bool = False
    tensor_types: tuple[str, ...] = ()  # PATTERN=TYPE, in order
    effort: str = DEFAULT_EFFORT
    mtp: bool = False
    pre: str | None = None
    calib: tuple[Path, ...] = ()  # text or token ids in place of the packaged text
    calib_extend: bool = False  # in addition to it
    ctx: int = DEFAULT_CTX  # tokens in a window
    windows: int = DEFAULT_WINDOWS  # of the fit, at most
    imatrix: Path | None = None  # statistics in place of a calibration
    cache: Path | None = None  # None: the user's cache folder
    max_ram: int = DEFAULT_MAX_RAM
    threads: int = 1
    overwrite: bool = False
    fresh: bool = False

    def choices(self) -> dict[str, object]:
        """The options that decide the bytes of the file, as JSON values."""
        return {
            "type": self.recipe,
            "pure": self.pure,
            "tensor_types": list(self.tensor_types),
            "effort": self.effort,
            "mtp": self.mtp,
            "pre": self.pre,
        }

    def command_options(self) -> str:
        """The options of `quantize` that make the same file again, FILE standing for files of the user's own."""
        words = ["--type", self.recipe, "--effort", self.effort]
        words += [word for text in self.tensor_types for word in ("--tensor-type", text)]
        words += ["--pre", self.pre] if self.pre else []
        words += [f"--{name}" for name in ("pure", "mtp") if getattr(self, name)]
        if self.imatrix is not None:
            words += ["--imatrix", "FILE"]
        elif self.effort != "fast":
            words += ["--ctx", str(self.ctx), "--windows", str(self.windows), *["--calib", "FILE"] * len(self.calib)]
            words += ["--calib-extend"] if self.calib_extend else []
        return shlex.join(words)


class Options(TypedDict, total=False):
    """The options that `quantize` and `plan` take, as keywords; what they mean is said at `Settings`."""

    recipe: str
    pure: bool
    tensor_types: Sequence[str]
    effort: str
    mtp: bool
    pre: str | None
    calib: Sequence[str | os.PathLike[str]]
    calib_extend: bool
    ctx: int
    windows: int
    imatrix: str | os.PathLike[str] | None
    cache: str | os.PathLike[str] | None
    max_ram: int | str
    threads: int | None
    overwrite: bool
    fresh: bool


def parse_settings(
    model_dir: str | os.PathLike[str], output: str | os.PathLike[str] | None = None, **options: Unpack[Options]
) -> Settings:
    """Fill in the defaults and refuse what cannot be meant; the arguments are the fields of `Settings`.

    Raises:
        UsageError: options contradict each other, or one names what does not exist or is not there.
    """
    folder = Path(model_dir)
    imatrix, cache, max_ram = options.get("imatrix"), options.get("cache"), options.get("max_ram", DEFAULT_MAX_RAM)
    given: dict[str, Any] = {
        **options,
        "tensor_types": tuple(options.get("tensor_types", ())),
        "calib": tuple(map(Path, options.get("calib", ()))),
        "imatrix": None if imatrix is None else Path(imatrix),
        "cache": None if cache is None else Path(cache),
        "max_ram": parse_size(max_ram) if isinstance(max_ram, str) else max_ram,
        "threads": parse_threads(options.get("threads")),
    }
    settings = Settings(folder, Path(output or default_output(folder, given)), **given)
    _refuse_contradictions(settings)
    return settings


def _refuse_contradictions(settings: Settings) -> None:
    if settings.effort not in EFFORTS:
        raise UsageError(f"--effort {settings.effort!r} is not one of {', '.join(EFFORTS)}")
    if settings.effort == "best":
        raise UsageError("--effort best is not available in this version: use --effort balanced")
    if settings.effort == "fast" and (settings.calib or settings.imatrix):
        raise UsageError("--effort fast looks at the weights alone: leave out --calib and --imatrix, or the effort")
    if settings.calib and settings.imatrix:
        raise UsageError("--imatrix takes the place of a calibration: leave out --calib, or --imatrix")
    if settings.calib_extend and not settings.calib:
        raise UsageError("--calib-extend adds the files of --calib to the packaged text: name them with --calib")


def parse_threads(threads: int | None) -> int:
    """`threads`, or as many as this process may run on.

    Raises:
        UsageError: fewer than one thread, or more than the process may use.
    """
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if threads is None:
        return available
    if not 1 <= threads <= available:
        raise UsageError(f"--threads {threads}: this process may use 1 to {available} threads on this machine")
    return threads


def default_output(model_dir: Path, options: Mapping[str, Any]) -> Path:
    """`NAME-Q4_K_M.gguf` (or `NAME-Q4_K_M-pure.gguf`) in the current folder."""
    recipe = str(options.get("recipe", DEFAULT_RECIPE)).upper()
    return Path(f"{model_dir.resolve().name or 'model'}-{recipe}{'-pure' if options.get('pure') else ''}.gguf")
