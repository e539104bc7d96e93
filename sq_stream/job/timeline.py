"""Time and resident memory of a run, stage by stage, sampled by a thread that costs next to nothing."""

from __future__ import annotations

import resource
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass

from sq_stream.events import Event, OnEvent, StageStarted

FIRST_STAGE = "prepare"
_INTERVAL = 0.1  # seconds between samples at first; twice as much whenever there are MOST_SAMPLES
MOST_SAMPLES = 512


@dataclass(frozen=True)
class Stage:
    """One stage of a run; seconds since its start."""

    name: str
    start: float
    end: float
    peak_ram: int  # bytes, of the samples


@dataclass(frozen=True)
class Timeline:
    """What a run took: `samples` are (seconds since the start, resident bytes), the largest of each span of time."""

    seconds: float
    peak_ram: int  # bytes, as the kernel counts it, which may lag a little behind the samples
    stages: tuple[Stage, ...]
    samples: tuple[tuple[float, int], ...]


class Recorder:
    """Records the timeline of what happens in its `with` block, from the events that it passes on.

    Where memory cannot be read there are no samples; recording never raises.
    """

    def __init__(self, on_event: OnEvent) -> None:
        self._on_event = on_event
        self._start = time.monotonic()
        self._stages: list[tuple[str, float]] = [(FIRST_STAGE, 0.0)]
        self._samples: list[tuple[float, int]] = []
        self._interval = _INTERVAL
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="memory samples", daemon=True)

    def __call__(self, event: Event) -> None:
        """Pass an event on."""
        if isinstance(event, StageStarted):
            self._stages.append((event.stage, self._now()))
        self._on_event(event)

    def timeline(self) -> Timeline:
        """What was recorded so far."""
        now, samples = self._now(), tuple(self._samples)
        ends = [start for _, start in self._stages[1:]] + [now]
        stages = tuple(
            Stage(name, start, end, max((ram for at, ram in samples if start <= at <= end), default=0))
            for (name, start), end in zip(self._stages, ends, strict=True)
        )
        return Timeline(now, max([peak_ram(), *(ram for _, ram in samples)]), stages, samples)

    def _now(self) -> float:
        return time.monotonic() - self._start

    def _sample(self) -> None:
        import psutil

        process = psutil.Process()
        with suppress(psutil.Error, OSError):
            while True:
                self._samples.append((self._now(), int(process.memory_info().rss)))
                if len(self._samples) == MOST_SAMPLES:
                    self._thin()
                if self._stop.wait(self._interval):
                    return

    def _thin(self) -> None:
        """Every two samples become their larger one, and the next ones come half as often."""
        self._interval *= 2
        pairs = zip(self._samples[::2], self._samples[1::2], strict=True)
        self._samples = [max(pair, key=lambda sample: sample[1]) for pair in pairs]

    def __enter__(self) -> Recorder:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()


def peak_ram() -> int:
    """Largest resident memory that this process has had, bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
