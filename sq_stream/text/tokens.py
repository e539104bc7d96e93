"""The tokens of a vocabulary, by id, with their GGUF types and scores."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from sq_stream.errors import BadInputError
from sq_stream.formats.strict_json import brief


class TokenType(IntEnum):
    """GGUF token types (`llama_token_type` of llama.h)."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class TokenTable:
    """Text, type and score of every token id; ids that the tokenizer leaves free are unused `[PAD<id>]` tokens."""

    texts: list[str]
    types: list[int]
    scores: list[float]

    @classmethod
    def unused(cls, n_vocab: int) -> TokenTable:
        """A table of `n_vocab` ids, none taken. The score is llama.cpp's for padding."""
        return cls([f"[PAD{i}]" for i in range(n_vocab)], [int(TokenType.UNUSED)] * n_vocab, [-10000.0] * n_vocab)

    def __len__(self) -> int:
        return len(self.texts)

    def put(self, token_id: int, text: str, token_type: TokenType, score: float = 0.0) -> None:
        """Give `token_id` this text, type and score."""
        self.texts[token_id] = text
        self.types[token_id] = int(token_type)
        self.scores[token_id] = score

    def check_distinct(self, where: str) -> None:
        """Refuse two ids with one text, at which llama.cpp aborts.

        Raises:
            BadInputError: two ids have the same text.
        """
        ids = {text: i for i, text in enumerate(self.texts)}
        if len(ids) == len(self.texts):
            return
        first, text = next((i, text) for i, text in enumerate(self.texts) if ids[text] != i)
        raise BadInputError(
            f"{where}: tokens {first} and {ids[text]} both read {brief(text)}; llama.cpp needs distinct tokens: "
            "remove or rename one of them"
        )


def looks_special(text: str) -> bool:
    """Whether llama.cpp's converter takes an added token for a control token although it is not marked special."""
    return (
        text in ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
        or (text.startswith("<|") and text.endswith("|>"))
        or (text.startswith("<｜") and text.endswith("｜>"))
        or (text.startswith("<unused") and text.endswith(">"))
    )


def added_token_type(text: str, *, special: bool) -> TokenType:
    """Type of an added token: control when it is special or looks so, else user-defined."""
    return TokenType.CONTROL if special or looks_special(text) else TokenType.USER_DEFINED


def written(text: str, token_type: TokenType) -> str:
    """The text that llama.cpp shall look for: a user-defined token is sought in text where spaces are spaces still."""
    return text.replace("▁", " ") if token_type is TokenType.USER_DEFINED else text
