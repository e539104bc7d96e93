"""Encoding linears in their turn: each makes up for the errors of those before it, seen in a paired pass."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from sq_stream.calibrate.gguf_weights import GGUFWeights
from sq_stream.calibrate.paired import HEAD, Meeting, PairedPass, Side
from sq_stream.calibrate.sketches import is_linear
from sq_stream.calibrate.streamed import LostWorkError, Residuals, into_batches
from sq_stream.calibrate.weights import LayerReader, zeros
from sq_stream.errors import BadInputError
from sq_stream.formats.gguf_read import GGUFReader
from sq_stream.formats.journal import Journal
from sq_stream.job.budget import SHAPED_TYPES
from sq_stream.job.encode import Encoding, streams_folder
from sq_stream.models.forward import layer_names
from sq_stream.models.layers import Site
from sq_stream.parallel import Workers
from sq_stream.quantize.encode import make_encoder
from sq_stream.quantize.rows import RowFeedback


def encode_in_turn(encoding: Encoding, workers: Workers) -> None:
    """Encode the linears of `plan.turns` that are not done; all other tensors must be.

    Raises:
        BadInputError: weights or activations are NaN or infinite, or the journal is damaged.
        StorageError: reading or writing failed; what is done is kept.
    """
    assert encoding.plan.turns is not None
    n_threads = encoding.plan.turns.pairing.threads  # memory may allow fewer of them to stream than to encode
    with GGUFReader.open(encoding.file.partial, growing=True) as file, Workers(n_threads) as streaming:
        turns = _Turns(encoding, file, workers, streaming)
        try:
            turns.take(_n_finished(encoding.journal))
        except LostWorkError:
            turns.take(0)


def _n_finished(journal: Journal) -> int:
    """Branches behind which both streams are on disk."""
    counts = [record["branches"] for record in journal.records if "branches" in record]
    if not all(type(count) is int and count >= 0 for count in counts):
        raise BadInputError(f"{journal.path} is damaged: start over with --fresh")
    return counts[-1] if counts else 0  # streams that were lost may have been started over


class _Turns:
    def __init__(self, encoding: Encoding, file: GGUFReader, workers: Workers, streaming: Workers) -> None:
        plan = encoding.plan
        assert plan.calibration is not None
        assert plan.turns is not None
        self._encoding, self._workers, self._pairing = encoding, workers, plan.turns.pairing
        self._tensors = {tensor.source.name: tensor for tensor in plan.tensors}
        self._two_sided, self._stage = plan.turns.two_sided, ""
        decoder, folder = plan.calibration.decoder, streams_folder(plan.settings.output)
        fit = into_batches(plan.calibration.windows)
        batches = [*fit, *into_batches(self._pairing.held)]
        reference, quantized = plan.calibration.reader, LayerReader(plan.spec.stored, GGUFWeights(file))
        self._quantized = quantized
        self._pass = PairedPass(
            Side(
                Residuals(folder / "reference", batches, reference, decoder),
                lambda i: _end(reference) if i == HEAD else reference.layer(i, resident=self._pairing.resident),
            ),
            Side(Residuals(folder / "quantized", batches, quantized, decoder), self._layer),
            columns={name: s.columns for name, s in encoding.scalings.items() if s.columns is not None},
            n_fit=len(fit),
            workers=streaming,
            tell=encoding.tell,
        )

    def take(self, finished: int) -> None:
        """Go through all branches but those that are finished."""
        for b in range(finished, len(self._pairing.branches)):
            self._stage = f"blk.{b // 2}."
            waiting = {site: n for site, n in self._pairing.branches[b].items() if self._waiting(self._stage, site)}
            self._pass.run_branch(b, waiting, self._encode)
            self._encoding.journal.append({"branches": b + 1})
        self._stage = ""
        if self._pairing.head and self._waiting("", (self._pairing.head,)):
            self._pass.run_head(self._pairing.head, self._encode)

    def _waiting(self, prefix: str, site: Site) -> list[str]:
        """The linears of a site that are not encoded."""
        names = (f"{prefix}{name}.weight" for name in site)
        return [name for name in names if name not in self._encoding.checksums]

    def _encode(self, site: Site, meeting: Meeting) -> None:
        for name in self._waiting(self._stage, site):
            tensor = self._tensors[name]
            encode = make_encoder(tensor.type, meeting.sketch, self._workers)
            if tensor.type.name in SHAPED_TYPES:
                self._encoding.encode(tensor, encode, partial(meeting.wanted, workers=self._workers), self._rows(name))
            else:
                self._encoding.encode(tensor, encode)

    def _rows(self, name: str) -> RowFeedback | None:
        """How the rows of a linear make up for each other's errors, if they do."""
        if self._encoding.gradients is None or name not in self._two_sided:
            return None
        feedback = RowFeedback(self._encoding.gradients[name], self._workers)
        self._encoding.gradients.forget()
        return feedback

    def _layer(self, i: int) -> Mapping[str, Any]:
        """Tensors of layer i as they are in the file; those that are not yet are zero."""
        if i == HEAD:
            return _end(self._quantized)
        shapes, weights = self._quantized.shapes(i), dict[str, Any]()
        for short, name in layer_names(self._quantized.names, i).items():
            if is_linear(name, shapes[short]) and name not in self._encoding.checksums:
                weights |= zeros({short: shapes[short]})
            else:
                weights[short] = self._quantized.tensor(name, resident=self._pairing.resident)
        return weights


def _end(reader: LayerReader) -> dict[str, Any]:
    """What comes before the output matrix."""
    return {name: reader.read(name) for name in ("output_norm.weight",)}
