"""Quantizing with statistics: from text, from the cache, from an importance matrix; what it gains; resuming."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from click.testing import CliRunner

from sq_stream import api
from sq_stream.calibrate.corpus import build_corpus
from sq_stream.cli import cli
from sq_stream.demo import model_folder
from sq_stream.demo.generate import read_model
from sq_stream.errors import BadInputError, DoesNotFitError, InterruptedJobError, UsageError
from sq_stream.events import Event, Note, StageStarted, TensorFinished
from sq_stream.job.plan import Plan, check_output
from sq_stream.models.forward import forward
from sq_stream.quantize.metric import DenseMetric
from sq_stream.text.encode import Tokenizer
from sq_stream.text.vocabulary import read_vocabulary

MODEL = model_folder()
WINDOWS = 16
PART: dict[str, Any] = {"recipe": "bf16", "tensor_types": [r"blk\.1\.ffn_(gate|down)=q4_k"]}  # soon done


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def quantize(cache: Path) -> Callable[..., list[Event]]:
    def call(path: Path, **options: Any) -> list[Event]:
        events: list[Event] = []
        settings = {"windows": WINDOWS, "cache": cache, "on_event": events.append, **options}
        api.quantize(MODEL, path, **settings)
        return events

    return call


@pytest.fixture(scope="module")
def shaped(quantize: Callable[..., list[Event]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shaped") / "shaped.gguf"
    quantize(path, pure=True)
    return path


@pytest.fixture(scope="module")
def heldout() -> np.ndarray:
    vocabulary = read_vocabulary(MODEL, arch="qwen35", n_vocab=4096)
    return build_corpus(Tokenizer.open(MODEL), vocabulary, ctx=128, windows=(1, 1, 12)).heldout


def log_probabilities(path: Path, tokens: np.ndarray) -> np.ndarray:
    decoder, weights = read_model(path)
    logits = forward(tokens, weights, decoder).astype(np.float64)
    return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)


def stages(events: list[Event]) -> list[str]:
    return [e.stage for e in events if isinstance(e, StageStarted)]


@pytest.fixture(scope="module")
def kl(heldout: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], float]:
    """Mean KL divergence of a file's predictions from those of the BF16 model."""
    path = tmp_path_factory.mktemp("bf16") / "bf16.gguf"
    api.quantize(MODEL, path, recipe="bf16", effort="fast")
    p = log_probabilities(path, heldout)
    return lambda path: float((np.exp(p) * (p - log_probabilities(path, heldout))).sum(axis=-1).mean())


def test_shaping_loses_less_than_rounding_on_text_it_has_not_seen(
    shaped: Path, kl: Callable[[Path], float], tmp_path: Path
) -> None:
    fast = tmp_path / "fast.gguf"
    api.quantize(MODEL, fast, pure=True, effort="fast")
    assert shaped.stat().st_size - fast.stat().st_size < 20_000  # only the metadata differs
    assert 0 < kl(shaped) < 0.9 * kl(fast)


def test_the_smallest_memory_that_the_plan_names_works(
    quantize: Callable[..., list[Event]],
    shaped: Path,
    kl: Callable[[Path], float],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is so small that wide sites are sketched, and shaped without a matrix."""
    path, options = tmp_path / "x.gguf", {"cache": tmp_path / "cache"}

    with pytest.raises(DoesNotFitError) as refusal:
        quantize(path, pure=True, max_ram="64M", **options)
    n = int(str(refusal.value).rsplit(maxsplit=1)[1].removesuffix("M"))
    assert not list(tmp_path.iterdir())
    with pytest.raises(DoesNotFitError, match=f"--max-ram {n}M"):
        quantize(path, pure=True, max_ram=f"{n - 1}M", **options)
    planned = api.plan(MODEL, path, pure=True, max_ram=f"{n}M", windows=WINDOWS, **options)
    assert planned.calibration is not None
    assert planned.calibration.ranks == {512: 128}
    assert planned.budget.peak_ram <= n * 2**20
    widths = []
    dense = DenseMetric.__init__
    monkeypatch.setattr(DenseMetric, "__init__", lambda self, a, *rest: widths.append(len(a)) or dense(self, a, *rest))
    quantize(path, pure=True, max_ram=f"{n}M", **options)
    assert set(widths) == {256}
    assert kl(path) < 1.1 * kl(shaped)
    assert stages(quantize(path, max_ram=f"{n}M", overwrite=True, **PART, **options)) == ["encode", "verify"]


@pytest.mark.parametrize("effort", ["fast", "balanced", "best"])
def test_compiled_kernels_change_what_is_refused_and_nothing_else(
    effort: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def plan(max_ram: str, kept: Callable[[set[str]], set[str]]) -> Plan:
        monkeypatch.setattr("sq_stream.job.plan.kept_kernels", kept)
        options: dict[str, Any] = {"effort": effort, "cache": tmp_path, "threads": 2}
        options |= {} if effort == "fast" else {"windows": WINDOWS, "ctx": 64}
        return api.plan(MODEL, tmp_path / "x.gguf", max_ram=max_ram, **options)

    def smallest(kept: Callable[[set[str]], set[str]]) -> int:
        with pytest.raises(DoesNotFitError) as refusal:
            plan("64M", kept)
        return int(str(refusal.value).rsplit(maxsplit=1)[1].removesuffix("M"))

    def none(uses: set[str]) -> set[str]:
        return set()

    n_compiling, n_compiled = smallest(none), smallest(set)
    assert n_compiled + 100 < n_compiling == smallest(lambda uses: set(sorted(uses)[1:]))
    assert plan(f"{n_compiled}M", set).budget.peak_ram <= n_compiled * 2**20
    before, after = plan(f"{n_compiling}M", none), plan(f"{n_compiling}M", set)
    assert after.budget.peak_ram < before.budget.peak_ram <= n_compiling * 2**20
    assert decisions(before) == decisions(after)


def decisions(plan: Plan) -> tuple[Any, ...]:
    """What memory decides."""
    passes = [streamed.identity for streamed in plan.statistics.passes] if plan.statistics else []
    turns = (plan.turns.pairing.linears, plan.turns.two_sided) if plan.turns else ()
    return plan.budget.tile_weights, passes, turns


def test_what_stays_as_it_is_has_no_turn(tmp_path: Path) -> None:
    """Nor is anything run behind the last linear that has one."""
    turns = api.plan(MODEL, tmp_path / "x.gguf", effort="best", windows=WINDOWS, cache=tmp_path, **PART).turns
    assert turns is not None
    assert [list(sites) for sites in turns.pairing.branches] == [[], [], [], [("ffn_gate", "ffn_up"), ("ffn_down",)]]
    assert turns.two_sided.keys() == {"blk.1.ffn_gate.weight", "blk.1.ffn_down.weight"}


def test_another_recipe_reuses_the_calibration(
    quantize: Callable[..., list[Event]], shaped: Path, tmp_path: Path
) -> None:
    assert stages(quantize(tmp_path / "x.gguf", **PART)) == ["encode", "verify"]


def test_statistics_that_vanish_while_they_are_used_are_computed_again(
    shaped: Path, cache: Path, quantize: Callable[..., list[Event]], tmp_path: Path
) -> None:
    own = Path(shutil.copytree(cache, tmp_path / "cache"))
    events: list[Event] = []

    def remove(event: Event) -> None:
        events.append(event)
        if isinstance(event, TensorFinished) and event.type == "Q4_K":
            shutil.rmtree(own, ignore_errors=True)

    quantize(tmp_path / "whole.gguf", **PART)
    quantize(tmp_path / "out.gguf", **PART, cache=own, on_event=remove)
    assert [event.text for event in events if isinstance(event, Note) and "calibrating anew" in event.text]
    assert (tmp_path / "out.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()


def test_a_coarser_calibration_does_not_go_on_with_what_is_done(
    shaped: Path, quantize: Callable[..., list[Event]], tmp_path: Path
) -> None:
    def stop(event: Event) -> None:
        if isinstance(event, TensorFinished):
            raise KeyboardInterrupt

    path, options = tmp_path / "out.gguf", {**PART, "max_ram": "64M", "cache": tmp_path / "cache"}
    with pytest.raises(InterruptedJobError):
        quantize(path, **PART, on_event=stop)
    with pytest.raises(DoesNotFitError) as refusal:
        quantize(path, **options)
    with pytest.raises(UsageError, match=r"differs in accuracy of the calibration \(--max-ram\): .*--fresh"):
        quantize(path, **{**options, "max_ram": str(refusal.value).rsplit(maxsplit=1)[1]})
    quantize(path, **PART)


def test_the_file_says_what_it_was_fitted_to(shaped: Path) -> None:
    fields = gguf.GGUFReader(shaped).fields
    assert fields["sq_stream.effort"].contents() == "balanced"
    assert fields["sq_stream.calib.tokens"].contents() == WINDOWS * 512
    digests = {fields[f"sq_stream.{part}.sha256"].contents() for part in ("calib", "convergence", "heldout")}
    assert len(digests) == 3


def test_an_importance_matrix_in_place_of_a_calibration(
    cache: Path, quantize: Callable[..., list[Event]], shaped: Path, heldout: np.ndarray, tmp_path: Path
) -> None:
    api.calibrate(MODEL, windows=WINDOWS, cache=cache, imatrix_out=tmp_path / "m.gguf")
    events: list[Event] = []
    api.quantize(MODEL, tmp_path / "i.gguf", pure=True, imatrix=tmp_path / "m.gguf", on_event=events.append)
    assert stages(events) == ["encode", "verify"]
    assert (tmp_path / "i.gguf").read_bytes() != shaped.read_bytes()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"effort": "best", "imatrix": "m.gguf"}, UsageError, "runs the model on text"),
        ({"effort": "fast", "calib": ["x.txt"]}, UsageError, "weights alone"),
        ({"calib": ["x.txt"], "imatrix": "m.gguf"}, UsageError, "takes the place"),
        ({"calib_extend": True}, UsageError, "name them with --calib"),
        ({"calib": ["short.txt"]}, BadInputError, "too short"),
        ({"ctx": 3}, UsageError, "--ctx 3: a window has 64 to"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    options: dict[str, Any], error: type[Exception], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("short.txt").write_text("Hardly a text.")
    with pytest.raises(error, match=message):
        api.plan(MODEL, "x.gguf", **options)


def test_memory_in_which_no_linear_can_have_its_turn_is_refused(
    quantize: Callable[..., list[Event]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sq_stream.job.plan.pairings", lambda *arguments: iter(()))
    with pytest.raises(DoesNotFitError):
        quantize(tmp_path / "x.gguf", effort="best")
    assert not list(tmp_path.iterdir())


def test_the_cache_is_listed_and_cleared(shaped: Path, tmp_path: Path) -> None:
    api.calibrate(MODEL, windows=2, ctx=64, cache=tmp_path)
    listed = CliRunner().invoke(cli, ["cache", "list", "--cache", str(tmp_path)]).stdout
    assert "complete" in listed
    assert " 128 " in listed
    assert "freed" in CliRunner().invoke(cli, ["cache", "clear", "--cache", str(tmp_path)]).stdout
    assert "is empty" in CliRunner().invoke(cli, ["cache", "list", "--cache", str(tmp_path)]).stdout


SHARED_MEMORY = Path("/dev/shm")


@pytest.mark.parametrize("same", [True, False])
def test_one_disk_must_hold_the_cache_and_the_file(same: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not same and (not SHARED_MEMORY.is_dir() or SHARED_MEMORY.stat().st_dev == tmp_path.stat().st_dev):
        pytest.skip("there is one file system only")
    cache = tmp_path / "cache" if same else SHARED_MEMORY / "not-there"
    job = api.plan(MODEL, tmp_path / "x.gguf", windows=WINDOWS, cache=cache)
    assert job.calibration is not None
    file, pending = job.budget.peak_disk, job.calibration.peak_disk
    enough = file + pending if same else max(file, pending)

    def check(free: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(2 * free, free, free))
        check_output(job)

    with job.checkpoint:
        check(enough)
        with pytest.raises(DoesNotFitError, match="the file on the same disk" if same else "disk space"):
            check(enough - 1)


def test_what_is_not_shaped_takes_less_time(tmp_path: Path) -> None:
    few, all_of_them = (
        api.plan(MODEL, tmp_path / "x.gguf", windows=WINDOWS, cache=tmp_path, tensor_types=types).budget.seconds
        for types in (["ffn=bf16"], [])
    )
    assert few < all_of_them
