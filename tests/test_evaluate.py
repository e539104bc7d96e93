"""Evaluation: its figures against a forward pass in memory, whatever the memory and threads; what it refuses."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args, get_type_hints

import gguf
import numpy as np
import pytest
import tiny_models
from click.testing import CliRunner
from gguf_files import describe, placeholder_vocabulary, write_f32
from hypothesis import given
from hypothesis import strategies as st

from sq_stream import api
from sq_stream.calibrate import shingles, streamed
from sq_stream.calibrate.corpus import build_corpus
from sq_stream.cli import cli
from sq_stream.demo import model_folder
from sq_stream.demo.generate import read_model
from sq_stream.errors import (
    BadInputError,
    DoesNotFitError,
    SqStreamError,
    StorageError,
    UnsupportedModelError,
    UsageError,
)
from sq_stream.evaluate import budget as budgets
from sq_stream.evaluate import run as evaluation
from sq_stream.evaluate.compare import Comparison
from sq_stream.evaluate.models import Reference, _checkpoint_model, open_model
from sq_stream.evaluate.results import Estimate, Evaluation, SuiteResult
from sq_stream.evaluate.statistics import Resampling, TokenScores, summarize
from sq_stream.evaluate.stream import score
from sq_stream.evaluate.suites import Suite, cut, make_suites
from sq_stream.events import Progress, StageStarted
from sq_stream.formats.checkpoint import Checkpoint
from sq_stream.models.forward import find_decoder, forward
from sq_stream.text.encode import Tokenizer
from sq_stream.text.vocabulary import Vocabulary, read_vocabulary

ROOT = Path(__file__).parents[1]
MODEL = model_folder()


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """fast.gguf, and bf16.gguf with the reference's own weights."""
    folder = tmp_path_factory.mktemp("files")
    api.quantize(MODEL, folder / "fast.gguf", pure=True, effort="fast", threads=2)
    api.quantize(MODEL, folder / "bf16.gguf", recipe="bf16", effort="fast", threads=2)
    return folder


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return read_vocabulary(MODEL, arch="qwen35", n_vocab=4096)


@pytest.fixture(scope="module")
def evaluate(cache: Path) -> Callable[..., Evaluation]:
    def call(*paths: Path, **options: Any) -> Evaluation:
        return api.evaluate(paths, MODEL, **{"cache": cache, "windows": 2, "threads": 2, **options})

    return call


@pytest.fixture(scope="module")
def scored(evaluate: Callable[..., Evaluation], files: Path) -> Evaluation:
    suites = ["heldout120", "general"]
    return evaluate(files / "fast.gguf", files / "bf16.gguf", baselines=["rtn"], suites=suites)


def log_probabilities(decoder: Any, weights: Any, tokens: np.ndarray) -> np.ndarray:
    logits = forward(tokens, weights, decoder).astype(np.float64)
    return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)


@given(st.data())
def test_tiles_of_the_vocabulary_give_what_all_of_it_does(data: st.DataObject) -> None:
    n, n_vocab = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 40))
    random = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    spread = data.draw(st.sampled_from([0.0, 1.0, 30.0, 3000.0]))
    logits = (random.standard_normal((3, n, n_vocab)) * spread + random.standard_normal((3, n, 1)) * 100).astype("f4")
    targets = random.integers(n_vocab, size=n).astype(np.int32)
    cuts = sorted({0, *data.draw(st.lists(st.integers(1, n_vocab), max_size=6)), n_vocab})
    comparison = Comparison.empty(3, targets)
    for start, stop in itertools.pairwise(cuts):
        comparison.add(start, iter(logits[:, :, start:stop]))
    exact = logits.astype(np.float64)
    log_p = exact - np.logaddexp.reduce(exact, axis=-1, keepdims=True)
    for m in range(3):
        scale = np.abs(exact).max() + 1
        np.testing.assert_allclose(comparison.loss(m), -log_p[m, np.arange(n), targets], atol=1e-6 * scale)
        kl = (np.exp(log_p[0]) * (log_p[0] - log_p[m])).sum(axis=-1)
        np.testing.assert_allclose(comparison.kl(m), kl, rtol=1e-5, atol=1e-6 * scale)
        np.testing.assert_array_equal(comparison.best[m], logits[m].argmax(axis=-1))


def test_figures_are_those_of_a_forward_pass_in_memory(scored: Evaluation, files: Path, vocabulary: Vocabulary) -> None:
    windows = build_corpus(Tokenizer.open(MODEL), vocabulary).heldout[:2]
    p = log_probabilities(*read_model(files / "bf16.gguf"), windows)
    q = log_probabilities(*read_model(files / "fast.gguf"), windows)
    p_next, q_next = (np.take_along_axis(x[:, :-1], windows[:, 1:, None], -1)[..., 0] for x in (p, q))
    kl = (np.exp(p) * (p - q)).sum(axis=-1)
    own = scored.suites[0].score("fast")
    assert own.loss.value == pytest.approx(-q_next.mean(), rel=1e-5)
    assert own.perplexity == pytest.approx(np.exp(-q_next.mean()), rel=1e-4)
    assert own.loss_gap.value == pytest.approx(p_next.mean() - q_next.mean(), abs=1e-5)
    assert own.mean_kl.value == pytest.approx(kl.mean(), rel=1e-4)
    assert (own.median_kl, own.kl_99, own.kl_999) == pytest.approx(np.quantile(kl, [0.5, 0.99, 0.999]), rel=1e-3)
    assert own.top1_agreement.value == pytest.approx((p.argmax(-1) == q.argmax(-1)).mean(), abs=0.002)
    assert own.rms_dp == pytest.approx(np.sqrt(((np.exp(q_next) - np.exp(p_next)) ** 2).mean()), rel=1e-3)
    for part in own.kl_by_position:
        assert part.mean_kl == pytest.approx(kl[:, part.first : part.last + 1].mean(), rel=1e-3)
    assert sum(own.kl_histogram.counts) == kl.size


def test_the_models_and_suites_are_told(scored: Evaluation, files: Path) -> None:
    reference, fast, bf16, rtn = scored.models
    assert [m.role for m in scored.models] == ["reference", "candidate", "candidate", "baseline"]
    assert [s.model for s in scored.suites[1].scores] == [m.name for m in scored.models]
    assert (fast.recipe, fast.effort, fast.file_bytes) == (
        "q4_k_m --pure",
        "fast",
        (files / "fast.gguf").stat().st_size,
    )
    assert (rtn.made, rtn.file_bytes, rtn.tensor_bytes) == ("rtn", None, fast.tensor_bytes)
    assert 4.5 < fast.bits_per_weight < 4.7 < reference.bits_per_weight == 16 < bf16.bits_per_weight < 16.1
    assert [(s.name, s.n_windows, s.n_ctx) for s in scored.suites] == [("heldout120", 2, 512), ("general", 2, 256)]
    assert scored.peak_ram > 0


def test_the_references_own_weights_lose_nothing(scored: Evaluation) -> None:
    for suite in scored.suites:
        for name in ("model", "bf16"):
            own = suite.score(name)
            assert (own.mean_kl.value, own.loss_gap.value, own.rms_dp) == (0, 0, 0)
            assert own.top1_agreement.value == 1
            assert not own.fits


def test_a_folder_is_evaluated_too(evaluate: Callable[..., Evaluation]) -> None:
    found = evaluate(MODEL, suites=["general"], windows=1)
    assert [m.name for m in found.models] == ["model", str(MODEL)]
    assert found.models[1].bits_per_weight == 16
    assert found.suites[0].score(str(MODEL)).mean_kl.value == 0


def test_rtn_is_what_fast_writes_and_nothing_of_it_is_recovered(scored: Evaluation) -> None:
    suite = scored.suites[0]
    fast, rtn = suite.score("fast"), suite.score("rtn of fast")
    assert (fast.loss, fast.mean_kl, fast.kl_histogram) == (rtn.loss, rtn.mean_kl, rtn.kl_histogram)
    of_fast, of_bf16 = suite.recoveries
    assert of_fast.kl == Estimate(0, 0, 0)
    assert of_bf16.kl == Estimate(1, 1, 1)


def test_results_do_not_depend_on_threads_or_memory(
    evaluate: Callable[..., Evaluation], files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"baselines": ["rtn"], "suites": ["general"]}
    expected = evaluate(files / "fast.gguf", **options).suites
    original = budgets._ways
    monkeypatch.setattr(budgets, "_ways", lambda *a: (way for way in original(*a) if not way.resident))
    monkeypatch.setattr("sq_stream.calibrate.weights.TILE_WEIGHTS", 2**14)  # so that matrices are read in tiles
    monkeypatch.setattr("sq_stream.evaluate.weights.CHUNK_WEIGHTS", 2**12)
    monkeypatch.setattr("sq_stream.calibrate.gguf_weights.CHUNK_WEIGHTS", 2**12)
    assert evaluate(files / "fast.gguf", **options, threads=1).suites == expected


@pytest.mark.parametrize("name", sorted(tiny_models.MODELS))
def test_a_file_of_every_architecture_is_read_as_its_checkpoint(name: str, tmp_path: Path) -> None:
    """A GGUF file of float32 weights in llama.cpp's conventions has no divergence from the checkpoint."""
    folder = tiny_models.write(name, tmp_path / "model")
    checkpoint = Checkpoint.open(folder)
    spec = describe(checkpoint)
    path = write_f32(tmp_path / "x.gguf", checkpoint, spec, tiny_models.N_VOCAB)
    reference = tiny_reference(checkpoint, spec)
    tokens = np.random.RandomState(0).randint(0, tiny_models.N_VOCAB, (3, 24)).astype(np.int32)
    suite = Suite("random", tokens, np.arange(3, dtype=np.int32))
    with reference.model, open_model(path, "x", "candidate", reference) as model:
        models = [reference.model, model]
        budget = budgets.choose_budget(models, [suite], vocabulary_bytes=0, before=0, threads=2, max_ram=2**31)
        scores = score(models, [suite], tmp_path, budget, lambda event: None)["random"]
    assert not scores["x"].kl.any()
    weights = {t.name: t.read(Checkpoint.open(folder), 0, t.n_rows).reshape(t.shape) for t in spec.tensors}
    log_p = log_probabilities(find_decoder(spec.arch, spec.metadata), weights, tokens)
    expected = -np.take_along_axis(log_p[:, :-1], tokens[:, 1:, None], -1)[..., 0]
    np.testing.assert_allclose(scores["x"].loss, expected, atol=1e-4)


def tiny_reference(checkpoint: Checkpoint, spec: Any) -> Reference:
    metadata = tuple(placeholder_vocabulary(tiny_models.N_VOCAB))
    vocabulary = Vocabulary("gpt2", "default", tiny_models.N_VOCAB, metadata)
    return Reference(_checkpoint_model("reference", "reference", checkpoint, spec), checkpoint, spec, vocabulary)


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"suites": ["wikitext"]}, UsageError, "'wikitext' is not one of heldout120"),
            ({"texts": ["no.txt"]}, UsageError, "no.txt: no such text"),
            ({"texts": [str(MODEL)]}, StorageError, "Is a directory"),
            ({"texts": [str(MODEL / "config.json")], "ctx": 100_000}, BadInputError, "make no window of 100000"),
            ({"texts": [str(MODEL / "model.safetensors")]}, BadInputError, "not UTF-8"),
            ({"texts": [str(MODEL / "README.md")], "ctx": 63}, UsageError, "--ctx 63: a window has 64 to"),
            ({"windows": 0}, UsageError, "--windows 0"),
            ({"baselines": ["no.gguf"]}, BadInputError, "no.gguf does not exist"),
            ({"baselines": ["rtn", "rtn"]}, UsageError, "rtn is named twice"),
            ({"max_ram": "100M"}, DoesNotFitError, "the smallest that works is --max-ram"),
            ({"threads": 100_000}, UsageError, "--threads 100000"),
        ],
    )
    def test_options(
        self,
        evaluate: Callable[..., Evaluation],
        files: Path,
        options: dict[str, Any],
        error: type[SqStreamError],
        message: str,
    ) -> None:
        with pytest.raises(error, match=re.escape(message)):
            evaluate(files / "fast.gguf", **options)

    def test_a_baseline_needs_the_types_of_a_file(self, evaluate: Callable[..., Evaluation]) -> None:
        with pytest.raises(UsageError, match="takes its block types from a GGUF file"):
            evaluate(MODEL, baselines=["rtn"])

    def test_a_file_of_another_architecture(self, tmp_path: Path) -> None:
        folder = tiny_models.write("llama", tmp_path / "llama")
        with Checkpoint.open(folder) as checkpoint:
            path = write_f32(tmp_path / "x.gguf", checkpoint, describe(checkpoint), tiny_models.N_VOCAB)
        with pytest.raises(UnsupportedModelError, match="of architecture 'llama' and the reference of 'qwen35'"):
            api.evaluate(path, MODEL)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ("shape", "blk.0.attn_norm.weight has shape [64] and the reference's [32]"),
            ("missing", "has no tensor blk.0.attn_norm.weight"),
            ("more", "has a tensor blk.0.attn_sub_norm.weight, which the reference does not have"),
            ("tokens", "288 of its 288 tokens are not the reference's, the first being 0: 't0' and not 'u0'"),
            ("fewer tokens", "has 288 tokens and the reference 287"),
        ],
    )
    def test_a_file_of_another_model(self, change: str, message: str, tmp_path: Path) -> None:
        checkpoint = Checkpoint.open(tiny_models.write("llama", tmp_path / "llama"))
        spec = describe(checkpoint)
        path = write_f32(tmp_path / "x.gguf", checkpoint, spec, tiny_models.N_VOCAB)
        reference = tiny_reference(checkpoint, spec)
        norm = next(t for t in spec.tensors if t.name == "blk.0.attn_norm.weight")
        others = tuple(t for t in spec.tensors if t is not norm)
        n = norm.shape[0]
        message = message.replace("[64]", f"[{n}]").replace("[32]", f"[{n + 1}]")
        if change == "shape":
            wider = dataclasses.replace(norm, shape=(n + 1,))
            reference = dataclasses.replace(reference, spec=dataclasses.replace(spec, tensors=(*others, wider)))
        elif change == "more":
            extra = dataclasses.replace(norm, name="blk.0.attn_sub_norm.weight")
            path = write_f32(
                path, checkpoint, dataclasses.replace(spec, tensors=(*spec.tensors, extra)), tiny_models.N_VOCAB
            )
        elif change == "missing":
            path = write_f32(path, checkpoint, dataclasses.replace(spec, tensors=others), tiny_models.N_VOCAB)
        else:
            tokens = [f"u{i}" for i in range(288 if change == "tokens" else 287)]
            entries = tuple(
                dataclasses.replace(e, value=tokens) if e.key.endswith(".tokens") else e
                for e in reference.vocabulary.metadata
            )
            reference = dataclasses.replace(
                reference, vocabulary=dataclasses.replace(reference.vocabulary, metadata=entries)
            )
        with pytest.raises(BadInputError, match=re.escape(message)):
            open_model(path, "x", "candidate", reference)

    def test_weights_that_are_not_finite(
        self, evaluate: Callable[..., Evaluation], files: Path, tmp_path: Path
    ) -> None:
        data = bytearray((files / "bf16.gguf").read_bytes())
        tensor = next(t for t in gguf.GGUFReader(files / "bf16.gguf").tensors if t.name == "blk.1.ffn_up.weight")
        data[tensor.data_offset : tensor.data_offset + 2] = b"\xc0\x7f"
        path = tmp_path / "nan.gguf"
        path.write_bytes(data)
        with pytest.raises(BadInputError, match=r"'blk\.1\.ffn_up\.weight' holds nan"):
            evaluate(path)


class TestText:
    def test_windows_of_a_file_cover_it(self) -> None:
        suite = cut("x", np.arange(1000, dtype=np.int32), 101, bos=7)
        assert suite.windows.shape == (10, 101)
        assert (suite.windows[:, 0] == 7).all()
        np.testing.assert_array_equal(suite.windows[:, 1:].ravel(), np.arange(1000))

    def test_neighboring_windows_are_resampled_together(self) -> None:
        suite = cut("x", np.zeros(512 * 9, np.int32), 512, bos=None)
        assert suite.documents.tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 2]

    def test_windows_are_spread_evenly(self) -> None:
        suite = cut("x", np.arange(1000, dtype=np.int32), 100, bos=None, spread=5)
        assert suite.windows[:, 0].tolist() == [0, 200, 400, 600, 800]
        assert len(cut("x", np.arange(300, dtype=np.int32), 100, bos=None, spread=5).windows) == 3

    def test_a_long_text_is_encoded_in_pieces_that_lose_nothing(self, vocabulary: Vocabulary, tmp_path: Path) -> None:
        text = "".join(f"Line {i}, which is neither long nor short.\n" for i in range(20_000))
        (tmp_path / "long.txt").write_text(text)
        tokenizer = Tokenizer.open(MODEL)
        (suite,) = make_suites([], [tmp_path / "long.txt"], tokenizer, vocabulary, ctx=512)
        skip = 0 if tokenizer.encode("Line")[0] == suite.windows[0, 0] else 1
        assert text.startswith(tokenizer.decode(suite.windows[:, skip:].ravel().tolist()))

    def test_general_is_running_text_of_the_package_or_the_users(self, vocabulary: Vocabulary, tmp_path: Path) -> None:
        tokenizer = Tokenizer.open(MODEL)
        (own,) = make_suites(["general"], [], tokenizer, vocabulary)
        assert own.windows.shape == (64, 256)
        assert len(set(own.documents.tolist())) > 5
        (tmp_path / "a.txt").write_text("".join(f"It was day {i} of the voyage.\n" for i in range(4000)))
        (users,) = make_suites(["general"], [tmp_path / "a.txt"], tokenizer, vocabulary)
        assert users.windows.shape == (64, 256)
        assert "voyage" in tokenizer.decode(users.windows[-1].tolist())

    def test_texts_of_one_name_are_told_apart(self, vocabulary: Vocabulary, tmp_path: Path) -> None:
        paths = [tmp_path / "a" / "x.txt", tmp_path / "b" / "x.txt", tmp_path / "general"]
        for path in paths:
            path.parent.mkdir(exist_ok=True)
            path.write_text("word " * 500)
        suites = make_suites([], paths, Tokenizer.open(MODEL), vocabulary, ctx=64)
        assert [suite.name for suite in suites] == list(map(str, paths))


class TestCalibrationRecord:
    def test_packaged_texts_are_not_in_the_record_of_the_packaged_calibration(self, vocabulary: Vocabulary) -> None:
        tokenizer = Tokenizer.open(MODEL)
        corpus = build_corpus(tokenizer, vocabulary)
        record = shingles.sample(corpus.calib)
        assert len(record) == shingles.MOST_SAMPLED
        for suite in make_suites(["heldout120", "convergence60", "general"], [], tokenizer, vocabulary):
            found = shingles.overlap(suite.windows, record)
            assert found.n_found < 0.005 * found.n_text, suite.name
            assert not found.is_repetition
        assert shingles.overlap(corpus.calib, record) == shingles.Overlap(len(record), len(record), len(record))

    def test_a_copy_is_found_wherever_it_is_cut_and_with_changes(self, vocabulary: Vocabulary) -> None:
        corpus = build_corpus(Tokenizer.open(MODEL), vocabulary)
        record = shingles.sample(corpus.calib)
        for part in (corpus.calib[5:6], corpus.calib[100:110], np.concatenate([corpus.heldout, corpus.calib[:10]])):
            text = part.ravel()[137:].copy()
            text[::200] = 5
            assert shingles.overlap(cut("x", text, 300, bos=None).windows, record).is_repetition

    def test_a_small_record_is_whole(self) -> None:
        windows = np.random.RandomState(0).randint(0, 1000, (2, 100)).astype(np.int32)
        record = shingles.sample(windows)
        assert len(record) == 2 * (100 - shingles.SHINGLE + 1)
        assert shingles.overlap(windows[:1], record).n_found == 69
        assert shingles.overlap(windows[:1], record).is_repetition
        assert shingles.overlap(windows + 1, record).n_found == 0
        assert not shingles.overlap(windows + 1, record).is_repetition

    def test_a_file_is_not_scored_on_the_text_that_it_was_calibrated_on(
        self, evaluate: Callable[..., Evaluation], cache: Path, tmp_path: Path
    ) -> None:
        words = ["sea", "ship", "wind", "night", "captain", "morning", "letter", "house", "friend", "winter", "village"]
        random = np.random.RandomState(0)
        lines = [" ".join(random.choice(words, 12)) + ".\n" for _ in range(3000)]
        (tmp_path / "own.txt").write_text("".join(lines[:2000]))
        (tmp_path / "other.txt").write_text("".join(lines[2000:]))
        path = tmp_path / "x.gguf"
        api.quantize(MODEL, path, pure=True, calib=[tmp_path / "own.txt"], ctx=128, windows=24, cache=cache, threads=2)
        with pytest.raises(BadInputError, match=r"own.txt is in the calibration text of .*x\.gguf"):
            evaluate(path, texts=[tmp_path / "own.txt"], windows=None)
        (suite,) = evaluate(path, texts=[tmp_path / "other.txt"], ctx=64).suites
        assert suite.score("x").mean_kl.value > 0

    def test_a_note_says_what_cannot_be_checked(
        self, evaluate: Callable[..., Evaluation], cache: Path, tmp_path: Path
    ) -> None:
        api.calibrate(MODEL, windows=2, ctx=64, cache=cache, imatrix_out=tmp_path / "m.gguf")
        api.quantize(MODEL, tmp_path / "x.gguf", pure=True, imatrix=tmp_path / "m.gguf", cache=cache)
        (note,) = evaluate(tmp_path / "x.gguf", windows=1, suites=["general"]).notes
        assert "importance matrix of some text: whether the text scored here was in it is not checked" in note


class TestStatistics:
    def test_the_interval_of_a_mean_is_that_of_the_normal_distribution(self) -> None:
        figures = np.random.default_rng(1).standard_normal(400)
        estimate = Resampling(np.arange(400, dtype=np.int32)).estimate(np.positive, figures)
        error = figures.std() / 20
        assert estimate.value == pytest.approx(figures.mean())
        assert estimate.low == pytest.approx(figures.mean() - 1.96 * error, abs=0.1 * error)
        assert estimate.high == pytest.approx(figures.mean() + 1.96 * error, abs=0.1 * error)

    def test_windows_of_one_document_count_as_one(self) -> None:
        """Four times the same figures say no more than once."""
        figures = np.random.default_rng(1).standard_normal(50)
        once = Resampling(np.arange(50, dtype=np.int32)).estimate(np.positive, figures)
        documents = np.repeat(np.arange(50, dtype=np.int32), 4)
        four = Resampling(documents).estimate(np.positive, np.repeat(figures, 4))
        assert (four.value, four.low, four.high) == pytest.approx((once.value, once.low, once.high))

    def test_one_document_has_no_interval(self) -> None:
        estimate = Resampling(np.zeros(5, np.int32)).estimate(np.positive, np.arange(5.0))
        assert estimate == Estimate(2.0, None, None)

    @staticmethod
    def result(loss: float, kl: float, baseline_loss: float = 3.0, baseline_kl: float = 0.4) -> SuiteResult:
        n, n_ctx = 6, 40
        noise = np.random.default_rng(0).standard_normal((n, 1)) / 100
        suite = Suite("x", np.zeros((n, n_ctx), np.int32), np.arange(n, dtype=np.int32))

        def scores(loss: float, kl: float) -> TokenScores:
            return TokenScores(
                np.full((n, n_ctx - 1), loss) + noise, np.full((n, n_ctx), kl), np.ones((n, n_ctx), bool), noise
            )

        own = {"r": scores(2.0, 0.0), "c": scores(loss, kl), "b": scores(baseline_loss, baseline_kl)}
        return summarize(suite, own, reference="r", candidates=["c"], baselines=["b"])

    def test_recovery_is_paired(self) -> None:
        (recovery,) = self.result(2.25, 0.1).recoveries
        for share in (recovery.loss, recovery.kl):
            assert share is not None
            assert (share.value, share.low, share.high) == pytest.approx((0.75, 0.75, 0.75))

    def test_a_loss_under_the_references_is_fitting(self) -> None:
        result = self.result(1.9, 0.1)
        assert result.score("c").fits
        assert not result.score("b").fits
        assert result.score("c").loss_gap.value == pytest.approx(-0.1)

    def test_where_there_is_no_gap_nothing_is_recovered(self) -> None:
        (recovery,) = self.result(2.25, 0.1, baseline_loss=2.0).recoveries
        assert recovery.loss is None
        (recovery,) = self.result(2.25, 0.1, baseline_kl=0.0).recoveries
        assert recovery.kl is None


class TestWork:
    def test_the_smallest_memory_that_is_named_works(self, evaluate: Callable[..., Evaluation], files: Path) -> None:
        with pytest.raises(DoesNotFitError) as refusal:
            evaluate(files / "fast.gguf", baselines=["rtn"], max_ram="64M")
        n = int(str(refusal.value).rsplit(maxsplit=1)[1].removesuffix("M"))
        with pytest.raises(DoesNotFitError, match=f"--max-ram {n}M"):
            evaluate(files / "fast.gguf", baselines=["rtn"], max_ram=f"{n - 1}M")
        found = evaluate(files / "fast.gguf", baselines=["rtn"], max_ram=f"{n}M", windows=1)
        assert found.planned_ram <= n * 2**20
        assert found.threads == 1

    def test_nothing_is_left_behind(self, files: Path, tmp_path: Path) -> None:
        def stop(event: object) -> None:
            if isinstance(event, Progress) and event.tensor.startswith("fast: layer 2"):
                assert list(tmp_path.glob("evaluation-*/1/*"))
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            api.evaluate(files / "fast.gguf", MODEL, windows=1, cache=tmp_path, on_event=stop)
        assert not list(tmp_path.iterdir())

    def test_what_a_killed_process_has_left_is_removed(
        self, evaluate: Callable[..., Evaluation], files: Path, tmp_path: Path
    ) -> None:
        for name in ("evaluation-dead", "other"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "lock").touch()
        with evaluation._scratch(tmp_path) as alive:
            assert not (tmp_path / "evaluation-dead").exists()
            with evaluation._scratch(tmp_path):
                assert alive.exists()
        assert [path.name for path in tmp_path.iterdir()] == ["other"]

    def test_a_full_disk(
        self, evaluate: Callable[..., Evaluation], files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(evaluation.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
        with pytest.raises(DoesNotFitError, match="choose another place with --cache"):
            evaluate(files / "fast.gguf", cache=tmp_path)
        monkeypatch.undo()

        def fail(path: Path, x: object) -> None:
            raise StorageError(f"writing {path} failed (No space left on device)")

        monkeypatch.setattr(streamed, "write_chunk", fail)
        arguments = ["eval", files / "fast.gguf", "--ref", MODEL, "--windows", 1, "--cache", tmp_path]
        result = CliRunner().invoke(cli, [str(a) for a in arguments])
        assert result.exit_code == StorageError.exit_code
        assert "No space left" in result.output
        assert not list(tmp_path.iterdir())

    def test_progress_goes_up_to_the_end(self, files: Path, tmp_path: Path) -> None:
        events: list[Any] = []
        api.evaluate(files / "fast.gguf", MODEL, windows=1, cache=tmp_path, on_event=events.append)
        (start,) = (event for event in events if isinstance(event, StageStarted))
        done = [event.done for event in events if isinstance(event, Progress)]
        assert done == sorted(done)
        assert done[-1] == start.total == 512
        assert (start.stage, start.unit) == ("evaluate", "tokens")


def dataclasses_of(kind: Any) -> set[type]:
    if not dataclasses.is_dataclass(kind):
        return set().union(*map(dataclasses_of, get_args(kind)))
    return {kind}.union(*(dataclasses_of(hint) for hint in get_type_hints(kind).values()))


def test_every_field_of_the_json_is_documented() -> None:
    page = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
    section = page[page.index("## Evaluations as JSON") :]
    for kind in dataclasses_of(Evaluation):
        for field in dataclasses.fields(kind):
            assert f"`{field.name}`" in section, f"{kind.__name__}.{field.name}"


def test_the_command_line(files: Path, cache: Path) -> None:
    arguments = ["eval", files / "fast.gguf", "--ref", MODEL, "--baseline", files / "bf16.gguf", "--windows", 1]
    common = [*map(str, arguments), "--cache", str(cache), "--suite", "general"]
    text = CliRunner().invoke(cli, common).stdout
    assert "general: 1 windows of 256 tokens" in text
    assert re.search(r"^fast +2\.1 +4\.58 ", text, re.MULTILINE)
    assert "fast recovers from bf16: loss gap none to close, KL none to close" in text
    found = json.loads(CliRunner().invoke(cli, [*common, "--json"]).stdout)
    assert found["schema"] == 1
    assert found["suites"][0]["scores"][1]["mean_kl"]["value"] > 0
