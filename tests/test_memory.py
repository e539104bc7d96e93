"""`--max-ram` under the kernel's limit, the plan against what is measured, and the smallest that works.

Kernels are compiled before, but for the tests that say so. SQ_REFERENCE_MODEL names the folder of the reference model.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from oracles.peak import is_in_memory, run_limited, run_measured

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

import memory

from sq_stream import api
from sq_stream.demo import model_folder

MIB = 2**20
MODEL = str(model_folder())
REFERENCE = next((Path(part) for part in os.environ.get("SQ_REFERENCE_MODEL", "").split(os.pathsep) if part), None)
OVER = 1.05  # of what is promised, at which the kernel kills
WITHIN = 0.15  # of the measured peak lies the planned one

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is limited and read as Linux does it")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GGUF file; what kernels the commands need are compiled and known to be."""
    folder = tmp_path_factory.mktemp("made")
    api.quantize(MODEL, folder / "x.gguf", windows=4, cache=folder / "cache", threads=2)
    api.quantize(MODEL, folder / "fast.gguf", effort="fast", threads=2)
    api.evaluate(folder / "fast.gguf", MODEL, windows=1, baselines=["rtn"], cache=folder / "cache", threads=2)
    return folder / "fast.gguf"


@dataclass(frozen=True)
class Case:
    """A command and its options; as one more effort, say."""

    command: str
    options: tuple[str, ...] = ()


CASES = [
    Case("quantize", ("--effort", "fast")),
    Case("quantize", ("--windows", "8", "--effort", "balanced")),
    Case("quantize", ("--windows", "32", "--ctx", "128", "--effort", "best")),
    Case("eval", ("--windows", "8")),
    Case("eval", ("--windows", "8", "--baseline", "rtn")),
    Case("calibrate", ("--windows", "8")),
    Case("verify", ("--against", MODEL)),
]


def command(case: Case, file: Path, folder: Path, max_ram: str) -> list[str]:
    parts = {
        "quantize": [MODEL, "-o", str(folder / "x.gguf")],
        "eval": [str(file), "--ref", MODEL, "--json"],
        "calibrate": [MODEL],
        "verify": [str(file)],
    }[case.command]
    if case.command != "verify":
        parts += ["--threads", "2", "--cache", str(folder / "cache")]
    return [sys.executable, "-m", "sq_stream", case.command, *parts, *case.options, "--max-ram", max_ram]


def planned_peak(command: list[str]) -> int:
    """What quantize plans."""
    plan = [*command[:3], "plan", *command[4:], "--json"]
    return int(json.loads(subprocess.run(plan, capture_output=True, check=True).stdout)["peak_ram"])


@pytest.mark.parametrize("case", CASES, ids=lambda case: " ".join((case.command, *case.options[::-1][:1])))
def test_the_smallest_that_is_named_works_under_the_limit_of_the_kernel(case: Case, file: Path, tmp_path: Path) -> None:
    refused = subprocess.run(command(case, file, tmp_path, "1M"), capture_output=True, text=True, check=False)
    named = re.search(r"the smallest that works is --max-ram (\d+)M$", refused.stderr, re.MULTILINE)
    assert refused.returncode == 5, refused.stderr
    assert named, refused.stderr
    promised = int(named[1]) * MIB

    limited = command(case, file, tmp_path, f"{named[1]}M")
    run = run_measured(limited) if is_in_memory(tmp_path) else run_limited(limited, int(OVER * promised))
    assert run.exit_code == 0, run.log or f"killed at {OVER} times {named[1]} MiB"
    assert run.peak_bytes <= promised, f"peak of {run.peak_bytes / MIB:.1f} MiB, {named[1]} MiB promised"


@pytest.mark.parametrize("is_compiled", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["kept", "compiled"])
@pytest.mark.parametrize("case", CASES[:5], ids=lambda case: " ".join((case.command, *case.options[::-1][:1])))
def test_the_plan_is_near_what_is_measured(
    case: Case, is_compiled: bool, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not is_compiled:
        monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "numba"))
    asked = command(case, file, tmp_path, "4G")
    planned = planned_peak(asked) if case.command == "quantize" else 0
    run = run_measured(asked)
    assert run.exit_code == 0, run.log
    planned = planned or json.loads(run.log[run.log.index("\n{\n") :])["planned_ram"]
    found = f"peak of {run.peak_bytes / MIB:.1f} MiB, {planned / MIB:.1f} MiB planned"
    assert run.peak_bytes <= planned <= (1 + WITHIN) * run.peak_bytes, found


@pytest.mark.parametrize("effort", ["fast", "balanced", "best"])
def test_the_plan_does_not_grow_with_depth_or_text(effort: str, tmp_path: Path) -> None:
    """And a plan is at least what is measured: so neither does memory. bench/memory.py measures it."""
    peaks = []
    for n_layer, n_windows in [(1, 32), (6, 128)]:
        memory.make_model(model := tmp_path / f"small-{n_layer}")
        text = {} if effort == "fast" else {"windows": n_windows, "ctx": 64}
        peaks.append(api.plan(model, effort=effort, cache=tmp_path, **text).budget.peak_ram)
    assert abs(peaks[1] - peaks[0]) < 2**12  # Python's own objects are measured with the arrays


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("qwen3.5-0.8b", {"fast", "eval"}),
        ("llama-3.1-8b", {"fast"}),
        *(pytest.param(s.name, {*s.kinds}, marks=pytest.mark.slow) for s in memory.SHAPES),
    ],
    ids=lambda value: value if isinstance(value, str) else "+".join(sorted(value)),
)
def test_a_larger_model_under_the_limit_of_the_kernel(name: str, kinds: set[str], file: Path, tmp_path: Path) -> None:
    """What docs/memory.md is written from, from nothing."""
    if name == "reference" and REFERENCE is None:
        pytest.skip("SQ_REFERENCE_MODEL names no checkpoint folder")
    for job in memory.jobs(tmp_path, REFERENCE):
        if job.name == name and job.kind in kinds:
            if job.model != REFERENCE:
                memory.make_model(job.model)
            measured = memory.run(job, tmp_path)
            print(memory.line_of(measured))
            assert measured.peak <= measured.max_ram
            assert measured.peak <= measured.planned <= (1 + WITHIN) * measured.peak


def test_the_limit_of_the_kernel_is_one() -> None:
    """What takes more than it may is killed, so that the other tests can fail."""
    run = run_limited([sys.executable, "-c", "x = bytearray(b'1') * 2**28"], 2**27)
    assert run.exit_code == (-9 if run.limited_by_kernel else 0)


def test_reading_headers_needs_no_budget(file: Path) -> None:
    run = run_measured([sys.executable, "-m", "sq_stream", "inspect", str(file)])
    assert run.exit_code == 0, run.log
    assert run.peak_bytes <= 64 * MIB
