r"""The release table: what quantization costs, and how much of it sq-stream gets back at the same bytes.

    python bench/recovery.py MODEL_DIR ... --folder FOLDER --report STEM \
        --text wikitext2-64x256=wikitext2-test.txt:64x256 --text code=code.txt:64x256
    python bench/recovery.py --short
    python bench/recovery.py --render STEM.json --docs docs

For every model there are the BF16 file, sq-stream's at each effort and llama.cpp's, pure and mixed, and llama.cpp's
other types of about that size (`--files REGEX` makes some of them). llama.cpp's hold, tensor for tensor, what its
`ggml_quantize_chunk` makes of the same BF16 weights in the types that llama-quantize chooses; with "imatrix", with an
importance matrix collected on the tokens that ours was calibrated on (as llama.cpp does it: none for the token
embedding). Texts are the packaged ones that no fit sees, and those given, which no calibration may have seen.

llama.cpp computes all logits, those of the BF16 file being the reference. KL divergence is in nats per token over every
position of every window; one column leaves the first positions out, where it is far larger. "Recovered" is the part of
the KL (and of the loss gap to BF16) of llama.cpp's `--pure` file that is gone. A table for each text is followed by the
bars; intervals are 95%, by bootstrap over windows, the same windows for both files of a ratio.

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
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bars import RULES, check, memory_bar, summarize
from candidates import Workshop
from divergence import Scorer
from oracles.llamacpp import LlamaModel
from pages import charts, document, markdown
from texts import TextFile, cut_texts

from sq_stream.calibrate.corpus import CTX, WINDOWS
from sq_stream.demo import model_folder

SHORT = {"calib_windows": 32, "convergence_windows": 4, "heldout_windows": 8, "bars": "better"}
LONG = {
    "calib_windows": WINDOWS[0],
    "convergence_windows": WINDOWS[1],
    "heldout_windows": WINDOWS[2],
    "bars": "reference",
}
DEMO = model_folder().resolve()
SETTINGS = ("calib_windows", "max_ram", "threads", "skip", "bars", "reuse")


def name_of(model_dir: Path) -> str:
    """What a model is called here: by its folder."""
    return "demo" if model_dir.resolve() == DEMO else model_dir.resolve().name


def measure(model_dir: Path, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """The figures of one model, as JSON values."""
    workshop = Workshop(
        model_dir,
        folder,
        calib_windows=arguments.calib_windows,
        max_ram=arguments.max_ram,
        threads=arguments.threads,
        reuse=arguments.reuse,
    )
    wanted = (make for name, make in workshop.release().items() if arguments.files.search(name))
    files = [workshop.reference, *(make() for make in wanted)]
    made = [workshop.imatrix, *files]
    scorer = Scorer(folder, workshop.reference, arguments.threads)
    packaged = {"convergence": arguments.convergence_windows, "heldout": arguments.heldout_windows}
    with LlamaModel(workshop.reference.path, vocab_only=True) as model:
        cut = cut_texts(model_dir, packaged, arguments.text, model.tokenize)
    texts, results, bars = [], [], []
    for text in cut:
        scores = {file.name: scorer.score(file, text) for file in files}
        n_windows, n_ctx = text.windows.shape
        texts.append({"name": text.name, "n_windows": n_windows, "n_ctx": n_ctx, "sha256": text.digest})
        results += [summarize(text.name, file, scores, arguments.skip) for file in files]
        bars += check(text.name, scores, RULES[arguments.bars], arguments.skip)
    bars.append(memory_bar(made, arguments.max_ram))
    return {
        "model": name_of(model_dir),
        "command": command(arguments),
        **{name: getattr(arguments, name) for name in SETTINGS},
        "texts": texts,
        "results": [asdict(result) for result in results],
        "bars": [asdict(bar) for bar in bars],
        "files": [{**asdict(file), "path": file.path.name} for file in made],
    }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model_dir", type=Path, nargs="*", help="default: the model that ships with sq-stream")
    add("--short", action="store_true", help="few windows, by default on the model that ships: some minutes")
    add("--text", type=TextFile.parse, action="append", default=[], metavar="NAME=FILE:WINDOWSxCTX", help="repeatable")
    add("--files", type=re.compile, default=re.compile(""), metavar="REGEX", help="only those whose names match")
    for part in ("calib", "convergence", "heldout"):
        add(f"--{part}-windows", type=int, metavar="N", help=f"of {CTX} tokens; default: {LONG[f'{part}_windows']}")
    add("--bars", choices=list(RULES), help="better: only better than llama.cpp with importance")
    add("--skip", type=int, default=1, metavar="N", help="first positions that the extra column leaves out")
    add("--max-ram", default="1G", help="of each sq-stream command")
    add("--threads", type=int, default=2, help="of sq-stream and of llama.cpp")
    add("--folder", type=Path, help="keep everything here; a temporary folder otherwise")
    add("--reuse", action="store_true", help="take the files in --folder, whatever code and options made them")
    add("--render", type=Path, metavar="STEM.json", help="measure nothing: take the figures of an earlier run")
    add("--report", type=Path, metavar="STEM", help="write STEM.json, STEM.md and a chart of each model")
    add("--docs", type=Path, metavar="FOLDER", help="write its page results.md, figures and charts; other models stay")
    arguments = parser.parse_args()
    for name, value in (SHORT if arguments.short else LONG).items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    arguments.model_dir = arguments.model_dir or [DEMO]
    names = [text.name for text in arguments.text]
    if len(set(names)) < len(names):
        parser.error("two --text have the same name")
    if not names and not arguments.heldout_windows and not arguments.convergence_windows:
        parser.error("there is no text: give --text, --convergence-windows or --heldout-windows")
    return arguments


def command(arguments: argparse.Namespace) -> str:
    """The command line that measures this again, without the places of this machine."""
    models = [name_of(path) for path in arguments.model_dir if path.resolve() != DEMO]
    options = [*models, *(["--short"] if arguments.short else [])]
    usual = SHORT if arguments.short else LONG
    settings = {name: getattr(arguments, name) for name in usual if getattr(arguments, name) != usual[name]}
    options += [f"--{name.replace('_', '-')} {value}" for name, value in settings.items()]
    options += [f"--files '{arguments.files.pattern}'"] if arguments.files.pattern else []
    options += [f"--text {text.name}={text.path.name}:{text.n_windows}x{text.n_ctx}" for text in arguments.text]
    options += ["--reuse"] if arguments.reuse else []
    return " ".join(["python bench/recovery.py", *options, "--folder FOLDER --docs docs"])


def with_earlier(report: dict[str, Any], stem: Path) -> dict[str, Any]:
    """The figures of `stem`, if there are any, with those of the models of `report` replaced or added."""
    path = stem.with_suffix(".json")
    earlier = json.loads(path.read_text())["models"] if path.exists() else []
    models = {model["model"]: model for model in [*earlier, *report["models"]]}
    return {"models": list(models.values())}


def write(report: dict[str, Any], stem: Path, text: str) -> None:
    """The figures, the page and the charts, beside each other."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    stem.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    stem.with_suffix(".md").write_text(text)
    for name, svg in charts(report, stem.name).items():
        (stem.parent / name).write_text(svg)


def main() -> None:
    arguments = parse_arguments()
    if arguments.render:
        report = json.loads(arguments.render.read_text())
    else:
        with tempfile.TemporaryDirectory() as scratch:
            folder = arguments.folder or Path(scratch)
            models = {name_of(path): path for path in arguments.model_dir}
            report = {
                "models": [
                    measure(path, folder / name if len(models) > 1 else folder, arguments)
                    for name, path in models.items()
                ]
            }
    print(markdown(report))
    if arguments.report:
        write(report, arguments.report, markdown(report))
    if arguments.docs:
        stem = arguments.docs / "results"
        page = with_earlier(report, stem)
        write(page, stem, document(page))
    sys.exit(0 if all(bar["met"] for model in report["models"] for bar in model["bars"]) else 1)


if __name__ == "__main__":
    main()
