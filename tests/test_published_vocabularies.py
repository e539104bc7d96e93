"""Published vocabularies, from the GGUF files in llama.cpp's models/ folder, through tokenizer.json and back.

    SQ_LLAMA_CPP=path/to/llama.cpp pytest -m slow tests/test_published_vocabularies.py

A tokenizer.json is made of a file's tokens and merges, with the definition that the model was published with. We must
recognize it, and read the file's tokens back; and `tokenizers` must give the ids that llama.cpp's own tests expect,
which shows that the definition is right.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import gguf
import pytest
from vocabularies import GOLDEN

from sq_stream.text.encode import Tokenizer
from sq_stream.text.vocabulary import read_vocabulary

MODELS = Path(os.environ.get("SQ_LLAMA_CPP", "")) / "models"
PUBLISHED = {"llama-bpe": "llama-bpe", "qwen2": "qwen2", "qwen35": "qwen35", "gpt-2": "gpt-2"} | dict.fromkeys(
    ("starcoder", "refact"), "smollm"
)
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("SQ_LLAMA_CPP" not in os.environ, reason="SQ_LLAMA_CPP names no llama.cpp source tree"),
]


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_vocabulary_is_recognized_and_kept(name: str, tmp_path: Path) -> None:
    reader = gguf.GGUFReader(MODELS / f"ggml-vocab-{name}.gguf")
    tokens, types, merges = (
        reader.fields[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "token_type", "merges")
    )
    definition = json.loads((GOLDEN / PUBLISHED[name] / "tokenizer.json").read_text("utf-8"))
    typed = list(enumerate(zip(tokens, types, strict=True)))
    definition |= {"normalizer": None, "post_processor": None}
    definition["model"] |= {"vocab": {text: i for i, (text, kind) in typed if kind == NORMAL}, "merges": merges}
    definition["added_tokens"] = [
        {"id": i, "content": text, "special": kind == CONTROL, "normalized": False}
        | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
        for i, (text, kind) in typed
        if kind in (CONTROL, USER_DEFINED)
    ]
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition), "utf-8")

    vocabulary = read_vocabulary(tmp_path, arch="llama", n_vocab=len(tokens))
    values = {entry.key.rpartition(".")[2]: entry.value for entry in vocabulary.metadata}
    assert vocabulary.pre == PUBLISHED[name]
    assert (values["tokens"], values["token_type"], values["merges"]) == (tokens, types, merges)

    texts = (MODELS / f"ggml-vocab-{name}.gguf.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    expected = (MODELS / f"ggml-vocab-{name}.gguf.out").read_text("utf-8").split("\n")
    tokenizer = Tokenizer.open(tmp_path)
    for text, ids in zip(texts, expected, strict=False):
        assert tokenizer.encode(text, special=False) == [int(i) for i in ids.split()]
