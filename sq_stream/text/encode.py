"""Text to token ids and back, with a checkpoint's own tokenizer."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sq_stream.errors import BadInputError
from sq_stream.formats.strict_json import brief
from sq_stream.text import spm
from sq_stream.text.files import read_json_object, read_text


@dataclass(frozen=True)
class Tokenizer:
    """Encodes and decodes text."""

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

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, special tokens included."""
        return self._decode(list(ids))


def _from_json(path: Path, text: str) -> Tokenizer:
    import tokenizers

    try:
        tokenizer = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # what the library raises
        raise BadInputError(f"{path}: the tokenizers library cannot read it: {brief(str(error))}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return Tokenizer(
        lambda text, special: list(tokenizer.encode(text, add_special_tokens=special).ids),
        lambda ids: str(tokenizer.decode(ids, skip_special_tokens=False)),
    )


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
