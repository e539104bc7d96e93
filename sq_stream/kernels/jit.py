"""Compiling kernels, and keeping what was compiled.

Compiled kernels are kept on disk. Numba by itself notices a change only in the file of the function that is called,
not in those of the leaves compiled into it, so they are kept in a folder named after all of these sources: an upgrade
never runs old code. Where nothing can be kept, on a full disk say, they are compiled anew in every process.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numba
from numba.core.caching import FunctionCache

from sq_stream.formats.storage import user_cache

_failures: list[OSError] = []


def jit(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """`numba.njit` with these options, arithmetic as NumPy's, and compiled code kept on disk where that works."""

    def decorate(function: Callable[..., Any]) -> Any:
        dispatcher = numba.njit(error_model="numpy", **options)(function)
        if numba.config.CACHE_DIR:
            with suppress(RuntimeError):  # it cannot be written after all
                dispatcher._cache = _Cache(function)  # in place of what `cache=True` puts there
        return dispatcher

    return decorate


def cache_failure() -> str | None:
    """Why compiled kernels could not be kept by this process; None if they could."""
    return str(_failures[0].strerror or _failures[0]) if _failures else None


class _Cache(FunctionCache):  # type: ignore[misc]
    """Numba's cache of one function, except that a failure costs time and not the job."""

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            return super().load_overload(sig, target_context)
        except Exception:  # unpickling a damaged file raises anything
            with _remembering_failures():
                self.flush()
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        with _remembering_failures():
            super().save_overload(sig, data)


@contextmanager
def _remembering_failures() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        _failures.append(error)


def _cache_folder() -> Path | None:
    """The first writable of: what NUMBA_CACHE_DIR says, this package, the user's cache, a temporary folder."""
    here = Path(__file__).parent
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(here.glob("*.py")))).hexdigest()[:16]
    chosen = [Path(numba.config.CACHE_DIR)] if numba.config.CACHE_DIR else []
    for parent in (*chosen, here / "__pycache__", user_cache()):
        folder = parent / f"kernels-{digest}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(folder, os.W_OK):
            for other in parent.glob("kernels-*"):
                if other != folder:
                    shutil.rmtree(other, ignore_errors=True)
            return folder
    try:
        return Path(tempfile.mkdtemp(prefix="sq-stream-kernels-"))
    except OSError as error:
        _failures.append(error)
        return None


numba.config.CACHE_DIR = str(_cache_folder() or "")
