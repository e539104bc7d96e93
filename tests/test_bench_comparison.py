"""The comparison with llama.cpp in bench/: its KL divergence, its bars, and what it makes again."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import gguf
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

import bars
import candidates
import divergence
import pages
import recovery
from texts import TextFile

from sq_stream.demo import model_folder
from sq_stream.formats.blocks import F32, Q4_K, Q5_0, Q5_K, Q8_0


@pytest.fixture
def logits() -> tuple[np.ndarray, np.ndarray]:
    """Of a reference and of a file near it, as spread as those of a language model: [64, 3000] each."""
    rng = np.random.default_rng(5)
    reference = 3 * rng.standard_normal((64, 3000)) + 12 * rng.standard_exponential((64, 1)) * (np.arange(3000) == 7)
    return reference.astype(np.float32), (reference + 0.3 * rng.standard_normal((64, 3000))).astype(np.float32)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    x = logits.astype(np.float64)
    x -= x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def test_kl_divergence_from_stored_logits_is_that_of_the_exact_ones(logits):
    reference, near = logits
    tokens = np.arange(64, dtype=np.int32) % 9
    packed = divergence.Logits.pack(reference, tokens)
    p, q = log_softmax(reference), log_softmax(near)
    exact = (np.exp(p) * (p - q)).sum(axis=-1)
    assert exact.mean() > 0.01
    stored = divergence.kl_divergence(packed, near)
    np.testing.assert_allclose(stored, exact, atol=2e-4)
    assert abs(stored.mean() - exact.mean()) < 1e-4 * exact.mean()
    assert np.abs(divergence.kl_divergence(packed, reference)).max() < 1e-6
    np.testing.assert_array_equal(packed.top, reference.argmax(axis=-1))
    np.testing.assert_allclose(packed.loss, -p[np.arange(63), tokens[1:]], rtol=1e-5)


def scores(kl: float, loss: float) -> divergence.Scores:
    spread = np.linspace(0.9, 1.1, 20)[:, None]  # of the windows
    agrees = np.ones((20, 8), np.bool_)
    return divergence.Scores(kl * spread * np.ones((20, 8)), agrees, loss + 0.01 * spread * np.ones((20, 7)))


@pytest.mark.parametrize(("kl", "loss", "met"), [(0.26, 3.24, True), (0.28, 3.26, False)])
def test_bars(kl, loss, met):
    pure = "q4_k_m-pure"
    files = {
        "BF16": scores(0, 3),
        f"{pure}, sq-stream balanced": scores(kl, loss),
        f"{pure}, llama.cpp": scores(1, 4),
    }
    ratio, gap = bars.check("text", files, bars.RULES["reference"], skip=1)
    assert (ratio.figure, ratio.limit, ratio.met) == (pytest.approx(kl), 0.27, met)
    assert (gap.figure, gap.limit, gap.met) == (pytest.approx(4 - loss), 0.75, met)
    assert ratio.interval == pytest.approx((kl, kl))  # the windows differ by the same factors
    assert "**no**" in pages.bars_table([asdict(ratio), asdict(gap)], skip=1) or met


def test_the_extra_column_leaves_out_the_first_positions():
    first = scores(0.1, 3)
    first.kl[:, 0] = 50
    files = {"q4_k_m, sq-stream balanced": scores(0.1, 3), "q4_k_m, llama.cpp + imatrix": first}
    (bar,) = bars.check("text", files, bars.RULES["better"], skip=1)
    assert bar.figure < 0.1
    assert bar.figure_later == pytest.approx(1)


@pytest.mark.parametrize("argument", ["test.txt:2x256", "a=missing.txt:2x256", "a={file}", "a={file}:0x256"])
def test_a_wrong_text_is_refused(argument, tmp_path):
    (tmp_path / "file.txt").write_text("text")
    with pytest.raises(argparse.ArgumentTypeError):
        TextFile.parse(argument.format(file=tmp_path / "file.txt"))
    assert TextFile.parse(f"a={tmp_path / 'file.txt'}:2x256").n_ctx == 256


class Maker:
    """Writes a file, or is interrupted; remembers whether it was told to start afresh."""

    def __init__(self, path: Path) -> None:
        self.path, self.fresh, self.interrupted = path, [], False

    def __call__(self, fresh: bool) -> None:
        self.fresh.append(fresh)
        if self.interrupted:
            raise KeyboardInterrupt
        self.path.write_bytes(b"made")


def test_files_are_made_again_only_when_needed(tmp_path):
    settings: dict[str, Any] = {"calib_windows": 1, "max_ram": "1G", "threads": 1}
    shop = candidates.Workshop(model_folder(), tmp_path, **settings)
    make = Maker(tmp_path / "file.gguf")

    def request(code: int, shop: candidates.Workshop = shop) -> candidates.File:
        return shop._make("file", make.path, {"code": code}, make)

    first = request(1)
    assert request(1) == first
    assert make.fresh == [True]
    make.path.write_bytes(b"damaged")
    request(1)
    request(2)
    make.interrupted = True
    with pytest.raises(KeyboardInterrupt):
        request(3)
    make.interrupted = False
    request(3)  # goes on where it was interrupted
    assert make.fresh == [True, False, True, True, False]
    reusing = candidates.Workshop(model_folder(), tmp_path, **settings, reuse=True)
    assert request(4, reusing).sha256 == first.sha256
    assert len(make.fresh) == 5


@pytest.mark.parametrize(
    ("name", "q4_k_s", "n_gqa", "n_in", "chosen"),
    [  # llama-quantize's own, by --dry-run
        ("blk.0.attn_v.weight", Q5_K, 3, 768, "IQ4_XS"),
        ("blk.9.attn_v.weight", Q4_K, 4, 768, "Q5_K"),
        ("blk.9.attn_v.weight", Q5_0, 4, 576, "Q5_1"),
        ("blk.9.attn_q.weight", Q4_K, 4, 768, "IQ4_XS"),
        ("blk.9.attn_q.weight", Q5_0, 3, 576, "IQ4_NL"),
        ("blk.0.ffn_down.weight", Q5_K, 3, 1536, "Q5_K"),
        ("token_embd.weight", Q8_0, 3, 576, "Q8_0"),
        ("blk.0.attn_norm.weight", F32, 3, 576, "F32"),
    ],
)
def test_types_of_iq4(name, q4_k_s, n_gqa, n_in, chosen):
    assert candidates._iq4_type(name, q4_k_s, candidates.IQ4_TYPES["iq4_xs"], n_gqa, n_in).name == chosen


def test_llamacpps_files_hold_what_it_makes_of_the_reference(tmp_path):
    shop = candidates.Workshop(model_folder(), tmp_path, calib_windows=1, max_ram="1G", threads=1)
    theirs = {t.name: t for t in gguf.GGUFReader(shop.llamacpp("iq4_xs").path).tensors}
    reference = {t.name: t for t in gguf.GGUFReader(shop.reference.path).tensors}
    assert theirs.keys() == reference.keys()
    assert "IQ4_XS" in {t.tensor_type.name for t in theirs.values()}
    for name, tensor in theirs.items():
        x, y = (gguf.quants.dequantize(t.data, t.tensor_type) for t in (reference[name], tensor))
        assert np.linalg.norm(x - y) <= 0.12 * np.linalg.norm(x), name


def report() -> dict[str, Any]:
    names = ["BF16", bars.BASELINE, "q4_k_m-pure, sq-stream balanced"]
    results = [
        {
            **{"text": "a", "name": name, "tensor_mib": 100.0 + i, "bits_per_weight": 4.5, "mean_kl": 0.1 * i},
            **{"mean_kl_interval": (0.1 * i, 0.2 * i), "mean_kl_later": 0.1, "median_kl": 0.1, "kl_99": 1.0},
            **{"top1_agreement": 0.9, "loss": 3.0, "perplexity": 20.0, "kl_recovered": 0.5, "loss_recovered": None},
        }
        for i, name in enumerate(names)
    ]
    bar = asdict(bars.Bar("a", "a bar", 0.2, (0.1, 0.3), 0.2, 0.27, at_least=False, met=True))
    texts = [{"name": "a", "n_windows": 2, "n_ctx": 8, "sha256": ""}]
    took = {"seconds": 2.0, "cpu_seconds": 3.0, "peak_bytes": 2**28}
    files = [{"name": "BF16", **took}, {"name": names[1], **dict.fromkeys(took)}]
    model = {"model": "m", "skip": 1, "max_ram": "1G", "reuse": False, "texts": texts, "results": results}
    return {"models": [{**model, "command": "python bench/recovery.py m", "bars": [bar], "files": files}]}


def test_pages_show_every_figure():
    page, (name, svg) = pages.document(report()), *pages.charts(report(), "results").items()
    assert name == "results-m.svg"
    assert "![Mean KL divergence of every file](results-m.svg)" in page
    assert "| q4_k_m-pure, llama.cpp | 4.50 | 101.0 | 0.1000 | 3.0000 |" in page
    assert "| BF16 | 2 | 3 | 256 |" in page
    assert "\npython bench/recovery.py m\n" in page
    assert page.count("50.0%") == 3
    drawing = ElementTree.fromstring(svg)
    assert len(drawing.findall(".//{*}rect")) == 2  # all but the reference
    assert "q4_k_m-pure, sq-stream balanced" in svg


def test_a_page_keeps_the_models_that_are_not_measured_again(tmp_path):
    model, stem = report()["models"][0], tmp_path / "results"
    assert recovery.with_earlier({"models": [model]}, stem) == {"models": [model]}
    stem.with_suffix(".json").write_text(json.dumps({"models": [{**model, "command": "old"}, {**model, "model": "n"}]}))
    page = recovery.with_earlier({"models": [model]}, stem)
    assert [(m["model"], m["command"]) for m in page["models"]] == [("m", model["command"]), ("n", model["command"])]
    assert "results-n.svg" in pages.document(page)


def test_the_page_in_docs_is_made_of_its_figures():
    docs = Path(__file__).parents[1] / "docs"
    figures = json.loads((docs / "results.json").read_text())
    assert (docs / "results.md").read_text() == pages.document(figures)
    for name, svg in pages.charts(figures, "results").items():
        assert (docs / name).read_text() == svg
