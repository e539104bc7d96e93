"""Compiling kernels; what was compiled is kept on disk, and where that fails, on a full disk say, compiled again."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numba
from numba.core.caching import FunctionCache

from sq_stream.kernels.cache import cache_folder

_failures: list[OSError] = []

# Threads of libgomp, on which Numba runs kernels where it finds it, wait for their next piece of work in a loop of this
# many turns before they sleep. By default it is 300 000: milliseconds of processor time, which on a busy machine other
# processes and the kernels themselves are short of. What the user sets holds.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")


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


try:
    numba.config.CACHE_DIR = str(cache_folder())
except OSError as error:
    _failures.append(error)
    numba.config.CACHE_DIR = ""
