"""The page and the chart of bench/memory.py."""

from __future__ import annotations

import sys
from pathlib import Path
from xml.etree import ElementTree

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

import memory
from memory_page import Measured, chart, document

MIB = 2**20


def measured(name: str, kind: str, peak: int) -> Measured:
    return Measured(name, kind, f"sq-stream {kind} {name}", 512 * MIB, (peak + 10) * MIB, peak * MIB, True, 1.0)


def test_the_page_says_what_was_measured() -> None:
    runs = [measured("reference", "best", 400), measured("2 layers", "best", 200), measured("4 layers", "best", 202)]
    runs.append(measured("8 windows", "eval", 150))
    page = document(runs, {"reference": "nothing"}, "python bench/memory.py")
    assert "| reference | best | 512 | 410.0 | 400.0 | 1.02 |" in page
    assert "- reference: nothing." in page
    assert "| 4 layers |  |  | 202.0 (1.05) |  |" in page
    assert all(run.command in page for run in runs)
    drawing = ElementTree.fromstring(chart(runs))
    labels = [text.text for text in drawing.iter("{http://www.w3.org/2000/svg}text")]
    assert {"best", "eval", "layers", "windows of text", "4", "8"} <= set(labels)


def test_what_is_measured_has_a_checkpoint_and_a_place_on_the_page(tmp_path: Path) -> None:
    jobs = list(memory.jobs(tmp_path, Path("reference")))
    assert len({(job.name, job.kind) for job in jobs}) == len(jobs)
    assert {job.kind for job in jobs} == {*memory.EFFORTS, "eval"}
    assert len([job for job in memory.jobs(tmp_path, None) if job.name == "reference"]) == 0
    growing = {measured(job.name, job.kind, 1).growth for job in jobs}
    assert growing == {None} | {("layers", n) for n in memory.DEPTHS} | {("windows", n) for n in memory.WINDOWS}
