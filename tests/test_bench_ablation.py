"""The ablations in bench/: what they call the product's way is what the product does, and transformations are exact."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

import ablation
import best_parts
from ablation import PRODUCT, Bench, Figures, Row, Variant
from activations import round_to_8_bits
from texts import Text, cut_texts

from sq_stream import api
from sq_stream.demo import model_folder
from sq_stream.parallel import Workers

MODEL = model_folder()
CLASSES = ("ffn_gate", "ffn_up", "ffn_down")


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    cache = tmp_path_factory.mktemp("cache")
    with Workers(2) as workers:
        yield Bench(MODEL, cache, calib_windows=4, max_ram=2**32, workers=workers, n_threads=2)


@pytest.fixture(scope="module")
def text() -> Text:
    (whole,) = cut_texts(MODEL, {"convergence": 1}, [])
    return Text("short", whole.windows[:, :64])


def only(layer: str, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the bench quantize nothing but matrices of this layer, for time."""
    linears = bench.linears
    monkeypatch.setattr(bench, "linears", lambda classes: [name for name in linears(classes) if layer in name])


def test_the_products_variant_is_what_the_product_writes(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only("blk.3.", bench, monkeypatch)
    weights = bench.quantized((), PRODUCT)
    options = {"windows": 4, "cache": bench.calibration.store.folder}
    api.quantize(MODEL, tmp_path / "x.gguf", pure=True, tensor_types=[r"token_embd|blk\.[012]\.=bf16"], **options)
    for tensor in gguf.GGUFReader(tmp_path / "x.gguf").tensors:
        stored = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_allclose(weights[tensor.name].reshape(stored.shape), stored, rtol=1e-6, err_msg=tensor.name)


@pytest.mark.parametrize("variant", [Variant(smoothing=0.5), Variant(smoothing=0, rescaling=0.5)])
def test_scaling_alone_changes_no_output(
    variant: Variant, bench: Bench, text: Text, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "_decoded", lambda name, w, sketch: w)
    scaled = bench.quantized(CLASSES, variant)
    assert sum((scaled[name] != bench.weights[name]).any() for name in scaled) > 3
    (logits,), (expected,) = bench.logits(scaled, text), bench.logits(bench.weights, text)
    np.testing.assert_allclose(logits, expected, atol=2e-3)


def test_every_variant_differs_from_the_product(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    only("blk.0.", bench, monkeypatch)
    product = bench.quantized(("ffn_down",), PRODUCT)
    others = [Variant(diagonal=True), Variant(shrinkage=0.3), Variant(damping=0.5), Variant(sweeps=0)]
    for variant in [*others, Variant(by_energy=False), Variant(rescaling=0.5), Variant(windows=2)]:
        other = bench.quantized(("ffn_down",), variant)
        assert any((other[name] != product[name]).any() for name in bench.linears(("ffn_down",))), variant


@pytest.mark.parametrize("n", [512, 96])
def test_activations_are_rounded_to_127_steps_of_their_block(n: int) -> None:
    x = np.random.RandomState(0).standard_normal((3, n)).astype(np.float32)
    blocks, rounded = (y.reshape(3, -1, 256 if n == 512 else 32) for y in (x, round_to_8_bits(x)))
    largest = np.abs(blocks).max(axis=-1, keepdims=True)
    assert (np.abs(rounded - blocks) <= 0.501 * largest / 127).all()
    np.testing.assert_allclose(np.abs(rounded).max(axis=-1, keepdims=True), largest, rtol=1e-6)
    steps = rounded * 127 / largest
    np.testing.assert_allclose(steps, np.rint(steps), atol=1e-3)


def test_figures_are_measured_once(bench: Bench, text: Text, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = Row("descent", ("ffn_up",), replace(PRODUCT, sweeps=0), PRODUCT)
    absent = Row("none", ("no_such",), PRODUCT, PRODUCT)
    lines = list(ablation.table([row, absent], bench, Figures(bench, tmp_path / "figures.jsonl", "model"), [text]))
    assert len(lines) == 2 + 2
    assert "| descent | ffn_up | short | 8 bits |" in lines[-1]
    assert all(0 < float(cell) < 1 for line in lines[2:] for cell in line.split("|")[5:7])
    assert all(re.fullmatch(r" (\d\.\d{3}) \(\1 to \1\) ", line.split("|")[7]) for line in lines[2:])  # of one window
    monkeypatch.setattr(Bench, "quantized", None)
    assert lines == list(ablation.table([row], bench, Figures(bench, tmp_path / "figures.jsonl", "model"), [text]))


@pytest.mark.slow
def test_the_parts_of_best_are_those_of_the_product(tmp_path: Path) -> None:
    """Without any the file is that of `balanced`, with all that of `best`, and there is a line for each."""
    left = [r"token_embd|blk\.[0123]\.(?!ffn_down)=bf16"]
    options = {"windows": 64, "ctx": 64, "tensor_types": left, "cache": tmp_path / "cache", "threads": 2}
    made = []
    for parts, effort in [(best_parts.Parts(), "balanced"), (best_parts.BEST, "best")]:
        best_parts.make(parts, MODEL, tmp_path / f"{parts.name}.gguf", options)
        api.quantize(MODEL, tmp_path / "x.gguf", pure=True, effort=effort, overwrite=True, **options)
        files = [gguf.GGUFReader(tmp_path / name) for name in (f"{parts.name}.gguf", "x.gguf")]
        for own, product in zip(*(file.tensors for file in files), strict=True):
            np.testing.assert_array_equal(own.data, product.data, err_msg=own.name)
        made.append((parts, tmp_path / f"{parts.name}.gguf"))
    texts = cut_texts(MODEL, {"heldout": 2}, [])
    *_, balanced, best = best_parts.table(made, MODEL, texts, threads=2)
    assert balanced.startswith("| balanced | 0.")
    assert re.search(r"^\| in-turn, two-sided, refined \| 0\..* \| 1\.000 \(1\.000 to 1\.000\) \|$", best)
