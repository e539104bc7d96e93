"""Byte-level BPE vocabularies (tokenizer.json) as llama.cpp's `gpt2` kind: tokens, types, merges.

Follows `get_vocab_base` and `SpecialVocab` of llama.cpp's converter (conversion/base.py, gguf-py/gguf/vocab.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sq_stream.errors import BadInputError, UnsupportedModelError
from sq_stream.text.tokens import TokenTable, TokenType, added_token_type

_WHERE = "tokenizer.json"
_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class AddedToken:
    """A token that is found in the text before anything is split or merged."""

    id: int
    content: str
    special: bool
    normalized: bool


def check_model(tokenizer: Mapping[str, Any]) -> Mapping[str, Any]:
    """The `model` object of `tokenizer`, checked to be a BPE model with vocabulary and merges of the right form.

    Raises:
        BadInputError: parts are missing, of the wrong type, or contradict each other.
        UnsupportedModelError: the model is not BPE.
    """
    model = tokenizer.get("model")
    if not isinstance(model, Mapping) or not isinstance(model.get("vocab"), Mapping | list):
        raise BadInputError(f"{_WHERE}: no model with a vocabulary: is it a tokenizer of the `tokenizers` library?")
    kind = model.get("type", "BPE" if "merges" in model else None)
    if kind != "BPE":
        raise UnsupportedModelError(f"{_WHERE}: a {kind} tokenizer; supported: byte-level BPE and SentencePiece BPE")
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise UnsupportedModelError(f"{_WHERE}: {key} {model[key]!r}: llama.cpp's BPE has none")
    check_ids(model["vocab"])
    return model


def check_ids(vocab: Any) -> None:
    """Refuse a vocabulary that is not a map from token to distinct non-negative id.

    Raises:
        BadInputError: an id is not a number, is negative, or is given twice.
    """
    if not isinstance(vocab, Mapping):
        raise BadInputError(f"{_WHERE}: the vocabulary is a {type(vocab).__name__}, not a map from token to id")
    if bad := next((item for item in vocab.items() if type(item[1]) is not int or item[1] < 0), None):
        raise BadInputError(f"{_WHERE}: token {bad[0]!r} has id {bad[1]!r}, not a number from 0")
    if len(set(vocab.values())) < len(vocab):
        owners: dict[int, str] = {}
        for token, token_id in vocab.items():
            if token_id in owners:
                raise BadInputError(f"{_WHERE}: tokens {owners[token_id]!r} and {token!r} both have id {token_id}")
            owners[token_id] = token


def read_merges(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The merges of a BPE model, from `"a b"` or `["a", "b"]`, checked against its vocabulary.

    Raises:
        BadInputError: there are none, one is malformed, or one needs or makes a token that does not exist.
    """
    vocab, merges = model["vocab"], model.get("merges")
    if not isinstance(merges, list) or not merges:
        raise BadInputError(f"{_WHERE}: no merges, without which llama.cpp cannot load a BPE vocabulary")
    pairs = []
    for i, merge in enumerate(merges):
        parts = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(parts, list) or len(parts) != 2 or not all(isinstance(part, str) for part in parts):
            raise BadInputError(f"{_WHERE}: merge {i} is {merge!r}, not two tokens")
        left, right = parts
        for token in (left, right, left + right):
            if token not in vocab:
                raise BadInputError(f"{_WHERE}: merge {i} {merge!r} needs the token {token!r}, which does not exist")
        pairs.append((left, right))
    return pairs


def read_added_tokens(tokenizer: Mapping[str, Any], tokenizer_config: Mapping[str, Any]) -> list[AddedToken]:
    """Added tokens of tokenizer.json and of tokenizer_config.json, whose flags win, each with its id.

    A token that tokenizer_config.json names as special (bos_token, ...) is one too when the vocabulary has it.

    Raises:
        BadInputError: an entry is malformed, or a token has two ids.
    """
    vocab: Mapping[str, int] = tokenizer["model"]["vocab"]
    found: dict[str, AddedToken] = {}
    for source, token_id, entry in _added_entries(tokenizer, tokenizer_config):
        content = entry.get("content") if isinstance(entry, Mapping) else None
        if not isinstance(content, str) or type(token_id) is not int or token_id < 0:
            raise BadInputError(f"{source}: added token {entry!r} with id {token_id!r}: needs a text and an id from 0")
        known = found[content].id if content in found else vocab.get(content, token_id)
        if known != token_id:
            raise BadInputError(f"{source}: token {content!r} has id {token_id}, elsewhere {known}")
        special = bool(entry.get("special"))
        found[content] = AddedToken(token_id, content, special, bool(entry.get("normalized", not special)))
    for content in _named_special(tokenizer_config):
        if content not in found and content in vocab:
            found[content] = AddedToken(vocab[content], content, special=True, normalized=False)
    text_of = {token_id: text for text, token_id in vocab.items()} if found else {}
    for token in found.values():
        if (other := text_of.setdefault(token.id, token.content)) != token.content:
            raise BadInputError(f"{_WHERE}: id {token.id} is given to both {other!r} and {token.content!r}")
    return list(found.values())


def _added_entries(
    tokenizer: Mapping[str, Any], tokenizer_config: Mapping[str, Any]
) -> Iterator[tuple[str, Any, Any]]:
    """(file, id, entry) of every added token, tokenizer.json first."""
    added, decoder = tokenizer.get("added_tokens") or [], tokenizer_config.get("added_tokens_decoder") or {}
    if not isinstance(added, list) or not isinstance(decoder, Mapping):
        raise BadInputError(f"{_WHERE}: added_tokens must be a list, added_tokens_decoder of its config an object")
    for entry in added:
        yield _WHERE, entry.get("id") if isinstance(entry, Mapping) else None, entry
    for key, entry in decoder.items():
        yield "tokenizer_config.json", int(key) if key.isascii() and key.isdigit() else key, entry


def _named_special(tokenizer_config: Mapping[str, Any]) -> Iterator[str]:
    """Texts of the tokens that tokenizer_config.json calls special."""
    more = tokenizer_config.get("additional_special_tokens") or tokenizer_config.get("extra_special_tokens") or []
    if isinstance(more, Mapping):
        more = list(more.values())
    for entry in [tokenizer_config.get(name) for name in _SPECIAL_NAMES] + (more if isinstance(more, list) else []):
        content = entry.get("content") if isinstance(entry, Mapping) else entry
        if isinstance(content, str):
            yield content


def token_table(
    tokenizer: Mapping[str, Any], tokenizer_config: Mapping[str, Any], n_vocab: int | None
) -> TokenTable:
    """Texts and types of the `n_vocab` token ids (by default, as many as the tokenizer has).

    Raises:
        BadInputError: ids are out of range, doubled or contradictory.
    """
    vocab: Mapping[str, int] = tokenizer["model"]["vocab"]
    added = read_added_tokens(tokenizer, tokenizer_config)
    largest = max([*vocab.values(), *(token.id for token in added)], default=-1)
    n_vocab = largest + 1 if n_vocab is None else n_vocab
    if largest >= n_vocab:
        text = next((t.content for t in added if t.id == largest), None) or next(
            t for t, i in vocab.items() if i == largest
        )
        raise BadInputError(
            f"{_WHERE}: token {text!r} has id {largest}, but the model has embeddings for {n_vocab} tokens only: "
            "this tokenizer belongs to another model"
        )
    table = TokenTable.unused(n_vocab)
    for text, token_id in vocab.items():
        table.put(token_id, text, TokenType.NORMAL)
    for token, text in zip(added, _shown(tokenizer, added), strict=True):
        token_type = added_token_type(text, special=token.special)
        table.put(token.id, text if token_type is TokenType.CONTROL else text.replace("▁", " "), token_type)
    table.check_distinct(_WHERE)
    return table


def _shown(tokenizer: Mapping[str, Any], added: list[AddedToken]) -> list[str]:
    """The texts of added tokens as the converter writes them: those matched before normalization, as they decode."""
    if all(token.normalized for token in added):
        return [token.content for token in added]
    from tokenizers import Tokenizer

    # Only the decoder matters: a tokenizer with none but the added tokens decodes alike and loads at once.
    vocab = {token.content: i for i, token in enumerate(added)}
    model = {"type": "BPE", "vocab": vocab, "merges": []}
    small = {"version": "1.0", "added_tokens": [], "model": model, "decoder": tokenizer.get("decoder")}
    try:
        decode = Tokenizer.from_str(json.dumps(small)).decode
    except Exception as error:  # the library raises plain Exception
        raise BadInputError(f"{_WHERE}: its decoder cannot be read: {error}") from error
    return [token.content if token.normalized else decode([i]) for i, token in enumerate(added)]


def merge_strings(merges: list[tuple[str, str]]) -> list[str]:
    """Merges in GGUF's form `"a b"`, spaces within a token shown as the byte-level alphabet shows them (`Ġ`)."""
    return [f"{left.replace(' ', 'Ġ')} {right.replace(' ', 'Ġ')}" for left, right in merges]
