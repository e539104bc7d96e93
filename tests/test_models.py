"""Model files against llama.cpp's converter, its loader and transformers."""

from __future__ import annotations

import hashlib
import importlib
import json

import numpy as np
import pytest
import tiny_models
from gguf_files import describe, write_f32
from oracles.llamacpp import LlamaModel

from sq_stream.formats.checkpoint import Checkpoint
from sq_stream.formats.metadata import ValueType
from sq_stream.kernels.codec import encode
from sq_stream.models import MODULES, find
from sq_stream.quantize.recipe import choose_types

NAMES = tuple(tiny_models.MODELS)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    opened = {name: Checkpoint.open(tiny_models.write(name, folder / name)) for name in NAMES}
    yield opened
    for checkpoint in opened.values():
        checkpoint.close()


@pytest.fixture(scope="module")
def specs(checkpoints):
    return {name: describe(checkpoints[name], mtp=tiny_models.MODELS[name].mtp) for name in NAMES}


def digest(x):
    return hashlib.sha256(x.tobytes()).hexdigest()[:16]


@pytest.mark.parametrize("name", NAMES)
def test_keys_are_the_converters(specs, name):
    golden, spec = tiny_models.golden(name), specs[name]
    assert spec.arch == golden["arch"]
    ours = {}
    for entry in spec.metadata:
        kinds = [entry.type.name] + ([entry.element.name] if entry.element is not None else [])
        value = float(np.float32(entry.value)) if entry.type is ValueType.FLOAT32 else entry.value
        assert entry.key not in ours
        ours[entry.key] = {"type": kinds, "value": value}
    assert ours == golden["keys"]


@pytest.mark.parametrize("name", NAMES)
def test_tensors_are_the_converters(checkpoints, specs, name):
    golden = tiny_models.golden(name)["tensors"]
    tensors = specs[name].tensors
    assert sorted(tensor.name for tensor in tensors) == sorted(golden)
    for tensor in tensors:
        assert list(tensor.shape) == golden[tensor.name]["shape"]
        values = tensor.read(checkpoints[name], 0, tensor.n_rows)
        assert values.dtype == np.float32
        expected = golden[tensor.name]["f32"]
        if isinstance(expected, list):
            np.testing.assert_allclose(values.ravel(), expected, rtol=3e-7)
        else:
            assert digest(np.ascontiguousarray(values, "<f4")) == expected, tensor.name


@pytest.mark.parametrize("recipe", ["bf16", "f16"])
@pytest.mark.parametrize("name", NAMES)
def test_unquantized_types_and_bytes_are_the_converters(checkpoints, specs, name, recipe):
    golden = tiny_models.golden(name)["tensors"]
    spec = specs[name]
    shapes = [(tensor.name, tensor.shape) for tensor in spec.tensors]
    choices = choose_types(shapes, recipe, arch=spec.arch, n_layer=spec.n_layer, n_expert=spec.n_expert)
    for tensor, choice in zip(spec.tensors, choices, strict=True):
        block_type, expected = golden[tensor.name][recipe]
        assert choice.block_type.name == block_type, tensor.name
        if isinstance(golden[tensor.name]["f32"], str):
            data = encode(tensor.read(checkpoints[name], 0, tensor.n_rows), choice.block_type)
            assert digest(data) == expected, tensor.name


@pytest.mark.parametrize("name", NAMES)
def test_rows_are_read_in_any_tiles(checkpoints, specs, name):
    for tensor in specs[name].tensors:
        whole = tensor.read(checkpoints[name], 0, tensor.n_rows)
        middle = tensor.n_rows // 3
        parts = [tensor.read(checkpoints[name], a, b) for a, b in ((0, middle), (middle, tensor.n_rows))]
        np.testing.assert_array_equal(np.concatenate(parts), whole)


@pytest.mark.parametrize("name", NAMES)
def test_llamacpp_computes_the_logits_of_transformers(checkpoints, specs, name, tmp_path):
    """In float32, with logits of a standard deviation of 1 to 3; but llama.cpp rounds GELU, which Gemma has, to F16."""
    path = write_f32(tmp_path / "model.gguf", checkpoints[name], specs[name], tiny_models.N_VOCAB)
    with LlamaModel(path) as model:
        logits = model.logits(tiny_models.TOKENS)
    np.testing.assert_allclose(logits, tiny_models.golden_logits(name), atol=1e-2 if "gemma" in name else 2e-4)


@pytest.mark.parametrize("name", [name for name in NAMES if not tiny_models.MODELS[name].seed])
def test_golden_logits_are_those_of_transformers(checkpoints, name):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    folder = checkpoints[name].folder
    config = json.loads((folder / "config.json").read_text())
    model_class = getattr(transformers, config["architectures"][0])
    model = model_class.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.inference_mode():
        logits = model(torch.from_numpy(tiny_models.TOKENS)[None]).logits[0].numpy()
    np.testing.assert_allclose(logits, tiny_models.golden_logits(name), atol=2e-4)


def test_every_architecture_has_its_module():
    for name, module in MODULES.items():
        assert name in importlib.import_module(f"sq_stream.models.{module}").ARCHITECTURES
        assert find({"architectures": ["SomethingElse", name]}).ARCHITECTURES.count(name) == 1
