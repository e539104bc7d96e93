"""What a job will need: memory as tile sizes, disk, time. Everything that cannot work is refused here."""

from __future__ import annotations

import math
import shutil
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sq_stream.calibrate.budget import BYTES_PER_VOCABULARY_BYTE, MIB
from sq_stream.calibrate.calibration import Calibration
from sq_stream.calibrate.pairing import Pairing
from sq_stream.calibrate.sketch import Sketch
from sq_stream.errors import DoesNotFitError
from sq_stream.formats.blocks import BLOCK_TYPES, BlockType
from sq_stream.parallel import SLAB
from sq_stream.quantize.metric import DenseMetric, FactorMetric
from sq_stream.quantize.rows import RowFeedback
from sq_stream.refine.budget import Refining
from sq_stream.units import format_size

SHAPED_TYPES = frozenset(("Q4_K", "Q5_K", "Q6_K", "Q8_0", "Q5_0", "Q5_1"))

# Resident bytes before any tile: interpreter, NumPy, tokenizers, and Numba with kernels that it finds compiled.
PROGRAM_BYTES = 168 * MIB
# The same of the kernels of shaping, beyond those of plain encoding.
SHAPING_BYTES = 20 * MIB
# What Numba takes to compile anything, and what it keeps of having compiled the encoders of some types. All of these
# are from the peak memory that `quantize` states for a small model, with a filled and with an empty NUMBA_CACHE_DIR.
COMPILER_BYTES = 20 * MIB
KERNEL_BYTES = {
    ("Q4_K", "Q5_K"): 85 * MIB,
    ("Q6_K",): 75 * MIB,
    ("Q5_0", "Q5_1"): 85 * MIB,
    ("Q8_0",): 25 * MIB,
}
# The same for each type that tensors are shaped to.
SHAPING_KERNEL_BYTES = 30 * MIB
# Packed panels that BLAS keeps for each thread where tensors are shaped.
BLAS_BYTES = 6 * MIB
# Resident bytes for one weight of the tile in work: the float32 tile and one copy where rows are reordered or
# transformed (8), the encoded bytes (2, or 4 of rare types), and a truth value.
BYTES_PER_WEIGHT = 11
# The same where the tile is shaped: the tile, wanted values, errors, codes; for a row, work on a panel, and for a row
# and each row of a sketch S that is not exact, E Sᵀ; and work on some rows at a time.
BYTES_PER_SHAPED_WEIGHT = 17
BYTES_PER_SHAPED_ROW = 3584
BYTES_PER_PROJECTED_ERROR = 4
SHAPED_ROWS_BYTES = MIB
# And where it is shaped in its turn: what is wanted instead of it.
BYTES_PER_WEIGHT_IN_TURN = 8
# Resident bytes for one weight that is read back and compared: blocks, values, and the source's before and after
# transforms; and a truth value.
BYTES_PER_CHECKED_WEIGHT = 17
# A larger tile encodes no faster.
MOST_TILE_WEIGHTS = 4 * MIB

# Weights encoded per second by one core of a 2025 server, rounded down (bench/encoders.py); only for the estimate.
WEIGHTS_PER_SECOND = {
    "Q4_K": 15e6,
    "Q5_K": 12e6,
    "Q6_K": 10e6,
    "Q5_0": 40e6,
    "Q5_1": 40e6,
    "Q8_0": 100e6,
    "F32": 200e6,
    "F16": 200e6,
    "BF16": 200e6,
}
WEIGHTS_READ_BACK_PER_SECOND = 100e6
WEIGHTS_SHAPED_PER_SECOND = 0.5e6  # of one thread, by any type
MULTIPLICATIONS_PER_SECOND = 25e9  # of one thread in the forward pass
PAIRED_PASSES = 6  # forward passes that a paired one takes as long as
REFINING_PASSES = 7  # the same of going through the text in rounds


@dataclass(frozen=True)
class Budget:
    """Predicted needs of a job; bytes and seconds."""

    tile_weights: int
    peak_ram: int
    peak_disk: int
    seconds: float


@dataclass(frozen=True)
class TensorNeeds:
    """Resident bytes of encoding a tensor: `fixed`, and `per_weight` of a tile."""

    fixed: int
    per_weight: int
    least_tile: int
    n_weights: int

    def at(self, tile: int) -> int:
        """With tiles of about `tile` weights."""
        return self.fixed + self.per_weight * min(self.n_weights, max(tile, self.least_tile))


@dataclass(frozen=True)
class EncodingNeeds:
    """Resident bytes of encoding: those of the program, and of its tensors, one at a time."""

    program: int
    tensors: frozenset[TensorNeeds]

    @property
    def smallest(self) -> int:
        """With the least tiles."""
        return self.at(0)

    def at(self, tile: int) -> int:
        """With tiles of about `tile` weights."""
        return self.program + max(tensor.at(tile) for tensor in self.tensors)

    def largest_tile(self, max_ram: int) -> int:
        """The largest tile with which `max_ram` bytes do."""
        free = max_ram - self.program
        limited = [(free - t.fixed) // t.per_weight for t in self.tensors if t.at(t.n_weights) > free]
        return min([MOST_TILE_WEIGHTS, *limited])


def encoding_needs(
    tensors: Sequence[tuple[tuple[int, ...], BlockType]],
    *,
    vocabulary_bytes: int,
    threads: int,
    ranks: Mapping[int, int] | None = None,
    in_turn: bool = False,
    two_sided: Collection[tuple[int, ...]] = (),
    kept: Collection[str] = (),
) -> EncodingNeeds:
    """What encoding needs, whatever `--max-ram` says.

    Args:
        tensors: row-major shape and type of every tensor of the output.
        vocabulary_bytes: size of the tokenizer files that planning reads.
        threads: kernel threads.
        ranks: where tensors are shaped, the ranks of sketches by width; other widths are exact. None: none is shaped.
        in_turn: shaped tensors make up for the errors of others (see `calibrate.paired`).
        two_sided: shapes whose rows make up for each other's errors too (see `quantize.rows`).
        kept: those of `kernel_uses` whose kernels need not be compiled.
    """
    uses = kernel_uses((block_type for _, block_type in tensors), shaped=ranks is not None)
    program = PROGRAM_BYTES + BYTES_PER_VOCABULARY_BYTE * vocabulary_bytes + compiling_bytes(uses - set(kept))
    program += SHAPING_BYTES if ranks is not None else 0

    def needs(shape: tuple[int, ...], block_type: BlockType) -> TensorNeeds:
        n_weights, n_in = math.prod(shape), shape[-1]
        if ranks is None or block_type.name not in SHAPED_TYPES:
            return TensorNeeds(0, BYTES_PER_WEIGHT, SLAB * n_in, n_weights)
        turn = (4 * n_in**2, BYTES_PER_WEIGHT_IN_TURN) if in_turn else (0, 0)
        rows = RowFeedback.needed_bytes(shape[0], n_in, threads) if shape in two_sided else 0
        metric, per_row = _metric_bytes(n_in, ranks.get(n_in), threads), shaped_row_bytes(n_in, ranks.get(n_in))
        return TensorNeeds(
            fixed=metric + SHAPED_ROWS_BYTES + BLAS_BYTES * threads + turn[0] + rows,
            per_weight=-(-per_row // n_in) + turn[1],
            least_tile=SLAB * n_in,
            n_weights=n_weights,
        )

    return EncodingNeeds(program, frozenset(needs(shape, block_type) for shape, block_type in tensors))


def kernel_uses(types: Iterable[BlockType], *, shaped: bool) -> set[str]:
    """What kernels are used for, as `kernels.cache` remembers it: block types, encoded plainly or shaped."""
    return {f"{t.name}-shaped" if shaped and t.name in SHAPED_TYPES else t.name for t in types if t.name != "F32"}


def decoder_uses(types: Iterable[BlockType]) -> set[str]:
    """The same where blocks of these types are decoded; those of other makers' types need no kernels."""
    return {f"{t.name}-decoded" for t in types if t.name in BLOCK_TYPES and t.name != "F32"}


def compiling_bytes(uses: Collection[str]) -> int:
    """Resident bytes of compiling the kernels of `uses`, and of what Numba keeps of that."""
    types = {use.removesuffix("-shaped") for use in uses}
    encoders = sum(n_bytes for group, n_bytes in KERNEL_BYTES.items() if not types.isdisjoint(group))
    shaping = SHAPING_KERNEL_BYTES * sum(use.endswith("-shaped") for use in uses)
    return COMPILER_BYTES + encoders + shaping if uses else 0


def shaped_row_bytes(n_in: int, rank: int | None) -> int:
    """Resident bytes for one row of a tile that is shaped; without a rank, its metric is exact."""
    return BYTES_PER_SHAPED_WEIGHT * n_in + BYTES_PER_SHAPED_ROW + BYTES_PER_PROJECTED_ERROR * (rank or 0)


def _metric_bytes(n_in: int, rank: int | None, threads: int) -> int:
    """Resident bytes of a sketch, exact if it has no rank, and of the metric that is made of it."""
    if rank is None:
        return Sketch.needed_bytes(n_in, n_in) + DenseMetric.needed_bytes(n_in, threads)
    return Sketch.needed_bytes(n_in, rank) + FactorMetric.needed_bytes(n_in, rank)


def make_budget(
    tensors: Sequence[tuple[tuple[int, ...], BlockType]],
    needs: EncodingNeeds,
    likely: EncodingNeeds,
    *,
    file_bytes: int,
    max_ram: int,
    threads: int,
    passes: Sequence[Calibration] = (),
    pairing: Pairing | None = None,
    refining: Refining | None = None,
) -> Budget:
    """Divide `max_ram` bytes among the parts of a job.

    Args:
        tensors: row-major shape and type of every tensor of the output.
        needs: of encoding them while kernels are compiled, which decides what fits: the same job must be the same
            job when they are compiled already. What fits only without that is planned without.
        likely: of encoding them with the kernels that are there, which is what will be measured.
        file_bytes: size of the finished file.
        max_ram: bytes of resident memory that the process may use at its peak.
        threads: kernel threads.
        passes: what comes before, if tensors are shaped.
        pairing: what goes on meanwhile, if they are so in their turn.
        refining: what comes behind.

    Raises:
        DoesNotFitError: `max_ram` is too small; the message names the smallest that works.
    """
    if max_ram < needs.smallest:
        raise DoesNotFitError(
            f"--max-ram {format_size(max_ram)} is too small for this model: "
            f"the smallest that works is --max-ram {-(-needs.smallest // MIB)}M"
        )
    n_weights = sum(math.prod(shape) for shape, _ in tensors)
    tile, behind = needs.largest_tile(max_ram), [way for way in (pairing, refining) if way]
    peak_ram, forward = likely.at(tile), 0.0
    if passes:
        peak_ram = max(peak_ram, *(streamed.peak_ram for streamed in passes))
        n_tokens = sum(streamed.forward_passes * streamed.n_tokens for streamed in passes)
        forward = n_weights * n_tokens / MULTIPLICATIONS_PER_SECOND
        peak_ram = max([peak_ram, *(likely.program + way.working_ram for way in behind)])
        n_passes = PAIRED_PASSES * bool(pairing) + REFINING_PASSES * bool(refining)
        forward += n_passes * n_weights * passes[0].windows.size / MULTIPLICATIONS_PER_SECOND
    speeds = WEIGHTS_PER_SECOND | dict.fromkeys(SHAPED_TYPES if passes else (), WEIGHTS_SHAPED_PER_SECOND)
    encoding = sum(math.prod(shape) / speeds[block_type.name] for shape, block_type in tensors)
    return Budget(
        tile_weights=tile,
        peak_ram=peak_ram,
        peak_disk=file_bytes + max((way.peak_disk for way in behind), default=0),
        seconds=(encoding + forward) / threads + n_weights / WEIGHTS_READ_BACK_PER_SECOND,
    )


def verify_tile(max_ram: int, *, header_bytes: int, widest: int) -> int:
    """Values to decode at a time so that reading a file back stays within `max_ram` bytes.

    Args:
        max_ram: bytes of resident memory that the process may use at its peak.
        header_bytes: of the file, the vocabulary for the most part.
        widest: values of its longest row.

    Raises:
        DoesNotFitError: `max_ram` is too small; the message names the smallest that works.
    """
    fixed = PROGRAM_BYTES + COMPILER_BYTES + BYTES_PER_VOCABULARY_BYTE * header_bytes
    tile, least = (max_ram - fixed) // BYTES_PER_CHECKED_WEIGHT, SLAB * widest
    if tile < least:
        smallest = fixed + BYTES_PER_CHECKED_WEIGHT * least
        raise DoesNotFitError(
            f"--max-ram {format_size(max_ram)} is too small for this file: "
            f"the smallest that works is --max-ram {-(-smallest // MIB)}M"
        )
    return min(tile, MOST_TILE_WEIGHTS)


def check_disk(folder: Path, needed: int) -> None:
    """Make sure that `folder` can take `needed` more bytes.

    Raises:
        DoesNotFitError: there is less free space than that.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DoesNotFitError(
            f"{folder}: the file needs {format_size(needed)} of disk space and {format_size(free)} are free: "
            "make room, or choose another place with -o"
        )
