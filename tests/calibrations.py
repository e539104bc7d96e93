"""Calibrations of tiny models: what they run on, how they are stopped, how they are compared."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tiny_models

from sq_stream.calibrate.calibration import plan_calibration
from sq_stream.calibrate.sketch import Sketch
from sq_stream.calibrate.sketches import Sketches
from sq_stream.calibrate.store import Store
from sq_stream.events import Event, Note, OnEvent, Progress, ignore
from sq_stream.formats.checkpoint import Checkpoint
from sq_stream.models.base import ModelSpec

WINDOWS = np.random.RandomState(2).randint(0, tiny_models.N_VOCAB, (11, 40)).astype(np.int32)
BATCH_TOKENS = 120  # three windows to a batch: four batches
OPTIONS = {"max_ram": 2**30, "threads": 2}


Model = tuple[Checkpoint, ModelSpec]


def calibrate(
    model: Model, folder: Path, windows: np.ndarray = WINDOWS, *, on_event: OnEvent = ignore, **options: Any
) -> Sketches:
    """The result of a calibration with `folder` as its store."""
    return plan_calibration(*model, windows, Store(folder), **{**OPTIONS, **options}).run(on_event)


def run(
    model: Model,
    folder: Path,
    windows: np.ndarray = WINDOWS,
    *,
    on_event: OnEvent = ignore,
    **options: Any,
) -> tuple[dict[str, Sketch], list[str]]:
    """Sketches by name, and the notes, of the same."""
    notes: list[str] = []

    def listen(event: Event) -> None:
        if isinstance(event, Note):
            notes.append(event.text)
        on_event(event)

    with calibrate(model, folder, windows, on_event=listen, **options) as sketches:
        return dict(sketches), notes


def assert_same_bits(a: Mapping[str, Sketch], b: Mapping[str, Sketch]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name].factor, b[name].factor)
        np.testing.assert_array_equal(a[name].residual, b[name].residual)


class Stop:
    """Raises KeyboardInterrupt at the given layer's first progress."""

    def __init__(self, layer: int) -> None:
        self.layer = layer

    def __call__(self, event: Event) -> None:
        if isinstance(event, Progress) and event.tensor.startswith(f"layer {self.layer} "):
            raise KeyboardInterrupt
