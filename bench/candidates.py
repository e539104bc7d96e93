"""GGUF files to compare, kept in a folder with a note of what each was made from; made again when that has changed.

Ours come from the command line of the tree that this script lies in; llama.cpp's hold, tensor for tensor, what its
`ggml_quantize_chunk` makes of the same BF16 weights at the block types of one of ours.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gguf
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from oracles.ggml import ggml_encode
from oracles.peak import Run, run_measured

from sq_stream.formats.blocks import BLOCK_TYPES
from sq_stream.formats.checkpoint import Checkpoint

ROOT = Path(__file__).parents[1]
ROWS_AT_ONCE = 2**22  # weights
_MAIN = "import sys; sys.path.insert(0, sys.argv.pop(1)); from sq_stream.cli import main; main()"


def sq_stream(*arguments: object, log_format: str = "plain") -> Run:
    """Run the command line of this tree; whatever sq-stream is installed or lies in the current folder."""
    command = [sys.executable, "-I", "-c", _MAIN, str(ROOT), *map(str, arguments), "--log-format", log_format]
    run = run_measured(command)
    if run.exit_code:
        raise SystemExit(f"sq-stream {' '.join(map(str, arguments))}: exit code {run.exit_code}:\n{run.log}")
    return run


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(2**22):
            digest.update(chunk)
    return digest.hexdigest()


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file beside `path`, then give it its name."""
    partial = path.with_name(f".{path.name}.partial")
    write(partial)
    os.replace(partial, path)


@dataclass(frozen=True)
class File:
    """A finished file; `seconds` and `peak_bytes` are what our command took to make it, None where none did."""

    name: str
    path: Path
    sha256: str
    seconds: float | None = None
    peak_bytes: int | None = None


class Workshop:
    """Makes the files of one model in one folder.

    Args:
        model_dir: the checkpoint.
        folder: keeps the files, their notes and the calibration.
        calib_windows: windows of 512 tokens that `balanced` and the importance matrix are calibrated on.
        max_ram: of every `sq-stream` command.
        threads: of every `sq-stream` command.
        reuse: take files that are there, whatever code and settings made them.
    """

    def __init__(
        self, model_dir: Path, folder: Path, *, calib_windows: int, max_ram: str, threads: int, reuse: bool = False
    ) -> None:
        self.model_dir, self.folder, self.reuse = model_dir, folder, reuse
        self._limits = ["--max-ram", max_ram, "--threads", threads]
        self._text = ["--windows", calib_windows, "--cache", folder / "cache"]
        self._calib_windows = calib_windows
        with Checkpoint.open(model_dir) as checkpoint:
            self._checkpoint = checkpoint.fingerprint()
        folder.mkdir(parents=True, exist_ok=True)

    @cached_property
    def code(self) -> str:
        """SHA-256 of our source and of the packaged text: of all that decides the bytes of our files."""
        package, digest = ROOT / "sq_stream", hashlib.sha256()
        for path in sorted(package.rglob("*")):
            where = path.relative_to(package)
            if path.is_file() and "__pycache__" not in where.parts and where.parts[0] not in ("cli", "demo"):
                digest.update(f"{where} {sha256(path)}\n".encode())
        return digest.hexdigest()

    @cached_property
    def reference(self) -> File:
        """The checkpoint in BF16."""
        return self._quantize("BF16", "bf16.gguf", "--type", "bf16", "--effort", "fast")

    @cached_property
    def imatrix(self) -> File:
        """The importance matrix of llama.cpp's form, of the tokens that `balanced` is calibrated on."""
        path = self.folder / "imatrix.gguf"
        options = [*self._limits, *self._text, "--imatrix-out", path]
        return self._make(
            "calibrate",
            path,
            {"code": self.code, "checkpoint": self._checkpoint, "calib_windows": self._calib_windows},
            lambda fresh: sq_stream("calibrate", self.model_dir, *options),
        )

    def fast(self, recipe: str) -> File:
        """Ours, weights only."""
        return self._quantize(f"{recipe}, sq-stream fast", f"{recipe}-fast.gguf", *_type(recipe), "--effort", "fast")

    def balanced(self, recipe: str) -> File:
        """Ours, calibrated and shaped; the time does not include the calibration."""
        return self._quantize(
            f"{recipe}, sq-stream balanced", f"{recipe}-balanced.gguf", *_type(recipe), calibration=self.imatrix
        )

    def llamacpp(self, recipe: str, *, importance: bool = False) -> File:
        """llama.cpp's, of the same types as `fast`; with `importance`, given the importance matrix."""
        like = self.fast(recipe).path
        made_from = {
            "reference": self.reference.sha256,
            "types": {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(like).tensors},
            "imatrix": self.imatrix.sha256 if importance else None,
            "xllamacpp": version("xllamacpp"),
        }
        path = self.folder / f"{recipe}-{'imatrix' if importance else 'llamacpp'}.gguf"
        imatrix = self.imatrix.path if importance else None

        def make(fresh: bool) -> None:
            write_atomically(path, lambda partial: requantize(self.reference.path, like, partial, imatrix))

        return self._make(f"{recipe}, llama.cpp{' + imatrix' if importance else ''}", path, made_from, make)

    def _quantize(self, name: str, file: str, *options: object, calibration: File | None = None) -> File:
        path = self.folder / file
        text = self._text if calibration else []
        command = ["quantize", self.model_dir, "-o", path, "--overwrite", *self._limits, *options, *text]
        made_from = {
            "code": self.code,
            "checkpoint": self._checkpoint,
            "options": list(map(str, options)),
            "calibration": calibration and calibration.sha256,
        }
        return self._make(name, path, made_from, lambda fresh: sq_stream(*command, *(["--fresh"] if fresh else [])))

    def _make(self, name: str, path: Path, made_from: dict[str, Any], make: Callable[[bool], Run | None]) -> File:
        """The file at `path`, made if it is not there or its note says otherwise.

        The note is written before, without a checksum, so that only a run of the same code is resumed: `make` is told
        whether to start afresh.
        """
        note_path = path.with_suffix(".json")
        note = json.loads(note_path.read_text()) if note_path.exists() else {}
        same = note.get("made_from") == made_from
        if path.exists() and (same or self.reuse):
            digest = sha256(path)
            if digest == note.get("sha256"):
                return File(name, path, digest, note["seconds"], note["peak_bytes"])
            if self.reuse:
                return File(name, path, digest)
        print(f"making {path.name}", file=sys.stderr, flush=True)
        write_atomically(note_path, lambda partial: partial.write_text(json.dumps({"made_from": made_from})))
        run = make(not same)
        file = File(name, path, sha256(path), run and run.seconds, run and run.peak_bytes)
        note = {**asdict(file), "path": path.name, "made_from": made_from}
        write_atomically(note_path, lambda partial: partial.write_text(json.dumps(note, indent=1) + "\n"))
        return file


def _type(recipe: str) -> list[str]:
    return ["--type", recipe.removesuffix("-pure"), *(["--pure"] if recipe.endswith("-pure") else [])]


def requantize(reference: Path, ours: Path, output: Path, imatrix: Path | None = None) -> None:
    """Copy our file and let llama.cpp quantize its tensors, of the same types, from the BF16 reference.

    As in llama-imatrix's files, only the layers' linears have an importance, not the token embedding nor the output.
    """
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
