"""Inputs for fuzzing and what reads them: seeds made by the builders of the tests, and mutations that know their form.

A target takes bytes and feeds them to one reader of sq-stream. Whatever they are, the reader may only return or raise
an error of ours with a message that is short and printable: `Target.check`. Random bytes would end at the first
checksum or length, so that most mutations change a value where the form has one and make lengths and checksums right.
`bench/fuzz.py` runs the targets for hours, `test_fuzz.py` for seconds.
"""

from __future__ import annotations

import json
import re
import shutil
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import gguf_files
import numpy as np
import tiny_models
import vocabularies

from sq_stream.errors import SqStreamError
from sq_stream.formats.gguf_layout import lay_out
from sq_stream.formats.metadata import Entry, ValueType

LONGEST_MESSAGE = 4000
MOST_BYTES = 2**17
INTERESTING = (
    0, 1, 2, 7, 8, 31, 32, 64, 127, 128, 255, 256, 2**15, 2**16 - 1, 2**20, 2**24, 2**31 - 1, 2**31,
    2**32 - 1, 2**32, 2**40, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1,
)  # fmt: skip
WORDS = (
    "", "a", "..", "../../x", "/etc/passwd", "\0", "\x1b[31m", "é", "\ud800", "<|x|>", "▁", "Ġ", "x" * 3000,
    "9" * 5000, "F32", "BF16", "U8", "full_attention", "yarn", "linear", "Sequence", "Replace", "ByteLevel",
    "Split", "BPE",
    "model.safetensors", "(a+)+$", "{{ x }}", "blk.0.attn_q.weight", "1e999", "-0",
)  # fmt: skip


@dataclass(frozen=True)
class Target:
    """One reader: where its inputs begin, how they are changed, what reads them."""

    name: str
    seeds: list[bytes]
    mutate: Callable[[bytes, Random], bytes]
    read: Callable[[bytes], object]

    def check(self, data: bytes) -> bool:
        """Whether `data` is accepted; AssertionError, or what the reader raised, if it misbehaves."""
        try:
            self.read(data)
        except SqStreamError as error:
            message = str(error)
            message.encode()
            assert len(message) <= LONGEST_MESSAGE, f"a message of {len(message)} characters: {message[:200]}"
            return False
        return True


# Mutations


def mutate_bytes(data: bytes, random: Random) -> bytes:
    """Some bytes flipped, replaced by interesting numbers, cut out, doubled or moved."""
    out = bytearray(data[:MOST_BYTES])
    for _ in range(random.choice((1, 1, 2, 4, 16))):
        at = random.randrange(len(out) + 1)
        kind = random.randrange(7)
        if kind == 0 and at < len(out):
            out[at] ^= 1 << random.randrange(8)
        elif kind == 1:
            size = random.choice((1, 2, 4, 8))
            out[at : at + size] = (random.choice(INTERESTING) % 256**size).to_bytes(size, "little")
        elif kind == 2:
            del out[at : at + random.choice((1, 4, 8, 64, 4096))]
        elif kind == 3:
            size = random.choice((1, 4, 8, 64))
            out[at:at] = out[random.randrange(len(out) + 1) :][:size]
        elif kind == 4:
            out[at:at] = random.randbytes(random.choice((1, 2, 8)))
        elif kind == 5 and random.random() < 0.3:
            del out[at:]
        elif at < len(out):
            out[at] = random.randrange(256)
    return bytes(out)


def mutate_value(value: Any, random: Random) -> Any:
    """A JSON value with one to four changes in it."""
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        value = _change(value, random)
    return value


def _change(value: Any, random: Random) -> Any:  # noqa: PLR0911
    if isinstance(value, dict) and value and random.random() < 0.9:
        key = random.choice(list(value))
        kind = random.randrange(12)
        if kind == 0:
            return {k: v for k, v in value.items() if k != key}
        if kind == 1:
            return {**value, random.choice(WORDS): value[key]}
        if kind == 2:
            return {**value, key: value[random.choice(list(value))]}
        return {**value, key: _change(value[key], random)}
    if isinstance(value, list) and value and random.random() < 0.9:
        at = random.randrange(len(value))
        kind = random.randrange(12)
        if kind == 0:
            return value[:at] + value[at + 1 :]
        if kind == 1:
            return value[:at] + value[at : at + 1] * random.choice((2, 3, 40)) + value[at:]
        return [*value[:at], _change(value[at], random), *value[at + 1 :]]
    return _odd_value(value, random)


def _odd_value(value: Any, random: Random) -> Any:
    if isinstance(value, int) and random.random() < 0.5:
        return value + random.choice((-1, 1, 2**31, -(2**63)))
    if isinstance(value, str) and random.random() < 0.3:
        return random.choice((value * 2, value[1:], value + random.choice(WORDS), value.upper()))
    number = random.choice(INTERESTING)
    nested: Any = []
    for _ in range(random.choice((1, 3, 50, 300, 900))):
        nested = [nested] if random.random() < 0.5 else {"a": nested}
    return random.choice(
        (None, True, False, [], {}, number, -number, float(number), 0.5, 1e308, float("nan"), float("inf"), nested,
         [value], {"a": value}, [value] * 100, random.choice(WORDS), random.choice(WORDS), str(value)[:2000])
    )  # fmt: skip


def dumps(value: Any) -> bytes:
    return json.dumps(value).encode()


def mutate_json(data: bytes, random: Random) -> bytes:
    if random.random() < 0.1:
        return mutate_bytes(data, random)
    try:
        return dumps(mutate_value(json.loads(data), random))
    except (ValueError, RecursionError):
        return mutate_bytes(data, random)


def mutate_safetensors(data: bytes, random: Random) -> bytes:
    """A changed header of the length that is stated; sometimes with the data that it asks for."""
    size = int.from_bytes(data[:8], "little")
    if random.random() < 0.15 or size > len(data) - 8:
        return mutate_bytes(data, random)
    header = mutate_json(data[8 : 8 + size], random)
    return len(header).to_bytes(8, "little") + header + data[8 + size :]


def mutate_lines(data: bytes, random: Random) -> bytes:
    """A changed journal whose lines have their right checksums."""
    if random.random() < 0.1:
        return mutate_bytes(data, random)
    lines = [line[9:] for line in data.split(b"\n")[:-1]]
    at = random.randrange(len(lines) + 1)
    if at == len(lines) or random.random() < 0.1:
        lines[at:at] = lines[:1]
    else:
        lines[at] = mutate_json(lines[at], random)
    return b"".join(b"%08x %s\n" % (zlib.crc32(line), line) for line in lines)


def mutate_sketch(data: bytes, random: Random) -> bytes:
    """A changed header, or changed frames, with right checksums."""
    magic, _, rest = data.partition(b"\n")
    line, _, frames = rest.partition(b"\n")
    header = line[9:]
    if random.random() < 0.1 or not header:
        return mutate_bytes(data, random)
    if random.random() < 0.6:
        header = mutate_json(header, random)
    else:
        try:
            parsed = json.loads(header)
        except (ValueError, RecursionError):
            parsed = None
        sizes = parsed.get("frames") if isinstance(parsed, dict) else None
        if not isinstance(sizes, list) or not sizes or any(type(size) is not int or size < 4 for size in sizes):
            return mutate_bytes(data, random)
        at = random.randrange(len(sizes))
        start = sum(sizes[:at])
        frame = mutate_bytes(frames[start + 4 : start + sizes[at]], random)
        frames = frames[:start] + zlib.crc32(frame).to_bytes(4, "little") + frame + frames[start + sizes[at] :]
        header = dumps({**parsed, "frames": [*sizes[:at], len(frame) + 4, *sizes[at + 1 :]]})
    return b"%s\n%08x %s\n%s" % (magic, zlib.crc32(header), header, frames)


def mutate_gguf(data: bytes, random: Random) -> bytes:
    """A length or number at the place of one, in the header mostly; or a key with another value, in a sound file."""
    if random.random() < 0.4:
        return mutate_bytes(data, random)
    try:
        entries, tensors, body = _taken_apart(data)
    except Exception:
        return mutate_bytes(data, random)
    for _ in range(random.choice((1, 1, 3))):
        if entries and random.random() < 0.8:
            at = random.randrange(len(entries))
            entries[at] = _odd_entry(entries[at], random)
        elif tensors:
            at = random.randrange(len(tensors))
            name, shape, kind = tensors[at]
            _, other, other_kind = random.choice(tensors)
            shape = random.choice((other, shape[::-1], (1, *shape), (0, *shape[1:]), (*shape, 1)))
            tensors[at] = random.choice((name, name[1:])), shape, random.choice((kind, other_kind))
    try:
        return lay_out(entries, tensors).header + body
    except Exception:
        return mutate_bytes(data, random)


def _taken_apart(data: bytes) -> tuple[list[Entry], list[tuple[str, tuple[int, ...], Any]], bytes]:
    from sq_stream.formats.gguf_read import GGUFReader

    path = scratch() / "apart.gguf"
    path.write_bytes(data)
    with GGUFReader.open(path) as reader:
        tensors = [(t.name, t.shape, t.block_type) for t in reader.tensors.values()]
        return list(reader.metadata.values()), tensors, data[reader.data_offset :]


def _odd_entry(entry: Entry, random: Random) -> Entry:
    if entry.type is ValueType.ARRAY:
        values = list(entry.value)
        kind = random.randrange(4)
        if kind == 0:
            return Entry(entry.key, ValueType.ARRAY, values[: random.choice((0, 1, 2))], entry.element)
        if kind == 1:
            return Entry(entry.key, ValueType.ARRAY, values[::-1], entry.element)
        if kind == 2:
            return Entry(entry.key, ValueType.ARRAY, [random.choice(INTERESTING) % 2**31], ValueType.INT32)
    number = random.choice(INTERESTING)
    return random.choice(
        (
            Entry(entry.key, ValueType.UINT64, number % 2**64),
            Entry(entry.key, ValueType.INT64, -(number % 2**63)),
            Entry(entry.key, ValueType.UINT32, number % 2**32),
            Entry(entry.key, ValueType.FLOAT32, random.choice((0.0, -1.0, 1e30, float("nan"), float("inf")))),
            Entry(entry.key, ValueType.BOOL, True),
            Entry(entry.key, ValueType.STRING, random.choice([w for w in WORDS if w != "\ud800"])),
            Entry(entry.key, ValueType.ARRAY, [1.5], ValueType.FLOAT64),
            Entry(entry.key + random.choice("ax."), entry.type, entry.value, entry.element),
        )
    )


# What is read

_FOLDER: list[Path] = []


def use_folder(folder: Path) -> None:
    """Where inputs are written to be read."""
    _FOLDER[:] = [folder]
    folder.mkdir(parents=True, exist_ok=True)


def scratch() -> Path:
    return _FOLDER[0]


def _written(name: str, data: bytes) -> Path:
    path = scratch() / name
    path.write_bytes(data)
    return path


def _fresh(name: str) -> Path:
    shutil.rmtree(scratch() / name, ignore_errors=True)
    (scratch() / name).mkdir()
    return scratch() / name


def _read_safetensors(data: bytes) -> None:
    from sq_stream.formats.safetensors import read_header

    path = _written("x.safetensors", data)
    with path.open("rb") as file:
        read_header(file.fileno(), path)


def _small_weights() -> bytes:
    entries = {
        "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "b.weight": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
        "c": {"dtype": "F16", "shape": [0, 5], "data_offsets": [32, 32]},
    }
    header = dumps({"__metadata__": {"format": "pt"}, **entries})
    return len(header).to_bytes(8, "little") + header + bytes(32)


def safetensors() -> Target:
    return Target("safetensors", [_small_weights()], mutate_safetensors, _read_safetensors)


def _read_folder(data: bytes) -> None:
    """A checkpoint folder from {file name: JSON value, or text}."""
    from sq_stream.formats.checkpoint import Checkpoint

    try:
        files = json.loads(data)
    except (ValueError, RecursionError):
        files = None
    folder = _fresh("checkpoint")
    if not isinstance(files, dict):
        files = {"config.json": "x"}
    for name, value in files.items():
        if name and len(name) < 100 and "/" not in name and "\0" not in name and name.isascii() and name != "..":
            (folder / name).write_bytes(value.encode("utf-8", "replace") if isinstance(value, str) else dumps(value))
    shards = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    for i, shard in enumerate(shards):
        header = dumps({f"t{i}": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}})
        (folder / shard).write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with Checkpoint.open(folder) as checkpoint:
        for name in checkpoint.tensors:
            checkpoint.read_rows(name, slice(0, 1))


def checkpoint() -> Target:
    weight_map = {f"t{i}": f"model-0000{i + 1}-of-00002.safetensors" for i in range(2)}
    index = {"metadata": {"total_size": 16}, "weight_map": weight_map}
    seed = {"config.json": {"architectures": ["LlamaForCausalLM"]}, "model.safetensors.index.json": index}
    return Target("checkpoint", [dumps(seed)], mutate_json, _read_folder)


def config() -> Target:
    """config.json of every architecture, against the shapes of its own tensors."""
    from sq_stream.models import find
    from sq_stream.models.forward import find_decoder

    shapes, seeds = {}, []
    for name in tiny_models.MODELS:
        values, weights = tiny_models.make(name)
        shapes[name] = {tensor: x.shape for tensor, x in weights.items()}
        seeds.append(dumps({"of": name, "config": values}))

    def read(data: bytes) -> None:
        from sq_stream.formats.strict_json import parse_object

        values = parse_object(data, Path("config.json"))
        of, given = values.get("of"), values.get("config")
        if not isinstance(of, str) or of not in shapes or not isinstance(given, dict):
            return
        spec = find(given).describe(given, shapes[of])
        find_decoder(spec.arch, spec.metadata)
        lay_out(spec.metadata, [])

    return Target("config", seeds, mutate_json, read)


VOCABULARIES = {"smollm": "llama", "qwen2": "qwen2", "llama-json": "llama", "tekken": "llama"}
FILES = ("tokenizer.json", "tokenizer_config.json", "config.json", "added_tokens.json", "chat_template.jinja")


def tokenizer() -> Target:
    """tokenizer.json and its companions, up to the GGUF keys and the token ids of a text."""
    from sq_stream.text.encode import Tokenizer
    from sq_stream.text.vocabulary import read_vocabulary

    seeds = []
    for name, arch in VOCABULARIES.items():
        folder = vocabularies.folder_of(name, scratch())
        files: dict[str, Any] = {"arch": arch}
        for file in FILES:
            if (folder / file).exists():
                text = (folder / file).read_text()
                files[file] = json.loads(text) if file.endswith(".json") else text
        files["n_vocab"] = vocabularies.n_vocab_of(folder)
        seeds.append(dumps(files))

    def read(data: bytes) -> None:
        try:
            files = json.loads(data)
        except (ValueError, RecursionError):
            files = {"tokenizer.json": data.decode("latin1")}
        folder = _fresh("tokenizer")
        if not isinstance(files, dict):
            return
        for name in FILES:
            if name in files:
                value = files[name]
                (folder / name).write_bytes(
                    value.encode("utf-8", "replace") if isinstance(value, str) else dumps(value)
                )
        n_vocab = files.get("n_vocab")
        n_vocab = n_vocab if type(n_vocab) is int and 0 < n_vocab < 2**17 else 2000
        arch = "qwen2" if files.get("arch") == "qwen2" else "llama"
        config = files.get("config.json")
        vocabulary = read_vocabulary(
            folder, arch=arch, n_vocab=n_vocab, config=config if isinstance(config, dict) else {}
        )
        lay_out(vocabulary.metadata, [])
        Tokenizer.open(folder).encode("Hello, world! 123 <|x|>\n  été", special=False)

    return Target("tokenizer", seeds, mutate_json, read)


def sentencepiece() -> Target:
    """tokenizer.model, up to the GGUF keys; the sentencepiece library sees it in a process of its own only."""
    from sq_stream.text.spm import read_model

    def read(data: bytes) -> None:
        folder = _fresh("sentencepiece")
        (folder / "tokenizer.model").write_bytes(data)
        read_model(folder, {}, 2000)

    folder = vocabularies.folder_of("llama-spm", scratch())
    return Target("sentencepiece", [(folder / "tokenizer.model").read_bytes()], mutate_bytes, read)


def _small_gguf() -> bytes:
    from sq_stream.formats.blocks import BF16, F32, Q4_K, Q8_0
    from sq_stream.formats.metadata import array, boolean, f32, string, u32

    entries = [
        string("general.architecture", "llama"),
        u32("general.file_type", 15),
        f32("llama.rope.freq_base", 1e4),
        boolean("tokenizer.ggml.add_bos_token", True),
        array("tokenizer.ggml.tokens", ValueType.STRING, ["a", "b", "▁c"]),
        array("sq_stream.calib.shingles", ValueType.UINT32, [1, 5, 9]),
    ]
    sizes = [("a.weight", (3, 256), Q4_K), ("b.weight", (2, 32), Q8_0), ("c", (5,), F32), ("d", (2, 2, 4), BF16)]
    layout = lay_out(entries, sizes)
    return layout.header + bytes(layout.total_bytes - layout.data_offset)


def gguf_file() -> Target:
    """A GGUF file given to inspect and verify, with all that they print."""
    from sq_stream.cli import tables
    from sq_stream.job.summary import summarize_gguf
    from sq_stream.job.verify import verify_file

    def read(data: bytes) -> None:
        path = _written("x.gguf", data)
        summary = summarize_gguf(path)
        tables.to_json(summary).encode()
        tables.summary_text(summary).encode()
        tables.checks_text(verify_file(path, max_ram=2**29)).encode()

    return Target("gguf", [_small_gguf()], mutate_gguf, read)


def evaluated() -> Target:
    """A GGUF file given to eval beside its reference, up to the weights of its first layer."""
    from sq_stream.evaluate.models import Reference, _checkpoint_model, open_model
    from sq_stream.formats.checkpoint import Checkpoint
    from sq_stream.text.vocabulary import Vocabulary

    references, seeds = {}, []
    for name in ("qwen3", "qwen35", "gemma3", "qwen2_yarn"):
        values, weights = _shrunk(name)
        folder = tiny_models.write_checkpoint(scratch() / f"reference-{name}", values, weights)
        opened = Checkpoint.open(folder)
        spec = gguf_files.describe(opened)
        tokens = gguf_files.placeholder_vocabulary(tiny_models.N_VOCAB)
        path = gguf_files.write_f32(scratch() / f"{name}.gguf", opened, spec, tiny_models.N_VOCAB)
        model = _checkpoint_model("ref", "reference", opened, spec)
        vocabulary = Vocabulary("gpt2", "default", tiny_models.N_VOCAB, tuple(tokens))
        references[spec.arch] = Reference(model, opened, spec, vocabulary)
        seeds.append(path.read_bytes())

    def read(data: bytes) -> None:
        path = _written("candidate.gguf", data)
        for arch, reference in references.items():
            if f"{arch}.block_count".encode() in data:
                with open_model(path, "x", "candidate", reference) as model:
                    model.decoder.layers[0]
                return

    return Target("eval", seeds, mutate_gguf, read)


def _shrunk(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """A tiny model made narrower, so that its file is small."""
    values = json.loads(json.dumps(tiny_models.MODELS[name].config))
    values |= {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1,
               "head_dim": 8, "query_pre_attn_scalar": 8}  # fmt: skip
    values |= {key: 4 for key in values if key.startswith("linear_") and key.endswith("_dim") and "conv" not in key}
    model = tiny_models.MODELS[name]
    return values, model.weights(tiny_models.Random(name), values, **model.options)


def imatrix() -> Target:
    """Importance matrices of both formats."""
    from sq_stream.calibrate.imatrix import export_imatrix, import_imatrix
    from sq_stream.calibrate.sketch import Sketch
    from sq_stream.calibrate.sketches import is_linear
    from sq_stream.formats.checkpoint import Checkpoint

    values, weights = _shrunk("qwen3")
    with Checkpoint.open(tiny_models.write_checkpoint(scratch() / "imatrix", values, weights)) as opened:
        spec = gguf_files.describe(opened)
    widths = {t.name: t.n_in for t in spec.tensors if is_linear(t.name, t.shape)}
    sketches = {name: Sketch.diagonal_only(np.full(n, 0.5, np.float32), 100) for name, n in widths.items()}
    path = scratch() / "seed.imatrix"
    export_imatrix(path, sketches, n_windows=2, n_ctx=50, datasets=["a"])
    legacy = struct.pack("<i", len(widths))
    for name, n in widths.items():
        legacy += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", 3, n) + np.ones(n, "<f4").tobytes()

    def read(data: bytes) -> None:
        dict(import_imatrix(_written("x.imatrix", data), spec))

    return Target("imatrix", [path.read_bytes(), legacy], mutate_gguf, read)


WIDTH = 12


def _factored(random: np.random.RandomState) -> Any:
    from sq_stream.calibrate.sketch import Factored

    diagonal = random.random_sample(WIDTH).astype(np.float32) + np.float32(0.1)
    diagonal[3] = 0
    factor = random.normal(size=(4, WIDTH - 1)).astype(np.float32)
    return Factored(100, diagonal, [factor[:, :6], factor[:, 6:]])


def sketch() -> Target:
    """The file of a site's second moment."""
    from sq_stream.calibrate.sketch import read_sketch, write_sketch

    path = scratch() / "seed.sketch"
    write_sketch(path, _factored(np.random.RandomState(1)))
    return Target("sketch", [path.read_bytes()], mutate_sketch, lambda data: read_sketch(_written("x.sketch", data)))


def entry() -> Target:
    """A calibration in the cache: its journal, with the sketches that it names."""
    from sq_stream.calibrate.store import Store, key_of

    identity, about = {"a": 1}, {"model": "m", "n_tokens": 5}
    store = Store(_fresh("store"))
    random = np.random.RandomState(2)
    with store.open(identity, about, 2) as opened:
        opened.finish_step({("blk.0.attn_q", "blk.0.attn_k"): _factored(random), ("blk.0.ffn_up",): _factored(random)})
        opened.finish_step({("output",): _factored(random)})
    folder = store.folder / key_of(identity)
    seed = (folder / "journal").read_bytes()
    kept = {path.name: path.read_bytes() for path in folder.glob("*.sketch")}

    def read(data: bytes) -> None:
        folder.mkdir(exist_ok=True)
        for name, content in kept.items():
            (folder / name).write_bytes(content)
        (folder / "journal").write_bytes(data)
        from sq_stream.cli import tables

        store.has(identity)
        tables.cache_text(store.folder, store.list()).encode()
        with store.open(identity, about, 2) as opened:
            for site in opened.sites:
                opened.load(site.linears)

    return Target("entry", [seed], mutate_lines, read)


def text() -> Target:
    """Files given as --calib and --text: the first byte of an input says which kind it is."""
    from sq_stream.calibrate.documents import read_files
    from sq_stream.text.files import read_text

    array = scratch() / "seed.npy"
    np.save(array, np.arange(40, dtype=np.int32).reshape(4, 10))
    seeds = [
        b"n" + array.read_bytes(),
        b"j[[1, 2, 3], [4, 5]]",
        b"t" + "Ein Satz.\n\nNoch einer, länger.\n".encode() * 50,
    ]

    def mutate(data: bytes, random: Random) -> bytes:
        kind, rest = data[:1], data[1:]
        return kind + (mutate_json if kind == b"j" else mutate_bytes)(rest, random)

    def read(data: bytes) -> None:
        suffix = {b"n": ".npy", b"j": ".json"}.get(data[:1], ".txt")
        path = _written(f"calib{suffix}", data[1:])
        read_files([path], 50)
        if suffix != ".npy":
            read_text(path)

    return Target("text", seeds, mutate, read)


def card() -> Target:
    """The model card and what else the gguf package reads for the general.* keys: {file: content}."""
    from sq_stream.job.identity import general_entries
    from sq_stream.job.settings import parse_settings

    front = "---\nlicense: apache-2.0\nlanguage:\n- en\n- no\ntags: [a, b]\nbase_model: org/name-7B\n"
    front += "datasets:\n- a/b\nmodel_name: X\n---\n# X\n"
    generation = {"temperature": 0.6, "top_k": 20, "top_p": 0.95}
    seed = {"README.md": front, "generation_config.json": generation, "config.json": {"_name_or_path": "org/x-1B"}}

    def mutate(data: bytes, random: Random) -> bytes:
        try:
            files = json.loads(data)
            name = random.choice(list(files))
            if isinstance(files[name], str):
                files[name] = mutate_bytes(files[name].encode(), random).decode("utf-8", "replace")
                return dumps(files)
        except (ValueError, TypeError, IndexError, RecursionError):
            pass
        return mutate_json(data, random)

    def read(data: bytes) -> None:
        try:
            files = json.loads(data)
        except (ValueError, RecursionError):
            files = {"README.md": data.decode("latin1")}
        folder = _fresh("Card-7B-Instruct")
        for name in ("README.md", "generation_config.json", "config.json"):
            value = files.get(name) if isinstance(files, dict) else None
            if value is not None:
                (folder / name).write_bytes(
                    value.encode("utf-8", "replace") if isinstance(value, str) else dumps(value)
                )
        settings = parse_settings(folder, scratch() / "out.gguf")
        lay_out(general_entries(settings, arch="llama", file_type=15, n_parameters=10**9), [])

    return Target("card", [dumps(seed)], mutate, read)


CONFIG = """\
[quantize]   # what plan and calibrate take too
max-ram = "1G"
threads = 1
effort = "fast"
tensor-type = ["ffn_down=q6_k", "attn=q8_0"]
pure = true
ctx = 0x80
calib = []
[plan]
json = true
[eval]
ref = "model"
[cache.list]
cache = '~/.cache'
"""
TOML_PARTS = (
    b"[[quantize]]", b"a.b.c = 1", b"{a = {b = 1}}", b"[" * 900, b"{a=" * 900, b"a." * 900, b"1979-05-27T07:32:00Z",
    b"99:99:99", b"0x" + b"f" * 9000, b"9" * 9000, b"inf", b"nan", b'"""', b"'''", b"\\ud800", b"\\u001b[31m",
    b"true", b"[1, 'a']", b"\n", b"=", b'"x"', b"config = 'y'", b"log-format = 'json'", b"[demo]\ntokens = 5",
)  # fmt: skip


def settings_file() -> Target:
    """sq-stream.toml, up to the settings of a job."""
    import click

    from sq_stream.cli import cli
    from sq_stream.cli.config import read_defaults
    from sq_stream.errors import UsageError
    from sq_stream.job.settings import Options, parse_settings

    def mutate(data: bytes, random: Random) -> bytes:
        if random.random() < 0.4:
            return mutate_bytes(data, random)
        tokens = re.split(rb"(\s+|[\[\]=,\"])", data)
        for _ in range(random.choice((1, 1, 2, 4))):
            part = random.choice(
                (random.choice(TOML_PARTS), random.choice(tokens), random.choice(WORDS).encode("utf-8", "replace"))
            )
            at = random.randrange(len(tokens))
            tokens[at : at + random.randrange(2)] = [part]
        return b"".join(tokens)

    def read(data: bytes) -> None:
        path = _written("sq-stream.toml", data)
        root = click.Context(cli, info_name="sq-stream")
        for name in ("quantize", "plan"):
            context = click.Context(cli.commands[name], root, info_name=name)
            try:
                found = read_defaults(context, path)
            except click.UsageError as error:
                raise UsageError(error.format_message()) from error
            options = {
                param.name: param.type_cast_value(context, found[param.name])
                for param in context.command.params
                if param.name in found
            }
            parse_settings("model", **{k: v for k, v in options.items() if k in Options.__annotations__})

    return Target("settings", [CONFIG.encode()], mutate, read)


MAKERS: dict[str, Callable[[], Target]] = {
    "safetensors": safetensors,
    "checkpoint": checkpoint,
    "config": config,
    "tokenizer": tokenizer,
    "sentencepiece": sentencepiece,
    "gguf": gguf_file,
    "eval": evaluated,
    "imatrix": imatrix,
    "sketch": sketch,
    "entry": entry,
    "text": text,
    "card": card,
    "settings": settings_file,
}
