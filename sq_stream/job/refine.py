"""Refining the finished tensors of a job, round by round, and putting the best generation into the file."""

from __future__ import annotations

import shutil
from dataclasses import asdict

from sq_stream.allocator import release_freed
from sq_stream.calibrate.streamed import LostWorkError
from sq_stream.errors import BadInputError
from sq_stream.events import Progress, StageStarted
from sq_stream.formats.gguf_read import GGUFReader
from sq_stream.job.encode import Encoding, streams_folder
from sq_stream.parallel import Workers
from sq_stream.refine.budget import Refining
from sq_stream.refine.parameters import Generations, RefinedWeights
from sq_stream.refine.rounds import Refinement
from sq_stream.refine.schedule import Generation, Round, best, next_round

STAGE = "refine"


def refine(encoding: Encoding, refining: Refining) -> None:
    """Refine the file, all tensors of which are encoded, unless that is done.

    Raises:
        BadInputError: the journal is damaged, or what was to be put into the file is.
        StorageError: reading or writing failed; the finished rounds are kept.
    """
    if not any("folded" in record for record in encoding.journal.records):
        release_freed()
        with GGUFReader.open(encoding.file.partial, growing=True) as file, Workers(refining.threads) as workers:
            job = _Job(encoding, refining, file, workers)
            job.fold(job.descend())


class _Job:
    def __init__(self, encoding: Encoding, refining: Refining, file: GGUFReader, workers: Workers) -> None:
        plan, folder = encoding.plan, streams_folder(encoding.plan.settings.output)
        assert plan.calibration is not None
        for done in ("reference", "quantized"):  # of the paired pass
            shutil.rmtree(folder / done, ignore_errors=True)
        self._encoding, self._refining = encoding, refining
        decoder = plan.calibration.decoder
        self._generations = Generations(file, folder / STAGE / "parameters", decoder.n_layer)
        self._run = Refinement(
            reference=plan.calibration.reader,
            file_spec=plan.spec.stored,
            generations=self._generations,
            decoder=decoder,
            folder=folder / STAGE,
            workers=workers,
            resident=refining.resident,
            tell=self._tell,
        )
        self._n_done, self._n_tokens = 0, refining.n_rounds * refining.of_round(1).size

    def descend(self) -> int:
        """Go through the rounds that are not done; the number of the best generation.

        All generations so far are in the journal, so that an interrupted job goes on.
        """
        self._encoding.on_event(StageStarted(STAGE, self._n_tokens, "tokens"))
        if not self._history():
            self._append(Generation(0, 0, self._run.divergence(0, self._refining.held)))
        n_rounds, n_parameters = self._refining.n_rounds, self._generations.n_parameters
        while step := next_round(history := self._history(), n_rounds, n_parameters):
            self._generations.keep_only({history[-1].number, best(history)})
            try:
                self._round(step)
            except LostWorkError:
                if step.number == 1:  # it is the file that is damaged, or something that was just written
                    raise
                self._append(history[0])
        return best(history)

    def _round(self, step: Round) -> None:
        windows = self._refining.of_round(step.number)
        self._n_done = (step.number - 1) * windows.size
        self._run.descend(step, windows)
        held = self._run.divergence(step.number, self._refining.held) if step.is_checked else None
        self._generations.sync()
        self._append(Generation(step.number, step.parent, held))

    def fold(self, best: int) -> None:
        """Put a generation into the file. Codes stay, so that this can be done again after an interruption."""
        weights = RefinedWeights(self._generations, best)
        try:
            for tensor in self._encoding.plan.tensors if best else ():
                if tensor.source.name in self._generations.shapes:
                    self._encoding.replace(tensor, weights.data)
        except LostWorkError as error:  # nor is what the file held before it known any more
            raise BadInputError(f"{error}: start over with --fresh") from error
        self._encoding.journal.append({"folded": best})

    def _append(self, generation: Generation) -> None:
        self._encoding.journal.append({"generation": asdict(generation)})

    def _history(self) -> list[Generation]:
        """Since the last start: what was lost has been started over."""
        try:
            found = [Generation(**r["generation"]) for r in self._encoding.journal.records if "generation" in r]
            starts = [i for i, generation in enumerate(found) if generation.number == 0]
            history = found[starts[-1] :] if found else []
            if any(g.number != i or not 0 <= g.parent <= i or (i and g.parent == i) for i, g in enumerate(history)):
                raise ValueError("generations are missing")
            if not all(isinstance(g.held, float | None) for g in history) or (history and history[0].held is None):
                raise ValueError("measurements are missing")
        except (TypeError, ValueError, IndexError) as error:
            path = self._encoding.journal.path
            raise BadInputError(f"{path} is damaged ({error}): start over with --fresh") from error
        return history

    def _tell(self, what: str) -> None:
        self._encoding.on_event(Progress(STAGE, what, self._n_done, self._n_tokens))
