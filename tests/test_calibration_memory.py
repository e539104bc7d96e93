"""Peak memory of calibrating and shaping a real checkpoint.

SQ_REFERENCE_MODEL names the checkpoint folder (several: separated by the system's path separator).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from oracles.peak import run_measured

MODELS = [Path(part) for part in os.environ.get("SQ_REFERENCE_MODEL", "").split(os.pathsep) if part]
CALIBRATE = """
import sys
from pathlib import Path
import numpy as np
from sq_stream.calibrate.calibration import plan_calibration
from sq_stream.calibrate.sensitivity import plan_sensitivity
from sq_stream.calibrate.store import Store
from sq_stream.formats.checkpoint import Checkpoint
from sq_stream.models import find

folder, cache, max_ram, n_windows, plan = sys.argv[1:]
with Checkpoint.open(Path(folder)) as checkpoint:
    spec = find(checkpoint.config).describe(checkpoint.config, checkpoint.shapes)
    n_vocab = next(t.n_rows for t in spec.tensors if t.name == "token_embd.weight")
    windows = np.random.RandomState(0).randint(0, n_vocab, (int(n_windows), 512)).astype(np.int32)
    planned = globals()[plan](checkpoint, spec, windows, Store(Path(cache)), max_ram=int(max_ram), threads=2)
    with planned.run() as sketches:
        assert len(sketches.unseen) <= (plan == "plan_sensitivity")  # an untied output matrix
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not MODELS, reason="SQ_REFERENCE_MODEL names no checkpoint folder"),
    pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read as Linux counts it"),
]


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
@pytest.mark.parametrize("max_ram", [600 * 2**20, 2**30], ids=["600M", "1G"])
@pytest.mark.parametrize(("plan", "n_windows"), [("plan_calibration", 24), ("plan_sensitivity", 8)])
def test_a_pass_keeps_to_its_memory(model: Path, plan: str, n_windows: int, max_ram: int, tmp_path: Path) -> None:
    run = run_measured([sys.executable, "-c", CALIBRATE, str(model), str(tmp_path), str(max_ram), str(n_windows), plan])
    assert run.exit_code == 0, run.log
    assert run.peak_bytes <= max_ram, f"peak of {run.peak_bytes / 2**20:.1f} MiB"


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
@pytest.mark.parametrize("max_ram", ["512M", "1G"])
def test_a_calibrated_job_keeps_to_its_plan(model: Path, max_ram: str, tmp_path: Path) -> None:
    """One layer shaped, for time: memory does not grow with their number."""
    options = [str(model), "--windows", "8", "--max-ram", max_ram, "--cache", str(tmp_path / "cache")]
    options += ["--tensor-type", r"^(token_embd|output)\.|blk\.([1-9]|\d\d)\.=bf16"]
    plan = [sys.executable, "-m", "sq_stream", "plan", *options, "--json"]
    planned = json.loads(subprocess.run(plan, capture_output=True, check=True).stdout)["peak_ram"]
    run = run_measured([sys.executable, "-m", "sq_stream", "quantize", *options, "-o", str(tmp_path / "x.gguf")])
    assert run.exit_code == 0, run.log
    assert run.peak_bytes <= planned, f"peak of {run.peak_bytes / 2**20:.1f} MiB, {planned / 2**20:.1f} MiB planned"
