"""The optimizer: relative steps of Adam, every parameter by itself.

Source: Kingma and Ba, *Adam* (arXiv:1412.6980). The gradients are those of logarithms, so that a step of 0.001 changes
a parameter by a thousandth.
"""

from __future__ import annotations

import numpy as np

from sq_stream.models.layers import Array

MEMORY = (0.9, 0.99)
"""Of the means of gradients and of their squares."""
LEAST = 1e-12
"""Root of the mean square of a gradient; where it is not larger there is none."""


def step(state: Array, gradient: Array, depth: int, rate: float) -> Array:
    """Parameters and means after a round.

    Args:
        state: parameters, means of gradients, means of their squares: [3, n].
        gradient: of the parameters' logarithms, [n].
        depth: rounds until now, this one included.
        rate: relative change of a parameter whose gradient has always been the same.
    """
    values, means, squares = state
    means = MEMORY[0] * means + (1 - MEMORY[0]) * gradient
    squares = MEMORY[1] * squares + (1 - MEMORY[1]) * gradient * gradient
    direction = means / (1 - MEMORY[0] ** depth) / (np.sqrt(squares / (1 - MEMORY[1] ** depth)) + LEAST)
    return np.stack([values * (1 - rate * direction), means, squares]).astype(np.float32)
