r"""Hold the speed of `sq-stream calibrate` against that of `llama-imatrix`, and shaping against calibrating.

    python bench/calibration_speed.py MODEL_DIR --imatrix llama.cpp/build/bin/llama-imatrix --threads 2 --rounds 3

Both run the BF16 model over equally many windows of the packaged calibration text, with equally many threads, in turns.
`pass` is the time from the first token on to the end of the process: ours goes on to write the second moments of all
sites, llama-imatrix (`--no-ppl`) to write its importance matrix. `process` is the time of the whole process, with its
start and tokenization. `CPU` is processor time: of our pass, which is what a second run that finds everything in the
cache does not need, and of all of llama-imatrix, whose start is short. Then `sq-stream quantize` finds the calibration
in the cache and shapes: its times are the whole process's, with reading, writing and verifying.

Figures are medians of the rounds, ratios medians of each round's. Bars: our forward pass has at least half of
llama-imatrix's tokens per second, and shaping takes no longer than three forward passes of the default 360 windows,
which at fewer --windows are reckoned from the tokens per second. The exit status is 1 when a bar is missed.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from candidates import Workshop, sq_stream
from oracles.llamacpp import LlamaModel
from oracles.peak import run_measured

from sq_stream.calibrate.corpus import CTX, WINDOWS, build_corpus
from sq_stream.demo import model_folder
from sq_stream.text.encode import Tokenizer
from sq_stream.text.vocabulary import read_vocabulary

MIN_SPEED = 0.5  # of llama-imatrix's
MAX_PASSES = 3.0  # forward passes in the time of shaping
_STARTED = re.compile(r"(\d+)\.(\d+)\.(\d+)\.(\d+) I \S+: computing over (\d+) chunks")  # min.s.ms.µs


@dataclass(frozen=True)
class Timing:
    """Seconds of a process: its pass over the tokens, all of it, and processor time; and its peak memory."""

    pass_seconds: float
    seconds: float
    cpu_seconds: float
    peak_bytes: int


@dataclass(frozen=True)
class Round:
    """One round of all three."""

    calibrate: Timing
    imatrix: Timing
    shape: Timing


def write_text(model_dir: Path, reference: Path, n_windows: int, output: Path) -> None:
    """The text of the calibration windows, and of a tenth more, since it may be tokenized into fewer tokens."""
    with LlamaModel(reference, vocab_only=True) as model:
        arch, n_vocab = model.metadata["general.architecture"], model.n_vocab
    tokenizer = Tokenizer.open(model_dir)
    n_wanted = n_windows + max(2, n_windows // 10)
    windows = build_corpus(tokenizer, read_vocabulary(model_dir, arch=arch, n_vocab=n_vocab), windows=(n_wanted, 1, 1))
    output.write_text("".join(tokenizer.decode(ids.tolist()) for ids in windows.calib), encoding="utf-8")


def time_calibrate(model_dir: Path, options: Sequence[object]) -> Timing:
    """With an empty cache, then with a filled one."""
    start = time.time()
    run = sq_stream("calibrate", model_dir, *options, log_format="json")
    events = [json.loads(line) for line in run.log.splitlines() if line.startswith("{")]
    began = next(event["time"] for event in events if event["event"] == "stage_started") - start
    idle = sq_stream("calibrate", model_dir, *options)
    return Timing(run.seconds - began, run.seconds, run.cpu_seconds - idle.cpu_seconds, run.peak_bytes)


def time_imatrix(binary: Path, reference: Path, text: Path, n_windows: int, threads: int, output: Path) -> Timing:
    options = ["--chunks", n_windows, "-c", CTX, "-t", threads, "--no-ppl", "--log-timestamps", "--log-prefix"]
    run = run_measured([str(binary), "-m", str(reference), "-f", str(text), "-o", str(output), *map(str, options)])
    found = _STARTED.search(run.log)
    if run.exit_code or found is None or int(found[5]) != n_windows:
        raise SystemExit(f"{binary} did not compute {n_windows} chunks (exit code {run.exit_code}):\n{run.log}")
    minutes, seconds, milli, micro = map(int, found.groups()[:4])
    began = 60 * minutes + seconds + milli / 1e3 + micro / 1e6
    return Timing(run.seconds - began, run.seconds, run.cpu_seconds, run.peak_bytes)


def measure(arguments: argparse.Namespace, folder: Path) -> list[Round]:
    limits = ["--max-ram", arguments.max_ram, "--threads", arguments.threads]
    workshop = Workshop(
        arguments.model_dir,
        folder,
        calib_windows=arguments.windows,
        max_ram=arguments.max_ram,
        threads=arguments.threads,
    )
    reference, text, cache = workshop.reference.path, folder / "text.txt", folder / "speed-cache"
    write_text(arguments.model_dir, reference, arguments.windows, text)
    recipe, output = ["--type", arguments.type, *(["--pure"] if arguments.pure else [])], folder / "shaped.gguf"
    calibration = ["--windows", arguments.windows, "--cache", cache]

    def shape(model_dir: Path, *options: object) -> Timing:
        run = sq_stream("quantize", model_dir, "-o", output, "--overwrite", "--fresh", *recipe, *limits, *options)
        return Timing(run.seconds, run.seconds, run.cpu_seconds, run.peak_bytes)

    shape(model_folder(), "--windows", 1, "--cache", folder / "warm-up")  # kernels are compiled now
    rounds = []
    for i in range(arguments.rounds):
        shutil.rmtree(cache, ignore_errors=True)
        args = (arguments.imatrix, reference, text, arguments.windows, arguments.threads, folder / "speed-imatrix.gguf")
        rounds.append(
            Round(
                time_calibrate(arguments.model_dir, [*limits, *calibration]),
                time_imatrix(*args),
                shape(arguments.model_dir, *calibration),
            )
        )
        print(f"round {i + 1} of {arguments.rounds}: {rounds[-1]}", file=sys.stderr, flush=True)
    return rounds


def summarize(rounds: Sequence[Round], n_windows: int) -> tuple[str, dict]:
    """The table, and the same as JSON values."""
    n_tokens = n_windows * CTX

    def values(which: str, field: str) -> np.ndarray:
        return np.array([getattr(getattr(round_, which), field) for round_ in rounds], np.float64)

    lines = ["| | pass, s | process, s | CPU, s | tokens/s | tokens per CPU s | peak, MiB |", "|" + " --- |" * 7]
    for which, name in (("calibrate", "sq-stream calibrate"), ("imatrix", "llama-imatrix"), ("shape", "shaping")):
        fields = ("pass_seconds", "seconds", "cpu_seconds", "peak_bytes")
        in_pass, process, cpu, peak = (float(np.median(values(which, field))) for field in fields)
        speeds = "| | |" if which == "shape" else f"| {n_tokens / in_pass:.0f} | {n_tokens / cpu:.0f} |"
        lines.append(f"| {name} | {in_pass:.1f} | {process:.1f} | {cpu:.1f} {speeds} {peak / 2**20:.0f} |")

    default_passes = values("calibrate", "pass_seconds") * WINDOWS[0] / n_windows
    speed = values("imatrix", "pass_seconds") / values("calibrate", "pass_seconds")
    cpu_speed = values("imatrix", "cpu_seconds") / values("calibrate", "cpu_seconds")
    passes = values("shape", "seconds") / default_passes
    bars = [
        ("tokens/s over llama-imatrix's", speed, f"≥ {MIN_SPEED:g}", bool(np.median(speed) >= MIN_SPEED)),
        ("tokens per CPU s over llama-imatrix's", cpu_speed, "", None),
        (
            f"shaping over one forward pass of {WINDOWS[0]} windows",
            passes,
            f"≤ {MAX_PASSES:g}",
            bool(np.median(passes) <= MAX_PASSES),
        ),
    ]
    lines += ["", "| bar | median (rounds) | limit | met |", "| --- | --- | --- | --- |"]
    for name, ratios, limit, met in bars:
        verdict = {True: "yes", False: "**no**", None: ""}[met]
        listed = ", ".join(f"{ratio:.2f}" for ratio in ratios)
        lines.append(f"| {name} | {np.median(ratios):.2f} ({listed}) | {limit} | {verdict} |")
    report = {
        "windows": n_windows,
        "ctx": CTX,
        "rounds": [asdict(round_) for round_ in rounds],
        "bars": [
            {"bar": name, "median": float(np.median(ratios)), "rounds": ratios.tolist(), "limit": limit, "met": met}
            for name, ratios, limit, met in bars
        ],
    }
    return "\n".join(lines) + "\n", report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model_dir", type=Path)
    add("--imatrix", type=Path, required=True, metavar="BINARY", help="llama.cpp's llama-imatrix")
    add("--windows", type=int, default=WINDOWS[0], metavar="N", help=f"of {CTX} tokens, at least 2")
    add("--rounds", type=int, default=3)
    add("--threads", type=int, default=2, help="of each program")
    add("--type", default="q4_k_m", help="of the shaped file")
    add("--pure", action=argparse.BooleanOptionalAction, default=True, help="of the shaped file")
    add("--max-ram", default="1G", help="of each sq-stream command")
    add("--folder", type=Path, help="keep the files here; a temporary folder otherwise")
    add("--report", type=Path, metavar="STEM", help="write STEM.md and STEM.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        rounds = measure(arguments, arguments.folder or Path(scratch))
    markdown, report = summarize(rounds, arguments.windows)
    report |= {"model": arguments.model_dir.resolve().name, "threads": arguments.threads, "max_ram": arguments.max_ram}
    print(f"{markdown}\n{json.dumps(report)}")
    if arguments.report:
        arguments.report.with_suffix(".md").write_text(markdown)
        arguments.report.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    sys.exit(1 if any(bar["met"] is False for bar in report["bars"]) else 0)


if __name__ == "__main__":
    main()
