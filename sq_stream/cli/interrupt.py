"""SIGINT and SIGTERM end a command in order and, whatever it is doing, within seconds."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
GRACE = 3.0  # seconds to end in order


class Interrupts:
    """Turns the first signal inside its `with` block into a KeyboardInterrupt; later ones are ignored.

    Python only does so between two of its own instructions, and threads end what they have begun: a long computation,
    or one that swallows the exception, would go on. So a thread that the signal wakes gives up for them.
    """

    def __init__(self, give_up: Callable[[], None]) -> None:
        """`give_up` is called, in another thread, if the block has not ended GRACE seconds after a signal."""
        self._give_up = give_up
        self._interrupted = False
        self._ended = threading.Event()

    def __enter__(self) -> Interrupts:
        wake, self._woken = os.pipe()
        os.set_blocking(self._woken, False)
        handled = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]  # by nohup, a shell's &
        self._previous = {number: signal.signal(number, self._interrupt) for number in handled}
        self._previous_fd = signal.set_wakeup_fd(self._woken, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._watch, args=(wake,), name="interrupts", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        signal.set_wakeup_fd(self._previous_fd)
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        os.close(self._woken)
        self._thread.join()

    def _interrupt(self, _number: int, _frame: FrameType | None) -> None:
        if not (self._interrupted or self._ended.is_set()):
            self._interrupted = True
            raise KeyboardInterrupt

    def _watch(self, wake: int) -> None:
        """Wait for a signal, whose number Python writes into the pipe, or for the pipe's end."""
        with open(wake, "rb", buffering=0) as pipe:
            while number := pipe.read(1):
                if number[0] in SIGNALS and not self._ended.wait(GRACE):
                    self._give_up()
