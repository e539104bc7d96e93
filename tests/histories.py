"""Jobs to which nothing happens, and those that are interrupted: what has to be true after each run."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from faults import Fault, Forge, Outcome, quantize_arguments, report


def empty(folder: Path) -> None:
    for path in folder.iterdir() if folder.exists() else ():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    folder.mkdir(exist_ok=True)


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.sketch")}


class Whole:
    """A quantize job that nothing happened to."""

    def __init__(self, forge: Forge, *more: str) -> None:
        empty(forge.work)
        self.arguments = quantize_arguments(forge.folder, report(forge.folder), *more)
        self.outcome = forge.run(self.arguments)
        assert self.outcome.code == 0, self.outcome.message
        self.names = names(forge.work)
        self.bytes = (forge.work / "out.gguf").read_bytes()
        self.cache = contents(forge.work / "cache")

    def count(self, calls: tuple[str, ...]) -> int:
        return sum(line.split()[0] in calls for line in self.outcome.calls)


class History:
    """The interrupted runs of one job, and what has to be true after each."""

    def __init__(self, forge: Forge, whole: Whole) -> None:
        empty(forge.work)
        self.forge, self.whole = forge, whole
        self.tensors: set[str] = set()  # finished
        self.layers = {"calibrate": 0, "encode": 0}  # finished by each pass, in `encode` that of the effort best

    def run(self, fault: Fault | None = None) -> Outcome:
        outcome = self.forge.run(self.whole.arguments, fault)
        assert not outcome.tensors & self.tensors, "a finished tensor was lost"
        again = any("anew" in note or "first layer" in note for note in outcome.notes())
        assert not (any(self.layers.values()) and again), "a finished layer was lost"
        self.tensors |= outcome.tensors
        for stage, n_finished in self.layers.items():
            told = [e["tensor"] for e in outcome.log if e["event"] == "progress" and e["stage"] == stage]
            started = [int(match[1]) for name in told if (match := re.fullmatch(r"layer (\d) of 2", name))]
            assert all(layer > n_finished for layer in started), "a finished layer was lost"
            self.layers[stage] = max([n_finished, *(layer - 1 for layer in started)])
        output = self.forge.work / "out.gguf"
        assert not output.exists() or output.read_bytes() == self.whole.bytes
        return outcome

    @property
    def is_finished(self) -> bool:
        """Killed after its last call."""
        work = self.forge.work
        return (work / "out.gguf").exists() and not (work / "out.gguf.journal").exists()

    def finish(self) -> None:
        """Run to the end, which is as if nothing had happened."""
        if not self.is_finished:
            outcome = self.run()
            assert outcome.code == 0, outcome.message
        assert names(self.forge.work) == self.whole.names
        assert (self.forge.work / "out.gguf").read_bytes() == self.whole.bytes
        assert contents(self.forge.work / "cache") == self.whole.cache
