"""llama.cpp, given our vocabulary, splits text into the same token ids as the checkpoint's own tokenizer."""

from __future__ import annotations

import json
import random
import unicodedata
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import pytest
from oracles.llamacpp import LlamaModel
from tokenizers import pre_tokenizers
from vocabularies import BYTE_LEVEL, DECOMPOSED, GOLDEN, NAMES, NASTY, SENTENCEPIECE, folder_of, n_vocab_of, write_gguf

from sq_stream.errors import BadInputError
from sq_stream.text.encode import Tokenizer
from sq_stream.text.vocabulary import read_vocabulary

# Where llama.cpp is known to differ, and why: its own code does, whatever a file says.
COMPOSITION = "llama.cpp does not compose characters (NFC)"
CASE = "llama.cpp's expression sees case in ASCII letters only"
MARKS = "llama.cpp's expression does not count combining marks as letters"
UNICODE = "llama.cpp's tables of character categories are older than Unicode 16"
SPACE_MARK = "llama.cpp seeks user-defined runs of spaces in the text, not in its form with spaces written as ▁"
ASCII_CASE = ("tekken", "gpt-4o")
KNOWN_DIFFERENCES = (
    *((name, "e\u0301", COMPOSITION) for name in ("qwen2", "qwen35")),
    *((name, "Ω".join("abcdefghijklmnop"), CASE) for name in ASCII_CASE),
    *((name, "\u0301".join("abcdefghijklmnop"), MARKS) for name in ASCII_CASE),
    *((name, "\U00013460".join("abcdefghijklmnop"), UNICODE) for name in BYTE_LEVEL),
)


class Pair:
    """A tokenizer, and llama.cpp with the vocabulary that we read from it."""

    def __init__(self, folder: Path, scratch: Path, pre: str | None = None) -> None:
        vocabulary = read_vocabulary(folder, arch="llama", n_vocab=n_vocab_of(folder), pre=pre)
        write_gguf(scratch / "vocabulary.gguf", "llama", vocabulary)
        self.own = Tokenizer.open(folder)
        self.llama = LlamaModel(scratch / "vocabulary.gguf", vocab_only=True)

    def differing(self, texts: Iterable[str], special: bool = False) -> list[str]:
        return [
            text for text in texts if self.llama.tokenize(text, special, True) != self.own.encode(text, special=special)
        ]


def added_tokens(folder: Path) -> list[str]:
    """Texts of the added tokens that have an embedding."""
    config = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    added = {int(i): token["content"] for i, token in config.get("added_tokens_decoder", {}).items()}
    if (folder / "tokenizer.json").exists():
        definition = json.loads((folder / "tokenizer.json").read_text("utf-8"))
        added |= {token["id"]: token["content"] for token in definition["added_tokens"]}
    return [text for i, text in added.items() if i < n_vocab_of(folder)]


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_ids_are_the_tokenizers(name: str, special: bool, tmp_path: Path) -> None:
    folder = folder_of(name, tmp_path)
    pair = Pair(folder, tmp_path)
    with_special = [f"a{token} b {token}{token}\n{token}c ▁" for token in added_tokens(folder)]
    texts = [*NASTY, *with_special, "".join(added_tokens(folder))]
    known = [text for text in texts if "▁" in text] if name == "gemma" else []  # SPACE_MARK
    assert [text for text in pair.differing(texts, special) if text not in known] == []


def probe(name: str, texts: list[str], scratch: Path, *, normalize: bool = False, pre: str | None = None) -> Pair:
    """A pair with a golden pre-tokenizer, and a vocabulary that shows in its ids where `texts` are split.

    Any two bytes that follow each other in the texts merge, unless a split is between them.
    """
    definition = json.loads((GOLDEN / name / "tokenizer.json").read_text("utf-8"))
    in_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str
    runs = [run for text in texts for run, _ in in_bytes(text)]
    pairs = sorted({(left, right) for run in runs for left, right in pairwise(run)})
    random.Random(0).shuffle(pairs)
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(left + right for left, right in pairs)]
    definition["model"] |= {"vocab": {token: i for i, token in enumerate(tokens)}, "merges": pairs}
    definition |= {"added_tokens": [], "post_processor": None}
    if not normalize:
        definition["normalizer"] = None
    (scratch / "tokenizer.json").write_text(json.dumps(definition), "utf-8")
    (scratch / "config.json").write_text(json.dumps({"vocab_size": len(tokens)}), "utf-8")
    return Pair(scratch, scratch, pre)


def ascii_case(text: str) -> str:
    """`text` without combining marks and without letters of other alphabets that have case."""
    return "".join(c for c in text if c < "\x80" or unicodedata.category(c) not in ("Lu", "Ll", "Lt", "Mn", "Mc", "Me"))


@pytest.mark.parametrize("name", BYTE_LEVEL)
def test_words_are_split_alike(name: str, tmp_path: Path) -> None:
    texts = [*NASTY, *DECOMPOSED]
    characters = sorted(set("".join(texts)))
    generator = random.Random(1)
    texts += ["".join(generator.choices(characters, k=generator.randrange(2, 20))) for _ in range(500)]
    if name in ASCII_CASE:
        texts = [ascii_case(text) for text in texts]
    assert probe(name, texts, tmp_path).differing(texts) == []


@pytest.mark.parametrize("name", BYTE_LEVEL)
def test_another_pre_tokenizer_would_show(name: str, tmp_path: Path) -> None:
    assert probe(name, list(NASTY), tmp_path, pre="deepseek-llm").differing(NASTY) != []


@pytest.mark.parametrize("name", BYTE_LEVEL)
def test_known_differences(name: str, tmp_path: Path) -> None:
    """They are still there: one that is gone should leave the list."""
    texts = [text for other, text, _ in KNOWN_DIFFERENCES if other == name]
    assert probe(name, texts, tmp_path, normalize=True).differing(texts) == texts


def test_a_written_space_mark_is_a_known_difference(tmp_path: Path) -> None:
    assert Pair(GOLDEN / "gemma", tmp_path).differing(["a ▁b"]) == ["a ▁b"], SPACE_MARK


def test_added_tokens_are_cut_out_before_sentencepiece_sees_them() -> None:
    tokenizer = Tokenizer.open(GOLDEN / "llama-spm")
    assert tokenizer.encode("<|im_start|><|im_end|></s>") == [1, 600, 601, 2]
    assert tokenizer.decode([1, *tokenizer.encode("a b<|im_end|>", special=False)]) == "<s>a b<|im_end|>"


@pytest.mark.parametrize("name", NAMES)
def test_decoding_gives_the_text_back(name: str, tmp_path: Path) -> None:
    tokenizer = Tokenizer.open(folder_of(name, tmp_path))
    for text in NASTY:
        same = text.replace("▁", " ") if name in SENTENCEPIECE else text
        assert tokenizer.decode(tokenizer.encode(text, special=False)) == same


def test_a_damaged_tokenizer_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match=r"no tokenizer\.json"):
        Tokenizer.open(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(BadInputError, match="the tokenizers library cannot work with it"):
        Tokenizer.open(tmp_path)
