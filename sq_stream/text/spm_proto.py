"""The parts of a SentencePiece tokenizer.model that a GGUF vocabulary is made of.

The file is one protocol buffer message, `ModelProto` of sentencepiece's src/sentencepiece_model.proto; the field
numbers below are from there. The `sentencepiece` package reads it too, but tells neither which pieces are user-defined
nor the kind of the model.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

BPE = 2  # TrainerSpec.ModelType


@dataclass(frozen=True)
class SentencePieceModel:
    """Pieces in the order of their ids, and how text is changed before it is split into them."""

    texts: list[str]
    scores: list[float]
    types: list[int]  # as in GGUF: `TokenType`
    model_type: int
    normalizes: bool  # rewrites characters (NFKC and the like) or runs of spaces
    add_dummy_prefix: bool  # puts a space before a text
    space_as_prefix: bool  # a word's space is the first character of its pieces, written "▁"


def parse_model(data: bytes) -> SentencePieceModel:
    """The model in the bytes of a tokenizer.model.

    Raises:
        ValueError: the bytes are not such a message.
    """
    texts, scores, types = [], [], []
    trainer: dict[int, int | bytes] = {}
    normalizer: dict[int, int | bytes] = {}
    try:
        for number, value in _fields(data):
            if number == 1:
                piece = dict(_fields(_message(value)))
                texts.append(_message(piece[1]).decode("utf-8"))
                scores.append(float(struct.unpack("<f", _message(piece.get(2, bytes(4))))[0]))
                types.append(int(piece.get(3, 1)))
            elif number == 2:
                trainer = dict(_fields(_message(value)))
            elif number == 3:
                normalizer = dict(_fields(_message(value)))
    except (KeyError, IndexError, TypeError, struct.error) as error:
        raise ValueError("not a SentencePiece model") from error
    if not texts:
        raise ValueError("a SentencePiece model without pieces")
    return SentencePieceModel(
        texts,
        scores,
        types,
        model_type=int(trainer.get(3, 1)),
        normalizes=bool(normalizer.get(2)) or bool(normalizer.get(4, 1)),
        add_dummy_prefix=bool(normalizer.get(3, 1)),
        space_as_prefix=bool(normalizer.get(5, 1)) and not trainer.get(24, 0),
    )


def _message(value: int | bytes) -> bytes:
    if not isinstance(value, bytes):
        raise TypeError("a number where a message should be")
    return value


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) of each field of a message: a number, or the bytes of anything else."""
    position, end = 0, len(data)
    while position < end:
        key, position = _varint(data, position)
        wire = key & 7
        if wire == 0:
            value, position = _varint(data, position)
            yield key >> 3, value
            continue
        if wire == 2:
            size, position = _varint(data, position)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire}")
        if position + size > end:
            raise ValueError("truncated")
        yield key >> 3, data[position : position + size]
        position += size


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """A number of 7-bit groups, lowest first, and the position behind it."""
    value = shift = 0
    while True:
        byte = data[position]
        value |= (byte & 0x7F) << shift
        position += 1
        if byte < 0x80:
            return value, position
        shift += 7
        if shift > 63:
            raise ValueError("number too long")
