"""An evaluation as text for people."""

from __future__ import annotations

from collections.abc import Iterator

from sq_stream.cli.tables import table
from sq_stream.evaluate.results import Estimate, Evaluation, ModelInfo, Recovery, Score, SuiteResult
from sq_stream.units import format_duration, format_size

_COLUMNS = (
    "model",
    "MiB",
    "bits/weight",
    "loss",
    "perplexity",
    "mean KL (95%)",
    "median KL",
    "99% KL",
    "99.9% KL",
    "top-1",
    "RMS Δp",
)


def evaluation_text(evaluation: Evaluation) -> str:
    """A table for each suite, what was recovered, and what it took."""
    models = {model.name: model for model in evaluation.models}
    parts = ["\n".join(_suite_lines(suite, models)) for suite in evaluation.suites]
    planned = f"{format_size(evaluation.planned_ram)} planned, {format_size(evaluation.max_ram)} allowed"
    peak = f"peak memory {format_size(evaluation.peak_ram)} ({planned})"
    return "\n\n".join([*parts, f"{format_duration(evaluation.seconds)}, {peak}"])


def _suite_lines(suite: SuiteResult, models: dict[str, ModelInfo]) -> Iterator[str]:
    yield f"{suite.name}: {suite.n_windows} windows of {suite.n_ctx} tokens, {suite.n_documents} documents"
    yield table([_COLUMNS, *(_row(score, models[score.model]) for score in suite.scores)])
    for recovery in suite.recoveries:
        yield _recovery_line(recovery)
    for score in suite.scores:
        if score.fits:
            yield (
                f"{score.model}: its loss is {-score.loss_gap.value:.4f} under the reference's. That is adaptation to "
                "this text or chance, not a better model: judge by the KL"
            )


def _row(score: Score, model: ModelInfo) -> tuple[str, ...]:
    return (
        score.model,
        f"{model.tensor_bytes / 2**20:.1f}",
        f"{model.bits_per_weight:.2f}",
        f"{score.loss.value:.4f}",
        f"{score.perplexity:.3f}",
        f"{score.mean_kl.value:.4f}{_interval(score.mean_kl, '.4f')}",
        f"{score.median_kl:.4f}",
        f"{score.kl_99:.3f}",
        f"{score.kl_999:.3f}",
        f"{score.top1_agreement.value:.1%}",
        f"{score.rms_dp:.2%}",
    )


def _recovery_line(recovery: Recovery) -> str:
    parts = [
        f"{what} none to close" if share is None else f"{what} {share.value:.1%}{_interval(share, '.1%')}"
        for what, share in (("loss gap", recovery.loss), ("KL", recovery.kl))
    ]
    return f"{recovery.candidate} recovers from {recovery.baseline}: {', '.join(parts)}"


def _interval(estimate: Estimate, form: str) -> str:
    if estimate.low is None or estimate.high is None:
        return ""
    return f" ({estimate.low:{form}} to {estimate.high:{form}})"
