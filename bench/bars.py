"""The figures of the comparison: those of each file, and the bars with what was measured."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import gguf
import numpy as np
from bootstrap import interval, ratio, resampled
from candidates import File
from divergence import Scores
from numpy.typing import NDArray

from sq_stream.units import parse_size

MIB = 2**20
REFERENCE = "BF16"
BASELINE = "q4_k_m-pure, llama.cpp"
"""What recovery is counted from."""
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Result:
    """The figures of one file on one text; intervals are 95%, from resampling windows."""

    text: str
    name: str
    tensor_mib: float
    bits_per_weight: float
    mean_kl: float
    mean_kl_interval: tuple[float, float]
    mean_kl_later: float  # over the positions that are not skipped
    median_kl: float
    kl_99: float
    top1_agreement: float
    loss: float
    perplexity: float
    kl_recovered: float | None  # part of the baseline's mean KL that is gone
    loss_recovered: float | None  # part of the baseline's loss gap to the reference that is closed


@dataclass(frozen=True)
class Bar:
    """One bar on one text: `figure` must be at most `limit`, or at least where `at_least` says so."""

    text: str
    bar: str
    figure: float
    interval: tuple[float, float]
    figure_later: float  # over the positions that are not skipped
    limit: float
    at_least: bool
    met: bool


@dataclass(frozen=True)
class Rule:
    """A bar: the ratio of two files' mean KL, or with `gap` the share of a file's loss gap to BF16 that ours closes."""

    bar: str
    ours: str
    theirs: str
    limit: float
    gap: bool = False


_PURE, _MIXED, _Q5 = "q4_k_m-pure", "q4_k_m", "q5_k_m-pure"
_PLAIN, _IMATRIX = "llama.cpp", "llama.cpp + imatrix"


def _rule(ours: str, effort: str, theirs: str, limit: float, gap: bool = False) -> Rule:
    bar = f"loss gap of {theirs} closed by {ours}, {effort}" if gap else f"mean KL of {ours}, {effort}, over {theirs}"
    return Rule(bar, f"{ours}, sq-stream {effort}", theirs, limit, gap)


RULES = {
    "reference": (
        _rule(_PURE, "balanced", f"{_PURE}, {_PLAIN}", 0.27),
        _rule(_PURE, "balanced", f"{_PURE}, {_IMATRIX}", 0.55),
        _rule(_PURE, "balanced", f"{_MIXED}, {_PLAIN}", 1.0),
        _rule(_PURE, "balanced", f"{_Q5}, {_PLAIN}", 1.0),
        _rule(_PURE, "balanced", f"{_PURE}, {_PLAIN}", 0.75, gap=True),
        _rule(_MIXED, "balanced", f"{_MIXED}, {_IMATRIX}", 0.7),
        _rule(_PURE, "best", f"{_PURE}, {_PLAIN}", 0.2),
        _rule(_PURE, "best", f"{_PURE}, {_IMATRIX}", 0.42),
        _rule(_PURE, "best", f"{_MIXED}, {_IMATRIX}", 1.0),
        _rule(_PURE, "best", f"{_PURE}, {_PLAIN}", 0.85, gap=True),
        _rule(_PURE, "best", f"{_PURE}, sq-stream balanced", 1.0),
    ),
    "better": (
        _rule(_PURE, "balanced", f"{_PURE}, {_IMATRIX}", 1.0),
        _rule(_MIXED, "balanced", f"{_MIXED}, {_IMATRIX}", 1.0),
        _rule(_PURE, "best", f"{_PURE}, sq-stream balanced", 1.0),
        _rule(_MIXED, "best", f"{_MIXED}, sq-stream balanced", 1.0),
    ),
}
"""Sets of bars: those of the width-768 reference model, where every matrix is a K type, and those of other models."""


@cache
def _size(file: File) -> tuple[int, int]:
    """Bytes and weights of all tensors."""
    tensors = gguf.GGUFReader(file.path).tensors
    return sum(int(tensor.n_bytes) for tensor in tensors), sum(int(tensor.n_elements) for tensor in tensors)


def summarize(text: str, file: File, all_scores: Mapping[str, Scores], skip: int) -> Result:
    """The figures of `file`; `skip` first positions of each window are left out of `mean_kl_later`."""
    n_bytes, n_weights = _size(file)
    scores, baseline = all_scores[file.name], all_scores.get(BASELINE)
    loss = float(scores.loss.mean())
    return Result(
        text=text,
        name=file.name,
        tensor_mib=n_bytes / MIB,
        bits_per_weight=8 * n_bytes / n_weights,
        mean_kl=float(scores.kl.mean()),
        mean_kl_interval=interval(resampled(scores.kl.mean(axis=1))),
        mean_kl_later=float(scores.kl[:, skip:].mean()),
        median_kl=float(np.median(scores.kl)),
        kl_99=float(np.quantile(scores.kl, 0.99)),
        top1_agreement=float(scores.agrees.mean()),
        loss=loss,
        perplexity=math.exp(loss),
        kl_recovered=None if baseline is None else 1 - float(scores.kl.mean() / baseline.kl.mean()),
        loss_recovered=None if baseline is None else _closed(loss, baseline, all_scores[REFERENCE]),
    )


def _closed(loss: float, baseline: Scores, reference: Scores) -> float:
    """The part of the baseline's loss gap that `loss` closes."""
    return float((baseline.loss.mean() - loss) / (baseline.loss.mean() - reference.loss.mean()))


def _fraction(rule: Rule, scores: Mapping[str, Scores], skip: int) -> tuple[Array, Array]:
    """Per window, numerator and denominator of the rule's ratio: [n_windows] each."""
    if not rule.gap:
        ours, theirs = (scores[name].kl[:, skip:].mean(axis=1) for name in (rule.ours, rule.theirs))
        return ours, theirs
    ours, theirs, reference = (scores[name].loss[:, skip:].mean(axis=1) for name in (rule.ours, rule.theirs, REFERENCE))
    return theirs - ours, theirs - reference


def check(text: str, scores: Mapping[str, Scores], rules: Sequence[Rule], skip: int) -> Iterator[Bar]:
    """The bars whose files were scored."""
    for rule in rules:
        if not {rule.ours, rule.theirs} <= scores.keys():
            continue
        above, below = _fraction(rule, scores, 0)
        later_above, later_below = _fraction(rule, scores, skip)
        figure, range_ = ratio(above, below)
        yield Bar(
            text=text,
            bar=rule.bar,
            figure=figure,
            interval=range_,
            figure_later=float(later_above.mean() / later_below.mean()),
            limit=rule.limit,
            at_least=rule.gap,
            met=figure >= rule.limit if rule.gap else figure <= rule.limit,
        )


def memory_bar(files: Sequence[File], max_ram: str) -> Bar:
    """The highest peak of our commands, as a share of what they were allowed."""
    share, bar = max(file.peak_bytes or 0 for file in files) / parse_size(max_ram), f"peak memory over {max_ram}"
    return Bar("", bar, share, (share, share), share, limit=1.0, at_least=False, met=share <= 1)
