"""The same input and options give the same bytes, whatever else is different: by effort, for every block type."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest

from sq_stream import api
from sq_stream.demo import model_folder
from sq_stream.formats.blocks import BLOCK_TYPES
from sq_stream.formats.gguf_read import GGUFReader
from sq_stream.job.run import run
from sq_stream.job.settings import EFFORTS
from sq_stream.parallel import SLAB

MODEL = model_folder()
TYPES = {
    r"blk\.0\.ffn_down": "q4_k",
    r"blk\.1\.attn_gate": "q5_k",
    r"blk\.1\.ffn_down": "q6_k",
    r"blk\.2\.attn_gate": "q8_0",
    r"blk\.3\.attn_k\.": "q5_0",
    r"blk\.3\.attn_v": "q5_1",
    r"blk\.3\.attn_output": "f16",
    r"blk\.0\.ffn_gate": "q4_k",  # a pair whose channels are smoothed
    r"blk\.0\.ffn_up": "q4_k",
}
OPTIONS: dict[str, Any] = {
    "recipe": "bf16",
    "tensor_types": [f"{pattern}={name}" for pattern, name in TYPES.items()],
    "ctx": 128,
    "windows": 8,
    "threads": 2,
}


@pytest.fixture(scope="module", params=EFFORTS)
def effort(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def whole(effort: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run, with the cache that it has filled beside it."""
    folder = tmp_path_factory.mktemp(effort)
    api.quantize(MODEL, folder / "whole.gguf", effort=effort, cache=folder / "cache", **OPTIONS)
    return folder / "whole.gguf"


def test_every_block_type_is_here(whole: Path) -> None:
    with GGUFReader.open(whole) as reader:
        assert {tensor.block_type.name for tensor in reader.tensors.values()} == set(BLOCK_TYPES)


def test_tiles_change_no_byte(effort: str, whole: Path, tmp_path: Path) -> None:
    job = api.plan(MODEL, tmp_path / "x.gguf", effort=effort, cache=whole.parent / "cache", **OPTIONS)
    with job.checkpoint:
        run(replace(job, budget=replace(job.budget, tile_weights=SLAB)))
    assert (tmp_path / "x.gguf").read_bytes() == whole.read_bytes()


def test_the_file_says_how_another_process_makes_it_again(whole: Path, tmp_path: Path) -> None:
    """With other threads, memory, hash seeds, locale and folder, and all that a run in this process left gone."""
    options = gguf.GGUFReader(whole).fields["sq_stream.options"].contents()
    command = [sys.executable, "-m", "sq_stream", "quantize", str(MODEL), *shlex.split(options)]
    environment = os.environ | {"PYTHONHASHSEED": "7", "LC_ALL": "C", "TZ": "Asia/Kathmandu"}
    others = ["-o", "x.gguf", "--cache", "cache", "-q", "--threads", "1", "--max-ram", "700M"]
    subprocess.run([*command, *others], cwd=tmp_path, env=environment, check=True)
    assert (tmp_path / "x.gguf").read_bytes() == whole.read_bytes()
