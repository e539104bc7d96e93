"""The paired pass: the reference and its quantized model side by side, each linear quantized when its turn comes.

In the quantized model a linear W meets inputs x̃ where the reference has x: they are off by the errors of all linears
before it. The weights V whose outputs come closest to those of the reference, in the mean square, are

    V = W + W E[(x - x̃) x̃ᵀ] A⁻¹            A = E[x̃ x̃ᵀ]
    V = W + E[(h - h̃ - W x̃) x̃ᵀ] A⁻¹        for a linear that adds to the residual stream

where h is the residual stream behind it in the reference, and h̃ what the quantized model has before it. Any other
weights, those that the block format has among them, cost tr(E A Eᵀ) more, E being how far they are from V: the same
objective as that of linears quantized independently, with other weights wanted. Both are regressions, and what is left
to explain is mostly noise, so that they are shrunk to what they explain of other text (see `regression`).

Source: asymmetric calibration, GPTAQ (arXiv:2504.02692); quantization error propagation, QEP (arXiv:2504.09629).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np

from sq_stream.allocator import release_freed
from sq_stream.calibrate.moments import CrossMoment, ExactMoment
from sq_stream.calibrate.ordered import InOrder
from sq_stream.calibrate.regression import shrunk_regression
from sq_stream.calibrate.sketch import Sketch
from sq_stream.calibrate.streamed import Residuals
from sq_stream.errors import BadInputError
from sq_stream.models.layers import Array, Site, Weights, linear
from sq_stream.models.parts import Branch
from sq_stream.parallel import Workers

HEAD = -1
"""In the place of a layer's number: what comes behind the layers."""


@dataclass(frozen=True, eq=False)
class Moments:
    """What the tokens say of a site."""

    sketch: Sketch  # of the inputs x̃
    fitted: Array  # mean of y x̃ᵀ over the tokens of the fit, y being what is explained, [n_out, n_in]
    held: Array  # the same over other tokens
    is_exit: bool

    def meeting(self) -> Meeting:
        """What is made of it, when the weights that it comes from are not needed any more."""
        return Meeting(self.sketch, shrunk_regression(self.sketch, self.fitted, self.held), self.is_exit)


@dataclass(frozen=True, eq=False)
class Meeting:
    """What is known at a site when its linears are to be quantized."""

    sketch: Sketch  # of the inputs x̃
    regression: Array  # of x - x̃ on x̃, [n_in, n_in]; at an exit, of h - h̃ - W x̃ on x̃, [n_out, n_in]
    is_exit: bool

    def wanted(self, w: Array, rows: slice, workers: Workers) -> Array:
        """V for the `rows` w [n, n_in] of W."""
        wanted: Array = w + (self.regression[rows] if self.is_exit else workers.matmul(w, self.regression))
        return wanted


@dataclass(frozen=True, eq=False)
class Side:
    """One of the two models; tensors of the quantized one that are not quantized yet may be anything of their shape."""

    stream: Residuals
    layer: Callable[[int], Weights]  # tensors of layer i by name without `blk.N.`; of HEAD: the final norm


@dataclass(frozen=True, eq=False)
class PairedPass:
    """Both models on their way through the layers; branch b of the decoder is half of layer b // 2."""

    reference: Side
    quantized: Side
    columns: Mapping[str, Array]  # what the columns of linears are multiplied by before they are quantized, by tensor
    n_fit: int  # batches that regressions are fitted to; the others are what they must hold for
    workers: Workers
    tell: Callable[[str], None] = lambda what: None  # told what is going on

    def run_branch(self, b: int, sites: Mapping[Site, int], quantize: Callable[[Site, Meeting], None]) -> None:
        """Meet at all sites of a branch, then go through it; after this it need not be done again.

        Args:
            b: number of the branch.
            sites: those that are not quantized, with their widths, in the order in which they are met.
            quantize: called with each site's linears, by their names without `.weight`, when they are to be quantized.

        Raises:
            BadInputError: weights or activations are not finite.
            LostWorkError: a residual stream is damaged.
            StorageError: reading or writing failed.
        """
        self.reference.stream.keep_only([b])
        self.quantized.stream.keep_only([b])
        self._advance(self.reference, b)
        for site, width in sites.items():
            if site == self._branch(b).exit:
                quantize(site, self._meet_at_exit(b, site, width).meeting())
            else:
                inputs = partial(self._entering, b, site)
                quantize(site, self._meet(f"blk.{b // 2}.{site[0]}", width, b // 2, inputs).meeting())
        self._advance(self.quantized, b)
        self.reference.stream.sync()
        self.quantized.stream.sync()

    def run_head(self, name: str, quantize: Callable[[Site, Meeting], None]) -> None:
        """Meet at the output matrix, behind all branches; otherwise as `run_branch`."""
        decoder = self.reference.stream.decoder

        def inputs(side: Side, weights: Weights, batch: int) -> Array:
            x = decoder.final_norm(side.stream.read(2 * decoder.n_layer, batch), weights)
            return x.reshape(-1, x.shape[-1])

        quantize((name,), self._meet(name, self.reference.stream.reader.n_embd, HEAD, inputs).meeting())

    def _branch(self, b: int) -> Branch:
        return self.reference.stream.decoder.branch(b)

    def _advance(self, side: Side, b: int) -> None:
        branch, weights = self._branch(b), side.layer(b // 2)

        def compute(batch: int) -> None:
            x = side.stream.read(b, batch)
            side.stream.write(b + 1, batch, x + branch.forward(x, weights))

        what = f"layer {b // 2 + 1} of {side.stream.decoder.n_layer}"
        self._for_batches(InOrder(), compute, len(side.stream.batches), what)

    def _entering(self, b: int, site: Site, side: Side, weights: Weights, batch: int) -> Array:
        return entering(self._branch(b), side.stream.read(b, batch), weights, site)

    def _meet(self, name: str, n_in: int, layer: int, inputs: Callable[[Side, Weights, int], Array]) -> Moments:
        """At a site, given its first linear and what gives its inputs [n, n_in] in a batch of either model."""
        columns = self.columns.get(f"{name}.weight", np.float32(1))
        theirs, ours = self.reference.layer(layer), self.quantized.layer(layer)

        def pair(batch: int) -> tuple[Array, Array]:
            gap = inputs(self.reference, theirs, batch) / columns
            x = inputs(self.quantized, ours, batch)
            gap -= x
            return gap, x

        return self._gather(name, n_in, n_in, pair, is_exit=False)

    def _meet_at_exit(self, b: int, site: Site, n_in: int) -> Moments:
        """At the site of the linear whose output is added to the residual stream.

        A token counts with the inverse mean square of the stream behind it, by which norms will divide it: the first
        tokens of a text may have streams a hundred times longer than others.
        """
        branch, name = self._branch(b), f"blk.{b // 2}.{site[0]}"
        columns = self.columns.get(f"{name}.weight", np.float32(1))
        weight, ours = self.reference.layer(b // 2)[f"{site[0]}.weight"], self.quantized.layer(b // 2)

        def pair(batch: int) -> tuple[Array, Array]:
            before, gap = self.quantized.stream.read(b, batch), self.reference.stream.read(b + 1, batch)
            x = entering(branch, before, ours, site)
            mean_square = np.einsum("...i,...i->...", gap, gap).reshape(-1, 1) / gap.shape[-1]
            size = np.sqrt(np.maximum(mean_square, np.finfo(np.float32).tiny))
            gap -= before
            gap = gap.reshape(len(x), -1)
            gap -= linear(x * columns, weight)
            gap /= size
            return gap, x / size

        return self._gather(name, weight.shape[0], n_in, pair, is_exit=True)

    def _gather(
        self, name: str, n_out: int, n_in: int, pair: Callable[[int], tuple[Array, Array]], *, is_exit: bool
    ) -> Moments:
        """The moments of pairs of what inputs [n, n_in] lack, or the outputs, [n, n_out], and the inputs."""
        n_fit, n_all = self.n_fit, len(self.reference.stream.batches)
        order, check_order = InOrder(), InOrder()
        moment, gaps = ExactMoment(n_in, order), CrossMoment(n_out, n_in, order)
        checks = CrossMoment(n_out, n_in, check_order)

        def fit(batch: int) -> None:
            gap, x = pair(batch)
            moment.add(batch, x)
            gaps.add(batch, gap, x)

        def check(batch: int) -> None:
            checks.add(batch, *pair(n_fit + batch))

        self._for_batches(order, fit, n_fit, name)
        self._for_batches(check_order, check, n_all - n_fit, name)
        try:
            sketch, fitted, held = moment.finish(1).sketch(), gaps.finish(), checks.finish()
        except FloatingPointError:
            raise BadInputError(
                f"the activations that enter {name}.weight are not finite: the weights are damaged, or they are too "
                "large for float32"
            ) from None
        sizes = [tokens.size for tokens in self.reference.stream.batches]
        fitted /= np.float32(sum(sizes[:n_fit]))
        held /= np.float32(sum(sizes[n_fit:]))
        return Moments(sketch, fitted, held, is_exit)

    def _for_batches(self, order: InOrder, compute: Callable[[int], None], n: int, what: str) -> None:
        release_freed()
        for _ in order.run(self.workers, compute, n):
            self.tell(what)


class _Reached(Exception):
    """What enters a site is known: the rest of a branch need not be computed."""

    def __init__(self, x: Array) -> None:
        self.x = x


def entering(branch: Branch, x: Array, weights: Weights, site: Site) -> Array:
    """What enters `site` of a branch, [n, n_in], from the residual stream x [..., n_tok, n_embd] before it."""

    def observe(seen: Site, activations: Array) -> None:
        if seen == site:
            raise _Reached(activations)

    try:
        branch.forward(x, weights, observe)
    except _Reached as reached:
        return reached.x.reshape(-1, reached.x.shape[-1])
    raise ValueError(f"{branch} has no site {site}")
