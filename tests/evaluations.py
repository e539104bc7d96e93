"""An evaluation as `eval` gives it, made up but consistent: for what is made of evaluations."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from sq_stream.evaluate.results import (
    Estimate,
    Evaluation,
    Histogram,
    ModelInfo,
    PositionBin,
    Recovery,
    Score,
    SuiteResult,
)

KLS = {
    "SmolLM2-135M": 0.0,
    "SmolLM2-135M-Q4_K_M-pure.gguf": 0.066,
    "SmolLM2-135M-Q4_K_M-llamacpp.gguf": 0.132,
    "rtn": 0.281,
    "imatrix": 0.139,
}
EDGES = tuple(float(edge) for edge in np.geomspace(1e-6, 10, 71))


def evaluation() -> Evaluation:
    """A candidate, two baselines made in memory and a file from elsewhere, on two suites."""
    models = (
        model("SmolLM2-135M", "reference", 16.0, None),
        model("SmolLM2-135M-Q4_K_M-pure.gguf", "candidate", 4.51, 0.066),
        model("SmolLM2-135M-Q4_K_M-llamacpp.gguf", "baseline", 5.11, 0.132),
        model("rtn", "baseline", 4.51, 0.281, made="rtn"),
        model("imatrix", "baseline", 4.51, 0.139, made="imatrix"),
    )
    suites = suite("heldout120", 512, 1.0), suite("<b>own</b>.txt", 256, 1.2)
    return Evaluation(
        schema=1, sq_stream="0.1.0", models=models, suites=suites, notes=("a note with <markup> & more",),
        n_samples=1000, seed=0, threads=2, max_ram=2**32, planned_ram=7 * 2**27, peak_ram=6 * 2**27, seconds=483.0,
    )  # fmt: skip


def model(name: str, role: str, bits: float, kl: float | None, made: str = "") -> ModelInfo:
    n_bytes = int(190.6e6 * bits / 8)
    return ModelInfo(
        name=name, role=role, path=f"models/{name}", made=made, architecture="llama", n_weights=190_600_000,
        tensor_bytes=n_bytes, file_bytes=None if made else n_bytes + 1_900_000, bits_per_weight=bits,
        types={"F32": 61, "Q4_K": 211} if kl else {"BF16": 272},
        recipe="q4_k_m --pure" if role == "candidate" else "", effort="balanced" if role == "candidate" else "",
    )  # fmt: skip


def suite(name: str, n_ctx: int, factor: float) -> SuiteResult:
    scores = [score(name, n_ctx, kl * factor) for name, kl in KLS.items()]
    mine = scores[1].mean_kl.value
    recoveries = tuple(
        Recovery(scores[1].model, s.model, estimate(1 - mine / s.mean_kl.value, 0.1) if s.model != "rtn" else None,
                 estimate(1 - mine / s.mean_kl.value, 0.05))
        for s in scores[2:]
    )  # fmt: skip
    return SuiteResult(name, 120, n_ctx, 120 * (n_ctx - 1), 37, "ab" * 32, tuple(scores), recoveries)


def score(model: str, n_ctx: int, kl: float) -> Score:
    tokens = np.random.RandomState(1).lognormal(np.log(max(kl, 1e-9)) - 1.1, 1.6, 4096)
    counts = np.histogram(np.clip(tokens, EDGES[0], EDGES[-1]), EDGES)[0]
    bounds = [0, *(2**i for i in range(2, int(np.log2(n_ctx)) + 1))]
    bins = [(a, b - 1, kl * (1.0 + 1.5 / (1 + i))) for i, (a, b) in enumerate(pairwise(bounds))]
    return Score(
        model=model, loss=estimate(3.02 + 0.6 * kl, 0.05), perplexity=float(np.exp(3.02 + 0.6 * kl)),
        loss_gap=estimate(0.6 * kl if model != "imatrix" else -0.004, 0.2), fits=model == "imatrix",
        mean_kl=estimate(kl, 0.08), median_kl=0.3 * kl, kl_99=7 * kl, kl_999=17 * kl,
        top1_agreement=estimate(1 - 0.7 * kl, 0.01), rms_dp=0.4 * kl,
        kl_by_position=tuple(PositionBin(*bin_) for bin_ in bins),
        kl_histogram=Histogram(EDGES, tuple(int(count) for count in counts)),
    )  # fmt: skip


def estimate(value: float, spread: float) -> Estimate:
    return Estimate(value, value - spread * abs(value), value + spread * abs(value))
