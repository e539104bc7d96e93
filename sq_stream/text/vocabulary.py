"""A checkpoint's tokenizer as the `tokenizer.*` metadata of a GGUF file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sq_stream.errors import BadInputError, UnsupportedModelError, UsageError
from sq_stream.formats.metadata import Entry, ValueType, array, boolean, string, u32
from sq_stream.text import bpe, pretokenizer, spm
from sq_stream.text.files import read_json_object
from sq_stream.text.special import special_entries
from sq_stream.text.tokenizer_json import BpeTokenizer, parse_bpe

_MODEL, _PRE = "tokenizer.ggml.model", "tokenizer.ggml.pre"
_ADD_BOS, _ADD_SPACE = "tokenizer.ggml.add_bos_token", "tokenizer.ggml.add_space_prefix"


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF file says of its tokenizer."""

    kind: Literal["gpt2", "llama"]  # byte-level BPE, SentencePiece
    pre: str  # llama.cpp's name for the way text is split into words; "default" for SentencePiece
    n_tokens: int  # as many as the model has embeddings
    metadata: tuple[Entry, ...]  # all `tokenizer.*` keys
    notes: tuple[str, ...] = ()  # what the user should know


def tokenizer_bytes(folder: Path) -> int:
    """Size of the tokenizer's files in the folder of a checkpoint."""
    return sum(path.stat().st_size for path in folder.glob("tokenizer.*"))


def read_vocabulary(
    folder: Path, *, arch: str, n_vocab: int, pre: str | None = None, config: Mapping[str, Any] | None = None
) -> Vocabulary:
    """The vocabulary of the checkpoint in `folder` for a model with `n_vocab` embeddings.

    As llama.cpp's converter does, tokenizer.model is taken where there is one, else tokenizer.json.

    Args:
        folder: holds tokenizer.json or tokenizer.model, and tokenizer_config.json.
        arch: the GGUF architecture, as "llama" or "gemma3".
        n_vocab: token ids; those that the tokenizer leaves free become unused tokens.
        pre: llama.cpp's name of the pre-tokenizer, instead of the recognized one.
        config: what config.json holds; read from the folder by default.

    Raises:
        BadInputError: a file is missing or damaged, or the tokenizer is not this model's.
        UnsupportedModelError: llama.cpp has no such tokenizer, as far as is known here.
        UsageError: `pre` is not a name that llama.cpp knows, or the tokenizer is a SentencePiece one.
        StorageError: a file cannot be read.
    """
    if config is None:
        config = read_json_object(folder / "config.json") or {}
    tokenizer_config = read_json_object(folder / "tokenizer_config.json") or {}
    definition = read_json_object(folder / "tokenizer.json")
    notes: list[str] = []
    has_model = spm.is_model_file(folder / "tokenizer.model")
    if has_model:
        pieces = spm.read_model(folder, tokenizer_config, n_vocab)
        entries = _sentencepiece(pieces, pre)
        notes += pieces.notes
    elif definition is None:
        raise BadInputError(f"{folder}: no tokenizer.json and no SentencePiece tokenizer.model: one of them is needed")
    elif arch == "gemma3":
        raise UnsupportedModelError(
            f"{folder}: Gemma's tokenizer.json alone cannot be converted: add the tokenizer.model published with it"
        )
    elif (tokenizer := parse_bpe(definition, tokenizer_config)).byte_fallback:
        entries = _sentencepiece(spm.read_tokenizer_json(tokenizer, n_vocab), pre)
    else:
        entries = _byte_level(tokenizer, pretokenizer.recognize(tokenizer, override=pre), n_vocab)
        notes += pretokenizer.differences(tokenizer)
    entries += special_entries(folder, definition or {}, tokenizer_config, config, n_vocab)
    entries += _arch_entries(arch, n_vocab, tokenizer_config)
    metadata = {entry.key: entry for entry in entries}
    kind, name = metadata[_MODEL].value, metadata[_PRE].value
    if not has_model and (kind == "llama" or name in pretokenizer.ADDS_BOS):  # else llama.cpp adds one
        metadata.setdefault(_ADD_BOS, boolean(_ADD_BOS, False))
    return Vocabulary(kind, name, n_vocab, tuple(metadata.values()), tuple(notes))


def _sentencepiece(pieces: spm.SentencePieceTokens, pre: str | None) -> list[Entry]:
    """Kind, tokens, scores and types of a SentencePiece vocabulary."""
    if pre not in (None, "default"):
        raise UsageError(f"--pre {pre}: this is a SentencePiece tokenizer, which llama.cpp does not pre-tokenize")
    entries = [
        string(_MODEL, "llama"),
        string(_PRE, "default"),
        array("tokenizer.ggml.tokens", ValueType.STRING, pieces.table.texts),
        array("tokenizer.ggml.scores", ValueType.FLOAT32, pieces.table.scores),
        array("tokenizer.ggml.token_type", ValueType.INT32, pieces.table.types),
    ]
    return entries if pieces.add_space_prefix else [*entries, boolean(_ADD_SPACE, False)]


def _byte_level(tokenizer: BpeTokenizer, pre: str, n_vocab: int) -> list[Entry]:
    """Kind, pre-tokenizer, tokens, types and merges of a byte-level BPE vocabulary."""
    table = bpe.read_tokens(tokenizer, n_vocab)
    return [
        string(_MODEL, "gpt2"),
        string(_PRE, pre),
        array("tokenizer.ggml.tokens", ValueType.STRING, table.texts),
        array("tokenizer.ggml.token_type", ValueType.INT32, table.types),
        array("tokenizer.ggml.merges", ValueType.STRING, bpe.merge_texts(tokenizer.merges)),
    ]


def _arch_entries(arch: str, n_vocab: int, tokenizer_config: Mapping[str, Any]) -> list[Entry]:
    """What the converter adds for one architecture (conversion/llama.py, gemma.py)."""
    entries = []
    if arch in ("llama", "mistral3"):
        prefix = tokenizer_config.get("add_prefix_space")
        if isinstance(prefix, bool):
            entries.append(boolean(_ADD_SPACE, prefix))
        if n_vocab == 49152:  # Granite's and SmolLM's tokenizer
            entries.append(boolean(_ADD_BOS, False))
        if n_vocab == 32016:  # CodeLlama
            ids = {"prefix": 32007, "suffix": 32008, "middle": 32009, "eot": 32010}
            entries += [u32(f"tokenizer.ggml.{role}_token_id", token_id) for role, token_id in ids.items()]
    if arch == "gemma3":
        entries.append(boolean(_ADD_SPACE, False))
    return entries
