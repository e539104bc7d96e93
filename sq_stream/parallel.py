"""Threads for NumPy work whose result must not depend on their number: fixed pieces, one BLAS thread to a piece."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from sq_stream.allocator import return_freed_arrays

T = TypeVar("T")
R = TypeVar("R")

SLAB = 128  # rows of a matrix product that one thread computes at a time


class Workers:
    """A pool of threads; while it is open, BLAS itself uses one thread."""

    def __init__(self, n_threads: int, begin: Callable[[], None] | None = None) -> None:
        """`n_threads` threads, in each of which `begin` is called first."""
        return_freed_arrays()
        self._limits = threadpool_limits(1, user_api="blas")
        self._pool = ThreadPoolExecutor(n_threads, initializer=begin)

    def map(self, function: Callable[[T], R], items: Iterable[T]) -> list[R]:
        """Results of `function` for all items, in their order."""
        return list(self._pool.map(function, items))

    def stream(self, function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """Results of `function` in the order of the items, as they come; what has not begun is dropped on an error."""
        return self._pool.map(function, items)

    def matmul(self, a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float32]:
        """A [n, k] times b [k, m], in slabs of rows: the same bits for any number of threads."""
        out = np.empty((len(a), b.shape[1]), np.float32)

        def slab(start: int) -> None:
            np.matmul(a[start : start + SLAB], b, out=out[start : start + SLAB])

        self.map(slab, range(0, len(a), SLAB))
        return out

    def close(self) -> None:
        """End the threads and give BLAS its own back."""
        self._pool.shutdown()
        self._limits.restore_original_limits()

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def one_kernel_thread() -> None:
    """What `Workers` that call kernels begin with: there are several of them already."""
    set_kernel_threads(1)


def set_kernel_threads(n: int) -> None:
    """Let the kernels that this thread calls use n threads."""
    import numba

    numba.set_num_threads(n)
