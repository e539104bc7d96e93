"""What models are scored on: the packaged sets, and the user's text."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sq_stream.calibrate.corpus import CTX, CTX_RANGE, bos_id, build_corpus, digest
from sq_stream.calibrate.documents import MAX_FILE, Ids, packaged
from sq_stream.errors import BadInputError, UsageError
from sq_stream.evaluate.settings import SUITES
from sq_stream.formats.storage import storage_errors
from sq_stream.text.encode import Encoder
from sq_stream.text.files import read_text
from sq_stream.text.vocabulary import Vocabulary

GENERAL_KINDS = ("encyclopedia", "prose")
"""Kinds of the packaged held-out documents that make up `general`: running text."""
GENERAL = (64, 256)
"""Windows of `general`, and tokens of each."""
BLOCK_TOKENS = 2048
"""Neighboring windows of the user's text that intervals resample together, as they would a document."""
MOST_BLOCKS = 500
"""In a text; the blocks of a longer one are larger."""
_PIECE = 2**18  # characters of text that are tokenized at a time, up to the next end of a line


@dataclass(frozen=True, eq=False)
class Suite:
    """Windows of token ids `[n, ctx]` and for each the document that most of it is from `[n]`, both int32."""

    name: str
    windows: Ids
    documents: Ids

    @property
    def sha256(self) -> str:
        """Of the token ids, in hexadecimal."""
        return digest(self.windows)

    def first(self, n: int | None) -> Suite:
        """The first n windows, or all; of packaged sets the first few are mixed like all of them."""
        return Suite(self.name, self.windows[:n], self.documents[:n])


def make_suites(
    names: Sequence[str],
    texts: Sequence[Path],
    tokenizer: Encoder,
    vocabulary: Vocabulary,
    *,
    ctx: int = CTX,
) -> list[Suite]:
    """The suites called `names`, and one of each text, or all texts in `general` where that is asked for.

    Args:
        names: of `SUITES`.
        texts: UTF-8 files; special tokens written in them are recognized.
        tokenizer: of the reference.
        vocabulary: of the reference.
        ctx: tokens in a window of a text of its own, BOS included where the model wants one.

    Raises:
        UsageError: there is no such file, or `ctx` is out of range.
        BadInputError: a file is not text, or too short.
        StorageError: a file cannot be read.
    """
    if not CTX_RANGE[0] <= ctx <= CTX_RANGE[1]:
        raise UsageError(f"--ctx {ctx}: a window has {CTX_RANGE[0]} to {CTX_RANGE[1]} tokens")
    suites = []
    if {"heldout120", "convergence60"} & set(names):
        corpus = build_corpus(tokenizer, vocabulary)
        suites.append(Suite("heldout120", corpus.heldout, corpus.heldout_documents))
        suites.append(Suite("convergence60", corpus.convergence, corpus.convergence_documents))
    if "general" in names:
        general = _packaged_general(tokenizer, vocabulary)
        if texts:
            ids = np.concatenate([_encode(path, tokenizer) for path in texts])
            general = cut("general", ids, GENERAL[1], bos_id(vocabulary), spread=GENERAL[0])
        suites.append(general)
    else:
        for path, name in zip(texts, _names(texts), strict=True):
            suites.append(cut(name, _encode(path, tokenizer), ctx, bos_id(vocabulary)))
    kept = [suite for suite in suites if suite.name in names or suite.name not in SUITES]
    for suite in kept:
        _check(suite, vocabulary)
    return kept


def cut(name: str, ids: Ids, ctx: int, bos: int | None, spread: int | None = None) -> Suite:
    """Windows of a text's token ids, each after BOS where there is one; `spread` of them evenly over it, or all."""
    step = ctx if bos is None else ctx - 1
    n_fitting = len(ids) // step
    if n_fitting == 0:
        raise BadInputError(
            f"{name}: {len(ids)} tokens make no window of {ctx}: give more text, or a smaller --ctx (at least "
            f"{CTX_RANGE[0]})"
        )
    which = np.arange(n_fitting) if spread is None else np.unique(np.arange(spread) * n_fitting // spread)
    windows = ids[: n_fitting * step].reshape(n_fitting, step)[which]
    if bos is not None:
        windows = np.insert(windows, 0, bos, axis=1)
    block = max(1, BLOCK_TOKENS // ctx, -(-n_fitting // MOST_BLOCKS))
    return Suite(name, windows, (which // block).astype(np.int32))


def _packaged_general(tokenizer: Encoder, vocabulary: Vocabulary) -> Suite:
    """Running text of the packaged held-out documents."""
    n, ctx = GENERAL
    corpus = build_corpus(tokenizer, vocabulary, ctx=ctx, windows=(1, 1, 2**30))
    kinds = {document.id: document.kind for document in packaged()}
    is_general = [kinds[corpus.document_ids[i]] in GENERAL_KINDS for i in corpus.heldout_documents]
    found = np.flatnonzero(is_general)
    which = found[np.unique(np.arange(n) * len(found) // n)]
    return Suite("general", corpus.heldout[which], corpus.heldout_documents[which])


def _encode(path: Path, tokenizer: Encoder) -> Ids:
    """Token ids of a file, without BOS."""
    with storage_errors("reading", path):
        if not path.exists():
            raise UsageError(f"{path}: no such text")
        if path.stat().st_size > MAX_FILE:
            raise BadInputError(f"{path}: more than {MAX_FILE} bytes, the most that is read: give a part of it")
    text = read_text(path) or ""
    ids = np.concatenate([np.empty(0, np.int64), *tokenizer.encode_all(list(_pieces(text)))])
    small: Ids = np.minimum(ids, np.iinfo(np.int32).max).astype(np.int32)  # what is too large is found in `_check`
    return small


def _pieces(text: str) -> Iterator[str]:
    """`text` in pieces that end with a line: a tokenizer's work on all of a large file would take much memory."""
    for match in re.finditer(rf"(?s).{{1,{_PIECE}}}\Z|.{{{_PIECE}}}[^\n]*\n?", text):
        yield match[0]


def _names(texts: Sequence[Path]) -> list[str]:
    """Names of files, with their folders where two would be called the same or like a packaged set."""
    short = [path.name for path in texts]
    return [
        str(path) if short.count(name) > 1 or name in SUITES else name for path, name in zip(texts, short, strict=True)
    ]


def _check(suite: Suite, vocabulary: Vocabulary) -> None:
    highest = int(suite.windows.max())
    if highest >= vocabulary.n_tokens:
        raise BadInputError(
            f"{suite.name}: the tokenizer gives token id {highest}, but the model's vocabulary ends at "
            f"{vocabulary.n_tokens - 1}: tokenizer and model do not belong together"
        )
