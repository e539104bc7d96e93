"""Calibration text as windows of token ids, in three parts that share no document and no passage.

`calib` is what fits see, `convergence` decides when they stop, `heldout` is only ever reported.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sq_stream.calibrate import chat
from sq_stream.calibrate.documents import GIVEN, Document, Ids, packaged, read_files, split
from sq_stream.calibrate.shingles import found, shingles
from sq_stream.errors import BadInputError, UsageError
from sq_stream.text.encode import Encoder
from sq_stream.text.pretokenizer import ADDS_BOS
from sq_stream.text.vocabulary import Vocabulary

CTX = 512
CTX_RANGE = (64, 2**20)
"""Fewest and most tokens of a window."""
WINDOWS = (360, 60, 120)
"""Windows for the fit, for the convergence test and for the held-out test."""
PARTS = ("calib", "convergence", "heldout")

MIX = {
    "encyclopedia": 40, "code": 16, "prose": 12, "languages": 12, "dialogue": 12, "technical": 8, GIVEN: 100,
}  # fmt: skip
"""Shares of the windows; a kind that has too few leaves its share to the others."""

MAX_REPEATED = 0.25
"""A window is a near-duplicate when this part of its shingles occurs in another part of the corpus.

Shingles and containment after Broder, "On the resemblance and containment of documents" (1997). With edits at a rate e
a copy keeps (1 - e)^32 of its shingles, so copies with up to 4% of their tokens changed are found, wherever they are
cut: as many as with Jaccard similarity 0.5 over 8-token shingles.
"""


@dataclass(frozen=True, eq=False)
class Corpus:
    """Windows of token ids `[n, ctx]`, int32, and for each the document that most of it is from `[n]`, int32.

    Any first few windows of a part are mixed like all of it.
    """

    calib: Ids
    convergence: Ids
    heldout: Ids
    calib_documents: Ids
    convergence_documents: Ids
    heldout_documents: Ids
    document_ids: tuple[str, ...]  # what the numbers in the `*_documents` mean
    coverage: Mapping[str, int] = field(default_factory=dict)  # windows of `calib` by what their text is
    notes: tuple[str, ...] = ()  # what the user should know

    @property
    def digests(self) -> dict[str, str]:
        """SHA-256 of the windows of each part, in hexadecimal."""
        return {name: digest(getattr(self, name)) for name in PARTS}


def build_corpus(
    tokenizer: Encoder,
    vocabulary: Vocabulary,
    *,
    ctx: int = CTX,
    files: Sequence[Path] = (),
    extend: bool = False,
    windows: tuple[int, int, int] = WINDOWS,
) -> Corpus:
    """The packaged text, the text of `files`, or with `extend` both, as windows of `ctx` tokens.

    Documents of one kind and part are joined before they are cut, so that none is too short. Where the model's
    vocabulary asks for it each window begins with BOS. The same text and tokenizer give the same windows.

    Args:
        tokenizer: of the checkpoint.
        vocabulary: of the same checkpoint; says how many token ids there are, and has the chat template.
        ctx: tokens in a window, within `CTX_RANGE`.
        files: text, or token ids (`read_files`), in place of the packaged text.
        extend: take the packaged text too, for half of the windows.
        windows: most windows for the fit, for the convergence test and for the held-out test.

    Raises:
        UsageError: `ctx` or `windows` is too small or too large, or there is no such file.
        BadInputError: a file holds nothing usable, or the text is too short.
        StorageError: a file cannot be read.
    """
    if not CTX_RANGE[0] <= ctx <= CTX_RANGE[1]:
        raise UsageError(f"--ctx {ctx}: a window has {CTX_RANGE[0]} to {CTX_RANGE[1]} tokens")
    if min(windows) < 1:
        raise UsageError(f"--windows {min(windows)}: at least one window is needed")
    given = read_files(files, vocabulary.n_tokens)
    own = packaged() if extend or not files else []
    parts = [a + b for a, b in zip(split(own), split(given), strict=True)]
    texts, notes = _encode([document for part in parts for document in part], tokenizer, vocabulary)
    bos = bos_id(vocabulary)
    pools, first = [], 0
    for part in parts:
        pools.append(_cut(part, texts[first : first + len(part)], first, ctx, bos))
        first += len(part)
    available = [sum(len(pool.tokens) for pool in part.values()) for part in pools]
    n_repeated = _drop_repeated(pools, 0 if bos is None else 1)
    chosen = [_choose(pool, n) for pool, n in zip(pools, windows, strict=True)]
    counts = [len(part.tokens) for part in chosen]
    if min(counts) < 1:
        where = [*map(str, files), *(["the packaged text"] if own else [])]
        raise BadInputError(
            f"{', '.join(where)}: {sum(map(len, texts))} tokens make {_listed(available)} windows of {ctx} tokens "
            f"({'/'.join(PARTS)}), of which {n_repeated} repeat another part's text: too short, at least one window of "
            f"each is needed; give more text (about {10 * ctx} tokens or more, without repetitions) or a smaller --ctx"
        )
    if n_repeated:
        notes.append(f"calibration windows left out because they repeat text of another part: {n_repeated}")
    if any(count < n for count, n in zip(counts, windows, strict=True)):
        notes.append(f"the calibration text makes {_listed(counts)} windows of {ctx} tokens, not {_listed(windows)}")
    return Corpus(
        calib=chosen[0].tokens,
        convergence=chosen[1].tokens,
        heldout=chosen[2].tokens,
        calib_documents=chosen[0].documents,
        convergence_documents=chosen[1].documents,
        heldout_documents=chosen[2].documents,
        document_ids=tuple(document.id for part in parts for document in part),
        coverage=Counter(_source(parts[0][i]) for i in chosen[0].documents),
        notes=tuple(notes),
    )


def _source(document: Document) -> str:
    """What a document's text is: its kind, with the language where that is not English; or the user's file."""
    if document.kind == GIVEN:
        return document.id.rpartition("/")[0]
    if document.kind == "languages":
        return f"languages, {document.id.removeprefix('own/languages').split('/')[1]}"
    return document.kind


def bos_id(vocabulary: Vocabulary) -> int | None:
    """The token that llama.cpp puts before a text, if it does (`llama_vocab::impl::load` in src/llama-vocab.cpp)."""
    values = {entry.key: entry.value for entry in vocabulary.metadata}
    adds = values.get("tokenizer.ggml.add_bos_token", vocabulary.kind == "llama" or vocabulary.pre in ADDS_BOS)
    token_id = values.get("tokenizer.ggml.bos_token_id", 1 if vocabulary.kind == "llama" else None)
    return int(token_id) if adds and token_id is not None else None


@dataclass(frozen=True, eq=False)
class _Pool:
    """Windows `[n, ctx]` and their documents `[n]`."""

    tokens: Ids
    documents: Ids

    def take(self, which: npt.NDArray[np.bool_] | npt.NDArray[np.intp]) -> _Pool:
        return _Pool(self.tokens[which], self.documents[which])


def _encode(documents: Sequence[Document], tokenizer: Encoder, vocabulary: Vocabulary) -> tuple[list[Ids], list[str]]:
    """Token ids of each document, without BOS, and notes."""
    values = {entry.key: entry.value for entry in vocabulary.metadata}
    words = values["tokenizer.ggml.tokens"]
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    found = {role: values.get(f"tokenizer.ggml.{name}_token_id") for role, name in names.items()}
    tokens = {f"{role}_token": words[token_id] for role, token_id in found.items() if token_id is not None}
    dialogues = [document.messages for document in documents if document.messages]
    written, note = chat.render(dialogues, values.get("tokenizer.chat_template"), tokens)
    rendered, bos = iter(written), bos_id(vocabulary)
    of_text = [document for document in documents if document.ids is None]
    texts = [next(rendered) if document.messages else document.text + "\n" for document in of_text]
    from_text = iter(tokenizer.encode_all(texts))
    encoded: list[npt.NDArray[Any]] = []
    for document in documents:
        ids = next(from_text) if document.ids is None else document.ids
        encoded.append(ids[1:] if document.messages and len(ids) and ids[0] == bos else ids)
    highest = max((int(ids.max()) for ids in encoded if len(ids)), default=0)
    if highest >= vocabulary.n_tokens:
        raise BadInputError(
            f"the tokenizer gives token id {highest}, but the model's vocabulary ends at {vocabulary.n_tokens - 1}: "
            "tokenizer and model do not belong together"
        )
    return [ids.astype(np.int32) for ids in encoded], [note] if note else []


def _cut(
    documents: Sequence[Document], texts: Sequence[Ids], first: int, ctx: int, bos: int | None
) -> dict[str, _Pool]:
    """The windows of one part by kind; `first` is the number of its first document."""
    pools = {}
    step = ctx if bos is None else ctx - 1
    for kind in MIX:
        members = [i for i, document in enumerate(documents) if document.kind == kind]
        ids = np.concatenate([texts[i] for i in members]) if members else np.empty(0, np.int32)
        source = np.repeat(np.array(members, np.int32) + first, [len(texts[i]) for i in members])
        n = len(ids) // step
        tokens = ids[: n * step].reshape(n, step)
        if bos is not None:
            tokens = np.insert(tokens, 0, bos, axis=1)
        runs = source[: n * step].reshape(n, step)
        pools[kind] = _Pool(tokens, np.array([np.bincount(run).argmax() for run in runs], np.int32))
    return pools


def _drop_repeated(parts: Sequence[dict[str, _Pool]], skip: int) -> int:
    """Leave out windows that repeat text of a later part, so that the held-out text stays whole; how many there were.

    The first `skip` tokens of a window do not count.
    """
    kept: list[npt.NDArray[np.uint64]] = [np.empty(0, np.uint64)]
    dropped = 0
    for pools in reversed(parts):
        seen = np.unique(np.concatenate(kept))
        for kind, pool in pools.items():
            hashes = shingles(pool.tokens[:, skip:])
            fresh = found(hashes, seen).mean(axis=1) < MAX_REPEATED
            kept.append(hashes[fresh].ravel())
            pools[kind] = pool.take(fresh)
            dropped += int((~fresh).sum())
    return dropped


def _choose(pools: dict[str, _Pool], n_wanted: int) -> _Pool:
    """At most `n_wanted` windows: kinds by `MIX`, one by one (Sainte-Laguë), within a kind evenly spaced."""
    counts = dict.fromkeys(pools, 0)
    order: list[tuple[str, int]] = []
    for _ in range(min(n_wanted, sum(len(pool.tokens) for pool in pools.values()))):
        free = [kind for kind, pool in pools.items() if counts[kind] < len(pool.tokens)]
        kind = max(free, key=lambda kind: MIX[kind] / (2 * counts[kind] + 1))
        order.append((kind, counts[kind]))
        counts[kind] += 1
    starts = dict(zip(pools, np.cumsum([0, *(len(pool.tokens) for pool in pools.values())]), strict=False))
    all_windows = _Pool(
        np.concatenate([pool.tokens for pool in pools.values()]),
        np.concatenate([pool.documents for pool in pools.values()]),
    )
    spaced = [starts[kind] + (2 * i + 1) * len(pools[kind].tokens) // (2 * counts[kind]) for kind, i in order]
    return all_windows.take(np.array(spaced, np.intp))


def digest(windows: Ids) -> str:
    """SHA-256 of token ids [n, ctx] and of their shape, in hexadecimal."""
    return hashlib.sha256(f"{windows.shape} ".encode() + windows.astype("<i4").tobytes()).hexdigest()


def _listed(counts: Iterable[int]) -> str:
    return "/".join(map(str, counts))
