"""The options of a quantize job, checked."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sq_stream.errors import UsageError

EFFORTS = ("fast", "balanced", "best")
DEFAULT_EFFORT = "balanced"
DEFAULT_MAX_RAM = 4 * 2**30
DEFAULT_CTX = 512
DEFAULT_WINDOWS = 360


@dataclass(frozen=True)
class Settings:
    """What the user asked for; `choices()` are the options that decide the bytes of the file."""

    model_dir: Path
    output: Path
    recipe: str = "q4_k_m"
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


def parse_settings(
    model_dir: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    recipe: str = "q4_k_m",
    pure: bool = False,
    tensor_types: Sequence[str] = (),
    effort: str = DEFAULT_EFFORT,
    mtp: bool = False,
    pre: str | None = None,
    calib: Sequence[str | os.PathLike[str]] = (),
    calib_extend: bool = False,
    ctx: int = DEFAULT_CTX,
    windows: int = DEFAULT_WINDOWS,
    imatrix: str | os.PathLike[str] | None = None,
    cache: str | os.PathLike[str] | None = None,
    max_ram: int = DEFAULT_MAX_RAM,
    threads: int | None = None,
    overwrite: bool = False,
    fresh: bool = False,
) -> Settings:
    """Fill in the defaults and refuse what cannot be meant; the arguments are the fields of `Settings`.

    Raises:
        UsageError: options contradict each other, or one names what does not exist or is not there.
    """
    if effort not in EFFORTS:
        raise UsageError(f"--effort {effort!r} is not one of {', '.join(EFFORTS)}")
    if effort == "best":
        raise UsageError("--effort best is not available in this version: use --effort balanced")
    if effort == "fast" and (calib or imatrix):
        raise UsageError("--effort fast looks at the weights alone: leave out --calib and --imatrix, or the effort")
    if calib and imatrix:
        raise UsageError("--imatrix takes the place of a calibration: leave out --calib, or --imatrix")
    if calib_extend and not calib:
        raise UsageError("--calib-extend adds the files of --calib to the packaged text: name them with --calib")
    folder = Path(model_dir)
    return Settings(
        model_dir=folder,
        output=Path(output) if output is not None else default_output(folder, recipe, pure=pure),
        recipe=recipe,
        pure=pure,
        tensor_types=tuple(tensor_types),
        effort=effort,
        mtp=mtp,
        pre=pre,
        calib=tuple(map(Path, calib)),
        calib_extend=calib_extend,
        ctx=ctx,
        windows=windows,
        imatrix=None if imatrix is None else Path(imatrix),
        cache=None if cache is None else Path(cache),
        max_ram=max_ram,
        threads=parse_threads(threads),
        overwrite=overwrite,
        fresh=fresh,
    )


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


def default_output(model_dir: Path, recipe: str, *, pure: bool = False) -> Path:
    """`NAME-Q4_K_M.gguf` (or `NAME-Q4_K_M-pure.gguf`) in the current folder."""
    name = model_dir.resolve().name or "model"
    return Path(f"{name}-{recipe.upper()}{'-pure' if pure else ''}.gguf")
