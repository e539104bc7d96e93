"""What a checkpoint folder or a GGUF file holds, from headers alone."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sq_stream.formats.checkpoint import Checkpoint
from sq_stream.formats.gguf_read import GGUFReader
from sq_stream.formats.metadata import Entry
from sq_stream.models import find

MOST_ELEMENTS_SHOWN = 6


@dataclass(frozen=True)
class TensorSummary:
    """A tensor as it lies in a file."""

    name: str
    type: str
    shape: tuple[int, ...]  # row-major
    n_bytes: int


@dataclass(frozen=True)
class CheckpointSummary:
    """A checkpoint folder: its architecture as llama.cpp calls it, and its tensors."""

    path: str
    architecture: str
    n_layer: int
    n_parameters: int  # of what would be converted
    tensors: tuple[TensorSummary, ...]
    left_out: dict[str, int]  # reason -> number of tensors


@dataclass(frozen=True)
class GGUFSummary:
    """A GGUF file: its metadata (long arrays cut) and its tensors."""

    path: str
    n_bytes: int
    n_parameters: int
    bits_per_weight: float
    metadata: dict[str, Any]
    tensors: tuple[TensorSummary, ...]


def summarize_checkpoint(folder: Path) -> CheckpointSummary:
    """Describe a checkpoint without reading its weights.

    Raises:
        BadInputError: it is damaged or incomplete.
        UnsupportedModelError: its architecture is not supported.
    """
    with Checkpoint.open(folder) as checkpoint:
        spec = find(checkpoint.config).describe(checkpoint.config, checkpoint.shapes)
        entries = checkpoint.tensors.values()
        return CheckpointSummary(
            path=str(folder),
            architecture=spec.arch,
            n_layer=spec.n_layer,
            n_parameters=sum(math.prod(t.shape) for t in spec.tensors),
            tensors=tuple(TensorSummary(e.name, e.dtype, e.shape, e.n_bytes) for e in entries),
            left_out={reason: len(names) for reason, names in spec.left_out.items()},
        )


def summarize_gguf(path: Path) -> GGUFSummary:
    """Describe a GGUF file without reading its weights.

    Raises:
        BadInputError: it is not a GGUF file or is damaged.
    """
    with GGUFReader.open(path) as reader:
        tensors = reader.tensors.values()
        n_parameters = sum(math.prod(t.shape) for t in tensors)
        return GGUFSummary(
            path=str(path),
            n_bytes=reader.file_bytes,
            n_parameters=n_parameters,
            bits_per_weight=8 * sum(t.n_bytes for t in tensors) / max(n_parameters, 1),
            metadata={entry.key: _shown(entry) for entry in reader.metadata.values()},
            tensors=tuple(TensorSummary(t.name, t.block_type.name, t.shape, t.n_bytes) for t in tensors),
        )


def _shown(entry: Entry) -> Any:
    """The value as JSON; of a long array only the beginning and its length."""
    if not isinstance(entry.value, np.ndarray | list):
        return entry.value
    first = entry.value[:MOST_ELEMENTS_SHOWN]
    shown = first.tolist() if isinstance(first, np.ndarray) else first
    return {"length": len(entry.value), "first": shown} if len(entry.value) > len(shown) else shown


def count_types(tensors: Iterable[TensorSummary]) -> list[tuple[str, int, int]]:
    """Type, number of tensors and bytes, the largest first."""
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for tensor in tensors:
        counts[tensor.type] += 1
        sizes[tensor.type] += tensor.n_bytes
    return [(name, counts[name], size) for name, size in sizes.most_common()]
