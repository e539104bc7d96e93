"""Checkpoint folders: what is accepted, what is refused with which words, what is read and in how much memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from sq_stream.errors import BadInputError, StorageError
from sq_stream.formats import checkpoint as checkpoint_module
from sq_stream.formats.checkpoint import INDEX, Checkpoint, check_finite

X = np.arange(60, dtype=np.float32).reshape(5, 12)
Y = np.linspace(-1, 1, 8, dtype=np.float16)
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def write(folder: Path, name: str, **tensors: np.ndarray) -> None:
    safetensors.numpy.save_file(tensors, folder / name)


def write_index(folder: Path, weight_map: object, **metadata: object) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": metadata, "weight_map": weight_map}))


def bf16_file(path: Path, name: str, shape: tuple[int, ...], codes: np.ndarray | None) -> None:
    """A file of one BF16 tensor, all holes (zeros) without `codes`."""
    n_bytes = 2 * int(np.prod(shape))
    header = json.dumps({name: {"dtype": "BF16", "shape": shape, "data_offsets": [0, n_bytes]}}).encode()
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        if codes is not None:
            file.write(codes.tobytes())
        file.truncate(8 + len(header) + n_bytes)


@pytest.fixture
def single(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    write(tmp_path, "model.safetensors", x=X, y=Y)
    return tmp_path


@pytest.fixture
def sharded(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    write(tmp_path, SHARDS[0], y=Y)
    write(tmp_path, SHARDS[1], x=X)
    write_index(tmp_path, {"x": SHARDS[1], "y": SHARDS[0]}, total_size=X.nbytes + Y.nbytes)
    return tmp_path


def test_reads_a_single_file(single):
    with Checkpoint.open(single) as checkpoint:
        assert checkpoint.config == {"model_type": "llama"}
        assert checkpoint.shapes == {"x": (5, 12), "y": (8,)}
        np.testing.assert_array_equal(checkpoint.read_rows("x", slice(None)), X)
        np.testing.assert_array_equal(checkpoint.read_rows("y", slice(None)), Y[None].astype(np.float32))
        assert checkpoint.warnings == []


def test_reads_shards(sharded):
    with Checkpoint.open(sharded) as checkpoint:
        assert list(checkpoint.tensors) == ["y", "x"]
        np.testing.assert_array_equal(checkpoint.read_rows("x", slice(1, 3)), X[1:3])
        assert checkpoint.warnings == []


def test_reads_shards_without_index(sharded):
    (sharded / INDEX).unlink()
    with Checkpoint.open(sharded) as checkpoint:
        np.testing.assert_array_equal(checkpoint.read_rows("x", slice(None)), X)


def test_follows_links_as_the_hub_cache_has_them(single, tmp_path_factory):
    blobs = tmp_path_factory.mktemp("blobs")
    os.rename(single / "model.safetensors", blobs / "4d7a")
    (single / "model.safetensors").symlink_to(blobs / "4d7a")
    with Checkpoint.open(single) as checkpoint:
        np.testing.assert_array_equal(checkpoint.read_rows("x", slice(None)), X)


@pytest.mark.parametrize("other", ["consolidated.safetensors", "adapter_model.safetensors"])
def test_leaves_other_weights_aside(single, other):
    write(single, other, x=-X, z=X)
    with Checkpoint.open(single) as checkpoint:
        assert checkpoint.shapes.keys() == {"x", "y"}
        np.testing.assert_array_equal(checkpoint.read_rows("x", slice(None)), X)
        assert checkpoint.warnings == [f"not part of the checkpoint, left aside: {other}"]


def test_index_decides_and_its_wrong_sum_is_only_told(sharded):
    write(sharded, "model.safetensors", x=-X)
    write_index(sharded, {"x": SHARDS[1], "y": SHARDS[0]}, total_size=999)
    with Checkpoint.open(sharded) as checkpoint:
        np.testing.assert_array_equal(checkpoint.read_rows("x", slice(None)), X)
        assert checkpoint.warnings == [
            f"{INDEX} states a total_size of 999 bytes, the tensors have 256",
            "not part of the checkpoint, left aside: model.safetensors",
        ]


def replace_config(text: str):
    return lambda folder: (folder / "config.json").write_text(text)


def truncate(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", (folder / "model.safetensors").stat().st_size - 1)


def only(name: str):
    def damage(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        (folder / name).touch()

    return damage


def add(name: str, **tensors: np.ndarray):
    return lambda folder: write(folder, name, **tensors)


DAMAGED_SINGLE = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
    "config not JSON": (replace_config("{,}"), "config.json is not valid JSON"),
    "config a list": (replace_config("[1]"), "config.json holds a JSON list where an object is expected"),
    "config nested too deep": (replace_config('{"a":' + "[" * 100_000), "config.json is not valid JSON"),
    "config a git-lfs pointer": (replace_config("version https://git-lfs.github.com/spec/v1"), "git lfs pull"),
    "truncated": (truncate, "model.safetensors is truncated"),
    "second set of weights": (
        add("model.fp32.safetensors", x=X),
        "'x' is in both model.fp32.safetensors and model.saf",
    ),
    "pytorch pickle": (
        only("pytorch_model-00001-of-00002.bin"),
        "only pickled weights (pytorch_model-00001-of-00002.bin)",
    ),
    "consolidated pickle": (only("consolidated.00.pth"), "only pickled weights (consolidated.00.pth)"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "has no *.safetensors"),
    "adapter only": (only("adapter_model.safetensors"), "LoRA adapter"),
    "GGUF only": (only("model.gguf"), "holds a GGUF file"),
    "shard missing": (
        only("model-00002-of-00003.safetensors"),
        "model-00001-of-00003.safetensors, model-00003-of-00003",
    ),
}


@pytest.mark.parametrize("damage", DAMAGED_SINGLE)
def test_refuses_damaged_folder(single, damage):
    change, message = DAMAGED_SINGLE[damage]
    change(single)
    with pytest.raises(BadInputError) as caught:
        Checkpoint.open(single)
    assert message in str(caught.value)


def index(weight_map: object):
    return lambda folder: write_index(folder, weight_map)


DAMAGED_SHARDED = {
    "index not JSON": (lambda folder: (folder / INDEX).write_text("x"), f"{INDEX} is not valid JSON"),
    "no map": (index(None), "has no weight_map"),
    "empty map": (index({}), "has no weight_map"),
    "name twice": (
        lambda folder: (folder / INDEX).write_text('{"weight_map": {"x": "a.safetensors", "x": "a.safetensors"}}'),
        "names 'x' twice",
    ),
    "shard elsewhere": (index({"x": "../other/a.safetensors"}), "'../other/a.safetensors', which is not the name"),
    "shard at a full path": (index({"x": "/etc/a.safetensors"}), "'/etc/a.safetensors', which is not the name"),
    "shard a pickle": (index({"x": "pytorch_model.bin"}), "'pytorch_model.bin', which is not the name"),
    "shard a number": (index({"x": 3}), "3, which is not the name"),
    "shards missing": (
        index({"x": SHARDS[0], "y": "b.safetensors", "z": "a.safetensors"}),
        "lacks 2 weight files: a.safetensors, b.safetensors",
    ),
    "tensor not in its shard": (index({"x": SHARDS[0], "y": SHARDS[0]}), f"is in {SHARDS[0]}, but it is not there"),
    "tensor in another shard": (
        index({"x": SHARDS[0], "y": SHARDS[1]}),
        f"is in {SHARDS[0]}, but it is in {SHARDS[1]}",
    ),
    "tensor nowhere": (index({"x": SHARDS[1], "y": SHARDS[0], "z": SHARDS[0]}), "'z' is in model-00001"),
    "tensor not in the index": (add(SHARDS[0], y=Y, extra=Y), "holds tensor 'extra', which"),
    "tensor in two shards": (add(SHARDS[0], y=Y, x=X), "'x' is in both"),
}


@pytest.mark.parametrize("damage", DAMAGED_SHARDED)
def test_refuses_damaged_shards(sharded, damage):
    change, message = DAMAGED_SHARDED[damage]
    change(sharded)
    with pytest.raises(BadInputError) as caught:
        Checkpoint.open(sharded)
    assert message in str(caught.value)


def test_refuses_what_is_no_folder(single):
    with pytest.raises(BadInputError, match="nowhere does not exist"):
        Checkpoint.open(single / "nowhere")
    with pytest.raises(BadInputError, match=r"model\.safetensors is a file: give the folder"):
        Checkpoint.open(single / "model.safetensors")


def test_names_tensor_that_cannot_be_read(single):
    write(single, "model.safetensors", x=X, codes=np.zeros((4, 4), np.int8))
    with Checkpoint.open(single) as checkpoint:
        np.testing.assert_array_equal(checkpoint.read_rows("x", slice(None)), X)
        with pytest.raises(BadInputError, match=r"'codes' in .* has dtype I8; BF16, F16, F32 can be read"):
            checkpoint.read_rows("codes", slice(None))
        with pytest.raises(BadInputError, match="has no tensor 'w'"):
            checkpoint.read_rows("w", slice(None))


def test_reports_a_file_that_shrinks_while_open(single):
    with Checkpoint.open(single) as checkpoint:
        os.truncate(single / "model.safetensors", 200)
        with pytest.raises(StorageError, match=r"ends at byte 200, .* bytes too early"):
            checkpoint.read_rows("x", slice(None))


def test_reports_a_file_that_changes_while_open(single):
    with Checkpoint.open(single) as checkpoint:
        checkpoint.read_rows("x", slice(None))
        os.utime(single / "model.safetensors", ns=(1, 1))
        with pytest.raises(StorageError, match=r"model.safetensors was changed while in use"):
            checkpoint.read_rows("x", slice(None))


def test_a_replaced_file_does_not_change_what_is_open(single):
    with Checkpoint.open(single) as checkpoint:
        (single / "model.safetensors").unlink()
        write(single, "model.safetensors", x=-X)
        np.testing.assert_array_equal(checkpoint.read_rows("x", slice(None)), X)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    (folder / "config.json").write_text("{}")
    return folder


ROWS = st.one_of(
    st.slices(14),
    hnp.arrays(np.int64, st.integers(0, 20), elements=st.integers(0, 13)),
)


@given(
    codes=hnp.arrays(np.uint16, (7, 2, 3), elements=st.integers(0, 2**16 - 1)),
    rows=ROWS,
    chunk=st.sampled_from([1, 13, 999]),
)
def test_bf16_rows_are_the_upper_halves_of_float32(folder, codes, rows, chunk):
    bf16_file(folder / "model.safetensors", "x", codes.shape, codes)
    matrix = codes.reshape(14, 3)
    with pytest.MonkeyPatch.context() as patch, Checkpoint.open(folder) as checkpoint:
        patch.setattr(checkpoint_module, "_CHUNK_BYTES", chunk)
        x = checkpoint.read_rows("x", rows)
    upper = x.view(np.uint32) >> 16
    np.testing.assert_array_equal(upper, matrix[rows])
    assert x.dtype == np.float32
    assert not (x.view(np.uint32) & 0xFFFF).any()


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_every_half_and_special_float_survives(single, dtype):
    x = np.arange(2**16, dtype=np.uint16).view(np.float16).reshape(256, 256).astype(dtype)
    write(single, "model.safetensors", x=x)
    with Checkpoint.open(single) as checkpoint:
        np.testing.assert_array_equal(checkpoint.read_rows("x", slice(None)), x.astype(np.float32))


def test_refuses_rows_that_are_not_there(single):
    with Checkpoint.open(single) as checkpoint:
        for rows in ([5], [-1]):
            with pytest.raises(IndexError):
                checkpoint.read_rows("x", np.array(rows, np.int64))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_check_finite_names_tensor_and_position(bad):
    x = np.zeros((4, 6), np.float32)
    check_finite(x, "w", 100)
    x[2, 5] = bad
    with pytest.raises(BadInputError, match=rf"'w' holds {bad} at \[row 102, column 5\]"):
        check_finite(x, "w", 100)
    check_finite(np.zeros((0, 6), np.float32), "w")


def test_fingerprint_sees_config_names_headers_and_times(single):
    def fingerprint() -> str:
        with Checkpoint.open(single) as checkpoint:
            return checkpoint.fingerprint()

    seen = [fingerprint()]
    assert fingerprint() == seen[0]
    (single / "config.json").write_text('{"model_type": "mistral"}')
    seen.append(fingerprint())
    os.utime(single / "model.safetensors", ns=(0, 1))
    seen.append(fingerprint())
    write(single, "model.safetensors", x=X, z=Y)
    os.utime(single / "model.safetensors", ns=(0, 1))
    seen.append(fingerprint())
    (single / "model.safetensors").rename(single / "model2.safetensors")
    seen.append(fingerprint())
    assert len(set(seen)) == len(seen)


PEAK_MEMORY = """
import re, sys
from pathlib import Path
from sq_stream.formats.checkpoint import Checkpoint, check_finite

def peak_kib():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

with Checkpoint.open(Path(sys.argv[1])) as checkpoint:
    before = peak_kib()
    for start in range(0, 250_000, 1000):
        check_finite(checkpoint.read_rows("x", slice(start, start + 1000)), "x", start)
    print(peak_kib() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads peak memory from /proc")
def test_reading_in_tiles_does_not_fill_memory(tmp_path):
    """A 500 MB tensor in tiles of 4 MB (of float32)."""
    (tmp_path / "config.json").write_text("{}")
    bf16_file(tmp_path / "model.safetensors", "x", (250_000, 1000), None)
    done = subprocess.run(
        [sys.executable, "-c", PEAK_MEMORY, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 16 * 1024
