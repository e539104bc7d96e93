"""The checkpoints that bench/make_checkpoint.py makes."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest
from gguf_files import describe

from sq_stream.formats.checkpoint import Checkpoint
from sq_stream.models import find
from sq_stream.quantize.recipe import choose_types

SCRIPT = Path(__file__).parent.parent / "bench" / "make_checkpoint.py"
PUBLISHED_BYTES = 435_896_640  # of the Qwen3.5-0.8B file with 4.52 bits per weight, its vocabulary included


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("make_checkpoint", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_qwen35_pure_has_the_tensor_bytes_of_the_published_file(script):
    config = script.make_config("qwen3.5-0.8b")
    spec = find(config).describe(config, script.tensor_shapes(config))
    shapes = [(tensor.name, tensor.shape) for tensor in spec.tensors]
    types = [c.block_type for c in choose_types(shapes, "q4_k_m", arch=spec.arch, n_layer=spec.n_layer, pure=True)]
    n_bytes = sum(block_type.tensor_bytes(shape) for block_type, (_, shape) in zip(types, shapes, strict=True))
    n_weights = sum(math.prod(shape) for _, shape in shapes)
    assert n_bytes == 424_934_656
    assert round(8 * n_bytes / n_weights, 2) == 4.52
    assert 0 < PUBLISHED_BYTES - n_bytes < 2**24  # 248320 tokens and their merges


@pytest.mark.parametrize("shape", ["llama-3.1-8b", "llama-3.1-70b"])
def test_shapes_are_those_of_their_configs(script, shape):
    config = script.make_config(shape, n_layer=3)
    spec = find(config).describe(config, script.tensor_shapes(config))
    assert spec.n_layer == 3
    assert not spec.left_out


def test_a_written_checkpoint_is_read_again(script, tmp_path):
    config = script.make_config("qwen3.5-0.8b", n_layer=4)
    config["text_config"] |= {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 256}
    script.write_checkpoint(tmp_path, config, shard_bytes=2**21)
    with Checkpoint.open(tmp_path) as checkpoint:
        assert len({entry.path for entry in checkpoint.tensors.values()}) > 2
        assert checkpoint.shapes == script.tensor_shapes(config)
        tensor = next(t for t in describe(checkpoint, mtp=True).tensors if t.name == "blk.0.ffn_up.weight")
        x = tensor.read(checkpoint, 0, tensor.n_rows)
    assert x.shape == (256, 256)
    assert np.std(x) == pytest.approx(1 / 16, rel=0.05)
