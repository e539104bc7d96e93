"""Feed hostile files to every reader of sq-stream, for as long as wanted; anything but an error of ours is a fault.

    python bench/fuzz.py --seconds 600 [--engine atheris|random] [--target NAME]... [--faults FOLDER]

Every target of tests/fuzzing.py runs in a process of its own whose address space may grow by `--memory` MiB beyond
what it has when it is warm, and each input may take `--input-seconds`. With atheris (pip install atheris) the mutations
that know a file's form are guided by the coverage of sq_stream; `random` applies them to the seeds alone. An input that
is no fault is `accepted` or `refused`; the inputs of faults are kept in the folder given, and `--replay FILE` reads one
again. Exits with 1 if there was a fault.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from random import Random
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
MIB = 2**20


class TooSlowError(BaseException):
    """An input took longer than it may."""


class Worker:
    """One target in this process: counts, limits, and what went wrong."""

    def __init__(self, options: argparse.Namespace, scratch: Path) -> None:
        import fuzzing

        self.options = options
        fuzzing.use_folder(scratch)
        self.target = fuzzing.MAKERS[options.target[0]]()
        self.counts = {"inputs": 0, "accepted": 0, "refused": 0, "faults": 0}
        self.seen: set[str] = set()
        for seed in self.target.seeds:
            if not self.target.check(seed):
                raise ValueError(f"{self.target.name}: a seed is refused")
        self._limit_memory(options.memory)
        signal.signal(signal.SIGALRM, self._too_slow)
        self.end = time.monotonic() + options.seconds

    @staticmethod
    def _limit_memory(mib: int) -> None:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + mib * MIB, -1))

    @staticmethod
    def _too_slow(_signal: int, _frame: object) -> None:
        raise TooSlowError

    def feed(self, data: bytes) -> None:
        """Read one input; a fault is written down, once for each place in the code."""
        self.counts["inputs"] += 1
        signal.setitimer(signal.ITIMER_REAL, self.options.input_seconds)
        try:
            self.counts["accepted" if self.target.check(data) else "refused"] += 1
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            signal.setitimer(signal.ITIMER_REAL, 0)
            self._keep(data, error)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        if time.monotonic() > self.end:
            self.finish()

    def _keep(self, data: bytes, error: BaseException) -> None:
        self.counts["faults"] += 1
        frames = traceback.extract_tb(error.__traceback__)
        ours = [frame for frame in frames if "sq_stream" in frame.filename] or list(frames)
        place = f"{type(error).__name__} {ours[-1].filename.rpartition('/')[2]}:{ours[-1].lineno}"
        if place in self.seen:
            return
        self.seen.add(place)
        folder = Path(self.options.faults)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.target.name}-{hashlib.sha256(data).hexdigest()[:12]}"
        path.write_bytes(data)
        print(f"FAULT {self.target.name}: {place}: {str(error)[:300]!r} ({path})", file=sys.stderr, flush=True)

    def finish(self) -> None:
        """End the process with the counts on standard output; libFuzzer would not come back."""
        print(json.dumps({self.target.name: self.counts}), flush=True)
        os._exit(1 if self.counts["faults"] else 0)


def run_random(worker: Worker, seed: int) -> None:
    """Mutations of the seeds, and of what was accepted of them."""
    random = Random(seed)
    pool = list(worker.target.seeds)
    while True:
        data = worker.target.mutate(random.choice(pool), random)
        accepted = worker.counts["accepted"]
        worker.feed(data)
        if worker.counts["accepted"] > accepted and len(pool) < 200 and len(data) < 2**16:
            pool.append(data)


def run_atheris(options: argparse.Namespace, scratch: Path) -> None:
    """Mutations that libFuzzer chooses by the coverage of sq_stream."""
    import atheris

    with atheris.instrument_imports(include=["sq_stream"]):  # before anything has imported it
        import fuzzing

        import sq_stream.calibrate.calibration
        import sq_stream.cli
        import sq_stream.evaluate.run
        import sq_stream.job.run  # noqa: F401

        fuzzing.use_folder(scratch / "making")
        fuzzing.MAKERS[options.target[0]]()
    worker = Worker(options, scratch / "work")
    corpus = scratch / "corpus"
    corpus.mkdir()
    for i, seed in enumerate(worker.target.seeds):
        (corpus / str(i)).write_bytes(seed)

    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        random = Random(seed)
        out = worker.target.mutate(data, random) if random.random() < 0.8 else atheris.Mutate(data, len(data) + 8)
        return bytes(out[:max_size])

    arguments = [sys.argv[0], f"-seed={options.seed}", "-max_len=262144", "-timeout=600", "-rss_limit_mb=0"]
    atheris.Setup([*arguments, "-verbosity=0", "-print_final_stats=0", str(corpus)], worker.feed, custom_mutator=mutate)
    atheris.Fuzz()


def run_target(options: argparse.Namespace, name: str) -> dict[str, Any]:
    """One target in a child process, and its counts; a process that dies is a fault."""
    own = [sys.executable, __file__, "--worker", "--target", name, "--engine", options.engine]
    for key in ("seconds", "seed", "memory", "input_seconds", "faults"):
        own += [f"--{key.replace('_', '-')}", str(getattr(options, key))]
    limit = options.seconds + 120 + 10 * options.input_seconds
    try:
        child = subprocess.run(
            own, stdout=subprocess.PIPE, timeout=limit, check=False, env={**os.environ, "NUMBA_NUM_THREADS": "1"}
        )
    except subprocess.TimeoutExpired:
        return {"faults": 1, "died": "hung"}
    for line in reversed(child.stdout.decode(errors="replace").splitlines()):
        if line.startswith(f'{{"{name}"'):
            return dict(json.loads(line)[name])
    return {"faults": 1, "died": f"exit code {child.returncode}"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", action="append", metavar="NAME", help="of tests/fuzzing.py; default: all")
    parser.add_argument("--engine", choices=("atheris", "random"), default="atheris")
    parser.add_argument("--seconds", type=float, default=60, help="for each target")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--memory", type=int, default=512, help="MiB of address space beyond that of the program")
    parser.add_argument("--input-seconds", type=float, default=20)
    parser.add_argument("--faults", default="faults", help="folder for the inputs of faults")
    parser.add_argument("--replay", metavar="FILE", help="read this input of --target, with its traceback")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as scratch:
        if options.worker:
            if options.engine == "atheris":
                run_atheris(options, Path(scratch))
            run_random(Worker(options, Path(scratch)), options.seed)
        import fuzzing

        if options.replay:
            fuzzing.use_folder(Path(scratch))
            target = fuzzing.MAKERS[options.target[0]]()
            print("accepted" if target.check(Path(options.replay).read_bytes()) else "refused")
            return 0
        results = {}
        for name in options.target or fuzzing.MAKERS:
            results[name] = run_target(options, name)
            print(f"{name:<14} {json.dumps(results[name])}", flush=True)
    n_inputs = sum(result.get("inputs", 0) for result in results.values())
    n_faults = sum(result["faults"] for result in results.values())
    print(f"{n_inputs} inputs, {n_faults} faults")
    return 1 if n_faults else 0


if __name__ == "__main__":
    sys.exit(main())
