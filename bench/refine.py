r"""Refine any file that sq-stream can decode, by itself: what the last stage of `--effort best` adds to it.

    python bench/refine.py MODEL_DIR FILE.gguf REFINED.gguf --rounds 15 --text wikitext2=wikitext2-test.txt:8x512

The rounds are those of `sq-stream quantize --effort best` (all 45 by default), over the packaged calibration text. The
mean KL from the checkpoint, evaluated in float32, is shown whenever `convergence60` is measured, also that of the texts
given, which decide nothing. REFINED.gguf is a copy of the file with the scales and norms of the best generation.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

from texts import TextFile, cut_texts

from sq_stream.calibrate.corpus import CTX, WINDOWS
from sq_stream.evaluate.models import open_reference
from sq_stream.formats.gguf_read import GGUFReader
from sq_stream.parallel import Workers
from sq_stream.refine.budget import CHECK_TOKENS, Refining
from sq_stream.refine.parameters import Generations, RefinedWeights
from sq_stream.refine.rounds import Refinement
from sq_stream.refine.schedule import Generation, best, next_round


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model_dir", type=Path)
    add("file", type=Path)
    add("refined", type=Path)
    add("--rounds", type=int, metavar="N", help="stop after so many")
    add("--windows", type=int, default=WINDOWS[0], metavar="N", help=f"of {CTX} tokens that are fitted to")
    add("--text", type=TextFile.parse, action="append", default=[], metavar="NAME=FILE:WINDOWSxCTX", help="repeatable")
    add("--threads", type=int, default=2)
    arguments = parser.parse_args()
    packaged = {"calib": arguments.windows, "convergence": CHECK_TOKENS // CTX}
    calib, held, *texts = cut_texts(arguments.model_dir, packaged, arguments.text)
    reference = open_reference(arguments.model_dir)
    spec, decoder = reference.spec, reference.model.decoder
    refining = Refining(calib.windows, held.windows, arguments.threads, resident=True, working_ram=0, peak_disk=0)
    with (
        tempfile.TemporaryDirectory(dir=arguments.refined.parent) as folder,
        GGUFReader.open(arguments.file) as file,
        Workers(arguments.threads) as workers,
    ):
        generations = Generations(file, Path(folder) / "parameters", decoder.n_layer)
        run = Refinement(
            reference.model.reader,
            spec.stored,
            generations,
            decoder,
            Path(folder),
            workers,
            resident=True,
        )

        def measure(number: int) -> float:
            kl = [run.divergence(number, text.windows) for text in (held, *texts)]
            named = zip((held, *texts), kl, strict=True)
            print(f"after {number} rounds:", ", ".join(f"{text.name} {x:.5f}" for text, x in named), flush=True)
            return kl[0]

        history = [Generation(0, 0, measure(0))]
        while step := next_round(history, refining.n_rounds, generations.n_parameters):
            if step.number > (arguments.rounds or step.number):
                break
            generations.keep_only({history[-1].number, best(history)})
            run.descend(step, refining.of_round(step.number))
            is_measured = step.is_checked or step.number == arguments.rounds
            history.append(Generation(step.number, step.parent, measure(step.number) if is_measured else None))
        shutil.copyfile(arguments.file, arguments.refined)
        weights = RefinedWeights(generations, best(history))
        with open(arguments.refined, "r+b") as copy:
            for name in generations.shapes:
                copy.seek(file.tensors[name].offset)
                copy.write(weights.data(name, 0, file.tensors[name].n_rows).tobytes())


if __name__ == "__main__":
    main()
