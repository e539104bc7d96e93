"""Everything about a job that can be known from headers alone: tensors, types, offsets, memory, disk, time."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sq_stream.calibrate.calibration import Calibration
from sq_stream.calibrate.pairing import pairings
from sq_stream.calibrate.sensitivity import Sensitivity
from sq_stream.errors import DoesNotFitError, StorageError, UsageError
from sq_stream.formats.atomic import partial_path
from sq_stream.formats.blocks import BlockType
from sq_stream.formats.checkpoint import Checkpoint
from sq_stream.formats.gguf_layout import FileLayout, TensorLayout, lay_out
from sq_stream.job.budget import Budget, EncodingNeeds, check_disk, encoding_needs, kernel_uses, make_budget
from sq_stream.job.identity import general_entries
from sq_stream.job.settings import Settings
from sq_stream.job.statistics import Statistics, find_statistics
from sq_stream.job.turns import Turns, plan_turns, shaped_names
from sq_stream.kernels.cache import kept_kernels
from sq_stream.models import find
from sq_stream.models.base import ModelSpec, TensorMap
from sq_stream.quantize.recipe import RECIPES, Choice, choose_types, parse_override
from sq_stream.text.vocabulary import Vocabulary, read_vocabulary, tokenizer_bytes


@dataclass(frozen=True, eq=False)
class PlannedTensor:
    """One tensor of the output: where its values come from, where its bytes go, and why they have their type."""

    source: TensorMap
    layout: TensorLayout
    reason: str

    @property
    def type(self) -> BlockType:
        """The block type in the file."""
        return self.layout.block_type


@dataclass(frozen=True, eq=False)
class Plan:
    """A job that can be run."""

    settings: Settings
    checkpoint: Checkpoint
    spec: ModelSpec
    tensors: tuple[PlannedTensor, ...]
    layout: FileLayout
    budget: Budget
    statistics: Statistics | None = None
    turns: Turns | None = None  # of the effort best
    notes: tuple[str, ...] = ()  # what the user should know

    @property
    def calibration(self) -> Calibration | None:
        """What is computed, or found, before the first tensor is encoded."""
        return self.statistics.calibration if self.statistics else None

    @property
    def sensitivity(self) -> Sensitivity | None:
        """What is computed, or found, behind it."""
        return self.statistics.sensitivity if self.statistics else None

    @property
    def n_weights(self) -> int:
        """Values in all tensors of the output."""
        return sum(math.prod(t.layout.shape) for t in self.tensors)

    @property
    def tensor_bytes(self) -> int:
        """Bytes of tensor data in the output, without header and padding."""
        return sum(t.layout.n_bytes for t in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        """Bits of tensor data for one value."""
        return 8 * self.tensor_bytes / self.n_weights


@dataclass(frozen=True, eq=False)
class _Headers:
    """What is known of a job before anything is planned."""

    checkpoint: Checkpoint
    spec: ModelSpec
    vocabulary: Vocabulary
    choices: Sequence[Choice]  # of a type for each tensor of `spec`

    @property
    def shapes(self) -> list[tuple[tuple[int, ...], BlockType]]:
        """Row-major shape and type of every tensor of the output."""
        return [(t.shape, choice.block_type) for t, choice in zip(self.spec.tensors, self.choices, strict=True)]

    @property
    def by_name(self) -> dict[str, tuple[tuple[int, ...], BlockType]]:
        """The same by name."""
        return {t.name: shaped for t, shaped in zip(self.spec.tensors, self.shapes, strict=True)}


def make_plan(settings: Settings) -> Plan:
    """Read the headers of a checkpoint and plan its quantization.

    What fits is decided as if kernels had to be compiled, so that the same command is the same job every time. Only
    what would be refused for that alone is planned without, if all kernels are there: it is that job or none.

    Raises:
        BadInputError: the checkpoint or its tokenizer is damaged or incomplete.
        UnsupportedModelError: architecture or pre-tokenizer unknown.
        UsageError: a tensor-type pattern is wrong or matches nothing, or the output cannot be what was given.
        DoesNotFitError: memory or disk are too small.
    """
    headers = _read_headers(settings)
    shaped = settings.effort != "fast" and settings.imatrix is None
    uses = kernel_uses((choice.block_type for choice in headers.choices), shaped=shaped)
    kept = kept_kernels(uses)
    needs = partial(
        encoding_needs,
        headers.shapes,
        vocabulary_bytes=tokenizer_bytes(settings.model_dir),
        threads=settings.threads,
        in_turn=settings.effort == "best",
    )
    likely = partial(needs, kept=kept)
    try:
        return _fit(settings, headers, needs, likely)
    except DoesNotFitError:
        if kept != uses:
            raise
    return _fit(settings, headers, likely, likely)


def _read_headers(settings: Settings) -> _Headers:
    """See `make_plan`, but for what does not fit."""
    overrides = [parse_override(text) for text in settings.tensor_types]
    checkpoint = Checkpoint.open(settings.model_dir)
    spec = find(checkpoint.config).describe(checkpoint.config, checkpoint.shapes, mtp=settings.mtp)
    n_vocab = next(t.shape[0] for t in spec.tensors if t.name == "token_embd.weight")
    vocabulary = read_vocabulary(
        settings.model_dir, arch=spec.arch, n_vocab=n_vocab, pre=settings.pre, config=checkpoint.config
    )
    choices = choose_types(
        [(t.name, t.shape) for t in spec.tensors],
        settings.recipe,
        arch=spec.arch,
        n_layer=spec.n_layer,
        n_expert=spec.n_expert,
        pure=settings.pure,
        overrides=overrides,
    )
    return _Headers(checkpoint, spec, vocabulary, choices)


def _fit(
    settings: Settings,
    headers: _Headers,
    needs: Callable[..., EncodingNeeds],
    likely: Callable[..., EncodingNeeds],
) -> Plan:
    """The plan that memory allows.

    Args:
        settings: of the job.
        headers: of its input.
        needs: what decides of encoding, from `ranks` and `two_sided` as of `encoding_needs`.
        likely: what encoding will take, from the same.
    """
    checkpoint, spec, vocabulary = headers.checkpoint, headers.spec, headers.vocabulary
    statistics = _find_statistics(settings, headers, needs)
    layout = _lay_out(settings, headers, statistics)
    ranks = statistics.calibration.ranks if statistics and statistics.calibration else None
    turns = plan_turns(statistics, headers.by_name, lambda two_sided: needs(ranks=ranks, two_sided=two_sided), settings)
    how = {"ranks": ranks, "two_sided": frozenset(turns.two_sided.values() if turns else ())}
    budget = make_budget(
        headers.shapes,
        needs(**how),
        likely(**how),
        file_bytes=layout.total_bytes,
        max_ram=settings.max_ram,
        threads=settings.threads,
        passes=statistics.passes if statistics else (),
        pairing=turns.pairing if turns else None,
        refining=turns.refining if turns else None,
    )
    tensors = tuple(
        PlannedTensor(source, place, choice.reason)
        for source, place, choice in zip(spec.tensors, layout.tensors, headers.choices, strict=True)
    )
    left_out = (f"left out: {len(names)} tensors ({reason})" for reason, names in spec.left_out.items())
    of_text = statistics.notes if statistics else ()
    of_turns = turns.notes if turns else ()
    notes = (*checkpoint.warnings, *spec.notes, *vocabulary.notes, *of_text, *of_turns, *left_out)
    return Plan(settings, checkpoint, spec, tensors, layout, budget, statistics, turns, notes)


def _find_statistics(settings: Settings, headers: _Headers, needs: Callable[..., EncodingNeeds]) -> Statistics | None:
    """The statistics, of an accuracy that leaves room for what follows them."""
    in_turn = settings.effort == "best"

    def afterwards(calibration: Calibration, held: NDArray[np.int32]) -> int:
        """Bytes of what follows it."""
        ways = pairings(calibration, held, shaped_names(headers.by_name), settings.threads) if in_turn else ()
        encoding = needs(ranks=calibration.ranks)
        in_pass = min((way.working_ram for way in ways), default=sys.maxsize if in_turn else 0)
        return max(encoding.smallest, encoding.program + in_pass)

    return find_statistics(settings, headers.checkpoint, headers.spec, headers.vocabulary, afterwards)


def _lay_out(settings: Settings, headers: _Headers, statistics: Statistics | None) -> FileLayout:
    """The file, whose header says what it is made from."""
    spec = headers.spec
    general = general_entries(
        settings,
        arch=spec.arch,
        file_type=RECIPES[settings.recipe].file_type,
        n_parameters=sum(math.prod(t.shape) for t in spec.tensors),
    )
    return lay_out(
        [*general, *(statistics.entries if statistics else ()), *spec.metadata, *headers.vocabulary.metadata],
        [(name, shape, block_type) for name, (shape, block_type) in headers.by_name.items()],
    )


def check_place(output: Path) -> None:
    """Refuse an output that has no folder to lie in, or is one.

    Raises:
        UsageError: it is a folder.
        StorageError: its folder does not exist or cannot be written.
    """
    if not output.parent.is_dir():
        raise StorageError(f"{output.parent}: there is no such folder to write {output.name} into")
    if not os.access(output.parent, os.W_OK):
        raise StorageError(f"{output.parent} cannot be written: choose another folder for {output.name}")
    if output.is_dir():
        raise UsageError(f"{output} is a folder: name the file to write")


def refuse_existing(settings: Settings) -> None:
    """Refuse an output that is there and is not to be replaced.

    Raises:
        UsageError: so it is.
    """
    output = settings.output
    if output.exists() and not settings.overwrite:
        raise UsageError(f"{output} exists: name another file with -o, or replace it with --overwrite")


def check_output(plan: Plan) -> None:
    """Refuse an output that would overwrite something, cannot be written, or does not fit on its disk.

    Raises:
        UsageError: the output exists (and --overwrite is not given), is a folder or belongs to the checkpoint.
        StorageError: its folder does not exist.
        DoesNotFitError: there is not enough free space.
    """
    output = plan.settings.output
    check_place(output)
    if output.resolve().parent == plan.checkpoint.folder.resolve() and output.suffix != ".gguf":
        raise UsageError(f"{output} would lie among the files of the checkpoint: name another file with -o")
    refuse_existing(plan.settings)
    partial = partial_path(output)
    reserved = partial.stat().st_blocks * 512 if partial.exists() else 0
    needed = plan.budget.peak_disk - reserved
    check_disk(output.parent, needed)
    for streamed in plan.statistics.passes if plan.statistics else ():
        if streamed.pending:
            streamed.check_disk(output.parent, needed)
