r"""Where the KL of a file sits: what goes when a group of tensors is BF16 again, and what 8-bit activations cost.

    python bench/where.py MODEL_DIR FILE.gguf --text wikitext2=wikitext2-test.txt:8x512

Groups are the kinds of tensors, and a few layers at a time. A tensor that was smoothed gets the values of the
checkpoint scaled in the same way (as `sq-stream verify --against` finds it), so that all else of the file still fits.
Everything is evaluated by the forward pass in float32, in memory. The share that goes has a 95% interval, by bootstrap
over windows; shares need not add up to 1, errors being neither independent nor small. The second table is of the
checkpoint's values alone, scaled as the file's are: what enters the matrices of a kind is rounded to 8 bits in blocks,
as llama.cpp's CPU kernels do, which no quantizer of weights can help.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from activations import MetIn8Bits, as_in_the_runtime, met_in_8_bits, round_to_8_bits
from bootstrap import ratio
from numpy.typing import NDArray
from texts import TextFile, cut_texts

from sq_stream.calibrate.corpus import CTX
from sq_stream.demo.generate import read_model
from sq_stream.formats.checkpoint import Checkpoint
from sq_stream.formats.gguf_read import GGUFReader
from sq_stream.job.verify import Source
from sq_stream.models.backward import divergence_vjp
from sq_stream.models.forward import Decoder, head_name, layer_names
from sq_stream.parallel import Workers

Array = NDArray[np.float32]
LAYERS_TOGETHER = 5


def exact(gguf: Path, model_dir: Path) -> dict[str, Array]:
    """The checkpoint's values of all tensors of a file, scaled as the file's are."""
    with GGUFReader.open(gguf) as reader, Checkpoint.open(model_dir) as checkpoint:
        source = Source.of(reader, checkpoint, 2**22)
        return {
            name: source.read(name, slice(0, tensor.n_rows), source.scaling(reader, name)).reshape(tensor.shape)
            for name, tensor in reader.tensors.items()
        }


def groups(quantized: Mapping[str, Array], n_layer: int) -> dict[str, list[str]]:
    """The matrices of each kind, and of some neighboring layers; all norms; everything."""
    matrices = [name for name, w in quantized.items() if w.ndim == 2 and "conv" not in name]
    found: dict[str, list[str]] = {"everything": list(quantized)}
    for name in matrices:
        found.setdefault(name.split(".")[-2], []).append(name)
    for first in range(0, n_layer, LAYERS_TOGETHER):
        last = min(first + LAYERS_TOGETHER, n_layer) - 1
        own = [n for n in matrices if (m := re.match(r"blk\.(\d+)\.", n)) and first <= int(m[1]) <= last]
        found[f"layers {first} to {last}"] = own
    return found


def hidden(tokens: NDArray[np.int32], weights: Mapping[str, Array], decoder: Decoder) -> Array:
    """What enters the output matrix, [n_window, n_ctx, n_embd]."""
    x = decoder.embed(weights["token_embd.weight"][tokens])
    for i in range(decoder.n_layer):
        x = decoder.layer(x, {short: weights[name] for short, name in layer_names(weights, i).items()}, i)
    return decoder.final_norm(x, weights)


def divergences(
    windows: NDArray[np.int32],
    reference: Mapping[str, Array],
    others: Mapping[str, Mapping[str, Array]],
    decoder: Decoder,
    workers: Workers,
) -> Iterator[tuple[str, NDArray[np.float64]]]:
    """Of each of the `others`, mean KL of every window [n_window]."""
    head = f"{head_name(reference)}.weight"
    batches = [windows[i : i + 2] for i in range(0, len(windows), 2)]
    theirs = workers.map(lambda tokens: hidden(tokens, reference, decoder), batches)
    for name, weights in others.items():

        def compare(i: int, weights: Mapping[str, Array] = weights) -> Array:
            x = hidden(batches[i], weights, decoder)
            x = round_to_8_bits(x) if isinstance(weights[head], MetIn8Bits) else x
            return divergence_vjp(x, weights[head], (theirs[i], reference[head]), decoder)[0].mean(axis=1)

        yield name, np.concatenate(workers.map(compare, range(len(batches)))).astype(np.float64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model_dir", type=Path)
    add("file", type=Path)
    add("--windows", type=int, default=8, metavar="N", help=f"of {CTX} tokens of convergence60")
    add("--text", type=TextFile.parse, action="append", default=[], metavar="NAME=FILE:WINDOWSxCTX", help="repeatable")
    add("--threads", type=int, default=2)
    arguments = parser.parse_args()
    decoder, quantized = read_model(arguments.file)
    scaled = exact(arguments.file, arguments.model_dir)
    named = groups(quantized, decoder.n_layer)
    swapped = {group: {**quantized, **{name: scaled[name] for name in names}} for group, names in named.items()}
    kinds = {group: names for group, names in named.items() if not group.startswith("layers")}
    matrices = {group: [name for name in names if scaled[name].ndim == 2] for group, names in kinds.items()}
    rounded = {group: met_in_8_bits(scaled, names) for group, names in matrices.items()}
    with Workers(arguments.threads) as workers, as_in_the_runtime():
        for text in cut_texts(arguments.model_dir, {"convergence": arguments.windows}, arguments.text):
            print(f"\n{text.name}\n\n| BF16 again | mean KL | share that goes (95%) |\n| --- | --- | --- |")
            others = {"nothing": quantized, **swapped}
            for group, kl in divergences(text.windows, scaled, others, decoder, workers):
                if group == "nothing":
                    whole = kl
                left, (low, high) = ratio(kl, whole)
                share = f"{1 - left:.1%} ({1 - high:.1%} to {1 - low:.1%})"
                print(f"| {group} | {kl.mean():.4f} | {share} |", flush=True)
            print("\n| 8-bit inputs of | mean KL | over that of the file (95%) |\n| --- | --- | --- |")
            for group, kl in divergences(text.windows, scaled, rounded, decoder, workers):
                share, (low, high) = ratio(kl, whole)
                print(f"| {group} | {kl.mean():.4f} | {share:.1%} ({low:.1%} to {high:.1%}) |", flush=True)


if __name__ == "__main__":
    main()
