"""Feedback from row to row: against plain least squares, and what it is worth under the two-sided objective."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from numpy.typing import NDArray

from sq_stream.calibrate.sketch import Sketch
from sq_stream.formats.blocks import BLOCK_TYPES
from sq_stream.kernels.codec import decode
from sq_stream.parallel import Workers
from sq_stream.quantize.encode import make_encoder
from sq_stream.quantize.rows import DAMPING, RowFeedback, number_of_groups, order_rows

Array = NDArray[np.float32]
STEP = np.float32(0.25)


def round_to_steps(x: Array) -> NDArray[np.uint8]:
    return np.clip(np.rint(x / STEP) + 128, 0, 255).astype(np.uint8)


def from_steps(blocks: NDArray[np.uint8]) -> Array:
    return (blocks.astype(np.float32) - 128) * STEP


def sketch(n: int, rank: int, seed: int = 1) -> Sketch:
    """Statistics with a few strong directions, and one value that is always zero."""
    random = np.random.RandomState(seed)
    factor = random.standard_normal((rank, n)) * np.geomspace(3, 0.1, rank)[:, None]
    residual = random.uniform(0.01, 0.1, n)
    factor[:, n // 2] = residual[n // 2] = 0
    return Sketch(1000, residual.astype(np.float32), factor.astype(np.float32))


def encode_by_least_squares(wanted: Array, gradients: Sketch) -> NDArray[np.uint8]:
    """Each group of rows moved to where all open rows cost least, given the errors of the decided ones."""
    n, b = len(wanted), gradients.dense().astype(np.float64)
    groups = order_rows(gradients.diagonal())
    b += DAMPING * (np.trace(b) / n or 1) * np.eye(n)
    blocks, errors = np.empty(wanted.shape, np.uint8), np.zeros(wanted.shape)
    for i, rows in enumerate(groups):
        decided, opened = np.concatenate([[], *groups[:i]]).astype(int), np.concatenate(groups[i:])
        moves = -np.linalg.solve(b[np.ix_(opened, opened)], b[np.ix_(opened, decided)] @ errors[decided])
        blocks[rows] = round_to_steps((wanted[rows] + moves[: len(rows)]).astype(np.float32))
        errors[rows] = from_steps(blocks[rows]) - wanted[rows]
    return blocks


@pytest.mark.parametrize("n_out", [1, 5, 64, 600])
def test_it_is_the_least_squares_answer_of_the_open_rows(n_out: int) -> None:
    gradients, wanted = sketch(n_out, 6), np.random.RandomState(2).standard_normal((n_out, 24)).astype(np.float32)
    with Workers(2) as workers:
        blocks = RowFeedback(gradients, workers).encode(wanted, round_to_steps, from_steps)
    expected = encode_by_least_squares(wanted, gradients)
    assert np.mean(blocks != expected) < 0.001  # what falls between two steps but for float32
    assert n_out < 64 or np.mean(blocks != round_to_steps(wanted)) > 0.01


@pytest.mark.parametrize("n_out", [1, 33, 9000])
def test_rows_with_large_gradients_are_decided_before_others(n_out: int) -> None:
    diagonal = np.random.RandomState(2).standard_exponential(n_out).astype(np.float32)
    groups = order_rows(diagonal)
    assert len(groups) == number_of_groups(n_out)
    assert max(map(len, groups)) <= 256
    np.testing.assert_array_equal(np.sort(np.concatenate(groups)), np.arange(n_out))
    assert all(diagonal[a].min() >= diagonal[b].max() for a, b in pairwise(groups))


def test_without_gradients_nothing_moves() -> None:
    gradients = Sketch(1000, np.zeros(40, np.float32), np.zeros((3, 40), np.float32))
    wanted = np.random.RandomState(2).standard_normal((40, 24)).astype(np.float32)
    with Workers(1) as workers:
        blocks = RowFeedback(gradients, workers).encode(wanted, round_to_steps, from_steps)
    np.testing.assert_array_equal(blocks, round_to_steps(wanted))


@pytest.mark.parametrize("name", ["Q4_K", "Q5_0"])
def test_shaped_rows_cost_far_less_where_the_predictions_look(name: str) -> None:
    n_out, n_in, block_type = 96, 512, BLOCK_TYPES[name]
    gradients, inputs = sketch(n_out, 8), sketch(n_in, 40, seed=5)
    wanted = np.random.RandomState(3).standard_normal((n_out, n_in)).astype(np.float32)
    b, a = gradients.dense().astype(np.float64), inputs.dense().astype(np.float64)

    def cost(blocks: NDArray[np.uint8]) -> float:
        errors = decode(blocks, block_type) - wanted.astype(np.float64)
        return float(np.sum((b @ errors) * (errors @ a)))

    results = []
    for threads in (1, 2):
        with Workers(threads) as workers:
            encode = make_encoder(block_type, inputs, workers)
            one_sided = encode(wanted)
            results.append(
                RowFeedback(gradients, workers).encode(wanted.copy(), encode, lambda data: decode(data, block_type))
            )
    assert cost(results[0]) < 0.5 * cost(one_sided)
    np.testing.assert_array_equal(*results)
