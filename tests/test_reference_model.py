"""A real checkpoint from folder to text, within 512 MiB.

SQ_REFERENCE_MODEL names the checkpoint folder (several: separated by the system's path separator). It must hold a
model that has learned English; the project's own is SmolLM2-135M.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from oracles.llamacpp import LlamaModel
from oracles.peak import run_measured
from oracles.server import complete

MODELS = [Path(part) for part in os.environ.get("SQ_REFERENCE_MODEL", "").split(os.pathsep) if part]
MAX_RAM = 512 * 2**20
TEXT = (
    "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness. "
    "The capital of France is Paris, and the capital of England is London. Water is made of hydrogen and oxygen."
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not MODELS, reason="SQ_REFERENCE_MODEL names no checkpoint folder"),
    pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read as Linux counts it"),
]


def quantize(model: Path, output: Path, *options: str) -> None:
    command = [
        sys.executable,
        "-m",
        "sq_stream",
        "quantize",
        str(model),
        "-o",
        str(output),
        "--effort",
        "fast",
        *options,
    ]
    run = run_measured([*command, "--max-ram", "512M", "--log-format", "plain"])
    assert run.exit_code == 0, run.log
    assert run.peak_bytes <= MAX_RAM, f"peak of {run.peak_bytes / 2**20:.1f} MiB\n{run.log}"


def log_probabilities(path: Path) -> NDArray[np.float64]:
    with LlamaModel(path) as model:
        logits = model.logits(model.tokenize(TEXT)).astype(np.float64)
    return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)


@pytest.fixture(scope="module", params=MODELS, ids=lambda model: model.name)
def model(request: pytest.FixtureRequest) -> Path:
    return request.param


@pytest.fixture(scope="module")
def reference(model: Path, tmp_path_factory: pytest.TempPathFactory) -> NDArray[np.float64]:
    path = tmp_path_factory.mktemp(model.name) / "bf16.gguf"
    quantize(model, path, "--type", "bf16")
    log_p = log_probabilities(path)
    path.unlink()
    return log_p


@pytest.mark.parametrize("options", [(), ("--pure",)], ids=["q4_k_m", "pure"])
def test_quantized_in_512_mib_and_speaks(
    model: Path, reference: NDArray[np.float64], options: tuple[str, ...], tmp_path: Path
) -> None:
    path = tmp_path / "model.gguf"
    quantize(model, path, *options)

    log_q = log_probabilities(path)
    kl = (np.exp(reference) * (reference - log_q)).sum(axis=-1).mean()
    assert kl < 0.6

    assert "Paris" in complete(path, "The capital of France is the city of", n_predict=8)
    story = complete(path, "Once upon a time, there was a", n_predict=32)
    assert len(re.findall(r"[A-Za-z]{2,}", story)) >= 8, story
