"""One job from start to end: the bytes of the file, resuming, refusing, and leaving nothing half-made."""

from __future__ import annotations

import errno
import os
import shutil
from functools import partial
from pathlib import Path

import gguf
import numpy as np
import pytest

from sq_stream import api
from sq_stream.demo import model_folder
from sq_stream.errors import (
    BadInputError,
    DoesNotFitError,
    InterruptedJobError,
    StorageError,
    UnsupportedModelError,
    UsageError,
    VerificationError,
)
from sq_stream.events import Event, OnEvent, TensorFinished
from sq_stream.formats.checkpoint import Checkpoint
from sq_stream.formats.gguf_write import GGUFFile
from sq_stream.job.settings import parse_settings

MODEL = model_folder()
plan = partial(api.plan, effort="fast")
quantize = partial(api.quantize, effort="fast")


class Stop(Exception):
    """Raised in the middle of a job."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The bytes of an uninterrupted run."""
    path = tmp_path_factory.mktemp("whole") / "whole.gguf"
    quantize(MODEL, path)
    return path.read_bytes()


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(MODEL, tmp_path / "model"))


def stop_after(n: int) -> OnEvent:
    seen = []

    def on_event(event: Event) -> None:
        if isinstance(event, TensorFinished):
            seen.append(event)
            if len(seen) == n:
                raise Stop

    return on_event


@pytest.mark.parametrize("recipe", ["bf16", "f16", "q8_0", "q6_k", "q5_k_m", "q4_k_s"])
def test_every_recipe_decodes_to_the_source(recipe: str, tmp_path: Path) -> None:
    path = tmp_path / "out.gguf"
    quantize(MODEL, path, recipe=recipe)
    worst = {"bf16": 0, "f16": 1e-4, "q8_0": 0.01, "q6_k": 0.03, "q5_k_m": 0.06, "q4_k_s": 0.12}[recipe]
    with Checkpoint.open(MODEL) as checkpoint:
        source = {t.name: t for t in plan(MODEL, path, recipe=recipe).spec.tensors}
        for tensor in gguf.GGUFReader(path).tensors:  # the reader and decoder are not ours
            decoded = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            expected = source[tensor.name].read(checkpoint, 0, source[tensor.name].n_rows)
            error = np.linalg.norm(decoded.reshape(expected.shape) - expected)
            assert error <= worst * np.linalg.norm(expected), tensor.name


def test_overrides_change_the_types_they_name(tmp_path: Path) -> None:
    job = plan(MODEL, tmp_path / "x.gguf", tensor_types=["ffn_down=q8_0", r"blk\.0\.=q6_k"], pure=True)
    types = {t.layout.name: t.type.name for t in job.tensors}
    assert types["blk.0.ffn_down.weight"] == "Q8_0"
    assert types["blk.0.ffn_up.weight"] == "Q6_K"
    assert types["blk.1.ffn_up.weight"] == "Q4_K"


@pytest.mark.parametrize("n", [1, 7, 30])
def test_a_stopped_job_resumes_to_the_same_bytes(n: int, whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "out.gguf"
    with pytest.raises(Stop):
        quantize(MODEL, path, on_event=stop_after(n))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.gguf.journal", "out.gguf.partial"]
    finished = []
    quantize(MODEL, path, on_event=lambda e: finished.append(e) if isinstance(e, TensorFinished) else None)
    assert path.read_bytes() == whole
    assert len(finished) == len(plan(MODEL, path).tensors) - n
    assert [p.name for p in tmp_path.iterdir()] == ["out.gguf"]


def test_another_job_in_the_way_is_refused_and_kept(whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "out.gguf"
    with pytest.raises(Stop):
        quantize(MODEL, path, on_event=stop_after(5))
    with pytest.raises(UsageError, match=r"differs in type: .*--fresh"):
        quantize(MODEL, path, recipe="q6_k")
    quantize(MODEL, path)
    assert path.read_bytes() == whole


def test_a_changed_checkpoint_is_not_mixed_into_what_is_done(copy: Path, tmp_path: Path) -> None:
    path = tmp_path / "out.gguf"
    with pytest.raises(Stop):
        quantize(copy, path, on_event=stop_after(5))
    os.utime(copy / "model.safetensors", ns=(1, 1))
    with pytest.raises(UsageError, match="differs in checkpoint"):
        quantize(copy, path)
    quantize(copy, path, fresh=True)
    assert path.is_file()


def test_two_jobs_on_one_file(tmp_path: Path) -> None:
    path = tmp_path / "out.gguf"
    job = plan(MODEL, path)
    with GGUFFile.create(path, job.layout), pytest.raises(InterruptedJobError, match="another process"):
        quantize(MODEL, path)


def test_damage_between_runs_is_found_before_the_file_gets_its_name(tmp_path: Path) -> None:
    path = tmp_path / "out.gguf"
    with pytest.raises(Stop):
        quantize(MODEL, path, on_event=stop_after(5))
    job = plan(MODEL, path)
    with open(tmp_path / "out.gguf.partial", "r+b") as file:
        file.seek(job.layout.tensors[0].offset + 100)
        file.write(b"\x01\x02\x03")
    with pytest.raises(VerificationError, match="not those that were written"):
        quantize(MODEL, path)
    assert not path.exists()


def test_a_nan_is_named_and_leaves_no_finished_file(copy: Path, tmp_path: Path) -> None:
    with Checkpoint.open(copy) as checkpoint:
        entry = next(e for e in checkpoint.tensors.values() if e.name.endswith("layers.1.mlp.up_proj.weight"))
    with open(entry.path, "r+b") as file:
        file.seek(entry.offset + 2 * (3 * entry.shape[1] + 5))
        file.write(b"\xc0\x7f")
    with pytest.raises(BadInputError, match=r"layers\.1\.mlp\.up_proj\.weight.* nan at \[row 3, column 5\]"):
        quantize(copy, tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


def test_existing_output_is_kept_unless_told_otherwise(tmp_path: Path) -> None:
    path = tmp_path / "out.gguf"
    path.write_text("precious")
    with pytest.raises(UsageError, match="--overwrite"):
        quantize(MODEL, path)
    assert path.read_text() == "precious"
    quantize(MODEL, path, overwrite=True)
    assert path.read_bytes()[:4] == b"GGUF"


def test_no_room_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(DoesNotFitError, match="1000 B are free"):
        quantize(MODEL, tmp_path / "out.gguf")
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up_leaves_a_job_to_resume(
    whole: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, left = os.pwrite, [30]

    def failing(fd: int, data: bytes, offset: int) -> int:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(fd, data, offset)

    path = tmp_path / "out.gguf"
    monkeypatch.setattr(os, "pwrite", failing)
    with pytest.raises(StorageError, match="No space left"):
        quantize(MODEL, path)
    monkeypatch.undo()
    assert not path.exists()
    quantize(MODEL, path)
    assert path.read_bytes() == whole


def test_a_disk_that_is_full_at_the_start_is_left_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", failing)  # of the journal, after the file has taken its space
    with pytest.raises(StorageError, match="No space left"):
        quantize(MODEL, tmp_path / "out.gguf")
    assert not list(tmp_path.iterdir())


def test_unknown_architectures_are_named(copy: Path, tmp_path: Path) -> None:
    config = (copy / "config.json").read_text().replace("Qwen3_5ForCausalLM", "Qwen9ForCausalLM")
    (copy / "config.json").write_text(config)
    with pytest.raises(UnsupportedModelError, match="Qwen9ForCausalLM"):
        plan(copy, tmp_path / "x.gguf")


def test_general_keys_say_what_the_model_is(whole: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(whole)
    fields = gguf.GGUFReader(tmp_path / "x.gguf").fields
    value = {key: fields[key].contents() for key in fields if key.startswith(("general.", "sq_stream."))}
    assert value["general.architecture"] == "qwen35"
    assert value["general.type"] == "model"
    assert value["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q4_K_M
    assert value["general.quantization_version"] == gguf.GGML_QUANT_VERSION
    assert value["general.size_label"] == "3.9M"
    assert value["general.name"]
    assert value["sq_stream.recipe"] == "q4_k_m"
    assert value["sq_stream.options"] == "--type q4_k_m --effort fast"


def test_the_options_in_the_file_are_all_that_decide_its_bytes(tmp_path: Path) -> None:
    settings = parse_settings(
        MODEL, tmp_path / "x.gguf", recipe="q8_0", pure=True, tensor_types=["a b=q6_k"], pre="smollm", mtp=True,
        calib=["my.txt", "mail.txt"], calib_extend=True, ctx=128, windows=9, max_ram="1G", threads=1,
    )  # fmt: skip
    assert settings.command_options() == (
        "--type q8_0 --effort balanced --tensor-type 'a b=q6_k' --pre smollm --pure --mtp "
        "--ctx 128 --windows 9 --calib FILE --calib FILE --calib-extend"
    )
    imatrix = parse_settings(MODEL, imatrix=tmp_path / "m.gguf")
    assert imatrix.command_options() == "--type q4_k_m --effort balanced --imatrix FILE"
