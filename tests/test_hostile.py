"""Files made to do harm: what they are refused for, what they may not reach, what the package never does."""

from __future__ import annotations

import ast
import json
import os
import shutil
import stat
import struct
import subprocess
import sys
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import zstandard
from click.testing import CliRunner
from vocabularies import GOLDEN, folder_of, n_vocab_of

import sq_stream
from sq_stream import api, confined
from sq_stream.calibrate.documents import read_files
from sq_stream.calibrate.sketch import MAGIC, Factored, read_sketch, write_sketch
from sq_stream.calibrate.store import Store, key_of
from sq_stream.cli import cli
from sq_stream.cli.echo import printable
from sq_stream.demo import model_folder
from sq_stream.errors import BadInputError, DoesNotFitError, SqStreamError, UnsupportedModelError
from sq_stream.formats import gguf_read
from sq_stream.formats.blocks import F32
from sq_stream.formats.chunks import decompress
from sq_stream.formats.gguf_layout import lay_out
from sq_stream.formats.metadata import ValueType, array, string, u32
from sq_stream.formats.strict_json import MAX_DEPTH, MAX_VALUES, parse_object
from sq_stream.job.identity import read_card
from sq_stream.kernels import cache
from sq_stream.text import encode
from sq_stream.text.bpe import read_tokens
from sq_stream.text.encode import ConfinedTokenizer, Tokenizer
from sq_stream.text.tokenizer_json import parse_bpe
from sq_stream.text.vocabulary import read_vocabulary

PACKAGE = Path(sq_stream.__file__).parent
WHERE = Path("x.json")


# The package itself


def calls_and_imports(source: str) -> set[str]:
    """Dotted names of everything that is imported, called or named as an argument."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Call):
            names |= {ast.unparse(node.func), *(keyword.arg or "" for keyword in node.keywords)}
    return names


FORBIDDEN_MODULES = {
    "pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "torch", "transformers", "socket", "ssl",
    "urllib", "http", "ftplib", "requests", "huggingface_hub", "code", "codeop", "ctypes", "runpy", "xmlrpc",
}  # fmt: skip
# Of the C library that the process has already; nothing from a file gets there.
ALLOWED = {"allocator.py": {"ctypes", "ctypes.CDLL"}}
FORBIDDEN_CALLS = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "np.load",
    "numpy.load",
    "os.system",
    "os.popen",
    "yaml.load",
}
FORBIDDEN_KEYWORDS = {"allow_pickle", "trust_remote_code", "shell"}


def test_no_module_unpickles_runs_text_or_opens_connections() -> None:
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        names = calls_and_imports(path.read_text())
        modules = {name for name in names if name.partition(".")[0] in FORBIDDEN_MODULES}
        place = str(path.relative_to(PACKAGE))
        if bad := (modules | names & (FORBIDDEN_CALLS | FORBIDDEN_KEYWORDS)) - ALLOWED.get(place, set()):
            found[place] = bad
    assert len(list(PACKAGE.rglob("*.py"))) > 100
    assert found == {}


def test_the_check_itself_sees_what_it_is_for() -> None:
    source = "import pickle\nfrom urllib import request\nnp.load(f, allow_pickle=True)\neval('1')\n"
    assert {"pickle", "urllib.request", "np.load", "allow_pickle", "eval"} <= calls_and_imports(source)


OFFLINE = """
import os, sys

def refuse(event, args):
    if event.startswith(("socket.connect", "socket.bind", "socket.getaddrinfo", "socket.sendto", "urllib.", "http.")):
        raise SystemExit(f"the network was asked for: {event} {args}")
    if event == "exec" and "modeling_evil" in str(args):
        raise SystemExit(f"code of the checkpoint was run: {event} {args}")

os.umask(0o027)
sys.addaudithook(refuse)
from sq_stream.cli import main
main()
"""


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a whole job left in its folder, of a checkpoint with code and a pickle in it.

    It ran in a network namespace with nothing in it where that is allowed, and anywhere with every connection refused.
    """
    folder = tmp_path_factory.mktemp("job")
    model = Path(shutil.copytree(model_folder(), tmp_path_factory.mktemp("model") / "checkpoint"))
    (model / "modeling_evil.py").write_text("raise SystemExit('ran')")
    (model / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "modeling_evil.Model"}}))
    alone = ["unshare", "--net", "--map-root-user"]
    if not shutil.which("unshare") or subprocess.run([*alone, "true"], capture_output=True, check=False).returncode:
        alone = []
    command = [*alone, sys.executable, "-c", OFFLINE, "quantize", str(model), "-o", "x.gguf", "--report", "r.json"]
    command += ["--windows", "2", "--ctx", "64", "--cache", "cache", "--threads", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "anew" not in done.stderr
    return folder


def test_a_whole_job_needs_no_network_and_runs_no_code_of_the_checkpoint(job: Path) -> None:
    assert api.inspect(job / "x.gguf").tensors


def test_files_have_ordinary_permissions(job: Path) -> None:
    """What a job leaves, and its cache, as the umask says: nobody else can write, and nothing can be executed."""
    paths = list(job.rglob("*"))
    files = {str(path.relative_to(job)): stat.S_IMODE(path.stat().st_mode) for path in paths if path.is_file()}
    assert {"x.gguf", "r.json"} < files.keys()
    assert any(name.endswith(".sketch") for name in files)
    assert set(files.values()) == {0o640}
    assert {stat.S_IMODE(path.stat().st_mode) for path in paths if path.is_dir()} == {0o750}


@pytest.mark.parametrize("mode", [0o700, 0o755, 0o777, 0o775])
def test_kernels_are_kept_only_where_nobody_else_can_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: int
) -> None:
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    name = cache.cache_folder.__wrapped__().name
    assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o700
    (tmp_path / name).chmod(mode)
    assert (cache.cache_folder.__wrapped__().parent == tmp_path) == (mode in (0o700, 0o755))


def test_a_link_is_no_folder_for_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "named"))
    name = cache.cache_folder.__wrapped__().name
    shutil.rmtree(tmp_path / "named" / name)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "named" / name).symlink_to(tmp_path / "elsewhere")
    assert cache.cache_folder.__wrapped__().parent != tmp_path / "named"


# JSON


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'{"a":' + b"[" * (MAX_DEPTH + 5) + b"]" * (MAX_DEPTH + 5) + b"}", "levels deep"),
        (b'{"a":' + b'{"]":' * 200 + b"1" + b"}" * 201, "levels deep"),
        (b'{"a":[' + b"[]," * MAX_VALUES + b"[]]}", "values; at most"),
        (b'{"a": "\\ud800"}', "surrogate"),
        (b'{"a": 1' + b"0" * 5000 + b"}", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        ('{"a": "é"}'.encode("utf-16"), "not valid JSON"),
    ],
)
def test_json_that_is_no_file_of_a_checkpoint_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(BadInputError, match=message) as caught:
        parse_object(data, WHERE)
    assert len(str(caught.value)) < 400


def test_brackets_and_escapes_in_strings_are_no_depth() -> None:
    deep = {"[" * 500: '\\"[[[' * 500, "a": ["\U0001f600 \\ud800"]}
    assert parse_object(json.dumps(deep).encode(), WHERE) == deep


def test_json_takes_no_more_memory_than_its_limits_say() -> None:
    data = b'{"a":[' + b"{}," * (MAX_VALUES // 2 - 10) + b"{}]}"
    tracemalloc.start()
    parse_object(data, WHERE)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**27


# Folders


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_models.write("llama", tmp_path / "model")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_pipe_in_a_checkpoint_is_not_waited_for(folder: Path, name: str) -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(BadInputError, match="a pipe or a device"):
        api.inspect(folder)


@pytest.mark.parametrize("name", ["x.gguf", "x.txt", "x.json"])
def test_a_device_is_not_read_for_ever(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.symlink_to("/dev/zero")
    with pytest.raises(SqStreamError, match="a pipe or a device"):
        api.inspect(path) if name == "x.gguf" else read_files([path], 10)


def test_a_config_that_is_endless_is_not_read(folder: Path) -> None:
    os.truncate(folder / "config.json", 2**40)
    with pytest.raises(BadInputError, match="larger than"):
        api.inspect(folder)


def test_a_thousand_missing_shards_are_told_in_one_line(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-99999.safetensors")
    with pytest.raises(BadInputError, match=r"lacks 99998 weight files: .*, …") as caught:
        api.inspect(folder)
    assert len(str(caught.value)) < 600


def test_dimensions_whose_product_no_float_holds_are_refused(folder: Path) -> None:
    header = json.dumps({"a": {"dtype": "F4", "shape": [2**62 + 1] * 63, "data_offsets": [0, 8]}}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    with pytest.raises(BadInputError, match="needs"):
        api.inspect(folder)


def test_an_architecture_of_a_million_characters_is_refused_at_once(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["x" * 10**6]}))
    with pytest.raises(UnsupportedModelError) as caught:
        api.inspect(folder)
    assert len(str(caught.value)) < 600


# GGUF files


def write_gguf(path: Path, entries: list[Any], tensors: list[tuple[str, tuple[int, ...]]]) -> Path:
    layout = lay_out(entries, [(name, shape, F32) for name, shape in tensors])
    path.write_bytes(layout.header)
    os.truncate(path, layout.total_bytes)
    return path


def test_names_do_nothing_to_the_terminal(tmp_path: Path) -> None:
    entries = [string("general.name", "\x1b]0;owned\x07"), string("\x9b31m", "x")]
    path = write_gguf(tmp_path / "x.gguf", entries, [("a\x1b[2J\u202eb", (4,))])
    for command in (["inspect"], ["inspect", "--json"], ["verify"], ["verify", "--json"]):
        result = CliRunner().invoke(cli, [*command, str(path)])
        assert result.exit_code == 0, result.output
        assert printable(result.output) == result.output
        if "--json" in command:
            json.loads(result.stdout)


def test_a_row_larger_than_the_memory_is_refused(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "x.gguf", [], [("a", (1, 2**36))])
    with pytest.raises(DoesNotFitError, match="the smallest that works is"):
        api.verify(path, max_ram="512M")


def test_a_tensor_without_values_is_verified(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "x.gguf", [], [("a", (3, 0)), ("b", (0, 8))])
    assert [check.n_bytes for check in api.verify(path)] == [0, 0]


def test_a_header_does_not_fill_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by many arrays that are each within bounds, either."""
    monkeypatch.setattr(gguf_read, "MAX_HEADER_BYTES", 2**16)
    kept = [array(f"k{i}", ValueType.UINT8, bytes(2**13)) for i in range(9)]
    path = write_gguf(tmp_path / "x.gguf", kept, [])
    with pytest.raises(BadInputError, match="of a header are read"):
        api.inspect(path)


# The cache


def factored() -> Factored:
    return Factored(7, np.ones(8, np.float32), [np.ones((8, 8), np.float32)])


def rewrite_header(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    head, rest = path.read_bytes()[len(MAGIC) :].split(b"\n", 1)
    header = json.loads(head[9:])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(MAGIC + b"%08x %s\n" % (zlib.crc32(text), text) + rest)


@pytest.mark.parametrize(
    "change",
    [
        lambda h: h.update(n_in=2**19, panels=[[8, 2**19]]),
        lambda h: h.update(n_in=2**40),
        lambda h: h.update(n_in=2**16, rank=2**16, panels=[[2**16, 8]]),
        lambda h: h.update(n_tokens="x"),
        lambda h: h.update(panels=[[8, 8, 8]]),
    ],
)
def test_a_sketch_takes_no_more_memory_than_its_frames_hold(tmp_path: Path, change: Callable[[Any], Any]) -> None:
    path = tmp_path / "x.sketch"
    write_sketch(path, factored())
    rewrite_header(path, change)
    tracemalloc.start()
    with pytest.raises(BadInputError):
        read_sketch(path, (8, 8))
    with pytest.raises(BadInputError):
        read_sketch(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**22


def test_a_frame_that_says_it_is_endless_is_refused() -> None:
    frame = zstandard.ZstdCompressor().compress(bytes(2**26))
    with pytest.raises(BadInputError, match="64 are expected"):
        decompress(zlib.crc32(frame).to_bytes(4, "little") + frame, np.uint8, (64,), "x")


@pytest.mark.parametrize("linear", ["../../outside", "/etc/passwd", "", "a/b", "a\0", 5, ".."])
def test_a_journal_names_no_files_outside_its_folder(tmp_path: Path, linear: Any) -> None:
    """Neither is such a file read, nor is the calibration used."""
    store, identity, about = Store(tmp_path / "store"), {"a": 1}, {"model": "m", "n_tokens": 3}
    with store.open(identity, about, 1) as entry:
        entry.finish_step({("blk.0.attn_q",): factored()})
    journal = store.folder / key_of(identity) / "journal"
    crc = write_sketch(tmp_path / "store" / "outside.sketch", factored())
    records = [json.loads(line[9:]) for line in journal.read_bytes().splitlines()]
    records[1]["sites"][0] |= {"linears": [linear], "crc32": crc}
    texts = [json.dumps(record).encode() for record in records]
    journal.write_bytes(b"".join(b"%08x %s\n" % (zlib.crc32(text), text) for text in texts))
    notes: list[Any] = []
    with store.open(identity, about, 1, notes.append) as entry:
        assert entry.done == 0
    assert "calibrating anew" in notes[0].text


def test_statistics_of_other_sizes_are_refused(tmp_path: Path) -> None:
    store, identity, about = Store(tmp_path), {"a": 1}, {"model": "m", "n_tokens": 3}
    with store.open(identity, about, 1) as entry:
        entry.finish_step({("blk.0.attn_q",): factored()})
        with pytest.raises(BadInputError, match="of another site"):
            entry.load(("blk.0.attn_q",), (8, 16))
        with pytest.raises(BadInputError, match="of another site"):
            entry.load(("blk.0.attn_q",), (4, 8))


# Tokenizers


def spoilt(tmp_path: Path, change: Callable[[dict[str, Any]], Any], name: str = "qwen2") -> Path:
    copy = Path(shutil.copytree(folder_of(name, tmp_path), tmp_path / "spoilt"))
    definition = json.loads((copy / "tokenizer.json").read_text())
    change(definition)
    (copy / "tokenizer.json").write_text(json.dumps(definition))
    return copy


def doubled(n: int) -> dict[str, Any]:
    step = {"type": "Replace", "pattern": {"String": "l"}, "content": "ll"}
    return {"type": "Sequence", "normalizers": [step] * n}


SLOW = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}


def test_a_tokenizer_that_fills_the_memory_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "MEMORY", 2**29)
    copy = spoilt(tmp_path, lambda t: t.update(normalizer=doubled(60)))
    with pytest.raises(BadInputError, match=r"its tokenizer failed on the text|cannot work with it"):
        ConfinedTokenizer(copy).encode_all(["hello"])


def test_a_tokenizer_that_takes_for_ever_is_stopped(tmp_path: Path) -> None:
    copy = spoilt(tmp_path, lambda t: t.update(pre_tokenizer=SLOW))
    with pytest.raises(BadInputError, match=r"retry-limit|its tokenizer failed"):
        ConfinedTokenizer(copy).encode_all(["a" * 40 + "b"])


def test_a_panic_of_the_library_is_an_error_of_ours(tmp_path: Path) -> None:
    copy = spoilt(tmp_path, lambda t: t.update(pre_tokenizer=SLOW))
    with pytest.raises(BadInputError, match="cannot work with it"):
        Tokenizer.open(copy).encode("a" * 40 + "b")


@pytest.mark.parametrize("name", ["qwen2", "llama-spm"])
def test_a_confined_tokenizer_gives_the_same_ids(tmp_path: Path, name: str) -> None:
    copy, texts = folder_of(name, tmp_path), ["Hello, world!", "", "Grüße 日本\n"]
    for ids, expected in zip(
        ConfinedTokenizer(copy).encode_all(texts), Tokenizer.open(copy).encode_all(texts), strict=True
    ):
        np.testing.assert_array_equal(ids, expected)


def test_errors_of_a_confined_tokenizer_are_its_own(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match=r"no tokenizer\.json and no SentencePiece"):
        ConfinedTokenizer(tmp_path).encode_all(["x"])


@pytest.mark.parametrize(
    ("function", "reason"),
    [("write", "File too large"), ("fill", "MemoryError"), ("spin", "it was stopped"), ("abort", "it was stopped")],
)
def test_what_a_confined_process_does_it_bears_itself(tmp_path: Path, function: str, reason: str) -> None:
    path = tmp_path / "written"
    with pytest.raises(confined.FailedError, match=reason):
        confined.call(f"confined_functions:{function}", str(path).encode(), memory=2**28, cpu_seconds=1)
    assert not path.exists() or path.stat().st_size == 0


def test_a_confined_process_answers() -> None:
    assert confined.call("confined_functions:answer", b"abc", memory=2**28, cpu_seconds=10) == b"cba"


def test_the_empty_token_has_no_id_beyond_the_model(tmp_path: Path) -> None:
    copy = spoilt(tmp_path, lambda t: t["model"]["vocab"].update({"": 10**9}))
    with pytest.raises(BadInputError, match="has id 1000000000, but the model"):
        read_vocabulary(copy, arch="qwen2", n_vocab=n_vocab_of(GOLDEN / "qwen2"))


def test_a_token_of_a_million_characters_is_refused_at_once(tmp_path: Path) -> None:
    copy = spoilt(tmp_path, lambda t: t["model"]["vocab"].update({"a" * 10**6: 400}), "llama-json")
    with pytest.raises(BadInputError, match="a token has 1000000 characters"):
        read_vocabulary(copy, arch="llama", n_vocab=10**4)


def test_long_arrays_are_shown_without_making_lists_of_them(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "x.gguf", [array("a", ValueType.UINT8, bytes(2**20))], [])
    tracemalloc.start()
    summary = api.inspect(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert summary.metadata["a"] == {"length": 2**20, "first": [0] * 6}  # type: ignore[union-attr]
    assert peak < 2**22


def test_an_id_of_five_thousand_digits_is_refused(tmp_path: Path) -> None:
    copy = spoilt(tmp_path, lambda t: None)
    (copy / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": {"9" * 5000: {"content": "x"}}}))
    with pytest.raises(BadInputError, match="needs a text and an id"):
        read_vocabulary(copy, arch="qwen2", n_vocab=10**4)


def test_a_decoder_that_is_not_byte_level_is_refused(tmp_path: Path) -> None:
    step = {"type": "Replace", "pattern": {"String": "l"}, "content": "ll"}
    copy = spoilt(tmp_path, lambda t: t.update(decoder={"type": "Sequence", "decoders": [step] * 60}))
    definition = json.loads((copy / "tokenizer.json").read_text())
    with pytest.raises(UnsupportedModelError, match="the decoder of byte-level BPE is ByteLevel"):
        read_tokens(parse_bpe(definition, {}), 10**4)


# Model cards and texts


@pytest.mark.parametrize(
    "front",
    [
        "a: &a [x,x,x]\nb: &b [*a,*a,*a]\ntags: *b\n",
        "[" * 5000,
        "tags: [a\n",
        "x: !!python/object/apply:os.system ['true']\n",
        "\x00",
        "license: 2020-99-99\n",
        "x: 0x\n",
    ],
)
def test_a_card_that_is_no_plain_yaml_says_nothing(tmp_path: Path, front: str) -> None:
    (tmp_path / "README.md").write_text(f"---\n{front}---\n")
    assert read_card(tmp_path / "README.md") in ({}, {"license": "2020-99-99"}, {"x": "0x"})


def test_a_card_with_fields_of_wrong_types_leaves_a_file_that_can_be_written(tmp_path: Path) -> None:
    folder = tiny_models.write("llama", tmp_path / "Tiny-1B")
    (folder / "README.md").write_text("---\ntags: [1, [2], {a: b}]\nlicense: {a: [b]}\nbase_model: [[1], {}]\n---\n")
    (folder / "generation_config.json").write_text('{"top_k": "x", "temperature": 1e308, "top_p": [1]}')
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model_folder() / file, folder / file)
    from sq_stream.job.identity import general_entries
    from sq_stream.job.settings import parse_settings

    settings = parse_settings(folder, tmp_path / "x.gguf")
    entries = general_entries(settings, arch="llama", file_type=15, n_parameters=10**9)
    lay_out(entries, [])
    assert {"general.name", "general.architecture"} <= {entry.key for entry in entries}


def test_an_array_of_countless_empty_rows_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    header = b"{'descr': '<i4', 'fortran_order': False, 'shape': (1099511627776, 0), }"
    header += b" " * (-(len(header) + 11) % 64) + b"\n"
    path.write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header)
    with pytest.raises(BadInputError, match="not a list or array of token ids"):
        read_files([path], 10)


def test_a_million_lists_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text("[" + "[1]," * 10**6 + "[1]]")
    with pytest.raises(BadInputError, match="lists"):
        read_files([path], 10)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (u32("llama.block_count", 2**32 - 1), "not usable|layers"),
        (u32("llama.attention.key_length", 7), "other sizes"),
        (array("llama.attention.layer_norm_rms_epsilon", ValueType.FLOAT32, [1.0]), "other sizes|not usable"),
        (string("llama.rope.freq_base", "x"), "not usable"),
        (u32("llama.rope.dimension_count", 2**20), "other sizes"),
        (u32("tokenizer.ggml.tokens", 5), "tokens are no strings"),
        (u32("sq_stream.calib.shingles", 5), "not sorted numbers"),
    ],
)
def test_keys_that_would_break_a_forward_pass_are_refused(tmp_path: Path, entry: Any, message: str) -> None:
    import gguf_files

    from sq_stream.evaluate.models import Reference, _checkpoint_model, open_model
    from sq_stream.formats.checkpoint import Checkpoint
    from sq_stream.formats.gguf_read import GGUFReader
    from sq_stream.text.vocabulary import Vocabulary

    with Checkpoint.open(tiny_models.write("mistral", tmp_path / "mistral")) as checkpoint:
        spec = gguf_files.describe(checkpoint)
        path = gguf_files.write_f32(tmp_path / "x.gguf", checkpoint, spec, tiny_models.N_VOCAB)
        tokens = tuple(gguf_files.placeholder_vocabulary(tiny_models.N_VOCAB))
        vocabulary = Vocabulary("gpt2", "default", tiny_models.N_VOCAB, tokens)
        reference = Reference(_checkpoint_model("ref", "reference", checkpoint, spec), checkpoint, spec, vocabulary)
        open_model(path, "x", "candidate", reference).close()
        with GGUFReader.open(path) as reader:
            entries = {**reader.metadata, entry.key: entry}
            tensors = [(t.name, t.shape, t.block_type) for t in reader.tensors.values()]
            body = path.read_bytes()[reader.data_offset :]
        path.write_bytes(lay_out(list(entries.values()), tensors).header + body)
        with pytest.raises(BadInputError, match=message):
            open_model(path, "x", "candidate", reference)
