"""Byte-level BPE vocabularies as llama.cpp's `gpt2` kind: tokens, types, merges.

Follows `get_vocab_base` and `SpecialVocab` of llama.cpp's converter (conversion/base.py, gguf-py/gguf/vocab.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from sq_stream.errors import BadInputError, UnsupportedModelError
from sq_stream.formats.strict_json import brief
from sq_stream.text.tokenizer_json import BpeTokenizer
from sq_stream.text.tokens import TokenTable, TokenType, added_token_type, written


def read_tokens(tokenizer: BpeTokenizer, n_vocab: int) -> TokenTable:
    """Texts and types of the `n_vocab` token ids.

    Raises:
        BadInputError: the tokenizer has more ids than the model, or the same text twice.
    """
    return token_table(tokenizer, _decoded(tokenizer), n_vocab)


def token_table(tokenizer: BpeTokenizer, added_texts: list[str], n_vocab: int) -> TokenTable:
    """Texts and types of the `n_vocab` token ids, `added_texts` being those of `tokenizer.added`.

    Raises:
        BadInputError: the tokenizer has more ids than the model, or the same text twice.
    """
    ids = {**tokenizer.vocab, **{token.content: token.id for token in tokenizer.added}}
    largest = max(ids, key=ids.__getitem__)
    if ids[largest] >= n_vocab:
        raise BadInputError(
            f"tokenizer.json: token {brief(largest)} has id {ids[largest]}, but the model has embeddings for {n_vocab} "
            "tokens only: this tokenizer belongs to another model"
        )
    table = TokenTable.unused(n_vocab)
    for text, token_id in tokenizer.vocab.items():
        table.put(token_id, text, TokenType.NORMAL)
    for token, text in zip(tokenizer.added, added_texts, strict=True):
        token_type = added_token_type(text, special=token.special)
        table.put(token.id, written(text, token_type), token_type)
    table.check_distinct("tokenizer.json")
    return table


def _decoded(tokenizer: BpeTokenizer) -> list[str]:
    """The texts of added tokens as the converter writes them: those sought before normalization, as they decode."""
    added = tokenizer.added
    if all(token.normalized for token in added):
        return [token.content for token in added]
    from tokenizers import Tokenizer

    if not isinstance(decoder := tokenizer.definition.get("decoder"), Mapping) or decoder.get("type") != "ByteLevel":
        kind = decoder.get("type") if isinstance(decoder, Mapping) else decoder
        raise UnsupportedModelError(f"tokenizer.json: the decoder of byte-level BPE is ByteLevel, not {brief(kind)}")
    # Only the decoder matters: a tokenizer of nothing but the added tokens decodes alike, and loads at once.
    vocab = {token.content: i for i, token in enumerate(added)}
    small = {"version": "1.0", "model": {"type": "BPE", "vocab": vocab, "merges": []}, "decoder": decoder}
    try:
        decode = Tokenizer.from_str(json.dumps(small)).decode
    except Exception as error:  # what the library raises
        raise BadInputError(f"tokenizer.json: its decoder cannot be read: {brief(str(error))}") from error
    return [token.content if token.normalized else decode([i]) for i, token in enumerate(added)]


def merge_texts(merges: list[tuple[str, str]]) -> list[str]:
    """Merges in GGUF's form `"a b"`; a space within a token becomes the byte-level alphabet's (`Ġ`)."""
    return [f"{left.replace(' ', 'Ġ')} {right.replace(' ', 'Ġ')}" for left, right in merges]
