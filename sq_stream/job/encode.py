"""Encoding: every tensor of a plan into its place in the partial file, tile by tile, each by itself or in its turn."""

from __future__ import annotations

import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sq_stream.allocator import release_freed
from sq_stream.calibrate.gguf_weights import decoder_of
from sq_stream.calibrate.sketches import Sketches
from sq_stream.events import OnEvent, Progress, StageStarted, TensorFinished
from sq_stream.formats.checkpoint import check_finite
from sq_stream.formats.gguf_write import GGUFFile
from sq_stream.formats.journal import Journal
from sq_stream.formats.storage import storage_errors
from sq_stream.job.plan import Plan, PlannedTensor
from sq_stream.job.tiles import row_tiles
from sq_stream.parallel import Workers, set_kernel_threads
from sq_stream.quantize.rows import RowFeedback
from sq_stream.quantize.smooth import UNSCALED, Scaling

if TYPE_CHECKING:
    from sq_stream.quantize.encode import Encoder

Array = NDArray[np.float32]
Wanted = Callable[[Array, slice], Array]
"""What is to be encoded in the place of some scaled rows w [n, n_in] of a tensor; it is told which they are."""


class Encoding:
    """The tensors of a plan on their way into its file; those with a checksum are there already.

    Args:
        plan: the job.
        sketches: of what enters the linears, smoothed; None: the weights are all that is known.
        gradients: of what their outputs get, smoothed, where `plan.turns` asks for them.
        scalings: what tensors are multiplied by, by name.
        file: the partial file.
        journal: told of each tensor when it is on disk.
        checksums: CRC-32 of the tensors that are done, by name; those of the others are added.
        on_event: told of the progress.
    """

    def __init__(
        self,
        plan: Plan,
        sketches: Sketches | None,
        gradients: Sketches | None,
        scalings: Mapping[str, Scaling],
        file: GGUFFile,
        journal: Journal,
        checksums: dict[str, int],
        on_event: OnEvent,
    ) -> None:
        self.plan, self.sketches, self.gradients, self.scalings = plan, sketches, gradients, scalings
        self.file, self.journal, self.checksums = file, journal, checksums
        self.on_event = on_event
        self._n_done = sum(_n_weights(t) for t in plan.tensors if t.source.name in checksums)

    def run(self) -> None:
        """Encode what is not done, and refine it if that is planned.

        Raises:
            BadInputError: a weight is NaN or infinite.
            StorageError: reading or writing failed; what is done is kept.
        """
        from sq_stream.job.in_turn import encode_in_turn
        from sq_stream.job.refine import refine
        from sq_stream.quantize.encode import make_encoder

        in_turn = self.plan.turns.pairing.linears if self.plan.turns else frozenset()
        self.on_event(StageStarted("encode", self.plan.n_weights))
        set_kernel_threads(self.plan.settings.threads)
        with Workers(self.plan.settings.threads) as workers:
            for tensor in self.plan.tensors:
                name = tensor.source.name
                if name not in self.checksums and name not in in_turn:
                    sketch = self.sketches.get(name) if self.sketches else None
                    self.encode(tensor, make_encoder(tensor.type, sketch, workers))
            if self.sketches:
                self.sketches.forget()
            if in_turn:
                encode_in_turn(self, workers)
        if self.plan.turns and self.plan.turns.refining:
            refine(self, self.plan.turns.refining)

    def tell(self, what: str, n_encoded: int = 0) -> None:
        """Say what is going on; `n_encoded` weights of an unfinished tensor are encoded."""
        self.on_event(Progress("encode", what, self._n_done + n_encoded, self.plan.n_weights))

    def encode(
        self,
        tensor: PlannedTensor,
        encode: Encoder,
        wanted: Wanted = lambda w, rows: w,
        feedback: RowFeedback | None = None,
    ) -> None:
        """Encode one tensor in row tiles, or as a whole if there is feedback between its rows; then it is done."""

        def blocks() -> Iterator[tuple[slice, NDArray[np.uint8]]]:
            for rows, data in self._blocks(tensor, encode, wanted, feedback):
                yield rows, data
                self.tell(tensor.source.name, rows.stop * tensor.source.n_in)

        release_freed()
        self._write(tensor, blocks())
        self._n_done += _n_weights(tensor)
        self.on_event(TensorFinished(tensor.source.name, tensor.type.name, _n_weights(tensor), tensor.layout.n_bytes))

    def replace(self, tensor: PlannedTensor, stored: Callable[[str, int, int], NDArray[np.uint8]]) -> None:
        """Overwrite a tensor that is done; `stored` gives its rows from one to another as they shall be."""
        name, source = tensor.source.name, tensor.source
        tiles = row_tiles(source.n_rows, source.n_in, self.plan.budget.tile_weights)
        self._write(tensor, ((rows, stored(name, rows.start, rows.stop)) for rows in tiles))

    def _write(self, tensor: PlannedTensor, tiles: Iterable[tuple[slice, NDArray[np.uint8]]]) -> None:
        """Write a tensor in tiles of stored rows; then the journal has it."""
        crc = 0
        for rows, data in tiles:
            self.file.write_rows(tensor.layout, rows.start, data)
            crc = zlib.crc32(data.data, crc)
        self.file.sync()
        self.journal.append({"tensor": tensor.source.name, "crc32": crc})
        self.checksums[tensor.source.name] = crc

    def _blocks(
        self, tensor: PlannedTensor, encode: Encoder, wanted: Wanted, feedback: RowFeedback | None
    ) -> Iterator[tuple[slice, NDArray[np.uint8]]]:
        """Blocks of a tensor, and of which rows they are."""
        tiles = self._tiles(tensor, wanted)
        if feedback is None:
            yield from ((rows, encode(x)) for rows, x in tiles)
            return
        whole = np.empty((tensor.source.n_rows, tensor.source.n_in), np.float32)
        for rows, x in tiles:
            whole[rows] = x
        yield slice(0, len(whole)), feedback.encode(whole, encode, decoder_of(tensor.type))

    def _tiles(self, tensor: PlannedTensor, wanted: Wanted) -> Iterator[tuple[slice, Array]]:
        """What is to be encoded, in tiles [n_tile, n_in], and which rows these are."""
        source, scaling = tensor.source, self.scalings.get(tensor.source.name, UNSCALED)
        for rows in row_tiles(source.n_rows, source.n_in, self.plan.budget.tile_weights):
            x = source.read(self.plan.checkpoint, rows.start, rows.stop)
            check_finite(x, source.source or source.name, rows.start)
            yield rows, wanted(scaling.apply(x, rows), rows)


def streams_folder(output: Path) -> Path:
    """Where the residual streams of both models are while a job is unfinished."""
    return output.with_name(output.name + ".streams")


def remove_streams(output: Path) -> None:
    """Delete them.

    Raises:
        StorageError: deleting fails.
    """
    folder = streams_folder(output)
    with storage_errors("deleting", folder):
        shutil.rmtree(folder, ignore_errors=not folder.exists())


def _n_weights(tensor: PlannedTensor) -> int:
    return tensor.source.n_rows * tensor.source.n_in
