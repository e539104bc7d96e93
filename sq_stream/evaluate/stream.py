"""Every model streamed over all windows: layer by layer, then all output matrices side by side, tile by tile."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sq_stream.allocator import release_freed
from sq_stream.calibrate.documents import Ids
from sq_stream.calibrate.streamed import Residuals, into_batches
from sq_stream.calibrate.weights import RowsOnDisk, is_large
from sq_stream.errors import BadInputError
from sq_stream.evaluate.budget import Budget, vocabulary_tile
from sq_stream.evaluate.compare import SLICE, Comparison
from sq_stream.evaluate.models import Model
from sq_stream.evaluate.statistics import TokenScores
from sq_stream.evaluate.suites import Suite
from sq_stream.events import OnEvent, Progress, StageStarted
from sq_stream.models.forward import layer_names
from sq_stream.models.layers import Array, tiles
from sq_stream.parallel import Workers, one_kernel_thread, set_kernel_threads

STAGE = "evaluate"


@dataclass(frozen=True, eq=False)
class Batches:
    """The windows of all suites in batches of one suite each: token ids `[n_window, n_ctx]`."""

    tokens: list[Ids]
    suites: list[str]  # of each batch

    @classmethod
    def of(cls, suites: Sequence[Suite]) -> Batches:
        """Batches as large as a forward pass computes them."""
        tokens, names = [], []
        for suite in suites:
            parts = into_batches(suite.windows)
            tokens += parts
            names += [suite.name] * len(parts)
        return cls(tokens, names)

    @property
    def n_tokens(self) -> int:
        """In all batches."""
        return sum(ids.size for ids in self.tokens)


def score(
    models: Sequence[Model], suites: Sequence[Suite], folder: Path, budget: Budget, on_event: OnEvent
) -> dict[str, dict[str, TokenScores]]:
    """Scores of every suite and model by their names.

    Args:
        models: the reference first.
        suites: what to score.
        folder: for the residual streams.
        budget: how to run.
        on_event: told of the progress.

    Raises:
        BadInputError: weights or predictions are NaN or infinite.
        StorageError: reading or writing failed.
    """
    batches = Batches.of(suites)
    progress = _Steps(models, batches, on_event)
    with Workers(budget.threads, one_kernel_thread) as workers:
        set_kernel_threads(budget.threads)
        last = []
        for i, model in enumerate(models):
            last.append(Residuals(folder / str(i), batches.tokens, model.reader, model.decoder))
            _run_layers(model, last[-1], budget, workers, progress)
        parts: dict[str, list[list[TokenScores]]] = {suite.name: [] for suite in suites}
        for name, comparison in zip(batches.suites, _compare_heads(models, last, workers, progress), strict=True):
            parts[name].append([_token_scores(model, comparison, m) for m, model in enumerate(models)])
    names = [model.info.name for model in models]
    return {suite: dict(zip(names, map(_joined, zip(*own, strict=True)), strict=True)) for suite, own in parts.items()}


def _run_layers(model: Model, residuals: Residuals, budget: Budget, workers: Workers, progress: _Steps) -> None:
    """Leave what enters the final norm in `residuals`, and nothing else."""
    n_layer = model.decoder.n_layer
    for i in range(n_layer):
        residuals.keep_only([i])
        release_freed()
        for batch, _ in enumerate(_run_layer(model, residuals, i, budget, workers)):
            progress.step(f"{model.info.name}: layer {i + 1} of {n_layer}", batch)
    residuals.keep_only([n_layer])
    if model.rounded is not None:
        model.rounded.keep([model.head])


def _run_layer(model: Model, residuals: Residuals, i: int, budget: Budget, workers: Workers) -> Iterator[None]:
    """Compute all batches of layer i, yielding after each in turn."""
    if model.rounded is not None:
        shapes = model.reader.shapes(i)
        large = [name for short, name in layer_names(model.reader.names, i).items() if is_large(shapes[short])]
        model.rounded.keep([] if budget.resident else large)
    weights = model.reader.layer(i, resident=budget.resident)

    def run_batch(batch: int) -> None:
        with np.errstate(all="ignore"):  # found in the end: predictions that are not finite
            residuals.write(i + 1, batch, model.decoder.layer(residuals.read(i, batch), weights, i))

    yield from workers.stream(run_batch, range(len(residuals.batches)))


def _compare_heads(
    models: Sequence[Model], last: Sequence[Residuals], workers: Workers, progress: _Steps
) -> Iterator[Comparison]:
    """Each batch's comparison."""
    release_freed()
    heads = [model.reader.on_disk(model.head) for model in models]
    norms = [{"output_norm.weight": model.reader.read("output_norm.weight")} for model in models]
    for batch, tokens in enumerate(last[0].batches):
        with np.errstate(all="ignore"):  # found in the end
            hidden = [
                model.decoder.final_norm(residuals.read(model.decoder.n_layer, batch), norm).reshape(tokens.size, -1)
                for model, residuals, norm in zip(models, last, norms, strict=True)
            ]
        yield _compare(models, heads, hidden, tokens, workers)
        progress.step("output", batch)


def _compare(
    models: Sequence[Model], heads: Sequence[RowsOnDisk], hidden: Sequence[Array], tokens: Ids, workers: Workers
) -> Comparison:
    """The predictions after `tokens` [n_window, n_ctx] compared, with one tile of logits at a time.

    Args:
        models: the reference first.
        heads: output matrix of each.
        hidden: what enters it, [tokens.size, n_embd].
        tokens: ids.
        workers: threads.
    """
    n_vocab, n_embd = heads[0].shape
    targets = np.pad(tokens[:, 1:], ((0, 0), (0, 1))).reshape(-1)
    slices = [slice(start, start + SLICE) for start in range(0, tokens.size, SLICE)]
    parts = [Comparison.empty(len(models), targets[part]) for part in slices]
    for rows in tiles(n_vocab, n_embd, vocabulary_tile(n_embd) * n_embd):
        weights = [head[rows] for head in heads]

        def add(k: int, first: int = rows.start, weights: Sequence[Array] = weights) -> None:
            with np.errstate(all="ignore"):
                logits = (
                    model.decoder.cap(x[slices[k]] @ w.T) for model, x, w in zip(models, hidden, weights, strict=True)
                )
                parts[k].add(first, logits)

        workers.map(add, range(len(slices)))
    return Comparison.joined(parts, tokens.shape)


def _token_scores(model: Model, comparison: Comparison, m: int) -> TokenScores:
    """Of the m-th model on one batch.

    Raises:
        BadInputError: its predictions are not finite.
    """
    loss, reference_loss, kl = comparison.loss(m)[:, :-1], comparison.loss(0)[:, :-1], comparison.kl(m)
    if not (np.isfinite(loss).all() and np.isfinite(kl).all()):
        raise BadInputError(
            f"{model.info.path}: its predictions are not finite: the weights are damaged, or too large for float32"
        )
    agrees = comparison.best[m] == comparison.best[0]
    return TokenScores(loss, kl, agrees, np.exp(-loss) - np.exp(-reference_loss))


def _joined(parts: Sequence[TokenScores]) -> TokenScores:
    """Scores of successive windows as one."""
    loss, kl, agrees, dp = (
        np.concatenate(arrays) for arrays in zip(*((p.loss, p.kl, p.agrees, p.dp) for p in parts), strict=True)
    )
    return TokenScores(loss, kl, agrees, dp)


class _Steps:
    """Tells how far the work is: a step is a layer of a model, or an output matrix, over all windows."""

    def __init__(self, models: Sequence[Model], batches: Batches, on_event: OnEvent) -> None:
        self._n_steps = sum(model.decoder.n_layer + 1 for model in models)
        self._n_models, self._batches, self._on_event = len(models), batches, on_event
        self._done = 0
        on_event(StageStarted(STAGE, batches.n_tokens, "tokens"))

    def step(self, what: str, batch: int) -> None:
        """A batch of a layer, or of all output matrices, is done."""
        weight = self._n_models if what == "output" else 1
        self._done += self._batches.tokens[batch].size * weight
        self._on_event(Progress(STAGE, what, self._done // self._n_steps, self._batches.n_tokens))
