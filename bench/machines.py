r"""What differs between machines: the same jobs with the code that other processors would choose.

    python bench/machines.py MODEL_DIR --folder FOLDER [--windows 16] [--effort fast --effort balanced]

Four libraries choose code by the processor: OpenBLAS its matrix products, NumPy its loops, LLVM (by Numba) the
instructions of our kernels, and glibc exp and its like. Each can be told to take another processor's, so one machine
shows what several would do, each library by itself and all together. For each effort the table has how many tensors
and bytes differ from this machine's file, and the mean KL divergence of every file (`sq-stream eval`).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from sq_stream.formats.gguf_read import GGUFReader

OPENBLAS, NUMPY, NUMBA = "OPENBLAS_CORETYPE", "NPY_DISABLE_CPU_FEATURES", "NUMBA_CPU_NAME"
AVX2 = {
    OPENBLAS: "Haswell",
    NUMPY: "X86_V4 AVX512_ICL",
    NUMBA: "haswell",
    "GLIBC_TUNABLES": "glibc.cpu.hwcaps=-AVX512F,-AVX512VL,-AVX512BW,-AVX512DQ,-AVX512CD",
}
MACHINES: dict[str, dict[str, str]] = {
    "this": {},
    "OpenBLAS for Haswell": {OPENBLAS: "Haswell"},
    "OpenBLAS for Sandybridge": {OPENBLAS: "Sandybridge"},
    "NumPy without AVX-512": {NUMPY: AVX2[NUMPY]},
    "Numba for Haswell": {NUMBA: "haswell"},
    "Numba for any x86-64": {NUMBA: "generic"},
    "glibc without FMA and AVX2": {"GLIBC_TUNABLES": "glibc.cpu.hwcaps=-FMA,-FMA4,-AVX2,-AVX512F"},
    "all for Haswell": AVX2,
}


def quantize(model: Path, file: Path, settings: dict[str, str], *, effort: str, windows: int) -> None:
    if file.exists():
        return
    command = [sys.executable, "-m", "sq_stream", "quantize", str(model), "-o", str(file), "--effort", effort]
    command += ["--windows", str(windows), "--cache", str(file.with_suffix(".cache"))]
    subprocess.run(command, env=os.environ | settings, check=True, stderr=subprocess.DEVNULL)


def differences(file: Path, other: Path) -> tuple[int, int, int]:
    """Tensors that differ, of all; and bytes that differ."""
    with GGUFReader.open(file) as a, GGUFReader.open(other) as b:
        counts = [
            int(np.count_nonzero(_bytes(file, x.offset, x.n_bytes) != _bytes(other, y.offset, y.n_bytes)))
            for x, y in zip(a.tensors.values(), b.tensors.values(), strict=True)
        ]
    return sum(n > 0 for n in counts), len(counts), sum(counts)


def _bytes(file: Path, offset: int, n: int) -> np.ndarray:
    return np.fromfile(file, np.uint8, n, offset=offset)


def evaluate(model: Path, files: list[Path], windows: int) -> list[float]:
    """Mean KL of each file on `heldout120`."""
    command = [sys.executable, "-m", "sq_stream", "eval", *map(str, files), "--ref", str(model), "--json"]
    command += ["--windows", str(windows)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    scores = json.loads(done.stdout)["suites"][0]["scores"]
    return [score["mean_kl"]["value"] for score in scores[1:]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--effort", action="append", default=[])
    parser.add_argument("--windows", type=int, default=16)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    for effort in args.effort or ["fast", "balanced"]:
        files = [args.folder / f"{effort}-{name.lower().replace(' ', '-')}.gguf" for name in MACHINES]
        for file, settings in zip(files, MACHINES.values(), strict=True):
            quantize(args.model, file, settings, effort=effort, windows=args.windows)
        n_bytes = files[0].stat().st_size
        print(f"\neffort {effort}, {n_bytes:,} bytes\n")
        print("| code | tensors that differ | bytes that differ | mean KL |\n| --- | --- | --- | --- |")
        for name, file, kl in zip(MACHINES, files, evaluate(args.model, files, args.windows), strict=True):
            tensors, n_tensors, n_different = differences(files[0], file)
            print(f"| {name} | {tensors} of {n_tensors} | {n_different:,} ({n_different / n_bytes:.2%}) | {kl:.6f} |")


if __name__ == "__main__":
    main()
