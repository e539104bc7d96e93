"""The statistics of all linears of a model, wherever they come from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np

from sq_stream.calibrate.sketch import Array, Sketch
from sq_stream.formats.storage import Closing
from sq_stream.models.base import ModelSpec
from sq_stream.models.forward import head_name
from sq_stream.models.layers import Site


class Sketches(Mapping[str, Sketch], Closing):
    """Statistics of every linear by its tensor's GGUF name, loaded one site at a time.

    A linear without data has neutral statistics.
    """

    unseen: tuple[str, ...]  # linears without data; not a token embedding that is only a table
    dead: dict[str, int]  # channels that were zero in every token, by each site's first linear

    def __init__(
        self,
        spec: ModelSpec,
        sites: Mapping[Site, int],
        load: Callable[[Site], Sketch],
        release: Callable[[], None] = lambda: None,
        *,
        of_outputs: bool = False,
    ) -> None:
        """Statistics of the `sites` given with their dead channels, got by `load`; `release` is called by `close`.

        Those `of_outputs` are as wide as a linear's output.
        """
        linears = [t for t in spec.tensors if is_linear(t.name, t.shape)]
        self._widths = {t.name: t.n_rows if of_outputs else t.n_in for t in linears}
        self._sites = {f"{name}.weight": site for site in sites for name in site}
        self._load, self._release = load, release
        self._last: tuple[Site, Sketch] | None = None
        self._factors: Mapping[str, Array] = {}
        tables = {"token_embd.weight"} - {f"{head_name(self._widths)}.weight"}
        self.unseen = tuple(name for name in self._widths if name not in self._sites and name not in tables)
        self.dead = {f"{site[0]}.weight": n_dead for site, n_dead in sites.items() if n_dead}

    def __getitem__(self, name: str) -> Sketch:
        site = self._sites.get(name)
        if site is None:
            return Sketch.neutral(self._widths[name])
        if self._last is None or self._last[0] != site:
            self._last = None
            sketch, factors = self._load(site), self._factors.get(name)
            self._last = site, sketch if factors is None else sketch.multiplied(np.reciprocal(factors))
        return self._last[1]

    def __iter__(self) -> Iterator[str]:
        return iter(self._widths)

    def __len__(self) -> int:
        return len(self._widths)

    def site(self, name: str) -> tuple[str, ...]:
        """All linears that share the inputs of linear `name`; none if it has no data."""
        return tuple(f"{linear}.weight" for linear in self._sites.get(name, ()))

    def smooth(self, factors: Mapping[str, Array]) -> None:
        """From now on give the statistics of linears whose columns are multiplied by `factors` [n_in], by name."""
        self._last, self._factors = None, factors

    def forget(self) -> None:
        """Let go of what was given last, which is kept for other linears of its site."""
        self._last = None

    def close(self) -> None:
        """Let go of where they come from."""
        self._last = None
        self._release()


def is_linear(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is a matrix that activations are multiplied with."""
    return len(shape) == 2 and name.endswith(".weight") and "conv1d" not in name
