"""Hold our encoders against llama.cpp's `ggml_quantize_chunk`: squared error per tensor, speed, scaling with threads.

    python bench/encoders.py MODEL_DIR --types Q4_K Q6_K --threads 2

Errors are ours divided by ggml's on the same rows, Σ over a group of tensors, and that of the group's worst tensor:
`plain` without importance, `weighted` with a random log-normal importance per column, the same for both, for K-quants.
Speeds are ratios too, medians of rounds in which the candidates take turns, since machines are noisy: of wall-clock
times and, on Linux, of the CPU times of the busiest thread, which is what they would be were the cores free. The exit
status is 1 when any tensor's error is above ggml's.
"""

from __future__ import annotations

import argparse
import sys
import time
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numba
import numpy as np
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from oracles.ggml import ggml_encode

from sq_stream.formats.blocks import BLOCK_TYPES, BlockType
from sq_stream.formats.checkpoint import Checkpoint
from sq_stream.kernels.codec import encode

Array = NDArray[np.float32]

TYPES = ("Q4_K", "Q5_K", "Q6_K", "Q8_0", "Q5_0", "Q5_1")
WEIGHTED = ("Q4_K", "Q5_K", "Q6_K")
TIMED_WEIGHTS = 2**20


def tensors(folder: Path, max_rows: int) -> Iterator[tuple[str, Array]]:
    """Matrices of the checkpoint, at most `max_rows` rows of each, evenly spread."""
    with Checkpoint.open(folder) as checkpoint:
        for name, shape in checkpoint.shapes.items():
            if len(shape) == 2:
                rows = np.unique(np.linspace(0, shape[0] - 1, min(max_rows, shape[0])).astype(np.int64))
                yield name, checkpoint.read_rows(name, rows)


def column_importance(name: str, n_in: int, sigma: float) -> Array:
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    return np.exp(sigma * rng.standard_normal(n_in)).astype(np.float32)


def squared_error(x: Array, blocks: NDArray[np.uint8], block_type: BlockType, importance: Array | None) -> float:
    error = np.square(x - dequantize(blocks, GGMLQuantizationType(block_type.ggml_id)), dtype=np.float64)
    return float(error.sum() if importance is None else (error * importance).sum())


def compare_errors(folder: Path, block_type: BlockType, max_rows: int, sigma: float) -> list[str]:
    """Print a line per group of tensors; the names of tensors that ggml stores with less error."""
    errors: dict[str, dict[str, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    worse = []
    for name, x in tensors(folder, max_rows):
        n_in = x.shape[1]
        if n_in % block_type.block_size:
            continue
        for kind in ("plain", "weighted") if block_type.name in WEIGHTED else ("plain",):
            importance = column_importance(name, n_in, sigma) if kind == "weighted" else None
            ours = squared_error(x, encode(x, block_type, importance), block_type, importance)
            theirs = squared_error(x, ggml_encode(x, block_type, importance), block_type, importance)
            errors[name.removesuffix(".weight").rpartition(".")[2]][kind].append((ours, theirs))
            if ours > theirs:
                worse.append(f"{block_type.name} {name} {kind}: {ours / theirs:.5f} of ggml's error")
    for group, kinds in errors.items():
        columns = []
        for pairs in kinds.values():
            ours, theirs = np.array(pairs).T
            columns.append(f"{ours.sum() / theirs.sum():10.4f}{(ours / np.maximum(theirs, 1e-300)).max():9.4f}")
        print(f"{block_type.name:6}{group:18}{len(kinds['plain']):4d}" + "".join(columns), flush=True)
    return worse


def compare_speed(folder: Path, block_type: BlockType, threads: int, rounds: int, sigma: float) -> None:
    """Print weights/s of one thread over ggml's, and of `threads` threads over one."""
    name, x = next((n, x) for n, x in tensors(folder, 1024) if x.size >= TIMED_WEIGHTS // 2)
    n_in = x.shape[1] // block_type.block_size * block_type.block_size
    x = np.ascontiguousarray(x[: TIMED_WEIGHTS // n_in, :n_in])
    for importance in (None, column_importance(name, n_in, sigma))[: 1 + (block_type.name in WEIGHTED)]:
        ours, theirs = partial(encode, x, block_type, importance), partial(ggml_encode, x, block_type, importance)
        ours()  # compiled or loaded now
        rows = [(seconds(theirs, 1), seconds(ours, 1), seconds(ours, threads)) for _ in range(rounds)]
        ggml, one, many = np.array(rows).transpose(1, 0, 2)  # each [rounds, wall and CPU]
        columns = (*np.median(ggml / one, axis=0), *np.median(one / many, axis=0))
        kind = "plain" if importance is None else "weighted"
        million_per_second = x.size / np.median(one[:, 0]) / 1e6
        print(
            f"{block_type.name:6}{kind:10}{million_per_second:8.1f}" + "".join(f"{c:10.2f}" for c in columns),
            flush=True,
        )


def seconds(work: Callable[[], object], threads: int) -> tuple[float, float]:
    """Wall-clock time of `work` and CPU time of its busiest thread, from about 0.1 s of it."""
    numba.set_num_threads(threads)
    n, before, start = 0, thread_seconds(), time.perf_counter()
    while (wall := time.perf_counter() - start) < 0.1:
        work()
        n += 1
    busiest = max((t - before.get(thread, 0.0) for thread, t in thread_seconds().items()), default=np.nan)
    return wall / n, busiest / n


def thread_seconds() -> dict[str, float]:
    """CPU time that each thread of this process has had, by thread id; empty where the system does not tell."""
    stats = Path("/proc/self/task").glob("*/schedstat")
    return {stat.parent.name: int(stat.read_text().split()[0]) / 1e9 for stat in stats}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_dir", type=Path, metavar="MODEL_DIR")
    parser.add_argument("--types", nargs="+", choices=TYPES, default=TYPES)
    parser.add_argument("--threads", type=int, default=2, help="threads of the scaling column")
    parser.add_argument("--rows", type=int, default=512, help="rows taken of each tensor for the errors")
    parser.add_argument("--rounds", type=int, default=15, help="timing rounds")
    parser.add_argument("--sigma", type=float, default=1.0, help="of the importance's logarithm")
    options = parser.parse_args()
    types = [BLOCK_TYPES[name] for name in options.types]

    print("squared error over ggml's, of the group and of its worst tensor")
    print(f"{'type':6}{'group':18}{'n':>4}{'plain':>10}{'worst':>9}{'weighted':>10}{'worst':>9}")
    worse = [line for t in types for line in compare_errors(options.model_dir, t, options.rows, options.sigma)]
    print(
        "\nspeed: million weights/s of one thread, over ggml's, and all threads over one; by wall clock and by CPU time"
    )
    many = f"x{options.threads}"
    print(f"{'type':6}{'':10}{'Mw/s':>8}{'/ ggml':>10}{'CPU':>10}{many + ' wall':>10}{many + ' CPU':>10}")
    for block_type in types:
        compare_speed(options.model_dir, block_type, options.threads, options.rounds, options.sigma)
    if worse:
        sys.exit("\nworse than ggml:\n" + "\n".join(worse))


if __name__ == "__main__":
    main()
