"""Peak memory of an evaluation of real models against its plan.

SQ_REFERENCE_MODEL names checkpoint folders (several: separated by the system's path separator).
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from oracles.peak import run_measured

from sq_stream import api

MODELS = [Path(part) for part in os.environ.get("SQ_REFERENCE_MODEL", "").split(os.pathsep) if part]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not MODELS, reason="SQ_REFERENCE_MODEL names no checkpoint folder"),
    pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read as Linux counts it"),
]


def evaluate(model: Path, tmp_path: Path, *options: str) -> tuple[int, int]:
    """Peak memory of the command, measured by the kernel, and what was planned."""
    file = tmp_path / "fast.gguf"
    if not file.exists():
        api.quantize(model, file, effort="fast", threads=2)
    command = [sys.executable, "-m", "sq_stream", "eval", str(file), "--ref", str(model), "--json", *options]
    run = run_measured([*command, "--threads", "2", "--cache", str(tmp_path), "--log-format", "json"])
    assert run.exit_code == 0, run.log
    found = json.loads(run.log[run.log.index("\n{\n") :])
    return run.peak_bytes, found["planned_ram"]


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
@pytest.mark.parametrize("max_ram", ["560M", "700M", "2G"])
def test_a_real_model_keeps_to_its_plan(
    model: Path, max_ram: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels are compiled anew, and a baseline is made in memory."""
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "numba"))
    peak, planned = evaluate(model, tmp_path, "--windows", "8", "--baseline", "rtn", "--max-ram", max_ram)
    assert peak <= planned, f"peak of {peak / 2**20:.1f} MiB, {planned / 2**20:.1f} MiB planned"
