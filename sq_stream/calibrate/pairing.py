"""How a paired pass fits into memory and onto the disk, and which linears have their turn in it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sq_stream.calibrate.budget import Layer, computing_bytes, windows_per_batch
from sq_stream.calibrate.calibration import Calibration
from sq_stream.calibrate.moments import CrossMoment, ExactMoment
from sq_stream.calibrate.regression import needed_bytes
from sq_stream.models.forward import Decoder
from sq_stream.models.layers import Site

N_STREAMS = 4  # two models, each with what enters a branch and what leaves it


@dataclass(frozen=True, eq=False)
class Pairing:
    """How to run a paired pass, and what it will take."""

    branches: Sequence[Mapping[Site, int]]  # up to the last one with sites, or all if there is a head: the sites of
    # each that have a turn, with their widths, in the order in which they are met
    held: NDArray[np.int32]  # windows of text that is not fitted to, and that fits must hold for
    head: str | None  # the output matrix, without its `.weight`, if it has a turn
    threads: int
    resident: bool  # a layer's weights are in memory; else large matrices are read tile by tile
    working_ram: int  # resident bytes at the peak, besides those of the program
    peak_disk: int

    @property
    def linears(self) -> frozenset[str]:
        """The tensors that are quantized in their turn."""
        sites = ((f"blk.{b // 2}.", site) for b, branch in enumerate(self.branches) for site in branch)
        names = {f"{prefix}{name}.weight" for prefix, site in sites for name in site}
        return frozenset(names | ({f"{self.head}.weight"} if self.head else set()))


def pairings(
    calibration: Calibration, held: NDArray[np.int32], shaped: Collection[str], threads: int
) -> Iterator[Pairing]:
    """All ways to run one, the best first, then the fastest.

    Args:
        calibration: its text is what is fitted to; sites that are too wide for its second moment to be exact have no
            turn, and where memory is short, nor have others that are as wide.
        held: other text, token ids [n_windows, n_ctx].
        shaped: the tensors that are; sites of none have no turn, and nor has a token embedding.
        threads: at most.
    """
    decoder, layers, n_embd = calibration.decoder, calibration.layers, calibration.reader.n_embd
    n_windows, n_ctx = len(calibration.windows) + len(held), calibration.windows.shape[1]
    batch_tokens = n_ctx * windows_per_batch(n_ctx)
    peak_disk = N_STREAMS * 4 * n_windows * n_ctx * n_embd
    widths = {width for layer in layers for _, width in layer.sites} | {n_embd}
    for widest in sorted(widths - calibration.ranks.keys(), reverse=True):
        branches = [_own(decoder, b, layers[b // 2], widest, shaped) for b in range(2 * decoder.n_layer)]
        head = "output" if "output.weight" in shaped and n_embd <= widest else None
        if not head:
            branches = branches[: max((b + 1 for b, sites in enumerate(branches) if sites), default=0)]
        for n_threads in range(threads, 0, -1):
            for resident in (True, False):
                working_ram = _working_ram(decoder, layers, branches, n_threads, resident, batch_tokens, n_embd)
                yield Pairing(branches, held, head, n_threads, resident, working_ram, peak_disk)


def _own(decoder: Decoder, b: int, layer: Layer, widest: int, shaped: Collection[str]) -> dict[Site, int]:
    """The sites of branch b that have a turn."""
    part = decoder.branch(b).part
    feed_forward = decoder.layers[b // 2][1].part
    of_feed_forward = (feed_forward.entry, feed_forward.exit)
    return {
        site: width
        for site, width in layer.sites
        if (site in of_feed_forward) == (part is feed_forward)
        and width <= widest
        and any(f"blk.{b // 2}.{name}.weight" in shaped for name in site)
    }


def _working_ram(
    decoder: Decoder,
    layers: Sequence[Layer],
    branches: Sequence[Mapping[Site, int]],
    threads: int,
    resident: bool,
    batch_tokens: int,
    n_embd: int,
) -> int:
    """Resident bytes of the worst branch."""
    chunk, worst = 4 * batch_tokens * n_embd, 0
    known: set[object] = set()
    for b, sites in enumerate(branches):
        layer = layers[b // 2]
        key = (id(layer), tuple(sites))
        if key in known:
            continue
        known.add(key)
        weights = 4 * (layer.weights if resident else layer.small_weights)
        worst = max(worst, weights + threads * computing_bytes(layer, chunk, resident))
        observing = dict(zip((site for site, _ in layer.sites), layer.observing, strict=True))
        for site, width in sites.items():
            n_out = n_embd if site == decoder.branch(b).exit else width
            moment, cross = ExactMoment.needs(width), CrossMoment.needs(n_out, width)
            looking = 2 * 4 * batch_tokens * width + max(observing[site], moment.adding, cross.adding)
            computing = computing_bytes(layer, chunk, resident, looking)
            sums = moment.resident + 2 * cross.resident
            gathering = max(threads * computing, moment.finishing + 4 * width**2)
            worst = max(worst, 2 * weights + sums + gathering, needed_bytes(n_out, width))
    return worst
