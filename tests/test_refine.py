"""Refinement: gradients of scales and norms, the optimizer, rounds on disk, and what they make of a file."""

from __future__ import annotations

import json
import math
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf.quants
import numpy as np
import pytest
import tiny_models
from gguf_files import describe, placeholder_vocabulary
from gradients import assert_is_gradient
from hypothesis import given, settings
from hypothesis import strategies as st
from threadpoolctl import threadpool_limits

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

import best_parts

from sq_stream import api
from sq_stream.calibrate.budget import Tracing
from sq_stream.calibrate.streamed import LostWorkError
from sq_stream.calibrate.weights import LayerReader
from sq_stream.demo import model_folder
from sq_stream.formats.blocks import BLOCK_TYPES, F32, BlockType
from sq_stream.formats.checkpoint import Checkpoint
from sq_stream.formats.gguf_layout import lay_out
from sq_stream.formats.gguf_read import GGUFReader
from sq_stream.formats.gguf_write import GGUFFile
from sq_stream.formats.journal import Journal
from sq_stream.formats.metadata import string
from sq_stream.job import refine as refine_job
from sq_stream.job.encode import Encoding
from sq_stream.kernels.codec import decode, encode
from sq_stream.models.backward import divergence_vjp
from sq_stream.models.base import ModelSpec, TensorMap
from sq_stream.models.forward import find_decoder, forward
from sq_stream.parallel import Workers
from sq_stream.refine import adam, schedule
from sq_stream.refine.budget import Refining, refinings
from sq_stream.refine.parameters import ENDS, Generations, RefinedWeights, group_of
from sq_stream.refine.rounds import Refinement
from sq_stream.refine.scales import gradient, scales_of, with_scales
from sq_stream.refine.schedule import Generation, Round, best, next_round

SCALED = [t for t in BLOCK_TYPES.values() if t.scales]
NAMES = ("llama", "qwen3", "qwen35_multimodal", "gemma3")
TOKENS = np.random.RandomState(1).randint(0, tiny_models.N_VOCAB, (2, 40)).astype(np.int32)


def random_blocks(seed: int, block_type: BlockType, n_rows: int = 3, n_blocks: int = 2) -> np.ndarray:
    """Blocks with all kinds of codes and scales of an ordinary size."""
    random = np.random.RandomState(seed)
    data = random.randint(0, 256, (n_rows, n_blocks * block_type.block_bytes)).astype(np.uint8)
    shape = (n_rows, n_blocks, len(block_type.scales))
    return with_scales(data, block_type, random.standard_normal(shape).astype(np.float32))


@pytest.mark.parametrize("block_type", SCALED, ids=lambda t: t.name)
@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=20, deadline=None)
def test_scales_are_where_ggml_has_them(block_type: BlockType, seed: int) -> None:
    """All values are doubled by doubling all scales, which changes nothing but these."""
    data = random_blocks(seed, block_type)
    doubled = with_scales(data, block_type, 2 * scales_of(data, block_type))
    kind = gguf.GGMLQuantizationType(block_type.ggml_id)
    np.testing.assert_array_equal(gguf.quants.dequantize(doubled, kind), 2 * gguf.quants.dequantize(data, kind))
    assert (doubled != data).any(axis=0).sum() <= 2 * len(block_type.scales) * 2
    np.testing.assert_array_equal(with_scales(doubled, block_type, scales_of(data, block_type)), data)


def test_scales_are_rounded_and_stay_finite() -> None:
    data = random_blocks(0, BLOCK_TYPES["Q4_K"])
    scales = np.full_like(scales_of(data, BLOCK_TYPES["Q4_K"]), 1e9)
    scales[..., 1] = 1 + 2.0**-12
    found = scales_of(with_scales(data, BLOCK_TYPES["Q4_K"], scales), BLOCK_TYPES["Q4_K"])
    assert (found == np.float32([65504, 1])).all()


@pytest.mark.parametrize("block_type", SCALED, ids=lambda t: t.name)
@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=20, deadline=None)
def test_the_gradient_of_a_scale_is_what_doubling_it_adds(block_type: BlockType, seed: int) -> None:
    """Values are linear in each scale, so that the derivative by its logarithm is that difference."""
    data = random_blocks(seed, block_type)
    d_rows = np.random.RandomState(seed).standard_normal((3, 2 * block_type.block_size)).astype(np.float32)
    found, scales = gradient(d_rows, data, block_type), scales_of(data, block_type)
    kind = gguf.GGMLQuantizationType(block_type.ggml_id)
    before = gguf.quants.dequantize(data, kind).astype(float)
    for i in range(scales.shape[-1]):
        changed = scales.copy()
        changed[..., i] *= 2
        added = gguf.quants.dequantize(with_scales(data, block_type, changed), kind) - before
        expected = (added * d_rows).reshape(*scales.shape[:2], -1).sum(axis=-1)
        np.testing.assert_allclose(found[..., i], expected, rtol=1e-4, atol=1e-4 * np.abs(added).max())


def test_the_optimizer_is_adam() -> None:
    torch = pytest.importorskip("torch")
    random = np.random.RandomState(0)
    parameter = torch.zeros(7, dtype=torch.float64, requires_grad=True)
    theirs = torch.optim.Adam([parameter], lr=1.0, betas=adam.MEMORY, eps=adam.LEAST)
    state = np.stack([np.ones(7), np.zeros(7), np.zeros(7)]).astype(np.float32)
    for depth in range(1, 9):
        g, rate = random.standard_normal(7), 0.01 / depth
        before = parameter.detach().numpy().copy()
        parameter.grad = torch.from_numpy(g)
        theirs.step()
        expected = state[0] * (1 + rate * (parameter.detach().numpy() - before))
        state = adam.step(state, g.astype(np.float32), depth, rate)
        np.testing.assert_allclose(state[0], expected, rtol=1e-5)


def followed(held: dict[int, float], n_rounds: int = 40) -> list[Round]:
    """All rounds, where the KL on other text is `held` or, in rounds that are not named, that of the first."""
    history, rounds = [Generation(0, 0, held[0])], []
    while step := next_round(history, n_rounds, 100):
        rounds.append(step)
        history.append(
            Generation(step.number, step.parent, held.get(step.number, held[0]) if step.is_checked else None)
        )
    return rounds


def test_rates_rise_with_success_and_fall_in_the_end() -> None:
    rounds = followed({0: 1.0, **{number: 1.0 - number / 100 for number in range(1, 41)}})
    assert [step.number for step in rounds] == [step.depth for step in rounds] == list(range(1, 41))
    assert [step.parent for step in rounds] == list(range(40))
    assert [step.number for step in rounds if step.is_checked] == list(range(5, 41, 5))
    rates = [step.rate for step in rounds]
    assert rates[0] < rates[4] < rates[5] < rates[10]
    assert rates[-1] == pytest.approx(schedule.LAST * schedule.RATE / 10 * schedule.LARGER**7)


def test_steps_that_were_too_large_are_taken_back() -> None:
    rounds = followed({0: 1.0, 5: 0.9, 10: 0.95, 15: 0.8, 20: 0.85, 25: math.nan, 30: 0.7})
    assert [(s.number, s.parent) for s in rounds if s.parent != s.number - 1] == [(11, 5), (21, 15), (26, 15), (36, 30)]
    assert [s.depth for s in rounds if s.number in (11, 16, 21, 26)] == [6, 11, 11, 11]
    by_number = {s.number: s.rate for s in rounds}
    assert by_number[11] < 0.6 * by_number[10]
    assert by_number[26] < 0.6 * by_number[25]


def test_it_ends_when_nothing_gets_better() -> None:
    rounds = followed({0: 1.0, 5: 0.9})
    assert rounds[-1].number == schedule.CHECK_EVERY * (1 + schedule.PATIENCE)
    history = [Generation(0, 0, 1.0), *(Generation(n, n - 1, None) for n in range(1, 5)), Generation(5, 4, math.nan)]
    assert best(history) == 0


@pytest.mark.parametrize("soft_cap", [0.0, 2.0])
def test_the_gradient_of_the_divergence_is_that_of_differences(soft_cap: float) -> None:
    random = np.random.RandomState(0)
    x, theirs = random.standard_normal((2, 2, 150, 24))  # more than a block of tokens
    matrix, other = random.standard_normal((2, 90, 24)) / 4
    with Checkpoint.open(model_folder()) as checkpoint:
        spec = describe(checkpoint)
    decoder = replace(find_decoder(spec.arch, spec.metadata), soft_cap=soft_cap)
    seen: list[np.ndarray] = []

    def divergence(x: np.ndarray, matrix: np.ndarray) -> np.ndarray:
        logits = [decoder.cap(y @ m.T) for y, m in ((theirs, other), (x, matrix))]
        p, q = (y - np.log(np.exp(y).sum(axis=-1, keepdims=True)) for y in logits)
        return (np.exp(p) * (p - q)).sum(axis=-1)

    kl, dx = divergence_vjp(x, matrix, (theirs, other), decoder, lambda rows, d: seen.append(d))
    np.testing.assert_allclose(kl, divergence(x, matrix), rtol=1e-9)
    assert_is_gradient(divergence, [x, matrix], np.ones((2, 150)), [dx, np.concatenate(seen)])


class Case:
    """A tiny model, a file of it in mixed types, and a refinement of that."""

    def __init__(self, name: str, folder: Path, workers: Workers) -> None:
        checkpoint = Checkpoint.open(tiny_models.write(name, folder / "model"))
        self.spec = describe(checkpoint)
        self.decoder = find_decoder(self.spec.arch, self.spec.metadata)
        types = iter([BLOCK_TYPES[t] for t in ("Q4_K", "Q6_K", "Q5_1", "Q8_0", "Q5_K", "Q5_0")] * 99)
        entries = [string("general.architecture", self.spec.arch), *self.spec.metadata]
        entries += placeholder_vocabulary(tiny_models.N_VOCAB)
        chosen = [
            next(types) if len(t.shape) == 2 and "conv" not in t.name and t.n_in % 256 == 0 else F32
            for t in self.spec.tensors
        ]
        layout = lay_out(entries, [(t.name, t.shape, c) for t, c in zip(self.spec.tensors, chosen, strict=True)])
        path = folder / "x.gguf"
        with GGUFFile.create(path, layout) as file:
            for tensor, place in zip(self.spec.tensors, layout.tensors, strict=True):
                rows = tensor.read(checkpoint, 0, tensor.n_rows)
                is_plain = place.block_type == F32
                file.write_rows(place, 0, rows.view(np.uint8) if is_plain else encode(rows, place.block_type))
            file.commit()
        self.file = GGUFReader.open(path)
        self.generations = Generations(self.file, folder / "parameters", self.decoder.n_layer)
        self.reference = LayerReader(self.spec, checkpoint)
        stored = ModelSpec(
            self.spec.arch, self.spec.n_layer, tuple(TensorMap(t.name, t.shape, t.name) for t in self.spec.tensors), ()
        )
        self.run = Refinement(self.reference, stored, self.generations, self.decoder, folder, workers, resident=True)

    def close(self) -> None:
        self.file.close()

    def parts(self, name: str) -> list[np.ndarray]:
        """Float64: what is added up to the values of a tensor, each linear in one of its parameters per block."""
        tensor = self.file.tensors[name]
        data = self.file.read_rows(name, 0, tensor.n_rows)
        if not tensor.block_type.scales:
            return [data.view(np.float32).astype(float).reshape(tensor.shape)]
        scales = scales_of(data, tensor.block_type)
        found = []
        for i in range(scales.shape[-1]):
            only = np.zeros_like(scales)
            only[..., i] = scales[..., i]
            found.append(decode(with_scales(data, tensor.block_type, only), tensor.block_type).astype(float))
        return found

    def moved(self, name: str, step: np.ndarray) -> np.ndarray:
        """Values of a tensor whose parameters are larger by the share `step`, in their shape."""
        tensor, parts = self.file.tensors[name], self.parts(name)
        if not tensor.block_type.scales:
            return parts[0] * (1 + step)
        blocks = (*step.shape[:2], tensor.block_type.block_size)
        return sum(
            (part.reshape(blocks) * (1 + step[..., i, None])).reshape(tensor.shape) for i, part in enumerate(parts)
        )


@pytest.fixture(scope="module", params=NAMES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    with threadpool_limits(1), Workers(2) as workers:
        case = Case(request.param, tmp_path_factory.mktemp("refine"), workers)
        yield case
        case.close()


def test_a_round_sees_the_gradient_of_every_parameter(case: Case) -> None:
    """Against differences of the divergence in float64, in a random direction for each tensor."""
    case.run.descend(Round(1, 0, 1, 1e-3, False), TOKENS)
    names = list(case.file.tensors)
    theirs = {n: case.reference.read(n).astype(float) for n in names}
    shapes = case.generations.shapes
    ours = {n: case.moved(n, np.zeros(shapes.get(n, ()))) for n in names}
    p = log_softmax(forward(TOKENS, theirs, case.decoder))

    def kl(weights: dict[str, np.ndarray]) -> float:
        q = log_softmax(forward(TOKENS, weights, case.decoder))
        return float((np.exp(p) * (p - q)).sum(axis=-1).mean())

    random = np.random.RandomState(0)
    n_checked = 0
    for group in {group_of(name) for name in shapes}:
        found = case.generations.by_name(group, case.generations.read(1, group)[1] / (1 - adam.MEMORY[0]))
        for name, own in found.items():
            direction = random.standard_normal(own.shape) + np.sign(own)  # along the gradient too, so as to be seen
            ends = [kl({**ours, name: case.moved(name, step * direction)}) for step in (-1e-5, 1e-5)]
            expected = (ends[1] - ends[0]) / 2e-5
            size = np.abs(own * direction).sum()
            assert abs((own * direction).sum() - expected) <= 1e-2 * size + 1e-9, name  # float32 against float64
            n_checked += size > 1e-7
    assert n_checked > 0.9 * len(shapes)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)


def test_divergence_is_that_of_the_models(case: Case) -> None:
    names = list(case.file.tensors)
    p = log_softmax(forward(TOKENS, {n: case.reference.read(n) for n in names}, case.decoder).astype(float))
    weights = LayerReader(case.run.file_spec, RefinedWeights(case.generations, 0))
    q = log_softmax(forward(TOKENS, {n: weights.read(n) for n in names}, case.decoder).astype(float))
    expected = (np.exp(p) * (p - q)).sum(axis=-1).mean()
    assert case.run.divergence(0, TOKENS) == pytest.approx(expected, rel=1e-3)


def test_rounds_lower_the_divergence(case: Case) -> None:
    before = case.run.divergence(0, TOKENS)
    for number in range(1, 6):
        case.run.descend(Round(number, number - 1, number, 1e-3, False), TOKENS)
    assert case.run.divergence(5, TOKENS) < 0.99 * before


def test_tiles_and_threads_change_no_bit(case: Case, tmp_path: Path) -> None:
    case.run.descend(Round(1, 0, 1, 1e-3, False), TOKENS)
    expected = {group: case.generations.read(1, group) for group in ("blk.0", ENDS)}
    with Workers(1) as workers:
        other = Refinement(
            case.reference, case.run.file_spec, case.generations, case.decoder, tmp_path, workers, resident=False
        )
        other.descend(Round(1, 0, 1, 1e-3, False), TOKENS)
    for group, state in expected.items():
        np.testing.assert_array_equal(case.generations.read(1, group), state)


def test_what_is_damaged_or_gone_is_lost_work(case: Case, tmp_path: Path) -> None:
    generations = Generations(case.file, tmp_path, case.decoder.n_layer)
    with pytest.raises(LostWorkError):
        generations.read(1, ENDS)
    generations.write(1, ENDS, generations.read(0, ENDS))
    path = next(tmp_path.glob("1-*"))
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(LostWorkError):
        generations.read(1, ENDS)


OPTIONS: dict[str, Any] = {"ctx": 128, "windows": 64, "threads": 2}


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list[dict[str, Any]]]:
    """A refined file whose linears are shaped each by itself, the same before refinement, and the journal's records."""
    folder = tmp_path_factory.mktemp("jobs")
    records: list[dict[str, Any]] = []

    def recording(journal: Journal, record: dict[str, Any]) -> None:
        append(journal, record)
        records.append(json.loads(json.dumps(record)))

    def keeping(encoding: Encoding, refining: Refining) -> None:
        shutil.copy(encoding.file.partial, folder / "plain.gguf")
        refine(encoding, refining)

    append, refine = Journal.append, refine_job.refine
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Journal, "append", recording)
        patch.setattr(refine_job, "refine", keeping)
        options = {**OPTIONS, "cache": folder / "cache"}
        best_parts.make(best_parts.Parts(refined=True), model_folder(), folder / "refined.gguf", options)
    return folder / "refined.gguf", folder / "plain.gguf", records


def test_a_job_keeps_the_generation_with_the_least_divergence_on_other_text(jobs: Any) -> None:
    _, _, records = jobs
    held = {r["generation"]["number"]: r["generation"]["held"] for r in records if "generation" in r}
    checked = {number: kl for number, kl in held.items() if kl is not None}
    (folded,) = [r["folded"] for r in records if "folded" in r]
    assert folded == min(checked, key=lambda number: checked[number])
    assert folded > 0


def test_codes_stay_and_scales_change(jobs: Any) -> None:
    refined, plain, _ = jobs
    with GGUFReader.open(refined) as a, GGUFReader.open(plain) as b:
        changed = 0
        for name, tensor in a.tensors.items():
            ours, theirs = (f.read_rows(name, 0, tensor.n_rows) for f in (a, b))
            if tensor.block_type.scales:
                changed += (ours != theirs).any()
                theirs = with_scales(theirs, tensor.block_type, scales_of(ours, tensor.block_type))
            if tensor.block_type.scales or not name.endswith("norm.weight"):
                np.testing.assert_array_equal(ours, theirs, err_msg=name)
            else:
                changed += (ours != theirs).any()
                np.testing.assert_allclose(ours.view(np.float32), theirs.view(np.float32), rtol=0.05)
        assert changed > 10


def test_a_refined_file_is_still_that_of_its_checkpoint(jobs: Any) -> None:
    checks = {check.name: check for check in api.verify(jobs[0], model_folder())}
    plain = {check.name: check for check in api.verify(jobs[1], model_folder())}
    for name, check in checks.items():
        assert check.relative_error is not None
        assert check.relative_error < plain[name].relative_error + 0.02, name


def test_a_round_takes_no_more_memory_than_is_planned(tmp_path: Path) -> None:
    """What NumPy allocates, at the peak, with the fewest threads; and not far less either."""
    options = {**OPTIONS, "ctx": 512, "effort": "best", "pure": True}
    plan = api.plan(model_folder(), tmp_path / "x.gguf", cache=tmp_path, **options)
    assert plan.calibration is not None
    assert plan.turns is not None
    assert plan.turns.refining is not None
    api.quantize(model_folder(), tmp_path / "x.gguf", effort="fast", pure=True)
    for resident in (True, False):
        with GGUFReader.open(tmp_path / "x.gguf") as file, Workers(1) as workers:
            generations = Generations(file, tmp_path / "parameters", plan.calibration.decoder.n_layer)
            largest = max(generations.read(0, group).shape[1] for group in ("blk.0", ENDS))
            ways = refinings(plan.calibration, plan.turns.refining.held, largest, 1)
            way = next(way for way in ways if way.resident == resident)
            reader, decoder = plan.calibration.reader, plan.calibration.decoder
            run = Refinement(reader, plan.spec.stored, generations, decoder, tmp_path, workers, resident)
            with Tracing() as tracing:
                run.descend(Round(1, 0, 1, 1e-3, False), way.of_round(1))
            assert tracing.peak <= way.working_ram
            assert tracing.peak > 0.6 * way.working_ram or not resident  # tiles of large matrices, which this has not
