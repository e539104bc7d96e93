"""The backward pass of a model: how its own predictions would change, from the end to the embedding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sq_stream.models.forward import Decoder, head_name, layer_names
from sq_stream.models.layers import Array, ObserveGradients, Weights, linear, linear_vjp, tiles, with_prefix

_BLOCK_TOKENS = 256  # of which a tile of logits is computed at a time
_BELOW_ONE = 1 - 2.0**-40


def draw(seed: int, windows: Sequence[int], n_ctx: int) -> NDArray[np.float64]:
    """What decides the labels of windows, by their numbers: uniform in 0 to 1, float64 [n_window, n_ctx]."""
    streams = (np.random.RandomState([seed, window]) for window in windows)
    return np.stack([stream.random_sample(n_ctx) for stream in streams])


def sampled_loss_vjp(
    x: Array, weight: Any, decoder: Decoder, uniform: NDArray[np.float64]
) -> tuple[NDArray[np.int64], Array]:
    """Labels sampled from a model's own predictions, and the gradient of their loss.

    The loss is the sum over tokens of the negative log probability of the token's label, as if that were fixed: the
    mean of the products of such gradients is the Fisher information. Logits are computed in tiles of the vocabulary,
    first for the probability of every tile, then for the labels and the gradient.

    Args:
        x: what enters the output matrix, [..., n_tok, d_model].
        weight: the output matrix [n_vocab, d_model].
        decoder: the model.
        uniform: from `draw`, [..., n_tok]; the label is where the cumulative probability comes to exceed it.

    Returns:
        Labels [..., n_tok], gradient [..., n_tok, d_model].
    """
    rows, parts = x.reshape(-1, x.shape[-1]), list(tiles(*weight.shape))
    blocks = list(tiles(len(rows), 1, _BLOCK_TOKENS))
    logs = _log_sums(rows, weight, decoder)
    log_total = _log_sum_exp(logs)[:, None]
    tile, rest = _choose(np.exp(logs - log_total), uniform.reshape(-1))
    labels, dx = np.empty(len(rows), np.int64), np.zeros_like(rows)
    for i, part in enumerate(parts):
        matrix = weight[part]
        for block in blocks:
            logits = decoder.cap(linear(rows[block], matrix))
            d_logits = np.exp(logits - log_total[block])
            own = np.flatnonzero(tile[block] == i)
            within, _ = _choose(d_logits[own], rest[block][own])
            labels[block][own] = part.start + within
            d_logits[own, within] -= 1
            d_logits *= decoder.cap_slope(logits)
            dx[block] += linear_vjp(d_logits, matrix)
    return labels.reshape(uniform.shape), dx.reshape(x.shape)


def divergence_vjp(
    x: Array,
    weight: Any,
    reference: tuple[Array, Any],
    decoder: Decoder,
    observe: Callable[[slice, Array], None] | None = None,
) -> tuple[Array, Array]:
    """KL(reference ‖ model) after every token, and the gradient of its sum.

    Args:
        x: what enters the model's output matrix, [..., n_tok, d_model].
        weight: that matrix [n_vocab, d_model].
        reference: the same two of the reference.
        decoder: of both.
        observe: told of the gradient [n_tile, d_model] of one tile of the output matrix after the other.

    Returns:
        KL in nats [..., n_tok], gradient of x.
    """
    rows, theirs = x.reshape(-1, x.shape[-1]), reference[0].reshape(-1, x.shape[-1])
    blocks = list(tiles(len(rows), 1, _BLOCK_TOKENS))

    def logits(of: Array, matrix: Array, block: slice) -> Array:
        return decoder.cap(linear(of[block], matrix))

    log_sum_p = _log_sum_exp(_log_sums(theirs, reference[1], decoder))[:, None]
    log_sum_q = _log_sum_exp(_log_sums(rows, weight, decoder))[:, None]
    kl, dx = np.zeros(len(rows), rows.dtype), np.zeros_like(rows)
    for part in tiles(*weight.shape):
        matrix, other = weight[part], reference[1][part]
        d_matrix = np.zeros(matrix.shape, rows.dtype)
        for block in blocks:
            log_p = logits(theirs, other, block) - log_sum_p[block]
            capped = logits(rows, matrix, block)
            log_q = capped - log_sum_q[block]
            p = np.exp(log_p)
            kl[block] += np.einsum("ij,ij->i", p, log_p - log_q)
            d_logits = np.exp(log_q)
            d_logits -= p
            d_logits *= decoder.cap_slope(capped)
            dx[block] += linear_vjp(d_logits, matrix)
            if observe is not None:
                d_matrix += d_logits.T @ rows[block]
        if observe is not None:
            observe(part, d_matrix)
    return kl.reshape(x.shape[:-1]), dx.reshape(x.shape)


def _log_sums(rows: Array, weight: Any, decoder: Decoder) -> Array:
    """Logarithms of the sums of the exponentials of a tile's logits, for rows [n, d_model]: [n, n_tiles]."""
    blocks, parts = list(tiles(len(rows), 1, _BLOCK_TOKENS)), list(tiles(*weight.shape))
    logs = np.empty((len(rows), len(parts)), rows.dtype)
    for i, part in enumerate(parts):
        matrix = weight[part]
        for block in blocks:
            logs[block, i] = _log_sum_exp(decoder.cap(linear(rows[block], matrix)))
    return logs


def _log_sum_exp(x: Array) -> Array:
    """Of the rows of x [n, m]: [n]."""
    largest = x.max(axis=1)
    sums: Array = np.log(np.exp(x - largest[:, None]).sum(axis=1)) + largest
    return sums


def _choose(weights: Array, u: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The column of each row of weights [n, m] that u [n] falls into, and where in it; both in 0 to 1 of the whole."""
    ends = np.cumsum(weights, axis=1, dtype=np.float64)
    target = np.minimum(u, _BELOW_ONE) * ends[:, -1]
    column = (ends <= target[:, None]).sum(axis=1)
    row = np.arange(len(ends))
    width = weights[row, column].astype(np.float64)
    return column, (target - (ends[row, column] - width)) / width


def backward(
    tokens: NDArray[np.integer[Any]],
    weights: Weights,
    decoder: Decoder,
    uniform: NDArray[np.float64],
    observe: ObserveGradients | None = None,
) -> tuple[NDArray[np.int64], Array]:
    """Labels for every token, and the loss's gradient, for a model that is in memory as a whole.

    Args:
        tokens: ids [..., n_tok].
        weights: all tensors by GGUF name.
        decoder: the model.
        uniform: see `sampled_loss_vjp`.
        observe: sees the inputs and output gradients of every linear and norm but the output matrix, named as in
            `weights`, from the last to the first.

    Returns:
        Labels [..., n_tok]; gradient of the rows of the token embedding as they enter, [..., n_tok, d_model].
    """
    layers = [{short: weights[name] for short, name in layer_names(weights, i).items()} for i in range(decoder.n_layer)]
    inputs = [decoder.embed(weights["token_embd.weight"][tokens])]
    for i, own in enumerate(layers):
        inputs.append(decoder.layer(inputs[-1], own, i))
    x = inputs.pop()
    head = weights[f"{head_name(weights)}.weight"]
    labels, dy = sampled_loss_vjp(decoder.final_norm(x, weights), head, decoder, uniform)
    dy = decoder.final_norm_vjp(dy, x, weights, observe)
    for i, own in reversed(list(enumerate(layers))):
        dy = decoder.layer_vjp(dy, inputs.pop(), own, i, with_prefix(observe, f"blk.{i}."))
    return labels, decoder.embed(dy)
