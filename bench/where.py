r"""Where the KL of a file sits: how much of it goes when one group of its tensors has its BF16 values again.

    python bench/where.py MODEL_DIR FILE.gguf --text wikitext2=wikitext2-test.txt:8x512

Groups are the kinds of tensors, and a few layers at a time. A tensor that was smoothed gets the values of the
checkpoint scaled in the same way (as `sq-stream verify --against` finds it), so that all else of the file still fits.
Everything is evaluated by the forward pass in float32, in memory. The share that goes has a 95% interval, by bootstrap
over windows; shares need not add up to 1, errors being neither independent nor small.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
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
RESAMPLES = 2000
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
    scaled, random = exact(arguments.file, arguments.model_dir), np.random.RandomState(0)
    named = groups(quantized, decoder.n_layer)
    swapped = {group: {**quantized, **{name: scaled[name] for name in names}} for group, names in named.items()}
    with Workers(arguments.threads) as workers:
        for text in cut_texts(arguments.model_dir, {"convergence": arguments.windows}, arguments.text):
            print(f"\n{text.name}\n\n| BF16 again | mean KL | share that goes (95%) |\n| --- | --- | --- |")
            others = {"nothing": quantized, **swapped}
            for group, kl in divergences(text.windows, scaled, others, decoder, workers):
                if group == "nothing":
                    whole = kl
                drawn = random.randint(0, len(kl), (RESAMPLES, len(kl)))
                shares = np.quantile(1 - kl[drawn].mean(axis=1) / whole[drawn].mean(axis=1), [0.025, 0.975])
                share = f"{1 - kl.mean() / whole.mean():.1%} ({shares[0]:.1%} to {shares[1]:.1%})"
                print(f"| {group} | {kl.mean():.4f} | {share} |", flush=True)


if __name__ == "__main__":
    main()
