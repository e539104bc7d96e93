"""Importance matrices of llama.cpp: mean squares of the activations, column by column.

Source: `common/imatrix-loader.cpp` and `tools/imatrix/imatrix.cpp` of llama.cpp, for GGUF and for the older format.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sq_stream.calibrate.sketch import Sketch
from sq_stream.calibrate.sketches import Sketches, is_linear
from sq_stream.errors import BadInputError
from sq_stream.formats.atomic import atomic_write
from sq_stream.formats.blocks import F32
from sq_stream.formats.gguf_layout import MAGIC, lay_out
from sq_stream.formats.gguf_read import GGUFReader
from sq_stream.formats.metadata import ValueType, array, string, u32
from sq_stream.formats.storage import only_regular, storage_errors
from sq_stream.formats.strict_json import brief, shown
from sq_stream.models.base import ModelSpec
from sq_stream.models.layers import Site

Array = NDArray[np.float32]

SUMS, COUNTS = ".in_sum2", ".counts"
_LAYER = re.compile(r"blk\.(\d+)\.")
_MAX_NAME = 2**10  # bytes of a name in the older format
_MAX_VALUES = 2**27  # of one entry in the older format
MAX_BYTES = 2**28
"""Of the file; that of a dense model of 405 billion weights has some 2**26."""


def export_imatrix(
    path: Path, sketches: Mapping[str, Sketch], *, n_windows: int, n_ctx: int, datasets: Sequence[str]
) -> None:
    """Write the diagonals of `sketches` as a GGUF importance matrix for llama-quantize, without unseen sites.

    As llama.cpp counts it, attn_v sees what attn_q sees: the tokens, not their mixtures.

    Args:
        path: the file, replaced if it is there.
        sketches: by tensor name.
        n_windows: windows of text ("chunks").
        n_ctx: tokens of each.
        datasets: what the text was.

    Raises:
        StorageError: writing fails.
    """
    values: dict[str, Array] = {}
    for name in sorted(sketches):
        sketch = sketches[name.replace("attn_v", "attn_q")]
        if sketch.n_tokens:
            values[name + SUMS] = sketch.diagonal() * np.float32(sketch.n_tokens)
            values[name + COUNTS] = np.array([sketch.n_tokens], np.float32)
    metadata = [
        string("general.type", "imatrix"),
        array("imatrix.datasets", ValueType.STRING, datasets),
        u32("imatrix.chunk_count", n_windows),
        u32("imatrix.chunk_size", n_ctx),
    ]
    layout = lay_out(metadata, [(name, (1, len(x)), F32) for name, x in values.items()])
    with atomic_write(path) as file:
        file.write(layout.header)
        for tensor in layout.tensors:
            file.seek(tensor.offset)
            file.write(values[tensor.name].astype("<f4").tobytes())
        file.truncate(layout.total_bytes)


def import_imatrix(path: Path, spec: ModelSpec) -> Sketches:
    """The importance matrix in `path` (GGUF, or the older binary format) as statistics that are diagonals only.

    Raises:
        BadInputError: the file is no importance matrix, is damaged, or is of another model than `spec`.
        StorageError: reading fails.
    """
    with storage_errors("reading", path), open(path, "rb", opener=only_regular) as file:
        is_gguf = file.read(len(MAGIC)) == MAGIC
        if (n_bytes := os.fstat(file.fileno()).st_size) > MAX_BYTES:
            raise BadInputError(f"{path} has {n_bytes} bytes; at most {MAX_BYTES} of an importance matrix are read")
    with np.errstate(invalid="ignore", over="ignore"):  # found below
        means = _read_gguf(path) if is_gguf else _read_legacy(path)
    _check_model(path, means, spec)
    sketches: dict[Site, Sketch] = {}
    for name, (mean, count) in means.items():
        if not np.isfinite(mean).all() or mean.min(initial=0) < 0:
            raise BadInputError(
                f"{path}: the importance of {shown(name)} holds {mean.min()}, {mean.max()}: it is damaged, "
                "collect it anew"
            )
        if count > 0:
            sketches[(name.removesuffix(".weight"),)] = Sketch.diagonal_only(mean, count)
    if not any(mean.any() for mean, count in means.values() if count > 0):
        raise BadInputError(f"{path} holds no data: all of its counts or sums are zero; collect it anew")
    return Sketches(spec, {site: sketch.n_dead for site, sketch in sketches.items()}, sketches.__getitem__)


def _read_gguf(path: Path) -> dict[str, tuple[Array, int]]:
    """Mean squares and token count of every tensor."""
    with GGUFReader.open(path) as reader:
        if reader.text("general.type") != "imatrix":
            raise BadInputError(f"{path} is a GGUF file, but no importance matrix (general.type is not imatrix)")
        values = {}
        for tensor in reader.tensors.values():
            if tensor.block_type is not F32:
                raise BadInputError(
                    f"{path}: {shown(tensor.name)} is {tensor.block_type.name}, an importance matrix is F32"
                )
            values[tensor.name] = reader.read_rows(tensor.name, 0, tensor.n_rows).view("<f4").astype(np.float32)
    means = {}
    for name in (name.removesuffix(SUMS) for name in values if name.endswith(SUMS)):
        sums, counts = values[name + SUMS], values.get(name + COUNTS)
        if counts is None or counts.size != 1 or len(sums) != 1:
            raise BadInputError(
                f"{path}: {shown(name)} has no single count of tokens; mixtures of experts are not supported"
            )
        if not 0 <= counts.item() < 2**63:
            raise BadInputError(
                f"{path}: {shown(name)} was seen by {counts.item()} tokens: it is damaged, collect it anew"
            )
        count = int(counts.item())
        means[name] = sums[0] / np.float32(max(count, 1)), count
    return means


def _read_legacy(path: Path) -> dict[str, tuple[Array, int]]:
    """Mean squares and chunk count of every tensor: sums are stored as means times chunks."""
    means = {}
    with storage_errors("reading", path), open(path, "rb", opener=only_regular) as file:
        n_bytes = os.fstat(file.fileno()).st_size

        def take(n: int) -> bytes:
            if n > n_bytes - file.tell():
                raise BadInputError(
                    f"{path} is no GGUF file and no whole importance matrix of the older format: collect it anew"
                )
            return file.read(n)

        def integer(lowest: int, highest: int) -> int:
            (value,) = struct.unpack("<i", take(4))
            if not lowest <= value <= highest:
                raise BadInputError(
                    f"{path} is no importance matrix: {value} at byte {file.tell() - 4} is no size; collect it anew"
                )
            return int(value)

        for _ in range(integer(1, 2**20)):
            name = take(integer(1, _MAX_NAME)).decode(errors="replace")
            count = integer(0, 2**31 - 1)
            sums = np.frombuffer(take(4 * integer(1, _MAX_VALUES)), "<f4").astype(np.float32)
            means[name] = sums / np.float32(max(count, 1)), max(count, 1)
    return means


def _check_model(path: Path, means: Mapping[str, tuple[Array, int]], spec: ModelSpec) -> None:
    """Refuse an importance matrix of another model. Multi-token prediction layers may be in it, or not."""
    widths = {t.name: t.n_in for t in spec.tensors if is_linear(t.name, t.shape)}
    advice = "it is of another model: use the one collected with this model, in any precision"
    predicting = {_layer(name) for name in (*means, *widths) if ".nextn." in name}
    for name, (mean, _) in means.items():
        if name in widths and len(mean) != widths[name]:
            raise BadInputError(
                f"{path}: {shown(name)} has {len(mean)} columns, the model's has {widths[name]}; {advice}"
            )
        if name not in widths and _layer(name) not in {-1, *predicting}:
            raise BadInputError(f"{path}: {shown(name)} is no linear of this {spec.arch} model; {advice}")
    if not means.keys() & widths.keys():
        raise BadInputError(f"{path} names none of this model's linears; {advice}")
    missing = set(map(_layer, widths)) - set(map(_layer, means)) - {-1, *predicting}
    if missing:
        raise BadInputError(f"{path} has nothing of layers {brief(sorted(missing))} of {spec.n_layer}; {advice}")


def _layer(name: str) -> int:
    """The number of the layer that a tensor belongs to, or -1."""
    match = _LAYER.match(name)
    return int(match[1]) if match else -1
