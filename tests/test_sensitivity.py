"""The streamed backward pass of tiny models against one in memory, its threads and budgets, and resuming it."""

from __future__ import annotations

import numpy as np
import pytest
import tiny_models
from calibrations import BATCH_TOKENS, OPTIONS, WINDOWS, assert_same_bits
from gguf_files import describe

from sq_stream.calibrate import budget as budgets
from sq_stream.calibrate import calibration, weights
from sq_stream.calibrate.backward import robust
from sq_stream.calibrate.sensitivity import plan_sensitivity
from sq_stream.calibrate.store import Store
from sq_stream.errors import BadInputError, DoesNotFitError
from sq_stream.events import Note, Progress
from sq_stream.formats.checkpoint import Checkpoint
from sq_stream.models.backward import backward, draw
from sq_stream.models.forward import find_decoder
from sq_stream.models.layers import is_norm

NAMES = [name for name, model in tiny_models.MODELS.items() if not model.mtp]


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr(budgets, "BATCH_TOKENS", BATCH_TOKENS)


def run(model, folder, on_event=lambda event: None, **options):
    """Sketches by name, and all events."""
    events = []

    def listen(event):
        events.append(event)
        on_event(event)

    planned = plan_sensitivity(*model, WINDOWS, Store(folder), **{**OPTIONS, **options})
    with planned.run(listen) as sketches:
        return {name: sketch for name, sketch in sketches.items() if sketch.n_tokens}, events


class StopAt:
    """Raises KeyboardInterrupt at a step's progress."""

    def __init__(self, step):
        self.step = step

    def __call__(self, event):
        if isinstance(event, Progress) and event.tensor == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("name", NAMES)
def test_sketches_are_the_moments_of_a_pass_in_memory(open_model, tmp_path, name):
    checkpoint, spec = open_model(name)
    tensors = {t.name: t.read(checkpoint, 0, t.n_rows).reshape(t.shape) for t in spec.tensors}
    decoder, expected = find_decoder(spec.arch, spec.metadata), {}

    def add(linear, dy):
        g = robust(dy.reshape(-1, dy.shape[-1])).astype(float)
        expected[f"{linear}.weight"] = expected.get(f"{linear}.weight", 0) + g.T @ g / WINDOWS.size

    def observe(site, x, dys):
        for linear, dy in zip(site, dys, strict=True):
            if not is_norm(linear):
                add(linear, dy)

    for start in range(0, len(WINDOWS), 3):
        windows = WINDOWS[start : start + 3]
        uniform = draw(5, range(start, start + len(windows)), WINDOWS.shape[1])
        _, d_rows = backward(windows, tensors, decoder, uniform, observe)
        add("token_embd", d_rows)
    sketches, _ = run((checkpoint, spec), tmp_path, seed=5)
    assert sketches.keys() == expected.keys()
    for tensor, moment in expected.items():
        scale = np.sqrt(np.diag(moment))
        error = (sketches[tensor].dense() - moment) / scale / scale[:, None]
        assert np.abs(error).max() < 5e-4, tensor
        assert sketches[tensor].n_tokens == WINDOWS.size


def test_threads_and_memory_do_not_change_a_bit(open_model, tmp_path, monkeypatch):
    model = open_model("qwen35")
    expected, _ = run(model, tmp_path / "a", threads=1)
    assert_same_bits(run(model, tmp_path / "b", threads=4)[0], expected)
    reads = set()
    monkeypatch.setattr(weights, "is_large", lambda shape: len(shape) == 2 and shape[1] > 8)
    monkeypatch.setattr(calibration, "budgets", lambda *args, **_: [budgets.Budget(2, False, {}, 0, 0)])
    monkeypatch.setattr(
        weights.RowsOnDisk, "__getitem__", lambda self, rows, read=weights.RowsOnDisk.__getitem__: (
            reads.add(self.tensor.name) or read(self, rows)
        )
    )  # fmt: skip
    assert_same_bits(run(model, tmp_path / "c")[0], expected)
    assert "blk.0.ffn_down.weight" in reads


@pytest.mark.parametrize("step", ["layer 2 of 4", "output", "layer 4 of 4, backward", "layer 1 of 4, backward"])
def test_interrupted_work_goes_on_at_the_last_finished_step(open_model, tmp_path, step):
    model = open_model("qwen35")
    expected, events = run(model, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(model, tmp_path / "parts", StopAt(step))
    sketches, events = run(model, tmp_path / "parts", threads=1)
    assert next(event.tensor for event in events if isinstance(event, Progress)) == step
    assert_same_bits(sketches, expected)
    assert not list(tmp_path.rglob("pass"))


@pytest.mark.parametrize("lost", ["inputs/1-000002.zst", "gradients/3-000001.zst"])
def test_what_is_lost_between_the_layers_is_computed_anew(open_model, tmp_path, lost):
    model = open_model("qwen35")
    with pytest.raises(KeyboardInterrupt):
        run(model, tmp_path, StopAt("layer 3 of 4, backward"))
    (path,) = tmp_path.glob(f"*/pass/{lost}")
    path.write_bytes(b"")
    sketches, events = run(model, tmp_path)
    assert any(isinstance(event, Note) and "from the first layer on" in event.text for event in events)
    assert_same_bits(sketches, run(model, tmp_path / "whole")[0])


def test_another_seed_draws_other_labels(open_model, tmp_path):
    model = open_model("llama")
    a, b = (run(model, tmp_path, seed=seed)[0]["blk.0.attn_q.weight"].dense() for seed in (0, 1))
    assert len(Store(tmp_path).list()) == 2
    assert 0.01 < np.abs(a - b).max() / np.abs(a).max() < 1


def test_a_pass_that_does_not_fit_is_refused(open_model, tmp_path):
    with pytest.raises(DoesNotFitError, match="smallest that works"):
        run(open_model("llama"), tmp_path, max_ram=2**20)


def test_gradients_that_are_not_finite_are_refused(tmp_path):
    config, tensors = tiny_models.make("smollm2")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = 1e38
    folder = tiny_models.write_checkpoint(tmp_path / "model", config, tensors, "float32")
    words = r"gradients of what comes from blk.1.ffn_down.weight are not finite"
    with Checkpoint.open(folder) as checkpoint, pytest.raises(BadInputError, match=words):
        run((checkpoint, describe(checkpoint)), tmp_path / "cache")


def test_rare_large_gradients_count_little():
    g = np.random.RandomState(0).standard_normal((101, 4)).astype(np.float32)
    g[7] *= 1000
    square = (g.astype(float) ** 2).sum(axis=1)
    expected = g / np.sqrt(1 + square / (4 * np.median(square)))[:, None]
    np.testing.assert_allclose(robust(g), expected, rtol=1e-5)
    assert (robust(g) ** 2).sum(axis=1).max() <= 4 * np.median(square)
    np.testing.assert_array_equal(robust(np.zeros((3, 2), np.float32)), 0)
