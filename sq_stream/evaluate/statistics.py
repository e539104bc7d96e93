"""From figures of every token to scores with intervals, by resampling documents."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sq_stream.evaluate.results import Estimate, Histogram, PositionBin, Recovery, Score, SuiteResult
from sq_stream.evaluate.suites import Suite

Floats = NDArray[np.float64]

SEED = 0
N_SAMPLES = 4000
KL_EDGES = tuple(10.0 ** (i / 4) for i in range(-24, 7))
"""Of the histogram: a quarter of a decade each, from 1e-6 to 32 nats."""


@dataclass(frozen=True, eq=False)
class TokenScores:
    """One model on one suite, by window and position."""

    loss: Floats  # [n_windows, n_ctx - 1], of the next token, nats
    kl: Floats  # [n_windows, n_ctx], nats
    agrees: NDArray[np.bool_]  # [n_windows, n_ctx], whether the likeliest token is the reference's
    dp: Floats  # [n_windows, n_ctx - 1], probability of the next token minus the reference's


class Resampling:
    """Documents of a suite drawn again with replacement, the same ones for every model.

    Source: the percentile bootstrap (Efron and Tibshirani, "An Introduction to the Bootstrap", 1993), by documents
    because the tokens of one are not independent.
    """

    def __init__(self, documents: NDArray[np.int32]) -> None:
        _, self._members, counts = np.unique(documents, return_inverse=True, return_counts=True)
        self.n_documents, self._windows = len(counts), counts
        random = np.random.default_rng(SEED)
        even = np.full(self.n_documents, 1 / self.n_documents)
        draws = random.multinomial(self.n_documents, even, N_SAMPLES)
        self._draws = draws.astype(np.float64)  # [N_SAMPLES, n_documents]

    def estimate(self, statistic: Callable[..., Floats], *by_window: Floats) -> Estimate:
        """A statistic of the means of figures `[n_windows]` each; it takes the means as arrays of any shape."""
        sums = [np.bincount(self._members, figures, self.n_documents) for figures in by_window]
        value = float(statistic(*(s.sum() / self._windows.sum() for s in sums)))
        if self.n_documents < 2:
            return Estimate(value, None, None)
        n_windows = self._draws @ self._windows
        low, high = np.quantile(statistic(*(self._draws @ s / n_windows for s in sums)), [0.025, 0.975])
        return Estimate(value, float(low), float(high))


def summarize(
    suite: Suite,
    scores: dict[str, TokenScores],
    *,
    reference: str,
    candidates: Sequence[str],
    baselines: Sequence[str],
) -> SuiteResult:
    """The result of one suite.

    Args:
        suite: what was scored.
        scores: of every model by name, the reference's first.
        reference: name of the reference.
        candidates: names of those that recover.
        baselines: names of those that they recover from.
    """
    resampling = Resampling(suite.documents)
    n_windows, n_ctx = suite.windows.shape
    return SuiteResult(
        name=suite.name,
        n_windows=n_windows,
        n_ctx=n_ctx,
        n_tokens=n_windows * n_ctx,
        n_documents=resampling.n_documents,
        sha256=suite.sha256,
        scores=tuple(_score(name, own, scores[reference], resampling) for name, own in scores.items()),
        recoveries=tuple(
            _recovery((candidate, scores[candidate]), (baseline, scores[baseline]), scores[reference], resampling)
            for candidate in candidates
            for baseline in baselines
        ),
    )


def _score(name: str, own: TokenScores, reference: TokenScores, resampling: Resampling) -> Score:
    loss, reference_loss = own.loss.mean(axis=1), reference.loss.mean(axis=1)
    gap = resampling.estimate(np.subtract, loss, reference_loss)
    median, kl_99, kl_999 = np.quantile(own.kl, [0.5, 0.99, 0.999])
    return Score(
        model=name,
        loss=resampling.estimate(np.positive, loss),
        perplexity=math.exp(min(float(loss.mean()), 700.0)),
        loss_gap=gap,
        fits=gap.value < 0,
        mean_kl=resampling.estimate(np.positive, own.kl.mean(axis=1)),
        median_kl=float(median),
        kl_99=float(kl_99),
        kl_999=float(kl_999),
        top1_agreement=resampling.estimate(np.positive, own.agrees.mean(axis=1)),
        rms_dp=float(np.sqrt(np.mean(own.dp**2))),
        kl_by_position=_by_position(own.kl),
        kl_histogram=_histogram(own.kl),
    )


def _recovery(
    candidate: tuple[str, TokenScores],
    baseline: tuple[str, TokenScores],
    reference: TokenScores,
    resampling: Resampling,
) -> Recovery:
    """Shares of the baseline's loss gap and KL that the candidate does not have."""
    losses = [scores.loss.mean(axis=1) for scores in (candidate[1], baseline[1], reference)]
    gap = resampling.estimate(np.subtract, losses[1], losses[2])
    loss = None
    if (gap.value if gap.low is None else gap.low) > 0:
        loss = resampling.estimate(lambda own, worse, best: (worse - own) / (worse - best), *losses)
    divergences = [scores.kl.mean(axis=1) for scores in (candidate[1], baseline[1])]
    kl = None
    if divergences[1].any():
        kl = resampling.estimate(lambda own, worse: 1 - own / worse, *divergences)
    return Recovery(candidate[0], baseline[0], loss, kl)


def _by_position(kl: Floats) -> tuple[PositionBin, ...]:
    """Bins that double: the first positions see little context, and are few."""
    n_ctx = kl.shape[1]
    stops = [min(2**i, n_ctx) for i in range((n_ctx - 1).bit_length() + 1)]
    return tuple(
        PositionBin(start, stop - 1, float(kl[:, start:stop].mean()))
        for start, stop in zip([0, *stops[:-1]], stops, strict=True)
    )


def _histogram(kl: Floats) -> Histogram:
    counts, _ = np.histogram(np.clip(kl, KL_EDGES[0], KL_EDGES[-1]), KL_EDGES)
    return Histogram(KL_EDGES, tuple(map(int, counts)))
