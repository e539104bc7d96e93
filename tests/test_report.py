"""Reports: measured as they say, complete after an interruption, harmless to the file, safe with foreign names."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import jsonschema
import numpy as np
import psutil
import pytest
from click.testing import CliRunner
from evaluations import evaluation

from sq_stream import api
from sq_stream.calibrate.sketch import Sketch
from sq_stream.calibrate.spectrum import COUNTS, leading_energy
from sq_stream.cli import cli
from sq_stream.demo import model_folder
from sq_stream.errors import StorageError
from sq_stream.evaluate.settings import parse_settings
from sq_stream.events import Event, Progress, StageStarted, TensorFinished
from sq_stream.formats.blocks import Q4_K
from sq_stream.job import timeline
from sq_stream.kernels.codec import decode, encode
from sq_stream.parallel import Workers
from sq_stream.quantize.measure import ErrorMeter
from sq_stream.quantize.smooth import UNSCALED, Scaling
from sq_stream.report import files, page
from sq_stream.report.charts import Axis, Line, linear_axis, log_axis, plot, spread
from sq_stream.report.content import evaluation_content
from sq_stream.report.evaluation import labels, quantiles
from sq_stream.report.numbers import duration, percent, significant

MODEL = model_folder()
SCHEMA = json.loads((Path(files.__file__).parent / "schema.json").read_text())
SHAPED = {"blk.1.ffn_gate.weight", "blk.1.ffn_up.weight", "blk.3.attn_v.weight"}  # the first two are smoothed too
FEW = {"recipe": "bf16", "tensor_types": [r"blk\.1\.ffn_(gate|up)=q4_k", "attn_v=q6_k"], "ctx": 128, "windows": 8}
N_TENSORS, N_MEASURED = 55, 32


Quantize = Callable[..., dict[str, Any]]


class Stop(Exception):
    """Raised in the middle of a job."""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def quantize(cache: Path) -> Quantize:
    """Quantize a few tensors of the demo model with statistics; the JSON report."""

    def call(output: Path, *reports: Path, **options: Any) -> dict[str, Any]:
        path = output.with_suffix(".json")
        api.quantize(MODEL, output, report=[path, *reports], cache=cache, **{**FEW, **options})
        return json.loads(path.read_text())

    return call


@pytest.fixture(scope="module")
def folder(quantize: Quantize, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file and its reports, x.gguf, x.json, x.html."""
    folder = tmp_path_factory.mktemp("report")
    quantize(folder / "x.gguf", folder / "x.html")
    return folder


@pytest.fixture(scope="module")
def report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "x.json").read_text())


def measured(report: dict[str, Any]) -> dict[str, Any]:
    return {t["name"]: t["error"] for t in report["quantization"]["tensors"] if t["error"]}


def evaluated() -> dict[str, Any]:
    settings = parse_settings(["a.gguf"], "models/x", baselines=["rtn"], texts=["own.txt"], suites=["heldout120"])
    return evaluation_content(settings, evaluation())


def test_the_file_is_the_same_without_a_report(folder: Path, cache: Path, tmp_path: Path) -> None:
    api.quantize(MODEL, tmp_path / "x.gguf", cache=cache, **FEW)
    assert (tmp_path / "x.gguf").read_bytes() == (folder / "x.gguf").read_bytes()
    assert sorted(path.name for path in folder.iterdir()) == ["x.gguf", "x.html", "x.json"]


def test_reports_follow_the_schema(report: dict[str, Any]) -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(report, SCHEMA)
    jsonschema.validate(json.loads(json.dumps(evaluated())), SCHEMA)
    damaged = json.loads(json.dumps(report))
    del damaged["quantization"]["layers"][0]["stored"]
    with pytest.raises(jsonschema.ValidationError, match="'stored' is a required property"):
        jsonschema.validate(damaged, SCHEMA)


def test_a_report_is_complete(report: dict[str, Any]) -> None:
    q = report["quantization"]
    errors = measured(report)
    assert len(q["tensors"]) == N_TENSORS
    assert len(errors) == N_MEASURED
    for name, error in errors.items():
        assert error["basis"] == "outputs"
        assert (0 < error["stored"] < 0.9 * error["plain"]) if name in SHAPED else error["stored"] == 0, name
    assert 0 < q["error_ratio"] < 0.9
    assert {name for site in q["inputs"]["sites"] for name in site["linears"]} == set(errors)
    assert sum(part["n_windows"] for part in q["calibration"]["coverage"]) == 8
    (run,) = q["run"]["runs"]
    assert [stage["name"] for stage in run["stages"]] == ["prepare", "calibrate", "encode", "measure", "verify"]
    assert 0 < max(ram for _, ram in run["samples"]) <= q["run"]["peak_ram"] <= q["run"]["max_ram"]
    assert report["reproduce"]["command"].startswith(f"sq-stream quantize {MODEL} --type bf16 --tensor-type ")


def test_a_job_without_statistics_has_errors_of_weights(tmp_path: Path) -> None:
    api.quantize(MODEL, tmp_path / "x.gguf", effort="fast", report=[tmp_path / "x.json", tmp_path / "x.html"])
    report = json.loads((tmp_path / "x.json").read_text())
    jsonschema.validate(report, SCHEMA)
    checks = {check.name: check.relative_error for check in api.verify(tmp_path / "x.gguf", MODEL)}
    for name, error in measured(report).items():
        assert error["basis"] == "weights"
        assert error["stored"] == pytest.approx(checks[name] ** 2, rel=1e-4), name
    assert report["quantization"]["calibration"] is None
    assert "--effort balanced" in (tmp_path / "x.html").read_text()


def test_a_job_with_an_importance_matrix_has_errors_weighted_by_it(cache: Path, tmp_path: Path) -> None:
    text = {key: FEW[key] for key in ("ctx", "windows")}
    api.calibrate(MODEL, imatrix_out=tmp_path / "imatrix.gguf", cache=cache, **text)
    given = {**FEW, "imatrix": tmp_path / "imatrix.gguf", "report": [tmp_path / "x.json", tmp_path / "x.html"]}
    api.quantize(MODEL, tmp_path / "x.gguf", **given)
    report = json.loads((tmp_path / "x.json").read_text())
    jsonschema.validate(report, SCHEMA)
    errors = measured(report)
    assert {error["basis"] for error in errors.values()} == {"importance"}
    assert all(errors[name]["stored"] < errors[name]["plain"] for name in SHAPED)
    assert report["quantization"]["inputs"]["sites"] == []
    assert "as far as an importance matrix tells" in (tmp_path / "x.html").read_text()


@pytest.mark.parametrize(("first", "stage"), [(True, "encode"), (False, "encode"), (True, "measure")])
def test_a_resumed_job_has_all_errors(
    first: bool,
    stage: str,
    quantize: Quantize,
    cache: Path,
    report: dict[str, Any],
    tmp_path: Path,
) -> None:
    def on_event(event: Event) -> None:
        if isinstance(event, Progress) and event.stage == stage and event.done > event.total / 2:
            raise Stop

    output = tmp_path / "x.gguf"
    options = {"report": [tmp_path / "x.json"]} if first else {}
    with pytest.raises(Stop):
        api.quantize(MODEL, output, on_event=on_event, cache=cache, **options, **FEW)
    resumed = quantize(output)
    assert measured(resumed) == measured(report)
    assert resumed["quantization"]["inputs"] == report["quantization"]["inputs"]
    assert len(resumed["quantization"]["run"]["runs"]) == 1 + first
    assert sorted(path.suffix for path in tmp_path.iterdir() if path.is_file()) == [".gguf", ".json"]


def test_a_report_that_cannot_be_written_loses_nothing(
    quantize: Quantize, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any) -> None:
        raise StorageError("disk full")

    output = tmp_path / "x.gguf"
    monkeypatch.setattr(api, "write_reports", full)
    with pytest.raises(StorageError, match="disk full"):
        quantize(output)
    monkeypatch.undo()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.gguf.journal", "x.gguf.partial"]
    encoded = []
    quantize(output, on_event=lambda e: encoded.append(e) if isinstance(e, TensorFinished) else None)
    assert output.exists()
    assert not encoded


def test_eval_writes_its_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sq_stream.evaluate.run.run", lambda settings, on_event: evaluation())
    command = ["eval", "a.gguf", "--ref", "models/x", "--baseline", "rtn", "--max-ram", "512M"]
    reports = ["--report", str(tmp_path / "e.html"), "--report", str(tmp_path / "e.json")]
    result = CliRunner().invoke(cli, [*command, *reports])
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "e.json").read_text())
    jsonschema.validate(report, SCHEMA)
    assert report["evaluation"] == json.loads(json.dumps(asdict(evaluation())))
    expected = "sq-stream eval a.gguf --ref models/x --baseline rtn --max-ram 536870912 --threads"
    assert report["reproduce"]["command"].startswith(expected)
    assert (tmp_path / "e.html").read_text().startswith("<!doctype html>")


@pytest.mark.parametrize("smoothed", [True, False])
@pytest.mark.parametrize("rank", [0, 40, 256])
def test_errors_are_those_of_the_outputs(smoothed: bool, rank: int) -> None:
    random = np.random.RandomState(rank)
    w = random.standard_normal((130, 256)).astype(np.float32)
    residual = random.uniform(0.1, 1, 256).astype(np.float32)
    sketch = Sketch(7, residual, random.standard_normal((rank, 256)).astype(np.float32))
    columns, rows = (random.uniform(0.5, 2, n).astype(np.float32) for n in (256, 130))
    scaling = Scaling(columns, rows) if smoothed else UNSCALED
    blocks = encode(scaling.apply(w.copy(), slice(0, 130)), Q4_K)
    with Workers(2) as workers:
        meter = ErrorMeter(Q4_K, sketch, scaling, workers)
        for tile in (slice(0, 128), slice(128, 130)):
            meter.add(w[tile], blocks[tile], tile)
        result = meter.result()
    a = np.diag(residual.astype(float)) + sketch.factor.T.astype(float) @ sketch.factor
    stored = (decode(blocks, Q4_K) / (columns * rows[:, None] if smoothed else 1) - w).astype(float)
    plain = (decode(encode(w, Q4_K), Q4_K) - w).astype(float)
    energy = np.trace(w @ a @ w.T)
    assert result.energy == pytest.approx(energy, rel=1e-5)
    assert result.stored == pytest.approx(np.trace(stored @ a @ stored.T) / energy, rel=1e-4)
    assert result.plain == pytest.approx(np.trace(plain @ a @ plain.T) / energy, rel=1e-4)
    assert result.basis == ("outputs" if rank else "importance")


@pytest.mark.parametrize("n_in", [48, 400])
def test_leading_energy_is_that_of_the_eigenvalues(n_in: int) -> None:
    random = np.random.RandomState(0)
    scales = np.float32(1) / np.sqrt(np.arange(1, n_in + 1), dtype=np.float32)
    factor = (random.standard_normal((n_in, n_in)) * scales[:, None]).astype(np.float32)
    sketch = Sketch(1, np.full(n_in, 0.5, np.float32), factor)
    values = np.linalg.eigvalsh(sketch.dense().astype(float))[::-1]
    expected = [values[:count].sum() / values.sum() for count in COUNTS if count <= n_in]
    with Workers(1) as workers:
        found = leading_energy(sketch, workers)
    assert np.all(np.array(found) <= np.array(expected) * (1 + 1e-5))
    np.testing.assert_allclose(found, expected, rtol=1e-5 if n_in <= 80 else 0.02)


def test_samples_are_thinned_to_their_maxima(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = timeline.Recorder(lambda event: None)
    recorder._samples = [(0.0, 3), (1.0, 5), (2.0, 4), (3.0, 1)]
    interval = recorder._interval
    recorder._thin()
    assert recorder._samples == [(1.0, 5), (2.0, 4)]
    assert recorder._interval == 2 * interval


def test_memory_that_cannot_be_read_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(self: psutil.Process) -> None:
        raise psutil.AccessDenied

    monkeypatch.setattr(psutil.Process, "memory_info", denied)
    with timeline.Recorder(lambda event: None) as recorder:
        recorder(StageStarted("encode", 1))
    result = recorder.timeline()
    assert result.samples == ()
    assert [stage.name for stage in result.stages] == ["prepare", "encode"]


def pages(folder: Path) -> dict[str, str]:
    return {"quantize": (folder / "x.html").read_text(), "eval": page.render(evaluated())}


def test_pages_need_nothing_else(folder: Path) -> None:
    for text in pages(folder).values():
        assert not re.search(r"<script|<link|<img|<iframe|@import|url\(|https?:|javascript:|\son\w+=", text)


def test_names_from_outside_are_text(folder: Path) -> None:
    content = evaluated()
    content["title"] = '"><script>alert(1)</script>'
    text = page.render(content)
    assert "<script" not in text
    assert "<b>own</b>" not in text
    assert "&lt;b&gt;own&lt;/b&gt;.txt" in text
    drawing = plot([Line([(0, 1), (1, 2)], '<i>&"x')], AXIS, AXIS, title="<t>", description="]]>")
    assert ElementTree.fromstring(drawing).findtext("title") == "<t>"


def test_drawings_are_sound_and_described(folder: Path) -> None:
    for text in pages(folder).values():
        drawings = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
        assert drawings
        for drawing in drawings:
            root = ElementTree.fromstring(drawing)
            assert root.get("role") == "img"
            assert root.findtext("title")
            assert root.findtext("desc")
            assert "nan" not in drawing


AXIS = linear_axis(10, str)


def test_axes_have_round_ticks_that_cover_the_data() -> None:
    def ticks(axis: Axis) -> Any:
        return pytest.approx([tick for tick, _ in axis.ticks])

    assert ticks(linear_axis(0.0037, str, n_ticks=4)) == [0, 0.001, 0.002, 0.003, 0.004]
    assert ticks(log_axis(0.02, 0.3, str)) == [0.02, 0.05, 0.1, 0.2, 0.5]
    assert ticks(log_axis(2e-4, 3, str)) == [1e-4, 1e-3, 1e-2, 0.1, 1, 10]
    assert Axis(1, 100, (), log=True).place(10) == pytest.approx(0.5)
    assert linear_axis(0, str).high > 0


def test_labels_do_not_overlap() -> None:
    tops = spread([50, 51, 52, 10], [10] * 4, 0, 100)
    assert tops == sorted(tops)
    assert all(b - a >= 10 for a, b in pairwise(tops))
    assert tops[-1] + 10 <= 100


def test_labels_leave_out_what_all_names_share() -> None:
    assert labels(asdict(evaluation())) == {
        "SmolLM2-135M": "SmolLM2-135M",
        "SmolLM2-135M-Q4_K_M-pure.gguf": "Q4_K_M-pure",
        "SmolLM2-135M-Q4_K_M-llamacpp.gguf": "Q4_K_M-llamacpp",
        "rtn": "rtn",
        "imatrix": "imatrix",
    }


def test_quantiles_of_a_histogram() -> None:
    points = quantiles({"edges": [0.1, 1, 10, 100], "counts": [900, 90, 10]}, last=1e-4)
    assert points == [pytest.approx((1, 1)), pytest.approx((2, 10))]


def test_numbers_are_short() -> None:
    assert [significant(x) for x in (0.05123, 12.345, 1234.5, 0.0, 99.96)] == ["0.0512", "12.3", "1,234", "0", "100.0"]
    assert percent(0.004523) == "0.452%"
    assert [duration(x) for x in (0.21, 9.94, 65)] == ["0.2 s", "9.9 s", "1 min 05 s"]
