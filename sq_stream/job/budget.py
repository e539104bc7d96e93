"""What a job will need: memory as tile sizes, disk, time. Everything that cannot work is refused here."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sq_stream.calibrate.calibration import Calibration
from sq_stream.calibrate.sketch import Sketch
from sq_stream.errors import DoesNotFitError
from sq_stream.formats.blocks import BlockType
from sq_stream.parallel import SLAB
from sq_stream.quantize.metric import DenseMetric, FactorMetric
from sq_stream.units import format_size

MIB = 2**20
SHAPED_TYPES = frozenset(("Q4_K", "Q5_K", "Q6_K", "Q8_0", "Q5_0", "Q5_1"))

# Resident bytes before any tile: interpreter, NumPy, tokenizers, and Numba while it compiles all the kernels. Measured
# as the peak memory that `quantize` states for a small model with an empty NUMBA_CACHE_DIR.
FIXED_BYTES = 320 * MIB
# The same where tensors are shaped, for each type they are shaped to.
COMPILING_BYTES = 40 * MIB
# Resident bytes for one weight of the tile in work: the float32 tile and one copy where rows are reordered or
# transformed (8), the encoded bytes (up to 4), and what the allocator keeps.
BYTES_PER_WEIGHT = 20
# The same where the tile is shaped: the tile, wanted values, errors, codes and E Sᵀ; and for a row, work on a panel.
BYTES_PER_SHAPED_WEIGHT = 20
BYTES_PER_SHAPED_ROW = 8192
# A larger tile encodes no faster.
MOST_TILE_WEIGHTS = 4 * MIB
# Resident bytes for one byte of the tokenizer's files while the vocabulary is read.
BYTES_PER_VOCABULARY_BYTE = 12

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
WEIGHTS_SHAPED_PER_SECOND = 1.5e6  # of one thread, by any type
MULTIPLICATIONS_PER_SECOND = 25e9  # of one thread in the forward pass


@dataclass(frozen=True)
class Budget:
    """Predicted needs of a job; bytes and seconds."""

    tile_weights: int
    peak_ram: int
    peak_disk: int
    seconds: float


@dataclass(frozen=True)
class EncodingNeeds:
    """Resident bytes of encoding: what does not depend on the tile, and `per_weight` of at least `least_tile`."""

    fixed: int
    per_weight: int
    least_tile: int

    @property
    def smallest(self) -> int:
        """With the least tile."""
        return self.fixed + self.per_weight * self.least_tile


def encoding_needs(
    tensors: Sequence[tuple[tuple[int, ...], BlockType]],
    *,
    vocabulary_bytes: int,
    threads: int,
    ranks: Mapping[int, int] | None = None,
) -> EncodingNeeds:
    """What encoding needs, whatever `--max-ram` says.

    Args:
        tensors: row-major shape and type of every tensor of the output.
        vocabulary_bytes: size of the tokenizer files that planning reads.
        threads: kernel threads.
        ranks: where tensors are shaped, the ranks of sketches by width; other widths are exact. None: none is shaped.
    """
    longest_row = max(shape[-1] for shape, _ in tensors)
    largest_tensor = max(math.prod(shape) for shape, _ in tensors)
    fixed = FIXED_BYTES + BYTES_PER_VOCABULARY_BYTE * vocabulary_bytes
    shaped = {(block_type, shape[-1]) for shape, block_type in tensors if block_type.name in SHAPED_TYPES}
    if ranks is None or not shaped:
        return EncodingNeeds(fixed, BYTES_PER_WEIGHT, min(longest_row, largest_tensor))
    widths = {width for _, width in shaped}
    return EncodingNeeds(
        fixed=fixed
        + COMPILING_BYTES * len({block_type for block_type, _ in shaped})
        + max(_metric_bytes(width, ranks.get(width), threads) for width in widths),
        per_weight=BYTES_PER_SHAPED_WEIGHT + BYTES_PER_SHAPED_ROW // min(widths),
        least_tile=min(SLAB * longest_row, largest_tensor),
    )


def _metric_bytes(n_in: int, rank: int | None, threads: int) -> int:
    """Resident bytes of a sketch, exact if it has no rank, and of the metric that is made of it."""
    if rank is None:
        return Sketch.needed_bytes(n_in, n_in) + DenseMetric.needed_bytes(n_in, threads)
    return Sketch.needed_bytes(n_in, rank) + FactorMetric.needed_bytes(n_in, rank)


def make_budget(
    tensors: Sequence[tuple[tuple[int, ...], BlockType]],
    needs: EncodingNeeds,
    *,
    file_bytes: int,
    max_ram: int,
    threads: int,
    calibration: Calibration | None = None,
) -> Budget:
    """Divide `max_ram` bytes among the parts of a job.

    Args:
        tensors: row-major shape and type of every tensor of the output.
        needs: of encoding them.
        file_bytes: size of the finished file.
        max_ram: bytes of resident memory that the process may use at its peak.
        threads: kernel threads.
        calibration: what comes before, if tensors are shaped.

    Raises:
        DoesNotFitError: `max_ram` is too small; the message names the smallest that works.
    """
    if max_ram < needs.smallest:
        raise DoesNotFitError(
            f"--max-ram {format_size(max_ram)} is too small for this model: "
            f"the smallest that works is --max-ram {-(-needs.smallest // MIB)}M"
        )
    n_weights = sum(math.prod(shape) for shape, _ in tensors)
    largest_tensor = max(math.prod(shape) for shape, _ in tensors)
    tile = min(largest_tensor, MOST_TILE_WEIGHTS, (max_ram - needs.fixed) // needs.per_weight)
    tile = max(tile, needs.least_tile)
    peak_ram, forward = needs.fixed + needs.per_weight * tile, 0.0
    if calibration:
        peak_ram = max(peak_ram, calibration.peak_ram)
        forward = n_weights * calibration.n_tokens / MULTIPLICATIONS_PER_SECOND
        encoding = n_weights / WEIGHTS_SHAPED_PER_SECOND
    else:
        encoding = sum(math.prod(shape) / WEIGHTS_PER_SECOND[block_type.name] for shape, block_type in tensors)
    return Budget(
        tile_weights=tile,
        peak_ram=peak_ram,
        peak_disk=file_bytes,
        seconds=(encoding + forward) / threads + n_weights / WEIGHTS_READ_BACK_PER_SECOND,
    )


def verify_tile(max_ram: int) -> int:
    """Values to decode at a time so that reading a file back stays within `max_ram` bytes.

    Raises:
        DoesNotFitError: `max_ram` does not hold the program itself.
    """
    tile = (max_ram - FIXED_BYTES) // BYTES_PER_WEIGHT
    if tile <= 0:
        raise DoesNotFitError(
            f"--max-ram {format_size(max_ram)} is too small: "
            f"the smallest that works is --max-ram {FIXED_BYTES // MIB + 1}M"
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
