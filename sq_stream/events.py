"""What a running job tells: plain dataclasses, handed to one callback, printed or logged by the command line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Note:
    """Something that the user should know: what was left out, what is resumed."""

    text: str


@dataclass(frozen=True)
class StageStarted:
    """A pass over the model begins; `total` is its size in weights, or in the `unit` given."""

    stage: str
    total: int
    unit: str = "weights"


@dataclass(frozen=True)
class Progress:
    """`done` of `total` weights (or other units) of the stage are behind us; `tensor` is in work."""

    stage: str
    tensor: str
    done: int
    total: int


@dataclass(frozen=True)
class TensorFinished:
    """One tensor is encoded and in the file."""

    name: str
    type: str
    n_weights: int
    n_bytes: int


@dataclass(frozen=True)
class Finished:
    """The file is complete, verified and in its place."""

    output: str
    n_bytes: int
    bits_per_weight: float
    seconds: float
    peak_ram: int


Event = Note | StageStarted | Progress | TensorFinished | Finished
OnEvent = Callable[[Event], None]


def ignore(event: Event) -> None:
    """The callback of those who do not listen."""
