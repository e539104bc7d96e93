"""A checkpoint's tokenizer as the `tokenizer.*` metadata of a GGUF file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sq_stream.errors import BadInputError
from sq_stream.formats.metadata import Entry, ValueType, array, boolean, string, u32
from sq_stream.text import bpe, pretokenizer
from sq_stream.text.files import read_json_object
from sq_stream.text.special import special_entries


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF file says of its tokenizer."""

    kind: Literal["gpt2", "llama"]  # byte-level BPE, SentencePiece
    pre: str  # llama.cpp's name for the way text is split into words; "default" for SentencePiece
    n_tokens: int  # as many as the model has embeddings
    metadata: tuple[Entry, ...]  # all `tokenizer.*` keys
    notes: tuple[str, ...] = ()  # what the user should know


def read_vocabulary(
    folder: Path, *, arch: str, n_vocab: int, pre: str | None = None, config: Mapping[str, Any] | None = None
) -> Vocabulary:
    """The vocabulary of the checkpoint in `folder` for a model with `n_vocab` embeddings.

    Args:
        folder: holds tokenizer.json or tokenizer.model, and tokenizer_config.json.
        arch: the GGUF architecture, as "llama" or "gemma3".
        n_vocab: token ids; those that the tokenizer leaves free become unused tokens.
        pre: llama.cpp's name of the pre-tokenizer, instead of the recognised one.
        config: what config.json holds; read from the folder by default.

    Raises:
        BadInputError: a file is missing or damaged, or the tokenizer is not this model's.
        UnsupportedModelError: llama.cpp has no such tokenizer, as far as is known here.
        UsageError: `pre` is not a name that llama.cpp knows.
        StorageError: a file cannot be read.
    """
    if config is None:
        config = read_json_object(folder / "config.json") or {}
    tokenizer_config = read_json_object(folder / "tokenizer_config.json") or {}
    tokenizer = read_json_object(folder / "tokenizer.json")
    if tokenizer is None:
        raise BadInputError(f"{folder}: no tokenizer.json and no tokenizer.model: the folder must hold one of them")
    kind, name, entries, notes = _read_bpe(tokenizer, tokenizer_config, n_vocab, pre)
    entries += special_entries(folder, tokenizer, tokenizer_config, config, n_vocab)
    entries += _arch_entries(arch, n_vocab, tokenizer_config)
    metadata = {entry.key: entry for entry in entries}
    if name in pretokenizer.ADDS_BOS:
        metadata.setdefault(_ADD_BOS, boolean(_ADD_BOS, False))
    return Vocabulary(kind, name, n_vocab, tuple(metadata.values()), notes)


_ADD_BOS = "tokenizer.ggml.add_bos_token"


def _read_bpe(
    tokenizer: Mapping[str, Any], tokenizer_config: Mapping[str, Any], n_vocab: int, pre: str | None
) -> tuple[Literal["gpt2"], str, list[Entry], tuple[str, ...]]:
    """Kind, pre-tokenizer, tokens with types and merges, and notes of a byte-level BPE tokenizer."""
    model = bpe.check_model(tokenizer)
    merges = bpe.read_merges(model)
    name = pretokenizer.recognize(tokenizer, override=pre)
    table = bpe.token_table(tokenizer, tokenizer_config, n_vocab)
    entries = [
        string("tokenizer.ggml.model", "gpt2"),
        string("tokenizer.ggml.pre", name),
        array("tokenizer.ggml.tokens", ValueType.STRING, table.texts),
        array("tokenizer.ggml.token_type", ValueType.INT32, table.types),
        array("tokenizer.ggml.merges", ValueType.STRING, bpe.merge_strings(merges)),
    ]
    return "gpt2", name, entries, ()


def _arch_entries(arch: str, n_vocab: int, tokenizer_config: Mapping[str, Any]) -> list[Entry]:
    """What the converter adds for one architecture (conversion/llama.py, gemma.py)."""
    entries = []
    if arch in ("llama", "mistral3"):
        prefix = tokenizer_config.get("add_prefix_space")
        if isinstance(prefix, bool):
            entries.append(boolean("tokenizer.ggml.add_space_prefix", prefix))
        if n_vocab == 49152:  # Granite small models, SmolLM
            entries.append(boolean(_ADD_BOS, False))
        if n_vocab == 32016:  # CodeLlama
            ids = {"prefix": 32007, "suffix": 32008, "middle": 32009, "eot": 32010}
            entries += [u32(f"tokenizer.ggml.{role}_token_id", token_id) for role, token_id in ids.items()]
    if arch == "gemma3":
        entries.append(boolean("tokenizer.ggml.add_space_prefix", False))
    return entries
