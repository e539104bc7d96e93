"""Calibration text: three parts without common documents or passages, the same each time, and clear errors."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zstandard
from vocabularies import folder_of, n_vocab_of

from sq_stream.calibrate.corpus import MAX_REPEATED, MIX, PARTS, WINDOWS, Corpus, bos_id, build_corpus
from sq_stream.calibrate.documents import GIVEN, MAX_FILE, Document, packaged, read_files, split
from sq_stream.calibrate.shingles import SHINGLE, shingles
from sq_stream.errors import BadInputError, StorageError, UsageError
from sq_stream.formats.metadata import boolean, u32
from sq_stream.text.encode import Tokenizer
from sq_stream.text.vocabulary import Vocabulary, read_vocabulary

Model = tuple[Tokenizer, Vocabulary]
ROOT = Path(__file__).parents[1]


def opened(name: str, scratch: Path) -> Model:
    folder = folder_of(name, scratch)
    arch = "gemma3" if name == "gemma" else "llama"
    return Tokenizer.open(folder), read_vocabulary(folder, arch=arch, n_vocab=n_vocab_of(folder))


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return opened("smollm2", tmp_path_factory.mktemp("smollm2"))


@pytest.fixture(scope="module")
def shipped(smollm2: Model) -> Corpus:
    return build_corpus(*smollm2)


def parts_of(corpus: Corpus) -> list[np.ndarray]:
    return [getattr(corpus, name) for name in PARTS]


def documents_of(corpus: Corpus, part: str) -> list[str]:
    return [corpus.document_ids[i] for i in getattr(corpus, f"{part}_documents")]


def grams(windows: np.ndarray) -> list[set[bytes]]:
    """Of each window its runs of `SHINGLE` tokens."""
    return [{row[i : i + SHINGLE].tobytes() for i in range(len(row) - SHINGLE + 1)} for row in windows]


def assert_no_passage_twice(corpus: Corpus) -> None:
    parts = [grams(part) for part in parts_of(corpus)]
    for i, part in enumerate(parts):
        elsewhere = set().union(*(window for j, other in enumerate(parts) if j > i for window in other))
        for window in part:
            assert len(window & elsewhere) <= MAX_REPEATED * len(window)


def test_the_packaged_text_fills_all_windows(shipped: Corpus) -> None:
    assert [part.shape for part in parts_of(shipped)] == [(n, 512) for n in WINDOWS]
    assert all(part.dtype == np.int32 for part in parts_of(shipped))
    assert not [note for note in shipped.notes if "not 360/60/120" in note]
    kinds = {document.id: document.kind for document in packaged()}
    for part, n in zip(PARTS, WINDOWS, strict=True):
        counts = Counter(kinds[name] for name in documents_of(shipped, part))
        for kind, share in MIX.items():
            assert kind == GIVEN or counts[kind] >= 0.8 * n * share / 100


def test_parts_share_no_document_and_no_passage(shipped: Corpus) -> None:
    sets = [set(documents_of(shipped, part)) for part in PARTS]
    assert sum(map(len, sets)) == len(set().union(*sets))
    assert_no_passage_twice(shipped)


def test_the_first_windows_are_mixed_like_all(shipped: Corpus) -> None:
    kinds = {document.id: document.kind for document in packaged()}
    first = Counter(kinds[name] for name in documents_of(shipped, "calib")[:40])
    assert all(abs(first[kind] - 0.4 * share) <= 2 for kind, share in MIX.items() if kind != GIVEN)


def test_windows_are_the_text_of_their_documents(shipped: Corpus, smollm2: Model) -> None:
    texts = {document.id: document.text for document in packaged()}
    for row, name in zip(shipped.heldout, documents_of(shipped, "heldout"), strict=True):
        if texts[name] and texts[name].isascii():
            text = smollm2[0].decode(row.tolist())
            pieces = [text[i : i + 40] for i in range(0, len(text), 40)]
            assert sum(piece in texts[name] for piece in pieces) > 0.3 * len(pieces), name


def test_dialogues_hold_the_special_tokens(shipped: Corpus, smollm2: Model) -> None:
    start = smollm2[0].encode("<|im_start|>", special=False)
    assert len(start) == 1
    named = documents_of(shipped, "calib")
    dialogues = np.array(["dialogue/" in name for name in named])
    assert dialogues.sum() > 30
    assert (shipped.calib[dialogues] == start[0]).any(axis=1).mean() > 0.9
    assert not (shipped.calib[~dialogues] == start[0]).any()


def test_the_same_again(shipped: Corpus, smollm2: Model) -> None:
    again = build_corpus(*smollm2)
    assert again.digests == shipped.digests
    assert len(set(shipped.digests.values())) == 3
    assert again.document_ids == shipped.document_ids
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in again.digests.values())


def test_fewer_windows_are_drawn_from_the_same_parts(shipped: Corpus, smollm2: Model) -> None:
    small = build_corpus(*smollm2, windows=(32, 8, 8), ctx=256)
    assert [part.shape for part in parts_of(small)] == [(32, 256), (8, 256), (8, 256)]
    homes = {name: part for part, members in zip(PARTS, split(packaged()), strict=True) for name in map(id_of, members)}
    for part in PARTS:
        assert {homes[name] for name in documents_of(small, part) + documents_of(shipped, part)} == {part}


def id_of(document: Document) -> str:
    return document.id


def test_each_kind_is_split_by_shares() -> None:
    parts = split(packaged())
    for kind in MIX:
        sizes = [sum(document.size for document in part if document.kind == kind) for part in parts]
        if kind != GIVEN:
            assert np.allclose(np.array(sizes) / sum(sizes), [6 / 9, 1 / 9, 2 / 9], atol=0.06), kind


@pytest.mark.parametrize("name", ["gemma", "llama-bpe"])
def test_small_vocabularies(name: str, tmp_path: Path) -> None:
    tokenizer, vocabulary = opened(name, tmp_path)
    corpus = build_corpus(tokenizer, vocabulary, windows=(60, 10, 20))
    assert [len(part) for part in parts_of(corpus)] == [60, 10, 20]
    assert all(part.min() >= 0 and part.max() < vocabulary.n_tokens for part in parts_of(corpus))
    first = bos_id(vocabulary)
    if first is not None:
        assert all((part[:, 0] == first).all() for part in parts_of(corpus))
        assert all((part[:, 1] != first).all() for part in parts_of(corpus))
    assert_no_passage_twice(corpus)


def test_bos_is_put_before_each_window_where_llama_cpp_does(smollm2: Model) -> None:
    tokenizer, vocabulary = smollm2
    assert bos_id(vocabulary) is None  # the converter says so for this vocabulary
    kept = tuple(entry for entry in vocabulary.metadata if "bos" not in entry.key)
    added = (boolean("tokenizer.ggml.add_bos_token", True), u32("tokenizer.ggml.bos_token_id", 7))
    changed = replace(vocabulary, metadata=(*kept, *added))
    corpus = build_corpus(tokenizer, changed, ctx=64, windows=(4, 4, 4))
    for part in parts_of(corpus):
        assert part.shape == (4, 64)
        assert (part[:, 0] == 7).all()


def prose(n_words: int, seed: int) -> str:
    rng = np.random.default_rng(seed)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    words = ["".join(rng.choice(letters, rng.integers(2, 9))) for _ in range(n_words)]
    return "\n\n".join(" ".join(words[i : i + 60]) for i in range(0, n_words, 60))


def test_files_replace_or_extend(smollm2: Model, tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text("\ufeff" + prose(12_000, 1), "utf-8")
    alone = build_corpus(*smollm2, files=[path], windows=(24, 4, 8))
    assert {name.split("/")[0] for name in alone.document_ids} == {"mine.txt"}
    assert [len(part) for part in parts_of(alone)] == [24, 4, 8]
    both = build_corpus(*smollm2, files=[path], extend=True, windows=(24, 4, 8))
    for part, n in zip(PARTS, (24, 4, 8), strict=True):
        mine = sum(name.startswith("mine.txt") for name in documents_of(both, part))
        assert abs(mine - n / 2) <= 1
    assert not set(documents_of(alone, "calib")) & set(documents_of(both, "heldout"))


def test_a_short_text_gives_fewer_windows_and_says_so(smollm2: Model, tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text(prose(4000, 2), "utf-8")
    corpus = build_corpus(*smollm2, files=[path])
    counts = [len(part) for part in parts_of(corpus)]
    assert all(0 < count < n for count, n in zip(counts, WINDOWS, strict=True))
    assert corpus.notes == (
        f"the calibration text makes {'/'.join(map(str, counts))} windows of 512 tokens, not 360/60/120",
    )


@pytest.mark.parametrize("suffix", ["npy", "json"])
@pytest.mark.parametrize("rows", [1, 12])
def test_token_ids(suffix: str, rows: int, smollm2: Model, tmp_path: Path) -> None:
    ids = np.random.default_rng(3).integers(0, 49152, (rows, 24_000 // rows)).astype(np.uint16)
    path = tmp_path / f"ids.{suffix}"
    value = ids if rows > 1 else ids[0]
    np.save(path, value) if suffix == "npy" else path.write_text(json.dumps(value.tolist()), "utf-8")
    corpus = build_corpus(*smollm2, files=[path], windows=(12, 2, 4))
    text = [row.tobytes() for row in ids.astype(np.int32)]
    for window in corpus.heldout:
        pieces = [window[i : i + 64].tobytes() for i in range(0, 512, 64)]
        assert sum(any(piece in row for row in text) for piece in pieces) >= 7


def test_passages_that_return_in_another_part_are_left_out(smollm2: Model, tmp_path: Path) -> None:
    """A second file that repeats the first, shifted, with one word in forty changed."""
    text = prose(20_000, 4)
    words = text.split(" ")[100:15_000]
    words[::40] = ["changed"] * len(words[::40])
    (tmp_path / "a.txt").write_text(text, "utf-8")
    (tmp_path / "b.txt").write_text(" ".join(words), "utf-8")
    corpus = build_corpus(*smollm2, files=[tmp_path / "a.txt", tmp_path / "b.txt"], windows=(40, 4, 8))
    assert_no_passage_twice(corpus)
    assert [note for note in corpus.notes if "repeat text of another part" in note]


def test_equal_documents_are_taken_once(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(prose(3000, 5), "utf-8")
    assert {document.id.split("/")[0] for document in read_files([tmp_path / "a.txt", tmp_path / "b.txt"], 9)} == {
        "b.txt"
    }


def test_pieces_are_the_whole_text(tmp_path: Path) -> None:
    texts = [prose(6000, 6), "x" * 20_000, "line\n" * 5000, "a b\n\n\nc" * 3000, "one\n"]
    for text in texts:
        (tmp_path / "text").write_text(text, "utf-8")
        pieces = [document.text for document in read_files([tmp_path / "text"], 9)]
        assert len(set(pieces)) == len(pieces)
        assert all(len(piece) <= 6003 and piece in text for piece in pieces)
        if text is texts[0]:
            assert "".join(pieces) == text


def npy_header(n: int) -> bytes:
    """A file of int32 that says it has `n`, and has 25."""
    header = f"{{'descr': '<i4', 'fortran_order': False, 'shape': ({n},), }}".encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(100)


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("a.txt", b"", BadInputError, "0 bytes and no text"),
        ("a.txt", b" \n\n\t ", BadInputError, "5 bytes and no text"),
        ("a.txt", b"\xff\xfe\x00", BadInputError, "not UTF-8"),
        ("a.txt", b"A sentence.", BadInputError, r"4 tokens make 0/0/0 windows of 512 .* give more text \(about 5120"),
        ("a.txt", b"so it goes. " * 4000, BadInputError, "repeat another part's text: too short"),
        ("a.txt", b"x" * (MAX_FILE + 1), BadInputError, f"{MAX_FILE + 1} bytes; at most {MAX_FILE}"),
        ("a.json", b"[1, 2, 49152]", BadInputError, r"token id 49152 \(row 0, position 2\) is outside .* 0 to 49151"),
        ("a.json", b"[[1], [2, -1]]", BadInputError, r"token id -1 \(row 1, position 1\)"),
        ("a.json", b"[1, true]", BadInputError, "needs a list of integers"),
        ("a.json", b"[1, 2.0]", BadInputError, "needs a list of integers"),
        ("a.json", b'{"ids": [1]}', BadInputError, "needs a list of integers"),
        ("a.json", b"[1, [2]]", BadInputError, "needs a list of integers"),
        ("a.json", b"[99999999999999999999999]", BadInputError, "not a list or array of token ids"),
        ("a.json", b"[1, 2", BadInputError, "not a list or array of token ids"),
        ("a.json", b"[" * 100_000, BadInputError, "not a list or array of token ids"),
        ("a.json", b"[]", BadInputError, "holds no token ids"),
        ("a.json", b"[1, 2, 3]", BadInputError, "3 tokens make 0/0/0 windows"),
        ("a.npy", b"", BadInputError, "not a list or array of token ids"),
        ("a.npy", b"\x93NUMPY\x01\x00garbage", BadInputError, "not a list or array of token ids"),
        ("a.npy", b"PK\x03\x04 is not an archive", BadInputError, "not a list or array of token ids"),
        ("a.npy", npy_header(10**12), BadInputError, "not a list or array of token ids"),
        ("a.npy", npy_header(10**30), BadInputError, "not a list or array of token ids"),
        ("a.npy", npy_header(-5), BadInputError, "not a list or array of token ids"),
        ("missing.txt", None, UsageError, "no such calibration file"),
        (".", None, StorageError, "give the name of a file"),
    ],
)
def test_errors(
    name: str, content: bytes | None, error: type[Exception], message: str, smollm2: Model, tmp_path: Path
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(error, match=message) as caught:
        build_corpus(*smollm2, files=[path])
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "array",
    [np.ones((2, 2, 2), np.int32), np.ones(4, np.float32), np.array([1, "x"], object), np.array(5), np.ones(3, bool)],
    ids=["three dimensions", "floats", "objects", "no dimension", "booleans"],
)
def test_arrays_that_hold_no_token_ids(array: np.ndarray, tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", array, allow_pickle=True)
    with pytest.raises(BadInputError, match="not a list or array of token ids"):
        read_files([tmp_path / "ids.npy"], 100)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ctx": 63}, "--ctx 63: a window has 64 to 1048576 tokens"),
        ({"ctx": 10**30}, "--ctx 10+: a window has 64 to 1048576 tokens"),
        ({"windows": (10, 0, 3)}, "--windows 0: at least one window"),
    ],
)
def test_settings_that_are_too_small_or_too_large(options: dict[str, object], message: str, smollm2: Model) -> None:
    with pytest.raises(UsageError, match=message):
        build_corpus(*smollm2, **options)  # type: ignore[arg-type]


def test_a_tokenizer_of_another_model(smollm2: Model, tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match=r"token id 491\d\d, but the model's vocabulary ends at 8999"):
        build_corpus(smollm2[0], replace(smollm2[1], n_tokens=9000))


def test_packaged_documents_hold_no_special_tokens_of_others() -> None:
    for document in packaged():
        text = document.text + "".join(message["content"] for message in document.messages)
        assert not re.search(r"<\|[^|\n]*\|>|</?s>|<[be]os>|<(?:start|end)_of_turn>|\[/?INST\]", text), document.id


def test_each_source_is_listed() -> None:
    text = ROOT / "sq_stream" / "calibrate" / "text"
    sources = (text / "SOURCES.md").read_text("utf-8")
    listed = tuple(re.findall(r"`([\w./-]+[/-])`", sources))
    assert len(listed) >= 12
    assert not [document.id for document in packaged() if not document.id.startswith(listed)]
    raw = zstandard.ZstdDecompressor().decompress((text / "documents.jsonl.zst").read_bytes())
    assert 1_000_000 < len(raw) < 2_000_000


def test_the_wheel_holds_text_and_licences(tmp_path: Path) -> None:
    builder = pytest.importorskip("hatchling.builders.wheel")
    import zipfile

    wheel = next(iter(builder.WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])))
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {
        f"sq_stream/calibrate/text/{name}" for name in ("documents.jsonl.zst", "SOURCES.md", "LICENSES.txt")
    } <= names


def test_shingles_tell_windows_apart() -> None:
    tokens = np.random.default_rng(0).integers(0, 50_000, (3, 100)).astype(np.int32)
    tokens[2, 10:80] = tokens[0, 20:90]
    hashes = shingles(tokens)
    assert hashes.shape == (3, 100 - SHINGLE + 1)
    assert np.array_equal(hashes[2, 10 : 80 - SHINGLE + 1], hashes[0, 20 : 90 - SHINGLE + 1])
    assert not np.isin(hashes[1], hashes[0]).any()
