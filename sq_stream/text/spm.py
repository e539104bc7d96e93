"""SentencePiece BPE vocabularies as llama.cpp's `llama` kind: tokens, scores, types.

From tokenizer.model (follows `_create_vocab_sentencepiece` of llama.cpp's conversion/base.py), or, where that is
missing, from a tokenizer.json with the same content (Llama 2 and Gemma style: BPE with byte fallback).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from sq_stream.errors import BadInputError, StorageError, UnsupportedModelError
from sq_stream.formats.storage import only_regular, read_input
from sq_stream.formats.strict_json import brief, shown
from sq_stream.text.bpe import token_table
from sq_stream.text.files import MAX_BYTES, read_json_object
from sq_stream.text.spm_proto import BPE, SentencePieceModel, parse_model
from sq_stream.text.tokenizer_json import BpeTokenizer, check_ids, declared_tokens
from sq_stream.text.tokens import TokenTable, TokenType, added_token_type, written

_ADDED_SCORE = -1000.0  # the converter's, for tokens that no merge makes
_BYTE = re.compile("<0x[0-9A-F]{2}>")


@dataclass(frozen=True)
class SentencePieceTokens:
    """What llama.cpp must know of a SentencePiece tokenizer."""

    table: TokenTable
    add_space_prefix: bool  # whether a space is put before a text
    notes: tuple[str, ...] = ()


def read_model(folder: Path, tokenizer_config: Mapping[str, Any], n_vocab: int) -> SentencePieceTokens:
    """The vocabulary in `folder`/tokenizer.model with the folder's added tokens.

    User-defined pieces keep that type (the converter makes them normal ones, unless the added tokens name them): they
    are found in a text before anything is merged.

    Raises:
        BadInputError: the file is no SentencePiece model, or has more pieces than the model has embeddings.
        UnsupportedModelError: it is not a BPE model, or marks spaces in another way.
        StorageError: the file cannot be read.
    """
    path = folder / "tokenizer.model"
    model = open_model(path)
    n_pieces = len(model.texts)
    if n_pieces > n_vocab:
        raise BadInputError(
            f"{path}: {n_pieces} pieces, but the model has embeddings for {n_vocab} tokens only: "
            "this tokenizer belongs to another model"
        )
    table = TokenTable.unused(n_vocab)
    for i, (text, score, kind) in enumerate(zip(model.texts, model.scores, model.types, strict=True)):
        token_type = TokenType(kind)
        table.put(i, written(text, token_type), token_type, score)
    notes = []
    ignored = []
    for token_id, text, token_type in added_tokens(folder, tokenizer_config):
        if token_id < n_vocab:
            table.put(token_id, written(text, token_type), token_type, _ADDED_SCORE)
        else:
            ignored.append(f"{shown(text)} ({token_id})")
    if ignored:
        notes.append(f"added tokens without an embedding are left out: {', '.join(ignored[:20])}")
    if TokenType.BYTE not in model.types:
        notes.append("no byte tokens: llama.cpp stops at characters that are not in the vocabulary")
    if model.normalizes:
        notes.append(
            "tokenizer.model rewrites text (characters or runs of spaces) before splitting it; llama.cpp does not"
        )
    table.check_distinct(str(path))
    return SentencePieceTokens(table, model.add_dummy_prefix, tuple(notes))


def is_model_file(path: Path) -> bool:
    """Whether there is a file `path`, and it is not one of the rank tables of tiktoken that go by the same name."""
    try:
        with open(path, "rb", opener=only_regular) as file:
            start = file.read(64)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise StorageError(f"{path}: cannot be read: {error.strerror}") from error
    return re.match(rb"[A-Za-z0-9+/]+=* \d+\n", start) is None


def open_model(path: Path) -> SentencePieceModel:
    """The SentencePiece model in the file `path`, of the kind that llama.cpp's tokenizer follows.

    Raises:
        BadInputError: the file is no SentencePiece model.
        UnsupportedModelError: it is not a BPE model, or marks spaces in another way.
        StorageError: the file cannot be read.
    """
    try:
        model = parse_model(read_input(path, MAX_BYTES))
        known = all(kind in list(TokenType) for kind in set(model.types)) and all(map(isfinite, model.scores))
    except ValueError as error:
        raise BadInputError(f"{path}: not a SentencePiece model ({error}): download it again") from error
    if not known:
        raise BadInputError(f"{path}: pieces of unknown types or scores: download it again")
    if model.model_type != BPE:
        raise UnsupportedModelError(
            f"{path}: a SentencePiece model of type {model.model_type}; llama.cpp's needs BPE (type {BPE})"
        )
    if not model.space_as_prefix:
        raise UnsupportedModelError(f"{path}: spaces are not marked by a leading ▁, as llama.cpp's tokenizer needs")
    return model


def added_tokens(folder: Path, tokenizer_config: Mapping[str, Any]) -> Iterator[tuple[int, str, TokenType]]:
    """(id, text, type) of the tokens in added_tokens.json, then of those in tokenizer_config.json, which win."""
    added = read_json_object(folder / "added_tokens.json") or {}
    check_ids(added, "added_tokens.json")
    for text, token_id in added.items():
        yield token_id, text, TokenType.USER_DEFINED
    for token in declared_tokens(tokenizer_config):
        yield token.id, token.content, added_token_type(token.content, special=token.special)


def read_tokenizer_json(tokenizer: BpeTokenizer, n_vocab: int) -> SentencePieceTokens:
    """The vocabulary of a tokenizer.json that was made of a SentencePiece BPE model (`byte_fallback`).

    llama.cpp merges the pair whose result has the highest score, `tokenizers` the pair of the first merge. Both are the
    same when all merges with one result stand together, and every pair that makes a token is a merge; then minus the
    number of the merge is the score, as in tokenizer.model. (The converter gives all tokens one score.)

    Raises:
        BadInputError: the tokenizer has more ids than the model, or the same text twice.
        UnsupportedModelError: merges or pre-tokenizer are not those of a SentencePiece model.
    """
    scores = _scores(tokenizer)
    table = token_table(tokenizer, [token.content for token in tokenizer.added], n_vocab)
    added = {token.id for token in tokenizer.added}
    for text, i in tokenizer.vocab.items():
        table.scores[i] = scores.get(text, -float(len(scores)))
        if i not in added and _BYTE.fullmatch(text):
            table.types[i] = int(TokenType.BYTE)
    for i in added:
        table.scores[i] = _ADDED_SCORE
    return SentencePieceTokens(table, _adds_space(tokenizer))


def _scores(tokenizer: BpeTokenizer) -> dict[str, float]:
    """Score of each token that merges make.

    Raises:
        UnsupportedModelError: no scores give the order of these merges.
    """
    refusal = "so it is not made of a SentencePiece model: llama.cpp cannot follow it without a tokenizer.model"
    vocab, scores, last = tokenizer.vocab, dict[str, float](), None
    for left, right in tokenizer.merges:
        text = left + right
        if text != last and text in scores:
            raise UnsupportedModelError(
                f"tokenizer.json: the merges that make {brief(text)} do not stand together, {refusal}"
            )
        scores.setdefault(text, -float(len(scores)))
        last = text
    added = {token.content for token in tokenizer.added}
    n_pairs = sum(
        text[:i] in vocab and text[i:] in vocab for text in vocab if text not in added for i in range(1, len(text))
    )
    n_merges = sum(left + right not in added for left, right in tokenizer.merges)
    if n_pairs != n_merges:
        raise UnsupportedModelError(
            f"tokenizer.json: {n_merges} merges, but {n_pairs} pairs of tokens make a token, {refusal}"
        )
    return scores


def _adds_space(tokenizer: BpeTokenizer) -> bool:
    """Whether a space is put before a text.

    Raises:
        UnsupportedModelError: normalizer or pre-tokenizer do more than to mark spaces.
    """
    adds = False
    for step in [*(tokenizer.normalizers or []), *(tokenizer.pre_tokenizers or [])]:
        kind, pattern = step.get("type"), step.get("pattern")
        if kind == "Prepend" and step.get("prepend") == "▁":
            adds = True
        elif kind == "Metaspace" and step.get("split") is False:
            adds = step.get("prepend_scheme") in ("first", "always")
        elif not (kind in ("Replace", "Split") and pattern == {"String": " "}):
            raise UnsupportedModelError(
                f"tokenizer.json: {shown(str(kind)[:100])} before byte-fallback BPE, which llama.cpp's SentencePiece "
                "tokenizer does not have; a folder with tokenizer.model is needed"
            )
    return adds
