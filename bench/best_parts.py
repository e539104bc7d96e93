r"""What each part of `--effort best` contributes: files made without some of them, each compared with the one with all.

    python bench/best_parts.py MODEL_DIR --folder FOLDER --text wikitext2=wikitext2-test.txt:64x256

Files are FOLDER/PARTS.gguf of `--type q4_k_m --pure`; one that is there is not made again, and one that was interrupted
goes on. All are evaluated by the forward pass in float32, in memory. Intervals are 95%, by bootstrap over windows.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from bootstrap import interval, ratio, resampled
from numpy.typing import NDArray
from texts import Text, TextFile, cut_texts
from where import divergences, exact

from sq_stream import api
from sq_stream.calibrate.corpus import CTX, WINDOWS
from sq_stream.demo.generate import read_model
from sq_stream.job.run import run
from sq_stream.parallel import Workers


@dataclass(frozen=True)
class Parts:
    """Which of the parts of `best` a file is made with; without any of them it is that of `balanced`."""

    in_turn: bool = False
    two_sided: bool = False  # needs `in_turn`
    refined: bool = False

    @property
    def name(self) -> str:
        """As of the file."""
        parts = {"in-turn": self.in_turn, "two-sided": self.two_sided, "refined": self.refined}
        return "+".join(part for part, is_in in parts.items() if is_in) or "balanced"


BEST = Parts(in_turn=True, two_sided=True, refined=True)
ALL = (
    Parts(),
    Parts(in_turn=True),
    Parts(in_turn=True, two_sided=True),
    Parts(refined=True),
    Parts(in_turn=True, refined=True),
    BEST,
)


def make(parts: Parts, model_dir: Path, path: Path, options: dict[str, Any]) -> None:
    """Write a file with some of the parts of `best`."""
    job = api.plan(model_dir, path, effort="best", pure=True, **options)
    assert job.turns is not None
    turns = job.turns
    if not parts.in_turn:
        turns = replace(turns, pairing=replace(turns.pairing, branches=(), head=None))
    if not parts.two_sided:
        turns = replace(turns, two_sided={})
    if not parts.refined:
        turns = replace(turns, refining=None)
    with job.checkpoint:
        run(replace(job, turns=turns), lambda event: None)


def table(made: Sequence[tuple[Parts, Path]], model_dir: Path, texts: Sequence[Text], threads: int) -> Iterator[str]:
    """Lines of Markdown."""
    kl: dict[tuple[str, Parts], NDArray[np.float64]] = {}
    with Workers(threads) as workers:
        for parts, path in made:
            decoder, quantized = read_model(path)
            scaled = exact(path, model_dir)  # every file is smoothed in its own way
            for text in texts:
                found = divergences(text.windows, scaled, {parts.name: quantized}, decoder, workers)
                ((_, kl[text.name, parts]),) = found
    last = made[-1][0]
    yield "| parts | " + " | ".join(f"{t.name}, mean KL (95%) | over the last row's" for t in texts) + " |"
    yield "| --- |" + " --- | --- |" * len(texts)
    for parts, _ in made:
        cells = [parts.name.replace("+", ", ")]
        for own, theirs in ((kl[text.name, parts], kl[text.name, last]) for text in texts):
            low, high = interval(resampled(own))
            times, (least, most) = ratio(own, theirs)
            cells += [f"{own.mean():.4f} ({low:.4f} to {high:.4f})", f"{times:.3f} ({least:.3f} to {most:.3f})"]
        yield f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model_dir", type=Path)
    add("--folder", type=Path, required=True, help="for files and statistics")
    add("--only", type=re.compile, default=re.compile(""), metavar="REGEX", help="only files whose names match")
    add(
        "--heldout-windows",
        type=int,
        default=16,
        metavar="N",
        help=f"of {CTX} tokens of the packaged held-out text that are scored",
    )
    add("--text", type=TextFile.parse, action="append", default=[], metavar="NAME=FILE:WINDOWSxCTX", help="repeatable")
    add("--calib-windows", type=int, default=WINDOWS[0], metavar="N", help=f"of {CTX} tokens that are fitted to")
    add("--max-ram", default="4G", help="of each job")
    add("--threads", type=int, default=2)
    arguments = parser.parse_args()
    options = {
        "windows": arguments.calib_windows,
        "cache": arguments.folder / "cache",
        "max_ram": arguments.max_ram,
        "threads": arguments.threads,
    }
    arguments.folder.mkdir(parents=True, exist_ok=True)
    made = []
    for parts in (parts for parts in ALL if arguments.only.search(parts.name)):
        path = arguments.folder / f"{parts.name}.gguf"
        if not path.exists():
            print(f"making {path.name}", file=sys.stderr, flush=True)
            make(parts, arguments.model_dir, path, options)
        made.append((parts, path))
    texts = cut_texts(arguments.model_dir, {"heldout": arguments.heldout_windows}, arguments.text)
    for line in table(made, arguments.model_dir, texts, arguments.threads):
        print(line, flush=True)


if __name__ == "__main__":
    main()
