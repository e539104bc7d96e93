"""Calibration of tiny models: the streamed pass against one in memory, resuming, the store, budgets."""

from __future__ import annotations

import numpy as np
import pytest
import tiny_models
from calibrations import BATCH_TOKENS, OPTIONS, WINDOWS, Stop, assert_same_bits, calibrate, run
from gguf_files import describe

from sq_stream.calibrate import budget as budgets
from sq_stream.calibrate import calibration, weights
from sq_stream.calibrate.budget import FIXED_BYTES, rank_choices
from sq_stream.calibrate.calibration import plan_calibration
from sq_stream.calibrate.sketch import Sketch
from sq_stream.calibrate.store import Store
from sq_stream.errors import BadInputError, DoesNotFitError
from sq_stream.events import Progress, StageStarted
from sq_stream.formats.checkpoint import Checkpoint
from sq_stream.models.forward import find_decoder
from sq_stream.models.forward import forward as forward_in_memory

NAMES = [name for name, model in tiny_models.MODELS.items() if not model.mtp]


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr(budgets, "BATCH_TOKENS", BATCH_TOKENS)


@pytest.mark.parametrize("name", NAMES)
def test_sketches_are_the_moments_of_a_pass_in_memory(open_model, tmp_path, name):
    checkpoint, spec = open_model(name)
    tensors = {t.name: t.read(checkpoint, 0, t.n_rows).reshape(t.shape) for t in spec.tensors}
    expected = {}

    def observe(site, x):
        x = x.reshape(-1, x.shape[-1]).astype(np.float64)
        expected.update({f"{name}.weight": x.T @ x / len(x) for name in site})

    forward_in_memory(WINDOWS, tensors, find_decoder(spec.arch, spec.metadata), observe)
    sketches, _ = run((checkpoint, spec), tmp_path)
    assert sketches.keys() - expected.keys() <= {"token_embd.weight"}
    for tensor, moment in expected.items():
        scale = np.sqrt(np.diag(moment))
        error = (sketches[tensor].dense() - moment) / scale / scale[:, None]
        assert np.abs(error).max() < 5e-4, tensor
        assert sketches[tensor].n_tokens == WINDOWS.size


def test_threads_and_memory_do_not_change_a_bit(open_model, tmp_path, monkeypatch):
    model = open_model("qwen35")
    expected, _ = run(model, tmp_path / "a", threads=1)
    assert_same_bits(run(model, tmp_path / "b", threads=4)[0], expected)
    reads = []
    monkeypatch.setattr(weights, "is_large", lambda shape: len(shape) == 2 and shape[1] > 8)
    monkeypatch.setattr(calibration, "budgets", lambda *args, **_: [budgets.Budget(2, False, {}, 0, 0)])
    monkeypatch.setattr(
        weights.RowsOnDisk, "__getitem__", lambda self, rows, read=weights.RowsOnDisk.__getitem__: (
            reads.append(self.tensor.name) or read(self, rows)
        )
    )  # fmt: skip
    assert_same_bits(run(model, tmp_path / "c")[0], expected)
    assert "blk.0.ffn_down.weight" in reads


def test_interrupted_work_goes_on_at_the_last_finished_layer(open_model, tmp_path):
    model = open_model("qwen35")
    expected, _ = run(model, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(model, tmp_path / "parts", on_event=Stop(3))
    (summary,) = Store(tmp_path / "parts").list()
    assert (summary.done, summary.steps, summary.complete) == (2, 5, False)
    seen = []
    sketches, notes = run(model, tmp_path / "parts", threads=1, on_event=seen.append)
    assert "resuming the calibration: 2 of 5 steps are done" in notes
    assert next(e.tensor for e in seen if isinstance(e, Progress)) == "layer 3 of 4"
    assert_same_bits(sketches, expected)
    assert not list(tmp_path.rglob("*.zst"))


def test_a_second_calibration_only_reads(open_model, tmp_path, monkeypatch):
    model = open_model("llama")
    expected, _ = run(model, tmp_path)
    monkeypatch.delattr(calibration, "run_forward")
    sketches, notes = run(model, tmp_path, threads=1)
    assert_same_bits(sketches, expected)
    assert notes == [f"calibration found in {tmp_path / Store(tmp_path).list()[0].key}"]


def test_what_sketches_depend_on(open_model, tmp_path):
    """Other text, energy or weights: another entry."""
    model = open_model("llama")
    run(model, tmp_path)
    run(model, tmp_path, WINDOWS[::-1])
    run(model, tmp_path, WINDOWS.reshape(-1, 20))
    run(model, tmp_path, energy=0.9)
    run(open_model("mistral"), tmp_path)
    summaries = Store(tmp_path).list()
    assert len(summaries) == 5
    assert {summary.n_tokens for summary in summaries} == {WINDOWS.size}
    assert all(summary.complete and summary.n_bytes > 0 for summary in summaries)
    assert {summary.model for summary in summaries} == {"llama", "mistral"}


def test_the_store_is_cleared(open_model, tmp_path):
    store = Store(tmp_path)
    assert store.list() == []
    run(open_model("llama"), tmp_path)
    run(open_model("mistral"), tmp_path)
    (tmp_path / "something else").mkdir()
    first, second = store.list()
    with pytest.raises(BadInputError, match="no calibration nonsense"):
        store.clear(["nonsense"])
    assert store.clear([first.key]) == first.n_bytes
    assert store.list() == [second]
    assert store.clear() == second.n_bytes
    assert [path.name for path in tmp_path.iterdir()] == ["something else"]


def test_default_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert Store().folder == tmp_path / "sq-stream"


@pytest.mark.parametrize("windows", [np.zeros((0, 40), np.int32), np.zeros(40, np.int32)])
def test_no_windows_are_refused(open_model, tmp_path, windows):
    with pytest.raises(BadInputError, match="windows"):
        run(open_model("llama"), tmp_path, windows)


@pytest.mark.parametrize("token", [-1, tiny_models.N_VOCAB])
def test_ids_outside_the_vocabulary_are_refused(open_model, tmp_path, token):
    windows = WINDOWS.copy()
    windows[3, 7] = token
    with pytest.raises(BadInputError, match=f"token id {token}"):
        run(open_model("llama"), tmp_path, windows)


@pytest.mark.parametrize(
    ("tensor", "value", "words"),
    [
        ("model.layers.1.mlp.up_proj.weight", np.nan, r"up_proj.weight' holds nan at \[row 3, column 5\]"),
        ("model.embed_tokens.weight", np.inf, r"embed_tokens.weight' holds inf at \[row 3, column 5\]"),
        ("model.layers.1.mlp.up_proj.weight", 1e38, r"activations that enter blk.1.ffn_down.weight are not finite"),
    ],
)
def test_values_that_are_not_finite_are_refused(tmp_path, tensor, value, words):
    config, tensors = tiny_models.make("smollm2")
    tensors[tensor][3, 5] = value
    folder = tiny_models.write_checkpoint(tmp_path / "model", config, tensors, "float32")
    windows = WINDOWS.copy()
    windows[0, 0] = 3
    with (
        Checkpoint.open(folder) as checkpoint,
        pytest.raises(BadInputError, match=words),
    ):
        run((checkpoint, describe(checkpoint)), tmp_path / "cache", windows, threads=3)


def test_linears_without_data_are_neutral_and_named(open_model, tmp_path):
    with calibrate(open_model("qwen35_mtp"), tmp_path) as sketches:
        assert set(sketches.unseen) == {
            f"blk.4.{name}.weight"
            for name in (
                "attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down", "nextn.eh_proj",
            )
        }  # fmt: skip
        sketch = sketches["blk.4.ffn_down.weight"]
        np.testing.assert_array_equal(sketch.dense(), np.eye(512))
        assert sketch.n_tokens == 0
        assert sketches["token_embd.weight"].n_tokens == 0


def test_dead_channels_are_counted(tmp_path):
    config, tensors = tiny_models.make("smollm2")
    tensors["model.layers.0.mlp.up_proj.weight"][7:10] = 0
    tensors["model.norm.weight"][4] = 0
    folder = tiny_models.write_checkpoint(tmp_path / "model", config, tensors)
    with (
        Checkpoint.open(folder) as checkpoint,
        calibrate((checkpoint, describe(checkpoint)), tmp_path / "cache") as sketches,
    ):
        assert sketches.dead == {"blk.0.ffn_down.weight": 3, "token_embd.weight": 1}
        assert np.flatnonzero(sketches["blk.0.ffn_down.weight"].diagonal() == 0).tolist() == [7, 8, 9]


def test_progress_is_told_in_tokens(open_model, tmp_path):
    seen = []
    run(open_model("llama"), tmp_path, on_event=seen.append)
    assert StageStarted("calibrate", WINDOWS.size, "tokens") in seen
    done = [event.done for event in seen if isinstance(event, Progress)]
    assert done == sorted(done)
    assert done[-1] == WINDOWS.size


def test_budgets_give_up_threads_first_and_exactness_last(open_model, tmp_path, monkeypatch):
    monkeypatch.setattr(budgets, "is_large", lambda shape: len(shape) == 2 and shape[1] > 8)
    monkeypatch.setattr(budgets, "TILE_WEIGHTS", 2**10)
    monkeypatch.setattr(budgets, "RANKS", (64, 16))
    model, store = open_model("qwen35"), Store(tmp_path)

    def budget_for(max_ram):
        return plan_calibration(*model, WINDOWS, store, max_ram=max_ram, threads=8).budget

    plenty = budget_for(2**30)
    assert (plenty.threads, plenty.resident, plenty.ranks) == (8, True, {})
    order = []
    for max_ram in range(plenty.peak_ram, FIXED_BYTES, -(2**18)):
        try:
            chosen = budget_for(max_ram)
        except DoesNotFitError as error:
            needed = int(str(error).rsplit(maxsplit=1)[1].removesuffix("M")) * 2**20
            assert budget_for(needed).peak_ram <= needed
            break
        assert chosen.peak_ram <= max_ram
        order.append((tuple(chosen.ranks.items()), -chosen.threads, not chosen.resident))
    assert any(ranks for ranks, *_ in order)
    assert any(streamed for *_, streamed in order)
    exact = [step for step in order if not step[0]]
    assert order[: len(exact)] == exact
    assert exact == sorted(exact)


def only_sketched(calibration):
    """Bytes of a use that has no room for an exact matrix of 512 × 512 values."""
    return 0 if 512 in calibration.ranks else 2**40


def test_what_comes_after_a_calibration_must_fit_too(open_model, tmp_path):
    model, store = open_model("llama"), Store(tmp_path)
    with pytest.raises(DoesNotFitError, match=r"smallest that works is --max-ram 5000M"):
        plan_calibration(*model, WINDOWS, store, **OPTIONS, afterwards=lambda calibration: 5000 * 2**20)
    planned = plan_calibration(*model, WINDOWS, store, **OPTIONS, afterwards=only_sketched)
    assert planned.ranks == {512: 128}
    assert planned.ranks in rank_choices(planned.layers, planned.reader.n_embd)


def test_sketched_sites_still_calibrate(open_model, tmp_path):
    """The narrow sketch of a wide site: its strongest directions, and the diagonal exactly."""
    model = open_model("llama")
    exact, _ = run(model, tmp_path / "exact")
    sketched, _ = run(model, tmp_path / "sketched", afterwards=only_sketched)
    for name, sketch in sketched.items():
        if name.endswith("ffn_down.weight"):
            assert sketch.rank == 128
            np.testing.assert_allclose(sketch.diagonal(), exact[name].diagonal(), rtol=1e-3)
            left = np.linalg.norm(sketch.dense() - exact[name].dense())
            only_diagonal = np.linalg.norm(np.diag(sketch.diagonal()) - exact[name].dense())
            assert left < 0.6 * only_diagonal
        else:
            np.testing.assert_array_equal(sketch.factor, exact[name].factor)
    assert len(Store(tmp_path / "sketched").list()) == 1


def test_what_the_store_has_needs_no_memory_to_compute(open_model, tmp_path):
    model = open_model("llama")
    expected, _ = run(model, tmp_path)
    planned = plan_calibration(*model, WINDOWS, Store(tmp_path), max_ram=2**20, threads=2)
    assert (planned.found, planned.peak_ram, planned.n_tokens, planned.ranks) == (True, 0, 0, {})
    assert_same_bits(run(model, tmp_path, max_ram=2**20)[0], expected)
    with pytest.raises(DoesNotFitError, match="too small for this model"):
        run(model, tmp_path / "empty", max_ram=2**20)


def test_a_narrow_sketch_is_used_where_an_exact_one_cannot_be(open_model, tmp_path):
    model = open_model("llama")
    run(model, tmp_path)
    expected, _ = run(model, tmp_path, afterwards=only_sketched)
    assert_same_bits(run(model, tmp_path, max_ram=2**20, afterwards=only_sketched)[0], expected)
    assert len(Store(tmp_path).list()) == 2


def test_what_is_found_damaged_and_cannot_be_computed_again_is_refused(open_model, tmp_path):
    model = open_model("llama")
    run(model, tmp_path)
    next(tmp_path.rglob("blk.1.ffn_gate.sketch")).unlink()
    with pytest.raises(DoesNotFitError, match="computing it again"):
        run(model, tmp_path, max_ram=2**20)


def test_sketches_of_one_site_are_read_once(open_model, tmp_path):
    with calibrate(open_model("llama"), tmp_path) as sketches:
        assert sketches["blk.0.attn_q.weight"] is sketches["blk.0.attn_k.weight"]
        assert isinstance(sketches["blk.0.ffn_down.weight"], Sketch)
        with pytest.raises(KeyError):
            sketches["blk.0.attn_norm.weight"]
