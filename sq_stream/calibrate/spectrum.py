"""How the energy of a site's activations is spread over directions: the leading eigenvalues of its second moment."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sq_stream.calibrate.sketch import Sketch
from sq_stream.parallel import Workers

COUNTS = (1, 2, 4, 8, 16, 32, 64)
"""Numbers of directions whose energy is told."""

_BLOCK = 80  # directions that are iterated together: those told of and some to spare
_ITERATIONS = 3


def leading_energy(sketch: Sketch, workers: Workers) -> list[float]:
    """Share of tr(A) in the strongest 1, 2, 4, … 64 directions, as far as there are so many channels.

    Found by subspace iteration with a Rayleigh-Ritz step (Halko, Martinsson, Tropp, arXiv:0909.4061, algorithm 4.4),
    which no site is too wide for: never more than the true shares, and equal to them where n_in is at most 80.

    Args:
        sketch: A = diag(r) + SᵀS [n_in, n_in].
        workers: threads.
    """

    def apply(x: NDArray[np.float32]) -> NDArray[np.float32]:
        return workers.matmul(sketch.factor.T, workers.matmul(sketch.factor, x)) + sketch.residual[:, None] * x

    trace = float(sketch.diagonal().sum(dtype=np.float64)) or 1.0
    n_in = sketch.n_in
    basis = np.random.RandomState(0).standard_normal((n_in, min(_BLOCK, n_in))).astype(np.float32)
    for _ in range(_ITERATIONS):
        basis = np.linalg.qr(apply(basis))[0]
    values = np.linalg.eigvalsh((basis.T @ apply(basis)).astype(np.float64))[::-1]
    shares = np.cumsum(np.maximum(values, 0)) / trace
    return [min(1.0, float(shares[count - 1])) for count in COUNTS if count <= n_in]
