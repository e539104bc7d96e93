"""Measure peak memory: large shapes under the kernel's limit, and a small model against its depth and its text.

    python bench/memory.py FOLDER [--reference MODEL_DIR] [--only PATTERN] [--docs docs]

Every command runs in a memory cgroup of the size promised for its shape and 5% more, swap forbidden, where the machine
lets us make one. Checkpoints have random weights in the shapes of published models (`make_checkpoint.py`) and, but for
one, few layers, for time, and a small vocabulary; `--reference` is the reference model itself. What is measured is kept
in FOLDER/memory.jsonl and not measured again: run it in parts with `--only`, a regular expression for names. `--docs`
writes memory.md and memory.svg from all of it.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from make_checkpoint import make_config, write_checkpoint
from memory_page import Measured, chart, document, line_of
from oracles.peak import run_limited

from sq_stream.demo import model_folder
from sq_stream.units import parse_size

OVER = 1.05  # of what is promised, at which the kernel kills
EFFORTS = ("fast", "balanced", "best")
KINDS = (*EFFORTS, "eval")  # of commands
CTX = 128  # tokens; a batch is 16 such windows
DEPTHS, WINDOWS = (2, 4, 8, 16), (8, 16, 32, 64)
GROWTH_RAM = "1G"


@dataclass(frozen=True)
class Shape:
    """A checkpoint and what it must fit in."""

    name: str
    max_ram: str
    layers: int
    reduced: str  # what is left out, for time
    bf16: str = ""  # tensors that are not quantized
    balanced_windows: int = 32  # two batches; in more of them two threads are more surely at their peaks together
    eval_windows: int = 8
    kinds: tuple[str, ...] = KINDS
    n_vocab: int = 4096


SHAPES = (
    Shape("reference", "512M", 30, "29 of its 30 layers are left in BF16", r"blk\.([1-9]|\d\d)\."),
    Shape("qwen3.5-0.8b", "1G", 4, "4 of its 24 layers, 4096 of its 248320 tokens"),
    Shape(
        "qwen3.5-0.8b-whole",
        "2G",
        24,
        "23 of its 24 layers are left in BF16; forward and backward pass and the round of refinement are whole",
        r"blk\.([1-9]|\d\d)\.",
        kinds=("best",),
        n_vocab=248320,
    ),
    Shape(
        "llama-3.1-8b",
        "2G",
        1,
        "1 of its 32 layers, 4096 of its 128256 tokens; all but attn_q, attn_k and ffn_down are left in BF16",
        r"^token_embd|^output\.|attn_v|attn_output|ffn_gate|ffn_up",
        eval_windows=4,
    ),
    Shape(
        "llama-3.1-70b",
        "4G",
        1,
        "1 of its 80 layers, 4096 of its 128256 tokens; all but attn_k and ffn_down are left in BF16",
        r"^token_embd|^output\.|attn_[qv]|attn_output|ffn_gate|ffn_up",
        balanced_windows=96,
        eval_windows=4,
    ),
)


@dataclass(frozen=True)
class Job:
    """A command: `kind` is an effort of quantize, or eval of the file of the effort fast."""

    name: str
    kind: str
    model: Path
    max_ram: str
    options: tuple[str, ...]


def jobs(folder: Path, reference: Path | None) -> Iterator[Job]:
    """All that is measured."""
    for shape in SHAPES:
        model = reference if shape.name == "reference" else folder / shape.name
        if model is not None:
            types = ("--tensor-type", f"{shape.bf16}=bf16") if shape.bf16 else ()
            texts = {"fast": (), "balanced": text(shape.balanced_windows), "best": text()}
            for kind in shape.kinds:
                options = (*types, *texts[kind]) if kind != "eval" else ("--windows", str(shape.eval_windows))
                yield Job(shape.name, kind, model, shape.max_ram, options)
    for n_layer in DEPTHS:
        model = folder / f"small-{n_layer}"
        for kind in EFFORTS:
            yield Job(f"{n_layer} layers", kind, model, GROWTH_RAM, text() if kind != "fast" else ())
        yield Job(f"{n_layer} layers", "eval", model, GROWTH_RAM, ("--windows", "8"))
    for n_windows in WINDOWS:
        for kind in ("balanced", "best", "eval"):
            options = text(n_windows, 512) if kind != "eval" else ("--windows", str(n_windows))
            yield Job(f"{n_windows} windows", kind, folder / "small-2", GROWTH_RAM, options)


def text(n_windows: int = 32, n_ctx: int = CTX) -> tuple[str, ...]:
    """Options that say so."""
    return ("--windows", str(n_windows), "--ctx", str(n_ctx))


def make_model(folder: Path) -> None:
    """The random checkpoint that the name of `folder` says, with the packaged model's tokenizer; if it is not there."""
    if (folder / "tokenizer.json").exists():
        return
    if folder.name.startswith("small-"):
        sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 4}
        config = make_config("llama-3.1-8b", int(folder.name.removeprefix("small-")), 4096) | sizes
    else:
        shape = next(s for s in SHAPES if s.name == folder.name)
        config = make_config(shape.name.removesuffix("-whole"), shape.layers, shape.n_vocab)
    write_checkpoint(folder, config, shard_bytes=2**30)
    shutil.copy(model_folder() / "tokenizer.json", folder)


def run(job: Job, scratch: Path) -> Measured:
    """Plan and run a job with nothing left of an earlier one; files stay in `scratch`.

    Raises:
        RuntimeError: it failed, or was killed at the limit.
    """
    cache, file = scratch / "cache", scratch / f"{job.model.name}-{job.kind}.gguf"
    shutil.rmtree(cache, ignore_errors=True)
    options = [*job.options, "--threads", "2", "--cache", cache, "--max-ram", job.max_ram]
    planned = 0
    if job.kind == "eval":
        words = ["eval", scratch / f"{job.model.name}-fast.gguf", "--ref", job.model, *options, "--json"]
    else:
        options = ["--effort", job.kind, *options]
        words = ["quantize", job.model, "-o", file, *options, "--overwrite", "--fresh"]
        planned = plan(job.model, options)
    limit = int(OVER * parse_size(job.max_ram))
    found = run_limited([sys.executable, "-m", "sq_stream", *map(str, words)], limit)
    if found.exit_code:
        raise RuntimeError(f"{job}: ended with {found.exit_code} (-9: killed at its limit)\n{found.log}")
    planned = planned or json.loads(found.log[found.log.index("\n{\n") :])["planned_ram"]
    line = " ".join(["sq-stream", *map(shown, words)])
    seconds, limited = round(found.seconds, 1), found.limited_by_kernel
    return Measured(job.name, job.kind, line, parse_size(job.max_ram), planned, found.peak_bytes, limited, seconds)


def plan(model: Path, options: Sequence[str | Path]) -> int:
    """Bytes of the peak that quantize plans."""
    command = [sys.executable, "-m", "sq_stream", "plan", model, *options, "--json"]
    return int(json.loads(subprocess.run(command, capture_output=True, check=True).stdout)["peak_ram"])


def shown(word: str | Path) -> str:
    """A word of a command line."""
    return word.name if isinstance(word, Path) else f"'{word}'" if "|" in word else word


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="for checkpoints, files and what is measured")
    parser.add_argument("--reference", type=Path, help="folder of the reference model")
    parser.add_argument("--only", type=re.compile, default=re.compile(""), help="names of what to measure, 'NAME KIND'")
    parser.add_argument("--docs", type=Path, help="write memory.md and memory.svg there")
    arguments = parser.parse_args()
    record = arguments.folder / "memory.jsonl"
    arguments.folder.mkdir(parents=True, exist_ok=True)
    known = [Measured(**json.loads(line)) for line in record.read_text().splitlines()] if record.exists() else []
    for job in jobs(arguments.folder, arguments.reference):
        is_known = any((m.name, m.kind) == (job.name, job.kind) for m in known)
        if is_known or not arguments.only.search(f"{job.name} {job.kind}"):
            continue
        if job.model != arguments.reference:
            make_model(job.model)
        known.append(run(job, arguments.folder))
        print(line_of(known[-1]), flush=True)
        with record.open("a") as file:
            file.write(json.dumps(asdict(known[-1])) + "\n")
    if arguments.docs:
        order = [(job.name, job.kind) for job in jobs(arguments.folder, arguments.folder)]
        known.sort(key=lambda m: order.index((m.name, m.kind)))
        notes = {shape.name: shape.reduced for shape in SHAPES}
        command = "python bench/memory.py FOLDER --reference REFERENCE --docs docs"
        (arguments.docs / "memory.md").write_text(document(known, notes, command))
        (arguments.docs / "memory.svg").write_text(chart(known))


if __name__ == "__main__":
    main()
