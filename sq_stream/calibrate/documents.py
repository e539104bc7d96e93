"""The documents that calibration text is made of: those of the package, and those of the user's files."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zstandard

from sq_stream.calibrate.chat import Message
from sq_stream.errors import BadInputError, SqStreamError, UsageError
from sq_stream.formats.storage import storage_errors
from sq_stream.formats.strict_json import brief
from sq_stream.text.files import read_text

Ids = npt.NDArray[np.int32]

GIVEN = "given"
"""The kind of documents that come from the user's files."""

SHARES = (6, 1, 2)
"""Parts of all text that go to the fit, to the convergence test and to the held-out test."""

MAX_FILE = 16 << 20  # bytes
MAX_ROWS = 2**16
"""Lists in a JSON file of token ids."""
_PIECE = (1500, 6000)  # fewest and most characters of a piece of a user's text
_PIECE_IDS = 2048  # token ids in a piece
_MIN_PIECES = 45


@dataclass(frozen=True, eq=False)
class Document:
    """A text, the messages of a dialogue, or token ids; never more than one of them."""

    id: str
    kind: str  # one of `corpus.MIX`
    text: str = ""
    messages: tuple[Message, ...] = ()
    ids: Ids | None = None

    @property
    def size(self) -> int:
        """Characters, or token ids."""
        if self.ids is not None:
            return len(self.ids)
        return len(self.text) + sum(len(message["content"]) for message in self.messages)

    @property
    def key(self) -> bytes:
        """A hash of the content, whatever the document is called."""
        content = json.dumps([self.text, self.messages]).encode()
        return hashlib.sha256(content if self.ids is None else self.ids.astype("<i4").tobytes()).digest()


def packaged() -> list[Document]:
    """The documents that ship with the package; what they are and their licences: text/SOURCES.md."""
    archive = resources.files("sq_stream.calibrate").joinpath("text/documents.jsonl.zst").read_bytes()
    lines = zstandard.ZstdDecompressor().decompress(archive).decode().split("\n")
    entries = [json.loads(line) for line in lines if line]
    return [Document(**{**entry, "messages": tuple(entry.get("messages", ()))}) for entry in entries]


def split(documents: Iterable[Document]) -> tuple[list[Document], list[Document], list[Document]]:
    """The documents for the fit, for the convergence test and for the held-out test.

    Within each kind the documents come in the order of their hashes, and each goes where most is missing of `SHARES`.
    So every kind is in each part, and a document is where it is whatever tokenizer or settings are used.
    """
    parts: tuple[list[Document], list[Document], list[Document]] = ([], [], [])
    kinds: dict[str, list[Document]] = {}
    for document in documents:
        kinds.setdefault(document.kind, []).append(document)
    for members in kinds.values():
        filled, total = [0, 0, 0], 0
        for document in sorted(members, key=lambda document: document.key):
            total += document.size
            missing = [total * share / sum(SHARES) - size for share, size in zip(SHARES, filled, strict=True)]
            i = missing.index(max(missing))
            parts[i].append(document)
            filled[i] += document.size
    return parts


def read_files(paths: Sequence[Path], n_vocab: int) -> list[Document]:
    """The documents of the user's files.

    `*.npy` (one or two dimensions of integers) and `*.json` (a list of integers, or of such lists) hold token ids; any
    other file is UTF-8 text, in which special tokens are recognized. Text is cut into documents of 1500 to 6000
    characters between paragraphs or lines, token ids into documents of at most 2048. Of equal documents one is kept.

    Raises:
        UsageError: there is no such file.
        BadInputError: a file is empty, too large, not text, or has token ids outside 0 to `n_vocab` - 1.
        StorageError: a file cannot be read.
    """
    documents = {document.key: document for path in paths for document in _read(path, n_vocab)}
    return list(documents.values())


def _read(path: Path, n_vocab: int) -> Iterator[Document]:
    with storage_errors("reading", path):
        if not path.exists():
            raise UsageError(f"{path}: no such calibration file")
        size = path.stat().st_size
    if size > MAX_FILE:
        raise BadInputError(f"{path}: {size} bytes; at most {MAX_FILE} of one file can be used: give a part of it")
    if path.suffix in (".npy", ".json"):
        for i, ids in enumerate(_token_ids(path, n_vocab)):
            yield Document(f"{path.name}/{i}", GIVEN, ids=ids)
        return
    text = (read_text(path) or "").removeprefix("\ufeff")
    if not text.strip():
        raise BadInputError(f"{path}: {size} bytes and no text: give a file with calibration text")
    for i, piece in enumerate(_pieces(text)):
        yield Document(f"{path.name}/{i}", GIVEN, text=piece)


def _pieces(text: str) -> Iterator[str]:
    """`text` in pieces that end with a paragraph, or with a line where there is no paragraph's end."""
    low, high = _PIECE
    size = max(low, min(high, len(text) // _MIN_PIECES))
    for match in re.finditer(rf"(?s).{{{size // 2},{size}}}(?:\n\s*\n|\Z)|.{{1,{size}}}(?:\n|\Z)|.{{1,{size}}}", text):
        if match[0].strip():
            yield match[0]


def _token_ids(path: Path, n_vocab: int) -> Iterator[Ids]:
    try:
        with storage_errors("reading", path):
            rows = _npy_rows(path) if path.suffix == ".npy" else _json_rows(path)
    except SqStreamError:
        raise
    except Exception as error:  # NumPy and json raise a dozen kinds for damaged files
        raise BadInputError(
            f"{path}: not a list or array of token ids ({brief(str(error))}): give integers as a JSON list or a "
            "NumPy array"
        ) from error
    if not sum(map(len, rows)):
        raise BadInputError(f"{path}: holds no token ids: give a file with ids of this model's tokenizer")
    for number, row in enumerate(rows):
        outside = np.flatnonzero((row < 0) | (row >= n_vocab))
        if len(outside):
            raise BadInputError(
                f"{path}: token id {row[outside[0]]} (row {number}, position {outside[0]}) is outside the model's "
                f"vocabulary, 0 to {n_vocab - 1}: give ids of this model's tokenizer"
            )
        for start in range(0, len(row), _PIECE_IDS):
            yield row[start : start + _PIECE_IDS].astype(np.int32)


def _npy_rows(path: Path) -> list[npt.NDArray[Any]]:
    array = np.lib.format.open_memmap(path, "r")  # checks the header against the size of the file, as load does not
    if array.ndim not in (1, 2) or array.dtype.kind not in "iu":
        raise ValueError("needs one or two dimensions of integers")
    if len(array) > array.size:
        raise ValueError("its rows are empty")
    return list(np.atleast_2d(np.array(array)))


def _json_rows(path: Path) -> list[npt.NDArray[Any]]:
    text = read_text(path) or ""
    if text.count("[") > MAX_ROWS:
        raise ValueError(f"more than {MAX_ROWS} lists")
    value = json.loads(text)
    rows = value if isinstance(value, list) and value and all(isinstance(row, list) for row in value) else [value]
    if not all(isinstance(row, list) and all(type(item) is int for item in row) for row in rows):
        raise ValueError("needs a list of integers, or a list of such lists")
    return [np.array(row, np.int64) for row in rows if row]
