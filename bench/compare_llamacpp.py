r"""Compare our files with llama.cpp's own, type for type and byte for byte, in one run that can be taken up again.

    python bench/compare_llamacpp.py MODEL_DIR --folder FOLDER --report STEM \
        --text wikitext2-64x256=wikitext2-test.txt:64x256 --text wikitext2-32x512=wikitext2-test.txt:32x512

Texts are those given, which no calibration may have seen, and the packaged calibration corpus's held-out part. For each
recipe there are four files with the same block type for every tensor: ours at `--effort fast` and `balanced`, and two
whose quantized tensors are what llama.cpp's `ggml_quantize_chunk` makes of the same BF16 weights, without and with an
importance matrix collected on the tokens that ours was calibrated on (as llama.cpp does it: none for the token
embedding). With `q4_k_m-pure` comes llama.cpp's Q5_K everywhere, without importance.

llama.cpp computes all logits, those of the BF16 file being the reference. KL divergence is in nats per token over every
position of every window; one column leaves the first positions out, where it is far larger. A table for each text is
followed by the bars; intervals are 95%, by bootstrap over windows, the same windows for both files of a ratio.

Everything lies in --folder and is not made again while what it was made from is the same: files (by checkpoint,
options and our source), the BF16 logits (2 bytes for each position and token of the vocabulary; may be deleted) and the
scores of every file on every text (by SHA-256 of file and tokens). The exit status is 1 when a bar is missed.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from bars import RULES, Bar, Result, bars_table, check, costs_table, results_table, summarize
from candidates import File, Workshop
from divergence import Scorer, Text
from oracles.llamacpp import LlamaModel

from sq_stream.calibrate.corpus import CTX, WINDOWS, build_corpus
from sq_stream.text.encode import Tokenizer
from sq_stream.text.vocabulary import read_vocabulary
from sq_stream.units import parse_size


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

    def cut(self, model: LlamaModel) -> Text:
        """The windows, evenly spread over the text, each beginning with BOS where the model wants it."""
        start = [model.bos] if model.metadata.get("tokenizer.ggml.add_bos_token") == "true" else []
        tokens, width = model.tokenize(self.path.read_text(encoding="utf-8")), self.n_ctx - len(start)
        if len(tokens) < self.n_windows * width:
            raise SystemExit(f"{self.path} has {len(tokens)} tokens, too few for {self.n_windows} windows of {width}")
        firsts = [i * (len(tokens) - width) // max(1, self.n_windows - 1) for i in range(self.n_windows)]
        return Text(self.name, np.array([start + tokens[first : first + width] for first in firsts], np.int32))


def heldout(model_dir: Path, model: LlamaModel, n_windows: int) -> Text:
    """The first windows of the packaged corpus's held-out part, which no fit sees."""
    vocabulary = read_vocabulary(model_dir, arch=model.metadata["general.architecture"], n_vocab=model.n_vocab)
    windows = build_corpus(Tokenizer.open(model_dir), vocabulary, ctx=CTX).heldout[:n_windows]
    return Text(f"heldout{len(windows)}", windows)


def cut_texts(arguments: argparse.Namespace, reference: File) -> list[Text]:
    with LlamaModel(reference.path, vocab_only=True) as model:
        texts = [text.cut(model) for text in arguments.text]
        if arguments.heldout_windows:
            texts.append(heldout(arguments.model_dir, model, arguments.heldout_windows))
    return texts


def make_files(workshop: Workshop, recipes: list[str]) -> list[File]:
    """The BF16 file first, then for each recipe ours and llama.cpp's."""
    files = [workshop.reference]
    for recipe in recipes:
        files += [
            workshop.fast(recipe),
            workshop.balanced(recipe),
            workshop.llamacpp(recipe),
            workshop.llamacpp(recipe, importance=True),
        ]
    return [*files, workshop.llamacpp("q5_k_m-pure")] if "q4_k_m-pure" in recipes else files


def memory_bar(files: list[File], max_ram: str) -> Bar:
    """The highest peak of our commands, as a share of what they were allowed."""
    share, bar = max(file.peak_bytes or 0 for file in files) / parse_size(max_ram), f"peak memory over {max_ram}"
    return Bar("", bar, share, (share, share), share, limit=1.0, at_least=False, met=share <= 1)


def run(arguments: argparse.Namespace, folder: Path) -> tuple[str, dict]:
    workshop = Workshop(
        arguments.model_dir,
        folder,
        calib_windows=arguments.calib_windows,
        max_ram=arguments.max_ram,
        threads=arguments.threads,
        reuse=arguments.reuse,
    )
    files = make_files(workshop, arguments.recipe)
    made = [workshop.imatrix, *files]
    scorer = Scorer(folder, workshop.reference, arguments.threads)
    results: list[Result] = []
    bars: list[Bar] = []
    markdown = ""
    for text in cut_texts(arguments, workshop.reference):
        scores = {file.name: scorer.score(file, text) for file in files}
        rows = [summarize(text.name, file, scores[file.name], arguments.skip) for file in files]
        n_windows, n_ctx = text.windows.shape
        title = f"### {text.name}: {n_windows} windows of {n_ctx} tokens"
        markdown += f"{title}\n\n{results_table(rows, arguments.skip)}\n"
        results += rows
        bars += check(text.name, scores, RULES[arguments.bars], arguments.skip)
    bars.append(memory_bar(made, arguments.max_ram))
    markdown += f"### Bars\n\n{bars_table(bars, arguments.skip)}\n### Our commands\n\n{costs_table(made)}"
    settings = ("calib_windows", "max_ram", "threads", "skip", "bars")
    report = {
        "model": arguments.model_dir.resolve().name,
        **{name: getattr(arguments, name) for name in settings},
        "results": [asdict(result) for result in results],
        "bars": [asdict(bar) for bar in bars],
        "files": [{**asdict(file), "path": file.path.name} for file in made],
    }
    return markdown, report


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model_dir", type=Path)
    add("--text", type=TextFile.parse, action="append", default=[], metavar="NAME=FILE:WINDOWSxCTX", help="repeatable")
    add("--heldout-windows", type=int, default=WINDOWS[2], metavar="N", help=f"of {CTX} tokens, 0 for none")
    add("--recipe", action="append", metavar="TYPE[-pure]", help="default: q4_k_m-pure and q4_k_m")
    add("--calib-windows", type=int, default=WINDOWS[0], metavar="N", help=f"of {CTX} tokens")
    add("--bars", choices=list(RULES), default="reference", help="better: only better than llama.cpp with importance")
    add("--skip", type=int, default=1, metavar="N", help="first positions that the extra column leaves out")
    add("--max-ram", default="1G", help="of each sq-stream command")
    add("--threads", type=int, default=2, help="of sq-stream and of llama.cpp")
    add("--folder", type=Path, help="keep everything here; a temporary folder otherwise")
    add("--reuse", action="store_true", help="take the files in --folder, whatever code and options made them")
    add("--report", type=Path, metavar="STEM", help="write STEM.md and STEM.json")
    arguments = parser.parse_args()
    arguments.recipe = arguments.recipe or ["q4_k_m-pure", "q4_k_m"]
    names = [text.name for text in arguments.text]
    if len(set(names)) < len(names):
        parser.error("two --text have the same name")
    if not names and not arguments.heldout_windows:
        parser.error("there is no text: give --text or --heldout-windows")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    with tempfile.TemporaryDirectory() as scratch:
        markdown, report = run(arguments, arguments.folder or Path(scratch))
    print(markdown)
    if arguments.report:
        arguments.report.with_suffix(".md").write_text(markdown)
        arguments.report.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    sys.exit(0 if all(bar["met"] for bar in report["bars"]) else 1)


if __name__ == "__main__":
    main()
