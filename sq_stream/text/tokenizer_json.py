"""A BPE tokenizer.json of the `tokenizers` library, checked: vocabulary, merges, added tokens, pipeline."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sq_stream.errors import BadInputError, UnsupportedModelError
from sq_stream.formats.strict_json import brief, shown

_WHERE, _CONFIG = "tokenizer.json", "tokenizer_config.json"
_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
MAX_TOKEN = 2**11
"""Characters of a token: what is asked of all its parts takes time by the square of that."""


@dataclass(frozen=True)
class AddedToken:
    """A token that is found in the text before anything is split or merged."""

    id: int
    content: str
    special: bool
    normalized: bool  # sought in the text after normalization
    plain: bool = True  # takes no spaces around it, and is found within words


@dataclass(frozen=True)
class BpeTokenizer:
    """A checked tokenizer.json: ids are distinct, and merges are of tokens and make tokens."""

    vocab: Mapping[str, int]
    merges: list[tuple[str, str]]
    added: list[AddedToken]  # some of them in `vocab` too
    ignore_merges: bool  # a word that is a token is not merged
    byte_fallback: bool  # merges are of characters, and bytes are for unknown ones: a converted SentencePiece model
    normalizers: list[Mapping[str, Any]] | None  # sequences unrolled; None: not understood
    pre_tokenizers: list[Mapping[str, Any]] | None
    definition: Mapping[str, Any]  # the whole file


def parse_bpe(definition: Mapping[str, Any], tokenizer_config: Mapping[str, Any]) -> BpeTokenizer:
    """The tokenizer that the objects in tokenizer.json and tokenizer_config.json define.

    Raises:
        BadInputError: parts are missing, of the wrong type, or contradict each other.
        UnsupportedModelError: the model is not BPE, or marks words in a way that llama.cpp does not know.
    """
    model = definition.get("model")
    if not isinstance(model, Mapping):
        raise BadInputError(f"{_WHERE}: no `model` object: is it a file of the `tokenizers` library?")
    kind = model.get("type", "BPE" if "merges" in model else None)
    if kind != "BPE":
        raise UnsupportedModelError(
            f"{_WHERE}: a {shown(str(kind)[:100])} tokenizer; supported: byte-level BPE and SentencePiece BPE"
        )
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise UnsupportedModelError(f"{_WHERE}: {key} {brief(model[key])}: llama.cpp's BPE has none")
    vocab = model.get("vocab")
    if not isinstance(vocab, Mapping) or not vocab:
        raise BadInputError(f"{_WHERE}: its vocabulary is no map from token to id")
    check_ids(vocab, _WHERE)
    return BpeTokenizer(
        vocab=vocab,
        merges=_merges(vocab, model.get("merges")),
        added=_all_added_tokens(vocab, definition.get("added_tokens") or [], tokenizer_config),
        ignore_merges=bool(model.get("ignore_merges")),
        byte_fallback=bool(model.get("byte_fallback")),
        normalizers=_flatten(definition.get("normalizer"), "normalizers"),
        pre_tokenizers=_flatten(definition.get("pre_tokenizer"), "pretokenizers"),
        definition=definition,
    )


def check_ids(vocab: Mapping[str, Any], where: str) -> None:
    """Refuse a vocabulary whose ids are not distinct numbers from 0, or that has absurdly long tokens.

    Raises:
        BadInputError: an id is not a number, is negative, or is given twice.
    """
    if any(len(token) > MAX_TOKEN for token in vocab):
        raise BadInputError(f"{where}: a token has {max(map(len, vocab))} characters; at most {MAX_TOKEN} are read")
    if bad := next((item for item in vocab.items() if type(item[1]) is not int or item[1] < 0), None):
        raise BadInputError(f"{where}: token {brief(bad[0])} has id {brief(bad[1])}, not a number from 0")
    if len(set(vocab.values())) == len(vocab):
        return
    owners: dict[int, str] = {}
    for token, token_id in vocab.items():
        if token_id in owners:
            raise BadInputError(f"{where}: tokens {brief(owners[token_id])} and {brief(token)} both have id {token_id}")
        owners[token_id] = token


def _merges(vocab: Mapping[str, int], merges: Any) -> list[tuple[str, str]]:
    """Pairs of tokens from merges of the form `"a b"` or `["a", "b"]`."""
    if not isinstance(merges, list) or not merges:
        raise BadInputError(f"{_WHERE}: no merges, without which llama.cpp cannot load a BPE vocabulary")
    pairs = []
    for i, merge in enumerate(merges):
        parts = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(parts, list) or len(parts) != 2 or not all(isinstance(part, str) for part in parts):
            raise BadInputError(f"{_WHERE}: merge {i} is {brief(merge)}, not two tokens")
        left, right = parts
        if left not in vocab or right not in vocab or left + right not in vocab:
            missing = next(token for token in (left, right, left + right) if token not in vocab)
            raise BadInputError(
                f"{_WHERE}: merge {i}, {brief(merge)}, needs the token {brief(missing)}, which does not exist"
            )
        pairs.append((left, right))
    return pairs


def _all_added_tokens(vocab: Mapping[str, int], entries: Any, tokenizer_config: Mapping[str, Any]) -> list[AddedToken]:
    """Added tokens of both files, whose flags in tokenizer_config.json win.

    A token that tokenizer_config.json names as special (bos_token, ...) is an added one too when the vocabulary has it.
    """
    if not isinstance(entries, list):
        raise BadInputError(f"{_WHERE}: added_tokens is not a list")
    listed = [_added_token(_WHERE, entry.get("id") if isinstance(entry, Mapping) else None, entry) for entry in entries]
    found: dict[str, AddedToken] = {}
    for token in [*listed, *declared_tokens(tokenizer_config)]:
        known = found[token.content].id if token.content in found else vocab.get(token.content, token.id)
        if known != token.id:
            raise BadInputError(f"{_WHERE}: token {brief(token.content)} has two ids, {known} and {token.id}")
        found[token.content] = token
    for content in _named_special(tokenizer_config):
        if content not in found and content in vocab:
            found[content] = AddedToken(vocab[content], content, special=True, normalized=False)
    owners = {token_id: text for text, token_id in vocab.items()} if found else {}
    for token in found.values():
        if (owner := owners.setdefault(token.id, token.content)) != token.content:
            raise BadInputError(f"{_WHERE}: tokens {brief(owner)} and {brief(token.content)} both have id {token.id}")
    return list(found.values())


def declared_tokens(tokenizer_config: Mapping[str, Any]) -> list[AddedToken]:
    """The added tokens that tokenizer_config.json lists by id.

    Raises:
        BadInputError: an entry is malformed.
    """
    decoder = tokenizer_config.get("added_tokens_decoder") or {}
    if not isinstance(decoder, Mapping):
        raise BadInputError(f"{_CONFIG}: added_tokens_decoder is not an object")
    return [
        _added_token(_CONFIG, int(key) if key.isdecimal() and len(key) < 20 else key, entry)
        for key, entry in decoder.items()
    ]


def _added_token(where: str, token_id: Any, entry: Any) -> AddedToken:
    content = entry.get("content") if isinstance(entry, Mapping) else None
    if not isinstance(content, str) or not content or type(token_id) is not int or token_id < 0:
        raise BadInputError(
            f"{where}: added token {brief(entry)} with id {brief(token_id)}: needs a text and an id from 0"
        )
    special = bool(entry.get("special"))
    plain = not any(entry.get(flag) for flag in ("lstrip", "rstrip", "single_word"))
    return AddedToken(token_id, content, special, bool(entry.get("normalized", not special)), plain)


def _named_special(tokenizer_config: Mapping[str, Any]) -> Iterator[str]:
    """Texts of the tokens that tokenizer_config.json calls special."""
    more = tokenizer_config.get("additional_special_tokens") or tokenizer_config.get("extra_special_tokens")
    if isinstance(more, Mapping):
        more = list(more.values())
    for entry in [*map(tokenizer_config.get, _SPECIAL_NAMES), *(more if isinstance(more, list) else [])]:
        content = entry.get("content") if isinstance(entry, Mapping) else entry
        if isinstance(content, str):
            yield content


def _flatten(component: Any, children: str) -> list[Mapping[str, Any]] | None:
    """The steps of a normalizer or pre-tokenizer, sequences unrolled; None if it is malformed."""
    if component is None:
        return []
    if not isinstance(component, Mapping):
        return None
    if component.get("type") != "Sequence":
        return [component]
    parts = component.get(children)
    nested = [_flatten(part, children) for part in parts] if isinstance(parts, list) else [None]
    return None if None in nested else [step for steps in nested for step in steps or ()]
