"""From a checkpoint and text to what the predictions make of every linear's output: computed once, then found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sq_stream.calibrate.backward import measure_backward, n_steps, run_backward
from sq_stream.calibrate.budget import Budget, Layer
from sq_stream.calibrate.calibration import Calibration, plan_pass
from sq_stream.calibrate.store import Entry, Store
from sq_stream.calibrate.weights import LayerReader
from sq_stream.events import OnEvent
from sq_stream.formats.checkpoint import Checkpoint
from sq_stream.models.base import ModelSpec
from sq_stream.models.forward import Decoder

VERSION = 1
"""Of the maths of gradients and labels."""


@dataclass(frozen=True, eq=False)
class Sensitivity(Calibration):
    """Second moments of the output gradients of all linears but the output matrix; made by `plan_sensitivity`.

    The one of the token embedding is that of its output: n_embd wide, as its rows are.
    """

    of_outputs = True
    forward_passes = 4

    @staticmethod
    def measure(decoder: Decoder, reader: LayerReader, n_ctx: int) -> Sequence[Layer]:
        """See `Calibration.measure`."""
        return measure_backward(decoder, reader, n_ctx)

    @staticmethod
    def n_stored(decoder: Decoder) -> int:
        """The inputs of all layers, and two generations of gradients."""
        return decoder.n_layer + 2

    @property
    def n_steps(self) -> int:
        """See `Calibration.n_steps`."""
        return n_steps(self.decoder)

    def _pass(self, entry: Entry, budget: Budget, on_event: OnEvent) -> None:
        run_backward(
            self.reader,
            self.decoder,
            self.windows,
            self.layers,
            entry,
            budget,
            seed=self.identity["seed"],
            energy=self.identity["energy"],
            on_event=on_event,
        )


def plan_sensitivity(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    windows: NDArray[np.int32],
    store: Store,
    *,
    max_ram: int,
    threads: int,
    seed: int = 0,
    energy: float = 1.0,
    vocabulary_bytes: int = 0,
) -> Sensitivity:
    """The most accurate second moments of output gradients that memory allows, of labels sampled with `seed`.

    Everything else, and the errors raised, are as in `plan_calibration`.
    """
    return plan_pass(
        Sensitivity,
        checkpoint,
        spec,
        windows,
        store,
        max_ram=max_ram,
        threads=threads,
        energy=energy,
        vocabulary_bytes=vocabulary_bytes,
        afterwards=lambda planned: 0,
        settings={"gradients": VERSION, "seed": seed},
    )
