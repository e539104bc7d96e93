"""Which round comes next: from which generation, and how large its steps are.

A trust region: a few rounds later the KL on text that no round has seen says whether they were too large. If it has
risen, the next round starts again from the best generation with smaller steps; if it has fallen, steps become larger.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

RATE = 0.2
"""Relative change of a parameter in a round, if its gradient has always had the same sign, times √n for n parameters.

Of n parameters each has 1/n of the gradient, but 1/√n of the noise. Chosen on convergence60: docs/method.md.
"""
SMALLER, LARGER = 0.5, 1.2
"""Factors of the rate when the KL on other text has risen, and when it has fallen."""
WARM_UP = 5
"""Rounds until the rate is what it should be: the means of the first ones are rough."""
LAST = 0.1
"""Of the rate, in the last round; it falls along half a cosine."""
CHECK_EVERY = 5
"""Rounds after which the KL on other text is measured."""
PATIENCE = 4
"""Such measurements without a new best after which it ends."""


@dataclass(frozen=True)
class Generation:
    """Parameters as they were after a round; number 0 are those of the file."""

    number: int
    parent: int  # the generation that it was made from
    held: float | None  # KL on other text, where it was measured


@dataclass(frozen=True)
class Round:
    """What is to be done next."""

    number: int  # of the generation that it makes
    parent: int
    depth: int  # rounds that led to it, itself included
    rate: float
    is_checked: bool


def best(history: Sequence[Generation]) -> int:
    """The generation with the least KL on other text; what is not a number is never less."""
    checked = [g for g in history if g.held is not None]
    return min(checked, key=lambda g: math.inf if g.held is None or math.isnan(g.held) else g.held).number


def next_round(history: Sequence[Generation], n_rounds: int, n_parameters: int) -> Round | None:
    """What follows `history`, in the order of numbers and with generation 0; None if it is over."""
    last, parents = history[-1], {g.number: g.parent for g in history}
    trust, since_best = 1.0, 0
    for i, generation in enumerate(history[1:], 2):
        if generation.held is not None:
            since_best = 0 if best(history[:i]) == generation.number else since_best + 1
            trust *= SMALLER if since_best else LARGER
    number, parent = last.number + 1, last.number if last.held is None else best(history)
    if number > n_rounds or since_best >= PATIENCE:
        return None
    depth, ancestor = 1, parent
    while ancestor:
        depth, ancestor = depth + 1, parents[ancestor]
    falling = LAST + (1 - LAST) * 0.5 * (1 + math.cos(math.pi * number / n_rounds))
    rate = RATE / math.sqrt(n_parameters) * trust * falling * min(1, depth / WARM_UP)
    return Round(number, parent, depth, rate, is_checked=number % CHECK_EVERY == 0 or number == n_rounds)
