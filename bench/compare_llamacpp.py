"""Compare our files with llama.cpp's own, type for type and byte for byte, in one run.

    python bench/compare_llamacpp.py MODEL_DIR --text wikitext2-test.txt --report docs/comparison

For each recipe there are four files with the same block type for every tensor: ours at `--effort fast` and `balanced`,
and two whose quantized tensors are what llama.cpp's `ggml_quantize_chunk` makes of the same BF16 weights, without and
with an importance matrix collected on the tokens that ours was calibrated on (as llama.cpp does it: none for the token
embedding). llama.cpp computes all logits, those of the BF16 file being the reference. KL divergence is in nats per
token, over every position of every window.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from oracles.ggml import ggml_encode
from oracles.llamacpp import LlamaModel
from oracles.peak import run_measured

from sq_stream.formats.blocks import BLOCK_TYPES

MIB = 2**20
ROWS_AT_ONCE = 2**22  # weights


@dataclass
class Candidate:
    """One GGUF file and, for each of its windows and positions, what it says about the text."""

    name: str
    path: Path
    kl: list[NDArray[np.float64]] = field(default_factory=list)  # [n_windows][n_tok]
    agrees: list[NDArray[np.bool_]] = field(default_factory=list)  # [n_windows][n_tok]
    loss: list[NDArray[np.float64]] = field(default_factory=list)  # [n_windows][n_tok - 1]


@dataclass(frozen=True)
class Result:
    """The figures of one file; intervals are 95%, from resampling windows."""

    name: str
    tensor_mib: float
    bits_per_weight: float
    mean_kl: float
    mean_kl_interval: tuple[float, float]
    median_kl: float
    kl_99: float
    top1_agreement: float
    loss: float
    perplexity: float


@dataclass(frozen=True)
class Difference:
    """Mean KL of our file minus that of llama.cpp's with the same types, window by window."""

    pair: str
    mean_kl: float
    interval: tuple[float, float]
    ratio: float


def sq_stream(*arguments: object) -> dict[str, float]:
    """Run our command line; seconds and peak MiB."""
    run = run_measured([sys.executable, "-m", "sq_stream", *map(str, arguments), "--log-format", "plain"])
    if run.exit_code:
        raise SystemExit(f"sq-stream ended with exit code {run.exit_code}:\n{run.log}")
    return {"seconds": run.seconds, "peak_mib": run.peak_bytes / MIB}


def requantize(reference: Path, ours: Path, output: Path, imatrix: Path | None = None) -> None:
    """Copy our file and let llama.cpp quantize its tensors, of the same types, from the BF16 reference."""
    sums = {} if imatrix is None else {t.name: t.data for t in gguf.GGUFReader(imatrix).tensors}
    shutil.copyfile(ours, output)
    source = {tensor.name: tensor for tensor in gguf.GGUFReader(reference).tensors}
    for tensor in gguf.GGUFReader(output, "r+").tensors:
        block_type = BLOCK_TYPES[tensor.tensor_type.name]
        if block_type.block_size == 1:
            continue
        bf16 = source[tensor.name].data.view(np.uint16)  # [n_out, n_in]
        step = max(1, ROWS_AT_ONCE // bf16.shape[-1])
        known = tensor.name.startswith("blk.") and f"{tensor.name}.in_sum2" in sums
        importance = sums[f"{tensor.name}.in_sum2"].reshape(-1).astype(np.float32) if known else None
        for start in range(0, len(bf16), step):
            weights = (bf16[start : start + step].astype(np.uint32) << 16).view(np.float32)
            tensor.data[start : start + step] = ggml_encode(weights, block_type, importance)
        tensor.data.flush()


def windows(model: LlamaModel, text: str, n_windows: int, n_ctx: int) -> Iterator[list[int]]:
    """`n_windows` stretches of the text, evenly spread, of `n_ctx` tokens each."""
    start = [model.bos] if model.metadata.get("tokenizer.ggml.add_bos_token") == "true" else []
    tokens = model.tokenize(text)
    width = n_ctx - len(start)
    if len(tokens) < n_windows * width:
        raise SystemExit(f"the text has {len(tokens)} tokens, too few for {n_windows} windows of {width}")
    for i in range(n_windows):
        first = i * (len(tokens) - width) // max(1, n_windows - 1)
        yield start + tokens[first : first + width]


def log_sums(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Log of the sum of the exponentials of each row: [n_tok]."""
    top = logits.max(axis=-1, keepdims=True)
    return np.log(np.exp(logits - top).sum(axis=-1, dtype=np.float64)) + top[:, 0]


def measure(
    candidate: Candidate, tokens: list[int], logits: NDArray[np.float32], reference: NDArray[np.float32]
) -> None:
    """Add one window: `logits` and `reference`, those of the BF16 file, are [n_tok, n_vocab]."""
    log_z, reference_log_z = log_sums(logits), log_sums(reference)
    p = np.exp(reference - reference_log_z[:, None].astype(np.float32))
    kl = (p * (reference - logits)).sum(axis=-1, dtype=np.float64) / p.sum(axis=-1, dtype=np.float64)
    candidate.kl.append(kl - reference_log_z + log_z)
    candidate.agrees.append(logits.argmax(axis=-1) == reference.argmax(axis=-1))
    candidate.loss.append(log_z[:-1] - logits[np.arange(len(tokens) - 1), tokens[1:]])


def interval(window_means: NDArray[np.float64], n_samples: int = 10_000) -> tuple[float, float]:
    """95% confidence interval of the mean, by bootstrap over windows."""
    samples = np.random.default_rng(0).integers(len(window_means), size=(n_samples, len(window_means)))
    low, high = np.quantile(window_means[samples].mean(axis=1), [0.025, 0.975])
    return float(low), float(high)


def summarize(candidate: Candidate) -> Result:
    tensors = gguf.GGUFReader(candidate.path).tensors
    n_bytes = sum(int(tensor.n_bytes) for tensor in tensors)
    kl, loss = np.concatenate(candidate.kl), float(np.concatenate(candidate.loss).mean())
    return Result(
        name=candidate.name,
        tensor_mib=n_bytes / MIB,
        bits_per_weight=8 * n_bytes / sum(int(tensor.n_elements) for tensor in tensors),
        mean_kl=float(kl.mean()),
        mean_kl_interval=interval(np.array([window.mean() for window in candidate.kl])),
        median_kl=float(np.median(kl)),
        kl_99=float(np.quantile(kl, 0.99)),
        top1_agreement=float(np.concatenate(candidate.agrees).mean()),
        loss=loss,
        perplexity=math.exp(loss),
    )


def compare(ours: Candidate, theirs: Candidate) -> Difference:
    a, b = (np.array([window.mean() for window in candidate.kl]) for candidate in (ours, theirs))
    return Difference(
        f"{ours.name} against {theirs.name}", float((a - b).mean()), interval(a - b), float(a.mean() / b.mean())
    )


def to_markdown(results: Sequence[Result], differences: Sequence[Difference]) -> str:
    lines = [
        "| file | MiB | bits/weight | mean KL (95%) | median KL | 99% KL | top-1 agreement | loss | perplexity |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in results:
        low, high = r.mean_kl_interval
        lines.append(
            f"| {r.name} | {r.tensor_mib:.1f} | {r.bits_per_weight:.2f} | {r.mean_kl:.4f} ({low:.4f} to {high:.4f}) "
            f"| {r.median_kl:.4f} | {r.kl_99:.3f} | {r.top1_agreement:.1%} | {r.loss:.4f} | {r.perplexity:.2f} |"
        )
    lines.append("")
    for d in differences:
        low, high = d.interval
        lines.append(f"- {d.pair}: mean KL {d.mean_kl:+.4f} (95%: {low:+.4f} to {high:+.4f}), ratio {d.ratio:.3f}")
    return "\n".join(lines) + "\n"


def make_files(arguments: argparse.Namespace, folder: Path) -> tuple[list[Candidate], dict]:
    """The BF16 file first, then for each recipe ours and llama.cpp's."""
    folder.mkdir(parents=True, exist_ok=True)
    model_dir, reference, imatrix = arguments.model_dir, folder / "bf16.gguf", folder / "imatrix.gguf"
    limits = ["--max-ram", arguments.max_ram]
    text = ["--windows", arguments.calib_windows, "--cache", folder / "cache"]

    def quantize(output: Path, *options: object) -> dict[str, float]:
        return sq_stream("quantize", model_dir, "-o", output, "--overwrite", *limits, *options)

    costs = {
        "bf16": quantize(reference, "--type", "bf16", "--effort", "fast"),
        "calibrate": sq_stream("calibrate", model_dir, *limits, *text, "--imatrix-out", imatrix),
    }
    candidates = [Candidate("BF16", reference)]
    for recipe in arguments.recipe:
        options = ["--type", recipe.removesuffix("-pure"), *(["--pure"] if recipe.endswith("-pure") else [])]
        files = {name: folder / f"{recipe}-{name}.gguf" for name in ("fast", "balanced", "llamacpp", "imatrix")}
        costs[f"{recipe}, fast"] = quantize(files["fast"], *options, "--effort", "fast")
        costs[f"{recipe}, balanced"] = quantize(files["balanced"], *options, *text)
        requantize(reference, files["fast"], files["llamacpp"])
        requantize(reference, files["fast"], files["imatrix"], imatrix)
        candidates += [
            Candidate(f"{recipe}, sq-stream fast", files["fast"]),
            Candidate(f"{recipe}, sq-stream balanced", files["balanced"]),
            Candidate(f"{recipe}, llama.cpp", files["llamacpp"]),
            Candidate(f"{recipe}, llama.cpp + imatrix", files["imatrix"]),
        ]
    return candidates, costs


def run(arguments: argparse.Namespace, folder: Path) -> tuple[str, dict]:
    candidates, costs = make_files(arguments, folder)
    with ExitStack() as stack:
        models = [
            stack.enter_context(LlamaModel(c.path, n_ctx=arguments.ctx, n_batch=256, n_threads=arguments.threads))
            for c in candidates
        ]
        text = arguments.text.read_text(encoding="utf-8")
        for i, tokens in enumerate(windows(models[0], text, arguments.windows, arguments.ctx), 1):
            reference = models[0].logits(tokens)
            measure(candidates[0], tokens, reference, reference)
            for candidate, model in zip(candidates[1:], models[1:], strict=True):
                measure(candidate, tokens, model.logits(tokens), reference)
            print(f"window {i} of {arguments.windows}", file=sys.stderr)
    results = [summarize(candidate) for candidate in candidates]
    groups = [candidates[i : i + 4] for i in range(1, len(candidates), 4)]
    pairs = [
        pair
        for fast, balanced, plain, imatrix in groups
        for pair in ((fast, plain), (balanced, plain), (balanced, imatrix))
    ]
    differences = [compare(*pair) for pair in pairs]
    report = {
        "model": arguments.model_dir.name,
        "text": arguments.text.name,
        "windows": arguments.windows,
        "ctx": arguments.ctx,
        "calib_windows": arguments.calib_windows,
        "max_ram": arguments.max_ram,
        "files": [asdict(result) for result in results],
        "differences": [asdict(difference) for difference in differences],
        "quantize": costs,
    }
    return to_markdown(results, differences), report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_dir", type=Path)
    parser.add_argument("--text", type=Path, required=True, help="UTF-8 text that no calibration has seen")
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--ctx", type=int, default=256, help="tokens of a window")
    parser.add_argument("--recipe", action="append", metavar="TYPE[-pure]", help="default: q4_k_m and q4_k_m-pure")
    parser.add_argument("--calib-windows", type=int, default=360, help="of 512 tokens")
    parser.add_argument("--max-ram", default="1G")
    parser.add_argument("--threads", type=int, default=2, help="of llama.cpp")
    parser.add_argument("--folder", type=Path, help="keep the GGUF files here")
    parser.add_argument("--report", type=Path, metavar="STEM", help="write STEM.md and STEM.json")
    arguments = parser.parse_args()
    arguments.recipe = arguments.recipe or ["q4_k_m", "q4_k_m-pure"]
    with tempfile.TemporaryDirectory() as scratch:
        markdown, report = run(arguments, arguments.folder or Path(scratch))
    print(markdown)
    if arguments.report:
        arguments.report.with_suffix(".md").write_text(markdown)
        arguments.report.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
