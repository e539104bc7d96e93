"""GGUF files of tiny models, for llama.cpp to load."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from sq_stream.formats.blocks import F32
from sq_stream.formats.checkpoint import Checkpoint
from sq_stream.formats.gguf_layout import lay_out
from sq_stream.formats.gguf_write import GGUFFile
from sq_stream.formats.metadata import Entry, ValueType, array, string, u32
from sq_stream.models import find
from sq_stream.models.base import ModelSpec


def describe(checkpoint: Checkpoint, *, mtp: bool = False) -> ModelSpec:
    return find(checkpoint.config).describe(checkpoint.config, checkpoint.shapes, mtp=mtp)


def placeholder_vocabulary(n: int) -> list[Entry]:
    """The least vocabulary of `n` tokens that llama.cpp accepts."""
    return [
        string("tokenizer.ggml.model", "gpt2"),
        string("tokenizer.ggml.pre", "default"),
        array("tokenizer.ggml.tokens", ValueType.STRING, [f"t{i}" for i in range(n)]),
        array("tokenizer.ggml.token_type", ValueType.INT32, [1] * n),
        array("tokenizer.ggml.merges", ValueType.STRING, ["t 0"]),
        u32("tokenizer.ggml.eos_token_id", 2),
    ]


def write_f32(path: Path, checkpoint: Checkpoint, spec: ModelSpec, n_vocab: int) -> Path:
    """Write all tensors of `spec` as F32."""
    entries = [string("general.architecture", spec.arch), *spec.metadata, *placeholder_vocabulary(n_vocab)]
    layout = lay_out(entries, [(tensor.name, tensor.shape, F32) for tensor in spec.tensors])
    with GGUFFile.create(path, layout) as file:
        for tensor, place in zip(spec.tensors, layout.tensors, strict=True):
            rows = tensor.read(checkpoint, 0, tensor.n_rows)
            file.write_rows(place, 0, np.ascontiguousarray(rows, "<f4").view(np.uint8))
        file.commit()
    return path
