"""GGUF files to compare, kept in a folder with a note of what each was made from; made again when that has changed.

Ours come from the command line of the tree that this script lies in; llama.cpp's hold, tensor for tensor, what its
`ggml_quantize_chunk` makes of the same BF16 weights at the block types that llama-quantize chooses.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cache, cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gguf
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from oracles.ggml import ggml_encode
from oracles.peak import Run, run_measured

from sq_stream import api
from sq_stream.errors import UsageError
from sq_stream.formats.blocks import BLOCK_TYPES, Q4_K, Q5_0, Q5_1, Q5_K, BlockType
from sq_stream.formats.checkpoint import Checkpoint
from sq_stream.formats.gguf_layout import lay_out
from sq_stream.formats.gguf_read import GGUFReader
from sq_stream.formats.gguf_write import GGUFFile
from sq_stream.job.settings import EFFORTS, parse_settings

ROOT = Path(__file__).parents[1]
ROWS_AT_ONCE = 2**22  # weights
NOT_IN_FILES = ("cli", "demo", "evaluate", "report")  # parts of the package that decide no byte of a file
IQ4_TYPES = {"iq4_nl": BlockType("IQ4_NL", 20, 32, 18), "iq4_xs": BlockType("IQ4_XS", 23, 256, 136)}
"""By recipe: types of llama.cpp's that sq-stream does not write."""
ENCODED = {name: t for name, t in BLOCK_TYPES.items() if t.block_size > 1} | {t.name: t for t in IQ4_TYPES.values()}
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


@cache
def source_digest() -> str:
    """SHA-256 of our source and of the packaged text: of all that decides the bytes of our files."""
    package, digest = ROOT / "sq_stream", hashlib.sha256()
    for path in sorted(package.rglob("*")):
        where = path.relative_to(package)
        if path.is_file() and "__pycache__" not in where.parts and where.parts[0] not in NOT_IN_FILES:
            digest.update(f"{where} {sha256(path)}\n".encode())
    return digest.hexdigest()


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file beside `path`, then give it its name."""
    partial = path.with_name(f".{path.name}.partial")
    write(partial)
    os.replace(partial, path)


@dataclass(frozen=True)
class File:
    """A finished file, and what our command took to make it: None where none did, or where that is not known.

    `cpu_seconds` are those of all threads, which other work on the machine hardly changes.
    """

    name: str
    path: Path
    sha256: str
    seconds: float | None = None
    cpu_seconds: float | None = None
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
            {"code": source_digest(), "checkpoint": self._checkpoint, "calib_windows": self._calib_windows},
            lambda fresh: sq_stream("calibrate", self.model_dir, *options),
        )

    @cached_property
    def efforts(self) -> list[str]:
        """Those that this version has."""
        return [effort for effort in EFFORTS if _available(self.model_dir, effort)]

    def release(self) -> dict[str, Callable[[], File]]:
        """Ways to make all files of the release table but the reference, by their names."""
        making: dict[str, Callable[[], File]] = {}
        for recipe in ("q4_k_m-pure", "q4_k_m"):
            making |= {f"{recipe}, sq-stream {effort}": partial(self.ours, recipe, effort) for effort in self.efforts}
            making[f"{recipe}, llama.cpp"] = partial(self.llamacpp, recipe)
            making[f"{recipe}, llama.cpp + imatrix"] = partial(self.llamacpp, recipe, importance=True)
        others = ("q4_k_s", *reversed(IQ4_TYPES), "q5_k_m-pure", "q5_k_m", "q6_k")
        return making | {f"{recipe}, llama.cpp": partial(self.llamacpp, recipe) for recipe in others}

    def ours(self, recipe: str, effort: str) -> File:
        """sq-stream's; where it is calibrated, the time does not include the calibration."""
        options = [*_type(recipe), *(["--effort", effort] if effort != "balanced" else [])]
        calibration = None if effort == "fast" else self.imatrix
        return self._quantize(
            f"{recipe}, sq-stream {effort}", f"{recipe}-{effort}.gguf", *options, calibration=calibration
        )

    def llamacpp(self, recipe: str, *, importance: bool = False) -> File:
        """llama.cpp's, of the types that its llama-quantize chooses; with `importance`, given the importance matrix."""
        types = self._types(recipe)
        made_from = {
            "reference": self.reference.sha256,
            "types": {name: block_type.name for name, block_type in types.items()},
            "imatrix": self.imatrix.sha256 if importance else None,
            "xllamacpp": version("xllamacpp"),
        }
        path = self.folder / f"{recipe}-{'imatrix' if importance else 'llamacpp'}.gguf"
        imatrix = self.imatrix.path if importance else None

        def make(fresh: bool) -> None:
            requantize(self.reference.path, types, path, imatrix)

        return self._make(f"{recipe}, llama.cpp{' + imatrix' if importance else ''}", path, made_from, make)

    def _types(self, recipe: str) -> dict[str, BlockType]:
        """The block type of every tensor, in the order of the file."""
        base = recipe.removesuffix("-pure")
        known = "q4_k_s" if base in IQ4_TYPES else base
        with (planned := api.plan(self.model_dir, recipe=known, pure=base != recipe, effort="fast")).checkpoint:
            types = {tensor.source.name: tensor.type for tensor in planned.tensors}
            if base in IQ4_TYPES:
                keys = {entry.key.partition(".")[2]: entry.value for entry in planned.spec.metadata}
                n_gqa = keys["attention.head_count"] // keys["attention.head_count_kv"]
                widths = {tensor.source.name: tensor.source.n_in for tensor in planned.tensors}
                types = {name: _iq4_type(name, t, IQ4_TYPES[base], n_gqa, widths[name]) for name, t in types.items()}
        return types

    def _quantize(self, name: str, file: str, *options: object, calibration: File | None = None) -> File:
        path = self.folder / file
        text = self._text if calibration else []
        command = ["quantize", self.model_dir, "-o", path, "--overwrite", *self._limits, *options, *text]
        made_from = {
            "code": source_digest(),
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
                return File(name, path, digest, note["seconds"], note.get("cpu_seconds"), note["peak_bytes"])
            if self.reuse:
                return File(name, path, digest)
        print(f"making {path.name}", file=sys.stderr, flush=True)
        write_atomically(note_path, lambda partial: partial.write_text(json.dumps({"made_from": made_from})))
        run = make(not same)
        took = (run.seconds, run.cpu_seconds, run.peak_bytes) if run else ()
        file = File(name, path, sha256(path), *took)
        note = {**asdict(file), "path": path.name, "made_from": made_from}
        write_atomically(note_path, lambda partial: partial.write_text(json.dumps(note, indent=1) + "\n"))
        return file


def _type(recipe: str) -> list[str]:
    return ["--type", recipe.removesuffix("-pure"), *(["--pure"] if recipe.endswith("-pure") else [])]


def _available(model_dir: Path, effort: str) -> bool:
    try:
        parse_settings(model_dir, effort=effort)
    except UsageError:
        return False
    return True


def _iq4_type(name: str, q4_k_s: BlockType, base: BlockType, n_gqa: int, n_in: int) -> BlockType:
    """What llama-quantize chooses for IQ4_NL and IQ4_XS where it chooses `q4_k_s` for Q4_K_S.

    The two mixtures differ in the attention's values alone (`llama_tensor_get_type` in src/llama-quant.cpp).
    """
    if q4_k_s.block_size == 1:
        return q4_k_s
    fits = n_in % Q4_K.block_size == 0
    is_values = "attn_v.weight" in name or "attn_qkv.weight" in name
    if is_values and n_gqa >= 4:
        return Q5_K if fits else Q5_1
    if is_values or q4_k_s in (Q4_K, Q5_0):
        return base if fits else IQ4_TYPES["iq4_nl"]
    return q4_k_s


def requantize(reference: Path, types: Mapping[str, BlockType], output: Path, imatrix: Path | None = None) -> None:
    """Write the tensors of the BF16 file `reference` in other types, quantized by llama.cpp.

    As in llama-imatrix's files, only the layers' linears have an importance, not the token embedding nor the output.
    """
    sums = {} if imatrix is None else {t.name: t.data for t in gguf.GGUFReader(imatrix).tensors}
    with GGUFReader.open(reference) as source:
        ours = ("sq_stream.", "general.file_type")
        keys = [entry for entry in source.metadata.values() if not entry.key.startswith(ours)]
        layout = lay_out(keys, [(name, source.tensors[name].shape, block_type) for name, block_type in types.items()])
        with GGUFFile.create(output, layout) as file:
            for tensor in layout.tensors:
                known = tensor.name.startswith("blk.") and f"{tensor.name}.in_sum2" in sums
                importance = sums[f"{tensor.name}.in_sum2"].reshape(-1).astype(np.float32) if known else None
                step = max(1, ROWS_AT_ONCE // tensor.shape[-1])
                for start in range(0, tensor.n_rows, step):
                    data = source.read_rows(tensor.name, start, min(start + step, tensor.n_rows))
                    if tensor.block_type.name in ENCODED:
                        weights = (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
                        data = ggml_encode(weights, tensor.block_type, importance)
                    file.write_rows(tensor, start, data)
            file.commit()
