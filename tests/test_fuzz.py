"""A short run of the fuzzing targets, from a fixed seed; `bench/fuzz.py` is the long one."""

from __future__ import annotations

import random
import resource
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import fuzzing
import pytest

N_INPUTS = {
    "safetensors": 400,
    "sketch": 300,
    "config": 250,
    "text": 200,
    "card": 120,
    "checkpoint": 150,
    "settings": 400,
}
FEWEST = 60
MEMORY = 2**29
SECONDS = 60


@contextmanager
def limited() -> Iterator[None]:
    """With `MEMORY` more bytes of address space than there is now."""

    def too_slow(_signal: int, _frame: object) -> None:
        raise AssertionError(f"an input took more than {SECONDS} s")

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before, handler = resource.getrlimit(resource.RLIMIT_AS), signal.signal(signal.SIGALRM, too_slow)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)


@pytest.mark.parametrize("name", fuzzing.MAKERS)
def test_whatever_is_read_ends_in_a_result_or_in_an_error_of_ours(name: str, tmp_path: Path) -> None:
    fuzzing.use_folder(tmp_path / "scratch")
    target = fuzzing.MAKERS[name]()
    assert all(target.check(seed) for seed in target.seeds)
    source = random.Random(20261123)
    n_inputs = N_INPUTS.get(name, FEWEST)
    outcomes = []
    with limited(), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        for i in range(n_inputs):
            data = target.mutate(target.seeds[i % len(target.seeds)], source)
            signal.alarm(SECONDS)
            outcomes.append(target.check(data))
    assert any(outcomes)
    assert name in {"entry", "card"} or not all(outcomes)  # these two start anew, or say nothing, instead of refusing
