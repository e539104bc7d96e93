"""A Hugging Face checkpoint folder: config.json and the tensors of its safetensors files.

Tensors are read with `pread` through a small buffer rather than mapped: resident memory never holds more than the rows
asked for, and a file that shrinks or fails under us raises an error where a mapping would kill the process (SIGBUS).
"""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sq_stream.errors import BadInputError
from sq_stream.formats.safetensors import DTYPE_BITS, MAX_HEADER_BYTES, TensorEntry, read_header
from sq_stream.formats.storage import (
    Closing,
    FileState,
    file_state,
    only_regular,
    read_input,
    read_into,
    storage_errors,
)
from sq_stream.formats.strict_json import brief, parse_object, shown

INDEX = "model.safetensors.index.json"
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors")
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
MAX_CONFIG_BYTES = 2**24
MAX_TENSORS = 2**18
"""In all files of a checkpoint; the largest published ones have about 2**17."""
_CHUNK_BYTES = 2**19  # read and converted at a time: stays in the cache


def _from_bf16(raw: NDArray[np.uint8], out: NDArray[np.float32]) -> None:
    np.left_shift(raw.view(np.uint16), 16, out=out.view(np.uint32), dtype=np.uint32)


def _from_f16(raw: NDArray[np.uint8], out: NDArray[np.float32]) -> None:
    out[:] = raw.view(np.float16)


def _from_f32(raw: NDArray[np.uint8], out: NDArray[np.float32]) -> None:
    out[:] = raw.view(np.float32)


_TO_FLOAT32: dict[str, Callable[[NDArray[np.uint8], NDArray[np.float32]], None]] = {
    "BF16": _from_bf16,
    "F16": _from_f16,
    "F32": _from_f32,
}


def check_finite(x: NDArray[np.float32], tensor: str, first_row: int = 0) -> None:
    """Raise BadInputError naming the first NaN or Inf of `x` [n, n_in], the rows of `tensor` from `first_row` on."""
    if x.size == 0 or (np.isfinite(x.min()) and np.isfinite(x.max())):
        return
    row, column = np.argwhere(~np.isfinite(x))[0]
    raise BadInputError(
        f"tensor {tensor!r} holds {x[row, column]} at [row {first_row + row}, column {column}]: "
        "the weights are damaged, download them again"
    )


class Checkpoint(Closing):
    """An open checkpoint folder. Opening reads config.json and the headers only; every file is checked then.

    Reading is safe from several threads at a time. The files stay open until `close`.
    """

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, TensorEntry]  # by name, in the order of the files and of the data in them
    warnings: list[str]  # oddities that do not keep the checkpoint from being read

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tensors = {}
        self._fds: dict[Path, int] = {}
        self._states: dict[Path, FileState] = {}
        self._hash = hashlib.sha256()
        self.warnings = []
        with storage_errors("opening", folder):
            if not folder.exists():
                raise BadInputError(f"{folder} does not exist: give the folder of a Hugging Face checkpoint")
            if not folder.is_dir():
                raise BadInputError(f"{folder} is a file: give the folder that holds config.json and *.safetensors")
            present = sorted(os.listdir(folder))
        if "config.json" not in present:
            raise BadInputError(f"{folder} has no config.json: give the folder of a Hugging Face checkpoint")
        raw, self.config = self._read_json("config.json")
        self._hash.update(raw)
        try:
            self._open_weights(present)
        except BaseException:
            self.close()
            raise

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Open and check a folder.

        Raises:
            BadInputError: the folder is no safetensors checkpoint, or a file in it is damaged.
            StorageError: reading fails.
        """
        return cls(Path(folder))

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor, by name."""
        return {name: entry.shape for name, entry in self.tensors.items()}

    def fingerprint(self) -> str:
        """SHA-256 (hex) that changes when the checkpoint does.

        It covers config.json and, of every weight file, its name, size, modification time and header: not the data.
        """
        return self._hash.hexdigest()

    def read_rows(self, name: str, rows: slice | NDArray[np.int64]) -> NDArray[np.float32]:
        """Rows of tensor `name` as float32 [n, n_in].

        The tensor is seen as a matrix [all dimensions but the last, the last], a vector being one row. `rows` is a
        slice or row numbers in any order. NaN and Inf are returned as they are (see `check_finite`).

        Raises:
            BadInputError: no such tensor, or its dtype is not BF16, F16 or F32.
            StorageError: reading fails, or the file was changed since it was opened.
        """
        entry = self._entry(name)
        n_rows, n_in = math.prod(entry.shape[:-1]), entry.shape[-1] if entry.shape else 1
        numbers = _row_numbers(rows, n_rows)
        row_bytes = n_in * DTYPE_BITS[entry.dtype] // 8
        chunk_rows = max(1, _CHUNK_BYTES // max(row_bytes, 1))
        raw = np.empty((min(chunk_rows, len(numbers)), row_bytes), np.uint8)
        x = np.empty((len(numbers), n_in), np.float32)
        for begin in range(0, len(numbers), chunk_rows):
            chunk = numbers[begin : begin + chunk_rows]
            for first, start, n in _runs(chunk):
                offset, path = entry.offset + start * row_bytes, entry.path
                read_into(self._fds[path], raw[first : first + n], offset, path, self._states[path])
            _TO_FLOAT32[entry.dtype](raw[: len(chunk)], x[begin : begin + len(chunk)])
        return x

    def close(self) -> None:
        """Close the files; nothing can be read after."""
        while self._fds:
            os.close(self._fds.popitem()[1])

    def _entry(self, name: str) -> TensorEntry:
        entry = self.tensors.get(name)
        if entry is None:
            raise BadInputError(f"{self.folder} has no tensor {name!r}")
        if entry.dtype not in _TO_FLOAT32:
            raise BadInputError(
                f"tensor {name!r} in {entry.path} has dtype {entry.dtype}; {', '.join(_TO_FLOAT32)} can be read: "
                "use the checkpoint as it was before it was quantized"
            )
        return entry

    def _open_file(self, name: str) -> None:
        path = self.folder / name
        with storage_errors("opening", path):
            fd = only_regular(path, os.O_RDONLY)
        self._fds[path] = fd
        size, mtime = self._states[path] = file_state(fd)
        header = read_header(fd, path)
        if len(self.tensors) + len(header.tensors) > MAX_TENSORS:
            raise BadInputError(f"{self.folder} holds more than {MAX_TENSORS} tensors, the most that are read")
        for entry in header.tensors:
            if (other := self.tensors.get(entry.name)) is not None:
                raise BadInputError(
                    f"tensor {brief(entry.name)} is in both {other.path.name} and {name} of {self.folder}: "
                    "keep only the files of one set of weights"
                )
            self.tensors[entry.name] = entry
        self._hash.update(f"\0{name}\0{size}\0{mtime}\0".encode(errors="surrogateescape") + header.raw)

    def _read_json(self, name: str) -> tuple[bytes, dict[str, Any]]:
        path = self.folder / name
        raw = read_input(path, MAX_HEADER_BYTES if name == INDEX else MAX_CONFIG_BYTES)
        return raw, parse_object(raw, path, unique_names=name == INDEX)

    def _open_weights(self, present: Sequence[str]) -> None:
        """Open the weight files among the names `present`: those of the index if there is one, else all that fit."""
        available = [name for name in present if name.endswith(".safetensors")]
        if INDEX in present:
            _, index = self._read_json(INDEX)
            weight_map = _parse_weight_map(index.get("weight_map"), self.folder / INDEX)
            names = sorted(set(weight_map.values()))
            _refuse_missing([n for n in names if not (self.folder / n).is_file()], self.folder / INDEX)
        else:
            weights = [name for name in available if not name.startswith("adapter_")]
            names = [name for name in weights if name.startswith("model")] or weights
            if not names:
                raise _no_weights(self.folder, present)
            _refuse_missing(_missing_shards(names), self.folder)
        for name in names:
            self._open_file(name)
        if INDEX in present:
            self._check_index(weight_map, index.get("metadata"))
        if left_aside := sorted(set(available) - set(names)):
            self.warnings.append(f"not part of the checkpoint, left aside: {', '.join(left_aside[:20])}")

    def _check_index(self, weight_map: dict[str, str], metadata: Any) -> None:
        """Raise BadInputError unless the index and the headers name the same tensors in the same files."""
        index = self.folder / INDEX
        found = {name: entry.path.name for name, entry in self.tensors.items()}
        for name, shard in weight_map.items():
            if found.get(name) != shard:
                raise BadInputError(
                    f"{index} says that tensor {brief(name)} is in {shown(shard)}, but it is "
                    f"{'in ' + found[name] if name in found else 'not there'}: download the checkpoint again"
                )
        if extra := found.keys() - weight_map.keys():
            name = min(extra)
            raise BadInputError(
                f"{found[name]} holds tensor {brief(name)}, which {index} does not name ({len(extra)} such tensors): "
                "index and files are of different checkpoints, download them again"
            )
        # Every tensor is accounted for by now, and published indexes do get this sum wrong: no reason to refuse.
        stated = metadata.get("total_size") if isinstance(metadata, dict) else None
        total = sum(entry.n_bytes for entry in self.tensors.values())
        if stated is not None and stated != total:
            self.warnings.append(f"{INDEX} states a total_size of {brief(stated)} bytes, the tensors have {total}")


def _row_numbers(rows: slice | NDArray[np.int64], n_rows: int) -> NDArray[np.int64]:
    if isinstance(rows, slice):
        return np.arange(*rows.indices(n_rows))
    if rows.size and (rows.min() < 0 or rows.max() >= n_rows):
        raise IndexError(f"rows {rows.min()} to {rows.max()} of a tensor of {n_rows} rows")
    return rows


def _runs(numbers: NDArray[np.int64]) -> Iterator[tuple[int, int, int]]:
    """Runs of consecutive values in `numbers`: position of the first, its value, length."""
    edges = [0, *(np.flatnonzero(np.diff(numbers) != 1) + 1).tolist(), len(numbers)]
    for begin, end in itertools.pairwise(edges):
        yield begin, int(numbers[begin]), end - begin


def _parse_weight_map(weight_map: Any, path: Path) -> dict[str, str]:
    if not isinstance(weight_map, dict) or not weight_map:
        raise BadInputError(f"{path} has no weight_map: the file is damaged, download it again")
    for name, shard in weight_map.items():
        plain = isinstance(shard, str) and shard.endswith(".safetensors") and not re.search(r"[/\\\0]", shard)
        if not plain:
            raise BadInputError(
                f"{path} says that tensor {brief(name)} is in {brief(shard)}, which is not the name of a *.safetensors "
                "file in its folder"
            )
    return weight_map


def _missing_shards(names: Sequence[str]) -> list[str]:
    """Files that are missing from sets named like `model-00001-of-00003.safetensors`."""
    shards = [m for m in map(_SHARD.fullmatch, names) if m]
    expected = {
        f"{m['stem']}-{number:05}-of-{m['count']}.safetensors"
        for m in shards
        for number in range(1, int(m["count"]) + 1)
    }
    return sorted(expected - set(names))


def _refuse_missing(missing: Sequence[str], where: Path) -> None:
    if missing:
        named = ", ".join(map(shown, missing[:5])) + (", …" if len(missing) > 5 else "")
        raise BadInputError(f"{where} lacks {len(missing)} weight files: {named}; download them")


def _no_weights(folder: Path, present: Sequence[str]) -> BadInputError:
    pickled = [name for name in present if name.endswith(_PICKLED)]
    if pickled:
        return BadInputError(
            f"{folder} holds only pickled weights ({pickled[0]}), which can run code when loaded: convert them to "
            "safetensors (transformers: model.save_pretrained(folder, safe_serialization=True))"
        )
    if any(name.startswith("adapter_") for name in present):
        return BadInputError(f"{folder} holds a LoRA adapter, not a model: merge it into its base model first")
    if any(name.endswith(".gguf") for name in present):
        return BadInputError(
            f"{folder} holds a GGUF file, no *.safetensors: quantizing starts from the original weights"
        )
    return BadInputError(f"{folder} has no *.safetensors: give the folder of a Hugging Face checkpoint")
