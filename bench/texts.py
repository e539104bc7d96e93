"""Texts to score files on: windows of files given, and of the parts of the packaged text that no fit sees."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from divergence import Text

from sq_stream.calibrate.corpus import CTX, bos_id, build_corpus
from sq_stream.formats.checkpoint import Checkpoint
from sq_stream.models import find
from sq_stream.text.encode import Tokenizer
from sq_stream.text.vocabulary import read_vocabulary

Encode = Callable[[str], Sequence[int]]


@dataclass(frozen=True)
class TextFile:
    """`n_windows` windows of `n_ctx` tokens of a UTF-8 text."""

    name: str
    path: Path
    n_windows: int
    n_ctx: int

    @classmethod
    def parse(cls, argument: str) -> TextFile:
        """From NAME=FILE:WINDOWSxCTX."""
        found = re.fullmatch(r"([^=]+)=(.+):(\d+)x(\d+)", argument)
        if found is None or int(found[3]) < 1 or int(found[4]) < 2:
            raise argparse.ArgumentTypeError(f"{argument!r} is not NAME=FILE:WINDOWSxCTX, as in wiki=test.txt:64x256")
        if not Path(found[2]).is_file():
            raise argparse.ArgumentTypeError(f"there is no file {found[2]}")
        return cls(found[1], Path(found[2]), int(found[3]), int(found[4]))

    def cut(self, encode: Encode, bos: int | None) -> Text:
        """The windows, evenly spread over the text, each beginning with `bos` where the model wants it."""
        start = [] if bos is None else [bos]
        tokens, width = list(encode(self.path.read_text(encoding="utf-8"))), self.n_ctx - len(start)
        if len(tokens) < self.n_windows * width:
            raise SystemExit(f"{self.path} has {len(tokens)} tokens, too few for {self.n_windows} windows of {width}")
        firsts = [i * (len(tokens) - width) // max(1, self.n_windows - 1) for i in range(self.n_windows)]
        return Text(self.name, np.array([start + tokens[first : first + width] for first in firsts], np.int32))


def cut_texts(
    model_dir: Path, packaged: Mapping[str, int], files: Sequence[TextFile], encode: Encode | None = None
) -> list[Text]:
    """The first windows of parts of the packaged text, as many as `packaged` says, then those of `files`.

    Files are tokenized by `encode`, or by the tokenizer of the checkpoint.
    """
    with Checkpoint.open(model_dir) as checkpoint:
        spec = find(checkpoint.config).describe(checkpoint.config, checkpoint.shapes)
        n_vocab = next(tensor.n_rows for tensor in spec.tensors if tensor.name == "token_embd.weight")
        vocabulary = read_vocabulary(model_dir, arch=spec.arch, n_vocab=n_vocab, config=checkpoint.config)
    tokenizer, texts = Tokenizer.open(model_dir), []
    corpus = build_corpus(tokenizer, vocabulary, ctx=CTX) if any(packaged.values()) else None
    for part, n_windows in packaged.items():
        if n_windows:
            windows = getattr(corpus, part)[:n_windows]
            texts.append(Text(f"{part}{len(windows)}", windows))
    encode = encode or partial(tokenizer.encode, special=False)
    return [*texts, *(file.cut(encode, bos_id(vocabulary)) for file in files)]
