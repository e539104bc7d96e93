"""Threads that add to the same sums, in the same order whatever their number and speed."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from threading import Condition

import numpy as np

from sq_stream.parallel import Workers


class InOrder:
    """Lets the batches 0, 1, 2, … through each point one after the other.

    They must be started in that order, so that the one that others wait for is always running.
    """

    def __init__(self) -> None:
        self._changed = Condition()
        self._next: Counter[Hashable] = Counter()
        self._failed = math.inf

    @contextmanager
    def turn(self, point: Hashable, batch: int) -> Iterator[None]:
        """Wait until all batches before this one have passed `point`; the next may when the block ends.

        Raises:
            AbandonedError: one of them failed.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._failed < batch or self._next[point] == batch)
            if self._failed < batch:
                raise AbandonedError
        yield
        with self._changed:
            self._next[point] += 1
            self._changed.notify_all()

    def run(self, workers: Workers, compute: Callable[[int], None], n_batches: int) -> Iterator[None]:
        """Compute all batches, yielding after each in turn."""

        def run_batch(batch: int) -> None:
            try:
                with np.errstate(over="ignore", invalid="ignore"):  # found in the end, in the sums
                    compute(batch)
            except BaseException:
                self.fail(batch)
                raise

        try:
            yield from workers.stream(run_batch, range(n_batches))
        finally:
            self.fail(-1)

    def fail(self, batch: int) -> None:
        """Let none pass that would come after this batch."""
        with self._changed:
            self._failed = min(self._failed, batch)
            self._changed.notify_all()


class AbandonedError(Exception):
    """An earlier batch failed; its error is the one to report."""
