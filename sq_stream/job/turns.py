"""Which linears the effort best encodes in their turn, and which of them by the gradients of their outputs too."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sq_stream.calibrate.budget import MIB
from sq_stream.calibrate.calibration import Calibration
from sq_stream.calibrate.pairing import Pairing, pairings
from sq_stream.formats.blocks import BlockType
from sq_stream.job.budget import SHAPED_TYPES, EncodingNeeds
from sq_stream.job.settings import Settings
from sq_stream.job.statistics import Statistics
from sq_stream.refine.budget import Refining, refinings
from sq_stream.refine.parameters import group_of, n_parameters

Shape = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Turns:
    """How the effort best encodes."""

    pairing: Pairing  # the pass in which linears have their turn
    two_sided: Mapping[str, Shape]  # those of them whose rows make up for each other's errors (`quantize.rows`)
    refining: Refining | None  # what comes behind it, if memory allows that
    notes: tuple[str, ...] = ()  # what the user should know


def plan_turns(
    statistics: Statistics | None,
    tensors: Mapping[str, tuple[Shape, BlockType]],
    needs: Callable[[frozenset[Shape]], EncodingNeeds],
    settings: Settings,
) -> Turns | None:
    """What memory allows of it; None for other efforts.

    Args:
        statistics: of the job. It has calibrated.
        tensors: of the output.
        needs: of encoding them, when linears of some shapes are two-sided.
        settings: of the job.
    """
    if settings.effort != "best" or statistics is None or statistics.calibration is None:
        return None
    assert statistics.convergence is not None
    program, shaped = needs(frozenset()).program, shaped_names(tensors)
    ways = pairings(statistics.calibration, statistics.convergence, shaped, settings.threads)
    pairing = next(way for way in ways if program + way.working_ram <= settings.max_ram)
    refining, notes = _plan_refining(statistics.calibration, statistics.convergence, tensors, settings, program)
    if statistics.sensitivity is None:
        return Turns(pairing, {}, refining, notes)
    names = shaped & pairing.linears - {"output.weight"}
    own = {name: shape for name, (shape, _) in tensors.items() if name in names}
    fitting = {shape for shape in own.values() if needs(frozenset({shape})).smallest <= settings.max_ram}
    return Turns(pairing, {name: shape for name, shape in own.items() if shape in fitting}, refining, notes)


def shaped_names(tensors: Mapping[str, tuple[Shape, BlockType]]) -> frozenset[str]:
    """Those of the tensors whose types are shaped to."""
    return frozenset(name for name, (_, block_type) in tensors.items() if block_type.name in SHAPED_TYPES)


def _plan_refining(
    calibration: Calibration,
    held: NDArray[np.int32],
    tensors: Mapping[str, tuple[Shape, BlockType]],
    settings: Settings,
    program: int,
) -> tuple[Refining | None, tuple[str, ...]]:
    """How the file is refined; None if memory is too small for it, and a note that says so."""
    sizes: Counter[str] = Counter()
    for name, (shape, block_type) in tensors.items():
        sizes[group_of(name)] += n_parameters(name, shape, block_type)
    ways = list(refinings(calibration, held, max(sizes.values()), settings.threads))
    for way in ways:
        if program + way.working_ram <= settings.max_ram:
            return way, ()
    smallest = program + min(way.working_ram for way in ways)
    return None, (f"not refined: that needs --max-ram {-(-smallest // MIB)}M",)
