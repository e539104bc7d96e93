"""What the encoders make of an importance: a positive weight per column."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sq_stream.errors import BadInputError

_LEAST_WEIGHT = np.float32(2.0**-32)  # of a column, against the heaviest: enough to give every block a best fit


def column_weights(importance: NDArray[np.float32] | None, n_in: int) -> NDArray[np.float32]:
    """Weights [n_in] in 2⁻³²..1: importance over the power of two above its largest, all 1 when it is None or zero.

    Raises:
        BadInputError: a value is negative, infinite or NaN.
        ValueError: `importance` is not of shape [n_in].
    """
    if importance is None:
        return np.ones(n_in, np.float32)
    if importance.shape != (n_in,):
        raise ValueError(f"importance has shape {importance.shape}, and the rows have {n_in} values")
    if not (usable := np.isfinite(importance) & (importance >= 0)).all():
        column = int(np.argmin(usable))
        raise BadInputError(
            f"importance of column {column} is {importance[column]}: it must be finite and not negative"
        )
    if not importance.any():
        return np.ones(n_in, np.float32)
    _, exponent = np.frexp(importance.max())
    return np.maximum(np.ldexp(importance, -exponent), _LEAST_WEIGHT).astype(np.float32, copy=False)
