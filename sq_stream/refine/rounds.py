"""Rounds: the reference and the quantized model streamed over some text, and a step down the gradient of their KL.

A round runs both models forward, layer by layer, then the quantized one backward, from the output matrix to the token
embedding. A layer's parameters are stepped as soon as it has been passed backward, into the next generation, so that
there is never more than one layer in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sq_stream.allocator import release_freed
from sq_stream.calibrate.gguf_weights import row_runs
from sq_stream.calibrate.ordered import InOrder
from sq_stream.calibrate.streamed import Residuals, Stream, into_batches
from sq_stream.calibrate.weights import LayerReader
from sq_stream.models.backward import divergence_vjp
from sq_stream.models.base import ModelSpec
from sq_stream.models.forward import Decoder, head_name
from sq_stream.models.layers import Array, ObserveGradients, Site, is_norm, tiles, with_prefix
from sq_stream.parallel import Workers
from sq_stream.refine import adam
from sq_stream.refine.parameters import ENDS, Generations, RefinedWeights
from sq_stream.refine.scales import gradient
from sq_stream.refine.schedule import Round

Gradients = dict[str, Array]
"""Of the logarithms of parameters, by tensor."""

TILE = 2**20
"""Weights whose gradients are in memory together."""
EMBEDDING = "token_embd.weight"


@dataclass(frozen=True, eq=False)
class Refinement:
    """What rounds need; `file_spec` are the tensors as they are in the file."""

    reference: LayerReader
    file_spec: ModelSpec
    generations: Generations
    decoder: Decoder
    folder: Path  # for what lies between the layers
    workers: Workers
    resident: bool  # a layer's weights are in memory; else large matrices are read tile by tile
    tell: Callable[[str], None] = lambda what: None  # told what is going on

    def divergence(self, generation: int, windows: NDArray[np.int32]) -> float:
        """Mean KL(reference ‖ quantized) of a generation over windows [n_window, n_ctx], in nats per token.

        Raises:
            BadInputError: weights are not finite.
            LostWorkError: the generation, or what lies between the layers, is missing or damaged.
            StorageError: reading or writing failed.
        """
        return _Pass(self, generation, windows).divergence()

    def descend(self, step: Round, windows: NDArray[np.int32]) -> float:
        """Make a generation from its parent; returns the mean KL of the parent over the windows.

        Raises:
            As `divergence`.
        """
        return _Pass(self, step.parent, windows).descend(step)


class _Pass:
    """Both models over the same windows, with one generation of parameters."""

    def __init__(self, run: Refinement, generation: int, windows: NDArray[np.int32]) -> None:
        self._run, self._generation = run, generation
        self._decoder, self._batches = run.decoder, into_batches(windows)
        self._weights = RefinedWeights(run.generations, generation)
        quantized = LayerReader(run.file_spec, self._weights)
        self._theirs = Residuals(run.folder / "reference", self._batches, run.reference, run.decoder)
        self._ours = Residuals(run.folder / "quantized", self._batches, quantized, run.decoder)
        self._slopes = Stream(run.folder / "gradients", self._batches, quantized.n_embd)
        for stream in (self._theirs, self._ours, self._slopes):
            stream.keep_only([])

    def divergence(self) -> float:
        for stream in (self._theirs, self._ours):
            self._forward(stream, keep=False)
        return self._mean(self._for_batches(self._head, "output"))

    def descend(self, step: Round) -> float:
        self._forward(self._theirs, keep=False)
        self._forward(self._ours, keep=True)
        kl, ends = zip(*self._for_batches(self._head_vjp, "output"), strict=True)
        of_ends = _sum(ends)
        for i in range(self._decoder.n_layer - 1, -1, -1):
            self._ours.keep_only(range(i + 1))
            self._slopes.keep_only([i + 1])
            weights = self._ours.reader.layer(i, resident=self._run.resident)
            found = self._for_batches(partial(self._layer_vjp, i, weights), f"layer {i + 1}, backward")
            del weights  # before those of the next layer are read
            self._step(f"blk.{i}", _sum(found), step)
        self._step(ENDS, _sum([of_ends, *self._for_batches(self._embedding, "embedding")]), step)
        return self._mean(kl)

    def _forward(self, stream: Residuals, *, keep: bool) -> None:
        decoder = self._decoder

        def compute(i: int, weights: Mapping[str, Any], batch: int) -> None:
            stream.write(i + 1, batch, decoder.layer(stream.read(i, batch), weights, i))

        for i in range(decoder.n_layer):
            own = stream.reader.layer(i, resident=self._run.resident)
            self._for_batches(partial(compute, i, own), f"layer {i + 1} of {decoder.n_layer}")
            del own  # before those of the next layer are read
            if not keep:
                stream.keep_only([i + 1])

    def _head(self, batch: int) -> float:
        return float(self._compare(batch, None)[0].sum(dtype=np.float64))

    def _head_vjp(self, batch: int) -> tuple[float, Gradients]:
        """Sum of the KL, and gradients at the end; what the last layer gets is kept."""
        name = f"{head_name(self._ours.reader.names)}.weight"
        found: Gradients = {}
        tiles_of_head: list[Array] = []

        def observe(rows: slice, d_rows: Array) -> None:
            tiles_of_head.append(self._of_rows(name, rows, d_rows))

        kl, dx, x, norm = self._compare(batch, observe if name in self._shapes else None)
        if tiles_of_head:
            found[name] = np.concatenate(tiles_of_head)
        dy = self._decoder.final_norm_vjp(dx, x, norm, self._observe(found))
        self._slopes.write(self._decoder.n_layer, batch, dy)
        return float(kl.sum(dtype=np.float64)), found

    def _compare(
        self, batch: int, observe: Callable[[slice, Array], None] | None
    ) -> tuple[Array, Array, Array, dict[str, Array]]:
        """KL of every token, gradient of what enters the output matrix, the last layer's output, and the final norm."""
        decoder, ends = self._decoder, []
        for stream in (self._theirs, self._ours):
            reader, x = stream.reader, stream.read(self._decoder.n_layer, batch)
            norm = {"output_norm.weight": reader.read("output_norm.weight")}
            ends.append((decoder.final_norm(x, norm), reader.on_disk(f"{head_name(reader.names)}.weight")))
        kl, dx = divergence_vjp(*ends[1], ends[0], decoder, observe)
        return kl, dx, x, norm

    def _layer_vjp(self, i: int, weights: Mapping[str, Any], batch: int) -> Gradients:
        found: Gradients = {}
        observe = with_prefix(self._observe(found), f"blk.{i}.")
        dx = self._decoder.layer_vjp(self._slopes.read(i + 1, batch), self._ours.read(i, batch), weights, i, observe)
        self._slopes.write(i, batch, dx)
        return found

    def _embedding(self, batch: int) -> Gradients:
        """Of the embedding as the table that tokens are looked up in."""
        if EMBEDDING not in self._shapes:
            return {}
        dx = self._decoder.embed(self._slopes.read(0, batch))
        numbers, place = np.unique(self._batches[batch], return_inverse=True)
        d_rows = np.zeros((len(numbers), dx.shape[-1]), np.float32)
        np.add.at(d_rows, place.reshape(-1), dx.reshape(-1, dx.shape[-1]))
        found = np.zeros(self._shapes[EMBEDDING], np.float32)
        for at, first, n in row_runs(numbers.astype(np.int64), len(numbers)):
            found[first : first + n] = self._of_rows(EMBEDDING, slice(first, first + n), d_rows[at : at + n])
        return {EMBEDDING: found}

    def _observe(self, found: Gradients) -> ObserveGradients:
        """Puts the gradients of what is observed into `found`."""

        def observe(site: Site, x: Array, dys: Sequence[Array]) -> None:
            rows = x.reshape(-1, x.shape[-1])
            for name, dy in zip((f"{linear}.weight" for linear in site), dys, strict=True):
                if name not in self._shapes:
                    continue
                if is_norm(name.removesuffix(".weight")):
                    own = np.einsum("ti,ti->i", rows, dy.reshape(rows.shape))
                    found[name] = own * self._weights.read_rows(name, slice(0, 1))[0]
                    continue
                flat = dy.reshape(len(rows), -1)
                parts = tiles(flat.shape[1], rows.shape[1], TILE)
                found[name] = np.concatenate([self._of_rows(name, t, flat[:, t].T @ rows) for t in parts])

        return observe

    def _of_rows(self, name: str, rows: slice, d_rows: Array) -> Array:
        """Gradients of the scales of some rows of a tensor, from that of the rows."""
        block_type = self._run.generations.file.tensors[name].block_type
        data = self._weights.data(name, rows.start, rows.stop)
        return gradient(d_rows, data, block_type)

    def _step(self, group: str, gradients: Gradients, of: Round) -> None:
        """Make a group's next generation."""
        generations, n_tokens = self._run.generations, sum(tokens.size for tokens in self._batches)
        state = generations.read(self._generation, group)
        flat = np.zeros(state.shape[1], np.float32)
        for name, own in generations.by_name(group, flat).items():  # views of it
            if name in gradients:
                own[:] = gradients[name] / n_tokens
        generations.write(of.number, group, adam.step(state, flat, of.depth, of.rate))

    def _for_batches(self, compute: Callable[[int], Any], what: str) -> list[Any]:
        release_freed()
        results: list[Any] = [None] * len(self._batches)

        def keep(batch: int) -> None:
            results[batch] = compute(batch)

        for _ in InOrder().run(self._run.workers, keep, len(results)):
            self._run.tell(what)
        return results

    def _mean(self, sums: Sequence[float]) -> float:
        return sum(sums) / sum(tokens.size for tokens in self._batches)

    @property
    def _shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._run.generations.shapes


def _sum(parts: Sequence[Gradients]) -> Gradients:
    """Of gradients that each part may have."""
    total: Gradients = {}
    for part in parts:
        for name, own in part.items():
            total[name] = total[name] + own if name in total else own
    return total
