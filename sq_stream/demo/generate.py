"""Text from a quantized copy of the shipped model, read back from its GGUF file and run in NumPy."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sq_stream.demo import model_folder
from sq_stream.formats.gguf_read import GGUFReader
from sq_stream.models.forward import Decoder, find_decoder, forward
from sq_stream.models.layers import Array

END_OF_TEXT = "<|endoftext|>"
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # what the bytes of an unfinished character decode to


def generate(
    gguf: Path, prompt: str, n_tokens: int, *, seed: int = 0, temperature: float = 0.7, top_k: int = 40
) -> Iterator[str]:
    """Pieces of the text that the model in `gguf` continues `prompt` with.

    Every step computes the whole sequence again: the simplest way that is fast enough for a sentence.

    Args:
        gguf: the shipped model, quantized; its token ids are those of the shipped tokenizer.
        prompt: text that is not empty.
        n_tokens: most tokens to generate; fewer when the model ends its text.
        seed: of the sampling; the same seed gives the same text for the same file on the same machine.
        temperature: divides the logits; 0 always takes the likeliest token.
        top_k: how many of the likeliest tokens are sampled from.

    Raises:
        UnsupportedModelError: the architecture of `gguf` has no forward pass.
        BadInputError: `gguf` is not a sound GGUF file.
        StorageError: reading fails.
    """
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model_folder() / "tokenizer.json"))
    decoder, weights = read_model(gguf)
    random = np.random.default_rng(seed)
    ids = tokenizer.encode(prompt).ids
    n_prompt, shown = len(ids), ""
    for _ in range(n_tokens):
        token = _sample(forward(np.array(ids), weights, decoder)[-1], temperature, top_k, random)
        if token == tokenizer.token_to_id(END_OF_TEXT):
            return
        ids.append(token)
        text = tokenizer.decode(ids[n_prompt:])
        if not text.endswith(_INCOMPLETE):
            yield text[len(shown) :]
            shown = text


def read_model(gguf: Path) -> tuple[Decoder, dict[str, Array]]:
    """The maths and the float32 weights of a GGUF file, by GGUF name.

    Raises:
        UnsupportedModelError: its architecture has no forward pass.
        BadInputError: it is not a sound GGUF file.
        StorageError: reading fails.
    """
    from sq_stream.kernels.codec import decode

    with GGUFReader.open(gguf) as reader:
        arch = reader.metadata["general.architecture"].value
        decoder = find_decoder(arch, reader.metadata.values())
        weights = {
            name: decode(reader.read_rows(name, 0, tensor.n_rows), tensor.block_type).reshape(tensor.shape)
            for name, tensor in reader.tensors.items()
        }
    return decoder, weights


def _sample(logits: Array, temperature: float, top_k: int, random: np.random.Generator) -> int:
    """A token id from logits [n_vocab]."""
    if temperature == 0:
        return int(np.argmax(logits))
    best: NDArray[np.intp] = np.argsort(logits, kind="stable")[::-1][:top_k]
    p = np.exp((logits[best] - logits[best[0]]).astype(np.float64) / temperature)
    return int(random.choice(best, p=p / p.sum()))
