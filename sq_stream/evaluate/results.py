"""What an evaluation found: plain dataclasses, written as they are by `--json` (docs/formats.md) and by the report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

SCHEMA = 1
"""Version of the JSON form; a field may be added without a new one."""

Role = Literal["reference", "candidate", "baseline"]


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95% interval from resampling documents; no interval where there is but one document."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class ModelInfo:
    """One of the models that were run."""

    name: str  # what the scores call it; no two models have the same
    role: Role
    path: str  # the file or folder; of a baseline made in memory, what it was made from
    made: Literal["", "rtn", "imatrix"]  # how, of a baseline made in memory
    architecture: str  # as GGUF calls it
    n_weights: int
    tensor_bytes: int
    file_bytes: int | None  # None of a baseline made in memory
    bits_per_weight: float
    types: dict[str, int]  # tensors of each type
    recipe: str  # as the file's metadata tells, "" if they do not
    effort: str


@dataclass(frozen=True)
class PositionBin:
    """Mean KL over positions `first` to `last` of a window, the first position being 0."""

    first: int
    last: int
    mean_kl: float


@dataclass(frozen=True)
class Histogram:
    """Numbers of tokens by KL: `counts[i]` are between `edges[i]` and `edges[i + 1]` nats.

    What lies below the first edge or above the last is counted in the first or last bin.
    """

    edges: tuple[float, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True)
class Score:
    """One model on one suite; KL and loss in nats per token."""

    model: str
    loss: Estimate  # of the next token
    perplexity: float
    loss_gap: Estimate  # to the reference, paired
    fits: bool  # a loss under the reference's: the model has adapted to the text, it has not got better
    mean_kl: Estimate  # of the model from the reference, KL(reference || model)
    median_kl: float
    kl_99: float
    kl_999: float
    top1_agreement: Estimate  # share of tokens
    rms_dp: float  # root mean square of the difference in the probability of the next token, as a share of 1
    kl_by_position: tuple[PositionBin, ...]
    kl_histogram: Histogram


@dataclass(frozen=True)
class Recovery:
    """What part of the difference between a baseline and the reference a candidate has closed; 1 is all of it."""

    candidate: str
    baseline: str
    loss: Estimate | None  # None where the baseline's loss is not reliably above the reference's
    kl: Estimate | None  # None where the baseline is the reference


@dataclass(frozen=True)
class SuiteResult:
    """All models on one suite of windows."""

    name: str
    n_windows: int
    n_ctx: int
    n_tokens: int  # positions with a KL
    n_documents: int  # that intervals resample
    sha256: str  # of the token ids
    scores: tuple[Score, ...]  # the reference's own first, then in the order of `Evaluation.models`
    recoveries: tuple[Recovery, ...]  # every candidate against every baseline

    def score(self, model: str) -> Score:
        """The score of the model with this name."""
        return next(score for score in self.scores if score.model == model)


@dataclass(frozen=True)
class Evaluation:
    """The result of one run of `eval`."""

    schema: int
    sq_stream: str  # version
    models: tuple[ModelInfo, ...]  # the reference, the candidates, the baselines
    suites: tuple[SuiteResult, ...]
    notes: tuple[str, ...]  # what the user should know
    n_samples: int  # of the bootstrap
    seed: int
    threads: int
    max_ram: int  # bytes that the process was allowed
    planned_ram: int  # bytes
    peak_ram: int  # bytes that it had
    seconds: float
