r"""What each part of the method contributes: the table "What was tried" of docs/method.md.

    python bench/ablation.py MODEL_DIR --cache CACHE --folder FOLDER --report STEM \
        --text stories=stories.txt:8x256

In each row some matrices are quantized twice, without and with what the row names, and all else stays as it is, to the
types of `--type q4_k_m --pure`. Everything is done by the product's own code: its forward pass, sketches, shaping and
smoothing; a row that leaves something out replaces a constant of the method or hands in other statistics. Decoded
weights are evaluated by the forward pass in float32, and once more with the activations that enter those matrices
rounded to 8 bits in blocks as llama.cpp's CPU kernels do. Figures are mean KL divergence from the BF16 model, in nats
per token, on the first windows of `convergence60` and on the texts given, and how many times as large it is with what
the row names (95%, by bootstrap over windows).

The statistics lie in --cache, as those of `sq-stream calibrate` do. Every figure is a line of FOLDER/figures.jsonl and
is not computed again while model, text, row and our source are the same.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from activations import as_in_the_runtime, met_in_8_bits
from bootstrap import ratio
from candidates import source_digest
from divergence import Logits, Text, kl_divergence
from numpy.typing import NDArray
from texts import TextFile, cut_texts

from sq_stream import api
from sq_stream.calibrate.calibration import plan_calibration
from sq_stream.calibrate.corpus import CTX, WINDOWS
from sq_stream.calibrate.sketch import Sketch
from sq_stream.calibrate.sketches import Sketches
from sq_stream.kernels.codec import decode
from sq_stream.models.forward import forward, head_name, linears_by_norm
from sq_stream.parallel import Workers
from sq_stream.quantize import shape, smooth
from sq_stream.quantize.encode import make_encoder
from sq_stream.quantize.grids import GRIDS, AffineSuperScales, Scales
from sq_stream.quantize.shape import order_runs
from sq_stream.units import parse_size

Array = NDArray[np.float32]
ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class Variant:
    """How matrices are quantized; the defaults are what the product does."""

    windows: int | None = None  # of calibration text; None: all
    energy: float = 1.0  # share of a second moment's trace that is kept
    mixtures: bool = True  # statistics of attn_v at what attention mixes, not at its inputs
    diagonal: bool = False  # mean squares alone, as an importance matrix
    shrinkage: float = 0.0  # of the off-diagonals
    damping: float = shape.DAMPING
    sweeps: int = shape.MOST_SWEEPS  # of descent
    by_energy: bool = True  # the panel, and in it the run of columns, with the most input energy first
    trials: bool = True  # of scales and mins in the first pass
    smoothing: float = smooth.EXPONENT  # between norms and the columns of the linears that they enter
    rescaling: float = smooth.EXPONENT  # the same between ffn_up's rows and ffn_down's columns


@dataclass(frozen=True)
class Row:
    """One experiment on the matrices of some classes, as ffn_up; no classes: all that are shaped."""

    what: str
    classes: tuple[str, ...]
    without: Variant
    with_it: Variant


PRODUCT, UNSMOOTHED, UNSCALED = Variant(), Variant(smoothing=0, rescaling=0), Variant(rescaling=0)
GATE_UP, QKV = ("ffn_gate", "ffn_up"), ("attn_q", "attn_k", "attn_v")
ROWS = (
    Row("second moments instead of mean squares", (), replace(UNSMOOTHED, diagonal=True), UNSMOOTHED),
    Row("descent after error feedback", (), Variant(sweeps=0), PRODUCT),
    Row("statistics of attn_v at mixtures", ("attn_v",), Variant(mixtures=False), PRODUCT),
    Row("smoothing, exponent ¼", GATE_UP, UNSMOOTHED, PRODUCT),
    Row("smoothing, exponent ½", GATE_UP, UNSMOOTHED, Variant(smoothing=0.5)),
    Row("smoothing, exponent ¼", QKV, UNSMOOTHED, PRODUCT),
    Row("smoothing, exponent ¼", (), UNSMOOTHED, PRODUCT),
    Row("up's rows and down's columns rescaled, exponent ¼", ("ffn_down",), UNSCALED, PRODUCT),
    Row(
        "up's rows and down's columns rescaled, exponent ½", ("ffn_down",), Variant(rescaling=0), Variant(rescaling=0.5)
    ),
    Row("damping 10% of the mean diagonal instead of 1%", ("ffn_up",), PRODUCT, Variant(damping=0.1)),
    *(
        Row(f"off-diagonals shrunk by {share:.0%}", (name,), PRODUCT, Variant(shrinkage=share))
        for share in (0.1, 0.3)
        for name in ("ffn_up", "ffn_down")
    ),
    Row("panels and runs of columns with the most energy first", ("attn_output",), Variant(by_energy=False), PRODUCT),
    Row("scales and mins of the first pass by trial", ("attn_output",), Variant(trials=False), PRODUCT),
    Row("99% of a second moment's energy instead of all", (), PRODUCT, Variant(energy=0.99)),
    Row("all windows of the text instead of 96", (), Variant(windows=96), PRODUCT),
)


class Bench:
    """A model in memory, and what quantizing parts of it costs.

    Args:
        model_dir: the checkpoint.
        cache: of calibrations.
        calib_windows: of calibration text, at most.
        max_ram: bytes that a calibration may take.
        workers: threads.
        n_threads: their number.
    """

    def __init__(
        self, model_dir: Path, cache: Path, *, calib_windows: int, max_ram: int, workers: Workers, n_threads: int
    ) -> None:
        self._workers, self._n_threads, self._max_ram = workers, n_threads, max_ram
        options: dict[str, Any] = {"windows": calib_windows, "cache": cache, "threads": n_threads}
        self._plan = api.plan(model_dir, recipe="q4_k_m", pure=True, max_ram=max_ram, **options)
        assert self._plan.calibration is not None
        self.calibration, self.checkpoint = self._plan.calibration, self._plan.checkpoint
        self.decoder = self.calibration.decoder
        tensors = [tensor.source for tensor in self._plan.tensors]
        self.weights: dict[str, Array] = {
            t.name: t.read(self.checkpoint, 0, t.n_rows).reshape(t.shape) for t in tensors
        }
        self._norms = linears_by_norm(self.decoder, self.weights)

    @cached_property
    def _shaped(self) -> dict[str, Any]:
        """Types of the matrices that are shaped; a token embedding that is only a table is not."""
        tables = {"token_embd.weight"} - {f"{head_name(self.weights)}.weight"}
        types = {tensor.source.name: tensor.type for tensor in self._plan.tensors}
        return {name: t for name, t in types.items() if t.name in GRIDS and name not in tables}

    def linears(self, classes: Sequence[str]) -> list[str]:
        """Matrices of the classes, or all."""
        return [name for name in self._shaped if not classes or name.split(".")[-2] in classes]

    def quantized(self, classes: Sequence[str], variant: Variant) -> dict[str, Array]:
        """All weights, those of `classes` quantized and decoded."""
        names, weights = self.linears(classes), dict(self.weights)
        with self._sketches(variant) as sketches, _as(variant):
            columns, rows = self._scalings(names, variant, sketches)
            for name, factors in columns.items():
                weights[name] = weights[name] * factors
            for name, factors in rows.items():
                weights[name] = (weights[name].T * factors).T
            for name in names:
                known = sketches[name if variant.mixtures else name.replace("attn_v", "attn_q")]
                sketch = _changed(known, variant)
                if name in columns:
                    sketch = sketch.multiplied(np.reciprocal(columns[name]))
                weights[name] = self._decoded(name, weights[name], sketch)
        return weights

    def _sketches(self, variant: Variant) -> Sketches:
        calibration = plan_calibration(
            self.checkpoint,
            self._plan.spec,
            self.calibration.windows[: variant.windows],
            self.calibration.store,
            max_ram=self._max_ram,
            threads=self._n_threads,
            energy=variant.energy,
        )
        return calibration.run()

    def _scalings(
        self, names: Sequence[str], variant: Variant, sketches: Sketches
    ) -> tuple[dict[str, Array], dict[str, Array]]:
        """What tensors are multiplied by, without changing any output: their columns, and their rows."""
        columns: dict[str, Array] = {}
        rows: dict[str, Array] = {}
        for norm, linears in self._norms.items():
            if variant.smoothing and not set(linears).isdisjoint(names):
                factors = _factors(sketches[linears[0]], variant.smoothing)
                columns |= dict.fromkeys(linears, factors)
                rows[norm] = np.reciprocal(factors)
        for name in names:
            if variant.rescaling and "ffn_down" in name:
                columns[name] = smooth.round_factors(_factors(sketches[name], variant.rescaling))
                rows[name.replace("ffn_down", "ffn_up")] = np.reciprocal(columns[name])
        return columns, rows

    def _decoded(self, name: str, w: Array, sketch: Sketch) -> Array:
        block_type = self._shaped[name]
        encode = make_encoder(block_type, sketch, self._workers)
        tiles = (w[start : start + ROWS_AT_ONCE] for start in range(0, len(w), ROWS_AT_ONCE))
        return np.vstack([decode(encode(np.ascontiguousarray(tile)), block_type) for tile in tiles])

    def logits(self, weights: dict[str, Array], text: Text, rounded: Sequence[str] = ()) -> Iterator[Array]:
        """Of each window [n_ctx, n_vocab]; what enters the matrices `rounded` is rounded to 8 bits."""
        with as_in_the_runtime():
            for window in text.windows:
                yield forward(window, met_in_8_bits(weights, rounded), self.decoder)


def _factors(sketch: Sketch, exponent: float) -> Array:
    with patch.object(smooth, "EXPONENT", exponent):
        return smooth.channel_factors(sketch.diagonal())


def _changed(sketch: Sketch, variant: Variant) -> Sketch:
    """A copy, with what the variant leaves out or adds."""
    if variant.diagonal:
        return Sketch.diagonal_only(sketch.diagonal(), sketch.n_tokens)
    kept = np.float32(1 - variant.shrinkage)
    residual = kept * sketch.residual + np.float32(variant.shrinkage) * sketch.diagonal()
    return Sketch(sketch.n_tokens, residual, np.sqrt(kept) * sketch.factor)


@contextmanager
def _as(variant: Variant) -> Iterator[None]:
    """Shaping with the constants of a variant."""
    with ExitStack() as stack:
        stack.enter_context(patch.multiple(shape, DAMPING=variant.damping, MOST_SWEEPS=variant.sweeps))
        if not variant.by_energy:
            stack.enter_context(patch.object(shape, "order_runs", _as_they_come))
        if not variant.trials:
            stack.enter_context(patch.object(AffineSuperScales, "choose", Scales.choose))
        yield


def _as_they_come(diagonal: Array) -> list[NDArray[np.int64]]:
    return order_runs(np.ones_like(diagonal))


class Figures:
    """Measured figures, one JSON line each; what is there is not measured again."""

    def __init__(self, bench: Bench, path: Path, checkpoint: str) -> None:
        self._bench, self._path, self._checkpoint = bench, path, checkpoint
        self._references: dict[str, list[Logits]] = {}
        lines = path.read_text().splitlines() if path.exists() else []
        self._known = {json.dumps(line["key"]): np.array(line["kl"]) for line in map(json.loads, lines)}

    def divergences(
        self, row: Row, variant: Variant, texts: Sequence[Text]
    ) -> dict[tuple[str, bool], NDArray[np.float64]]:
        """Mean KL of each window [n_windows], by text and whether activations are rounded."""
        keys = {(t.name, rounded): self._key(row, variant, t, rounded) for t in texts for rounded in (False, True)}
        if not set(keys.values()) <= self._known.keys():
            weights = self._bench.quantized(row.classes, variant)
            for text in texts:
                for rounded in (False, True):
                    self._add(keys[text.name, rounded], self._measure(weights, text, row, rounded))
        return {which: self._known[key] for which, key in keys.items()}

    def _measure(self, weights: dict[str, Array], text: Text, row: Row, rounded: bool) -> NDArray[np.float64]:
        if text.name not in self._references:
            exact = self._bench.logits(self._bench.weights, text)
            self._references[text.name] = [Logits.pack(*pair) for pair in zip(exact, text.windows, strict=True)]
        names = self._bench.linears(row.classes) if rounded else ()
        pairs = zip(self._references[text.name], self._bench.logits(weights, text, names), strict=True)
        return np.array([kl_divergence(reference, logits).mean() for reference, logits in pairs])

    def _key(self, row: Row, variant: Variant, text: Text, rounded: bool) -> str:
        n_windows = len(self._bench.calibration.windows)
        key = [source_digest(), self._checkpoint, n_windows, row.classes, asdict(variant), text.digest, rounded]
        return json.dumps(key)

    def _add(self, key: str, kl: NDArray[np.float64]) -> None:
        self._known[key] = kl
        with open(self._path, "a") as file:
            file.write(json.dumps({"key": json.loads(key), "kl": kl.tolist()}) + "\n")


def table(rows: Sequence[Row], bench: Bench, figures: Figures, texts: Sequence[Text]) -> Iterator[str]:
    """Lines of Markdown, each as soon as it is known."""
    yield "| what | quantized | text | activations | without | with | ratio (95%) |"
    yield "|" + " --- |" * 7
    for row in rows:
        if not bench.linears(row.classes):
            print(f"{row.what}: this model has no {', '.join(row.classes)}", file=sys.stderr)
            continue
        without, with_it = (figures.divergences(row, variant, texts) for variant in (row.without, row.with_it))
        for text, rounded in without:
            before, after = without[text, rounded], with_it[text, rounded]
            times, (low, high) = ratio(after, before)
            values = [f"{before.mean():.4f}", f"{after.mean():.4f}", f"{times:.3f} ({low:.3f} to {high:.3f})"]
            activations = "8 bits" if rounded else "float32"
            cells = [row.what, ", ".join(row.classes) or "all", text, activations, *values]
            yield f"| {' | '.join(cells)} |"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model_dir", type=Path)
    add("--cache", type=Path, required=True, help="of calibrations")
    add("--folder", type=Path, required=True, help="keeps the figures")
    add("--rows", type=re.compile, default=re.compile(""), metavar="REGEX", help="only rows whose names match")
    add("--windows", type=int, default=4, metavar="N", help=f"of {CTX} tokens of convergence60")
    add("--text", type=TextFile.parse, action="append", default=[], metavar="NAME=FILE:WINDOWSxCTX", help="repeatable")
    add("--calib-windows", type=int, default=WINDOWS[0], metavar="N", help=f"of {CTX} tokens")
    add("--max-ram", default="4G", help="of each calibration")
    add("--threads", type=int, default=2)
    add("--report", type=Path, metavar="STEM", help="write STEM.md")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    texts = cut_texts(arguments.model_dir, {"convergence": arguments.windows}, arguments.text)
    rows = [row for row in ROWS if arguments.rows.search(row.what)]
    with Workers(arguments.threads) as workers:
        bench = Bench(
            arguments.model_dir,
            arguments.cache,
            calib_windows=arguments.calib_windows,
            max_ram=parse_size(arguments.max_ram),
            workers=workers,
            n_threads=arguments.threads,
        )
        figures = Figures(bench, arguments.folder / "figures.jsonl", bench.checkpoint.fingerprint())
        lines = []
        for line in table(rows, bench, figures, texts):
            print(line, flush=True)
            lines.append(line)
    if arguments.report:
        arguments.report.with_suffix(".md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
