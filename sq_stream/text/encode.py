"""Text to token ids and back, with a checkpoint's own tokenizer."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from sq_stream import confined
from sq_stream.errors import BadInputError
from sq_stream.formats.strict_json import brief
from sq_stream.text import spm
from sq_stream.text.files import read_json_object, read_text

MEMORY = 2**31
"""Bytes of address space of the process that encodes text: some 2**29 are the program and a large vocabulary."""
CPU_SECONDS = 300

Ids = NDArray[np.int64]


class Encoder(Protocol):
    """Whatever gives token ids."""

    def encode_all(self, texts: Sequence[str]) -> list[Ids]:
        """Token ids of each text, without BOS and EOS; special tokens written in it are recognized."""
        ...


@dataclass(frozen=True)
class ConfinedTokenizer:
    """The tokenizer of the checkpoint in `folder`, which works in a process of its own (`confined`)."""

    folder: Path

    def encode_all(self, texts: Sequence[str]) -> list[Ids]:
        """See `Encoder`.

        Raises:
            BadInputError: the tokenizer is damaged, or its rules take too much time or memory.
            UnsupportedModelError, StorageError: as `Tokenizer.open`.
        """
        request = json.dumps({"folder": str(self.folder), "texts": list(texts)}).encode()
        try:
            answer = confined.call(f"{__name__}:encode_request", request, memory=MEMORY, cpu_seconds=CPU_SECONDS)
        except confined.FailedError as failure:
            raise BadInputError(f"{self.folder}: its tokenizer failed on the text: {failure}") from failure
        lengths, _, ids = answer.partition(b"\n")
        ends = np.cumsum(json.loads(lengths), dtype=np.int64)
        return np.split(np.frombuffer(ids, np.int64), ends[:-1])


def encode_request(request: bytes) -> bytes:
    """What the child process of `ConfinedTokenizer` does: the number of ids of each text, and all ids."""
    asked = json.loads(request)
    encoded = Tokenizer.open(Path(asked["folder"])).encode_all(asked["texts"])
    lengths = json.dumps([len(ids) for ids in encoded]).encode()
    return lengths + b"\n" + b"".join(ids.tobytes() for ids in encoded)


@dataclass(frozen=True)
class Tokenizer:
    """Encodes and decodes text, in this process: for tokenizers that are trusted."""

    _encode: Callable[[str, bool], list[int]]
    _decode: Callable[[list[int]], str]

    @classmethod
    def open(cls, folder: Path) -> Tokenizer:
        """The tokenizer of the checkpoint in `folder`: tokenizer.json if there is one, else tokenizer.model.

        Raises:
            BadInputError: there is neither, or it is damaged.
            UnsupportedModelError: tokenizer.model is not a BPE model.
            StorageError: a file cannot be read.
        """
        text = read_text(folder / "tokenizer.json")
        if text is not None:
            return _from_json(folder / "tokenizer.json", text)
        if spm.is_model_file(folder / "tokenizer.model"):
            return _from_model(folder)
        raise BadInputError(f"{folder}: no tokenizer.json and no SentencePiece tokenizer.model: one of them is needed")

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of `text`; with `special`, with the tokens that the tokenizer puts around a text (BOS, EOS).

        Special tokens written in the text are recognized. An added token may have an id beyond the model's embedding.
        """
        return self._encode(text, special)

    def encode_all(self, texts: Sequence[str]) -> list[Ids]:
        """See `Encoder`."""
        return [np.array(self.encode(text, special=False), np.int64) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, special tokens included."""
        return self._decode(list(ids))


def _from_json(path: Path, text: str) -> Tokenizer:
    import tokenizers

    with _errors_of("the tokenizers library", path):
        tokenizer = tokenizers.Tokenizer.from_str(text)
        tokenizer.no_truncation()
        tokenizer.no_padding()

    def encode(text: str, special: bool) -> list[int]:
        with _errors_of("the tokenizers library", path):
            return list(tokenizer.encode(text, add_special_tokens=special).ids)

    return Tokenizer(encode, lambda ids: str(tokenizer.decode(ids, skip_special_tokens=False)))


@contextmanager
def _errors_of(library: str, path: Path) -> Iterator[None]:
    """Errors of a library that reads `path` as ours; a panic of Rust's is a BaseException."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise BadInputError(f"{path}: {library} cannot work with it: {brief(str(error))}") from error


def _from_model(folder: Path) -> Tokenizer:
    """From tokenizer.model; added tokens are cut out of the text before, longest first."""
    from sentencepiece import SentencePieceProcessor

    path = folder / "tokenizer.model"
    spm.open_model(path)
    try:
        pieces = SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise BadInputError(f"{path}: sentencepiece cannot read it: {brief(str(error))}") from error
    config = read_json_object(folder / "tokenizer_config.json") or {}
    added = {text: token_id for token_id, text, _ in spm.added_tokens(folder, config)}
    added |= {pieces.id_to_piece(i): i for i in range(pieces.vocab_size()) if pieces.is_control(i)}
    texts = {token_id: text for text, token_id in added.items()}
    cut = re.compile("(" + "|".join(map(re.escape, sorted(added, key=len, reverse=True))) + ")") if added else None
    before = [pieces.bos_id()] if config.get("add_bos_token", True) and pieces.bos_id() >= 0 else []
    after = [pieces.eos_id()] if config.get("add_eos_token", False) and pieces.eos_id() >= 0 else []

    def encode(text: str, special: bool) -> list[int]:
        parts = cut.split(text) if cut else [text]
        ids = [[added[part]] if i % 2 else pieces.encode(part) for i, part in enumerate(parts) if part]
        inner = [token_id for part in ids for token_id in part]
        return [*before, *inner, *after] if special else inner

    def decode(ids: list[int]) -> str:
        runs = itertools.groupby(ids, key=lambda token_id: token_id in texts)
        return "".join(
            "".join(texts[i] for i in run) if is_added else str(pieces.decode(list(run))) for is_added, run in runs
        )

    return Tokenizer(encode, decode)
