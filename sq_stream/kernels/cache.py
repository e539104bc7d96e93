"""Where compiled kernels are kept, and for which block types they are all there; without importing Numba.

Numba by itself notices a change only in the file of the function that is called, not in those of the leaves compiled
into it, so compiled kernels are kept in a folder named after all of these sources: an upgrade never runs old code.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterable
from functools import cache
from importlib.metadata import version
from pathlib import Path

from sq_stream.formats.storage import user_cache


@cache
def cache_folder() -> Path:
    """The first that is this user's alone: in NUMBA_CACHE_DIR, this package, the user's cache; else a temporary one.

    Compiled kernels are machine code that is run as it is found, so a folder of another user, or one that others can
    write to, is passed over.

    Raises:
        OSError: there is none.
    """
    here = Path(__file__).parent
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(here.glob("*.py")))).hexdigest()[:16]
    chosen = [Path(os.environ["NUMBA_CACHE_DIR"])] if os.environ.get("NUMBA_CACHE_DIR") else []
    for parent in (*chosen, here / "__pycache__", user_cache()):
        folder = parent / f"kernels-{digest}"
        try:
            parent.mkdir(parents=True, exist_ok=True)
            folder.mkdir(mode=0o700, exist_ok=True)
            own = _is_ours(folder)
        except OSError:
            continue
        if own and os.access(folder, os.W_OK):
            for other in parent.glob("kernels-*"):
                if other != folder:
                    shutil.rmtree(other, ignore_errors=True)
            return folder
    return Path(tempfile.mkdtemp(prefix="sq-stream-kernels-"))


def _is_ours(folder: Path) -> bool:
    """Whether nobody but this user can change what is in `folder`."""
    status = folder.lstat()
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & 0o022


def kept_kernels(uses: Iterable[str]) -> set[str]:
    """Those of `uses` that a job with these kernels has been through on this processor, so that none is compiled."""
    try:
        folder = cache_folder()
    except OSError:
        return set()
    return {use for use in uses if _mark(folder, use).exists()}


def mark_kept(uses: Iterable[str]) -> None:
    """Remember that all kernels of `uses` have been compiled and kept.

    Raises:
        OSError: it cannot be remembered.
    """
    folder = cache_folder()
    for use in uses:
        _mark(folder, use).touch()


def _mark(folder: Path, use: str) -> Path:
    return folder / f"{use}-{_processor()}.kept"


@cache
def _processor() -> str:
    """A digest of all that Numba compiles for: processor, Python, its own version and settings."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        features = sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))})
    except OSError:
        features = [platform.processor()]
    settings = sorted(f"{name}={value}" for name, value in os.environ.items() if name.startswith("NUMBA_"))
    facts = [
        platform.machine(),
        features,
        sys.implementation.cache_tag,
        version("numba"),
        version("llvmlite"),
        settings,
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
