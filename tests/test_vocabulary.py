"""Vocabulary metadata: equal to what llama.cpp's converter writes, and clear errors for what cannot be used."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from golden.make_vocabularies import describe
from vocabularies import ARCHITECTURES, BYTE_LEVEL, GOLDEN, NAMES, folder_of, n_vocab_of

from sq_stream.errors import BadInputError, SqStreamError, UnsupportedModelError, UsageError
from sq_stream.text.vocabulary import Vocabulary, read_vocabulary


def read(folder: Path, name: str, **options: Any) -> Vocabulary:
    """The vocabulary of a golden tokenizer's folder, or of a changed copy of it."""
    options.setdefault("arch", ARCHITECTURES.get(name, "llama"))
    if "n_vocab" not in options:
        options["n_vocab"] = n_vocab_of(folder)
    return read_vocabulary(folder, **options)


def as_written(vocabulary: Vocabulary) -> dict[str, Any]:
    return {
        entry.key: describe(entry.type.name, entry.value, entry.element and entry.element.name)
        for entry in vocabulary.metadata
    }


@pytest.mark.parametrize("name", NAMES)
def test_metadata_is_the_converters(name: str, tmp_path: Path) -> None:
    folder = folder_of(name, tmp_path)
    expected = json.loads((folder / "expected.json").read_text("utf-8"))
    vocabulary = read(folder, name)
    assert as_written(vocabulary) == expected
    assert vocabulary.n_tokens == n_vocab_of(folder) == expected["tokenizer.ggml.tokens"]["length"]
    assert vocabulary.kind == expected["tokenizer.ggml.model"]["value"]
    assert vocabulary.pre == expected["tokenizer.ggml.pre"]["value"]


def changed_copy(tmp_path: Path, name: str, file: str, change: Callable[[dict[str, Any]], Any]) -> Path:
    """A copy of a golden folder in which one JSON file is changed."""
    folder = Path(shutil.copytree(GOLDEN / name, tmp_path / "changed"))
    value = json.loads((folder / file).read_text("utf-8"))
    change(value)
    (folder / file).write_text(json.dumps(value), "utf-8")
    return folder


def test_an_unknown_pre_tokenizer_is_shown_and_can_be_named(tmp_path: Path) -> None:
    split = {"type": "Split", "pattern": {"Regex": r"\w+|\W"}, "behavior": "Isolated", "invert": False}
    folder = changed_copy(
        tmp_path, "qwen2", "tokenizer.json", lambda t: t["pre_tokenizer"]["pretokenizers"].insert(0, split)
    )
    with pytest.raises(UnsupportedModelError, match=r"Known: .*llama-bpe.*qwen35.*--pre NAME.*\\\\w\+\|\\\\W"):
        read(folder, "qwen2")
    assert read(folder, "qwen2", pre="deepseek-llm").pre == "deepseek-llm"
    with pytest.raises(UsageError, match=r"--pre qwen17: llama\.cpp knows no such pre-tokenizer; it knows: .*qwen2"):
        read(folder, "qwen2", pre="qwen17")


@pytest.mark.parametrize(
    ("normalizer", "pre"),
    [
        ({"type": "NFC"}, "qwen2"),
        (None, "qwen2"),
        ({"type": "Sequence", "normalizers": [{"type": "NFC"}]}, "qwen2"),
        ({"type": "NFKC"}, None),
        ({"type": "Lowercase"}, None),
        ("NFC", None),
    ],
)
def test_normalizers_that_change_text_are_refused(tmp_path: Path, normalizer: Any, pre: str | None) -> None:
    folder = changed_copy(tmp_path, "qwen2", "tokenizer.json", lambda t: t.update(normalizer=normalizer))
    if pre:
        assert read(folder, "qwen2").pre == pre
    else:
        with pytest.raises(UnsupportedModelError, match="unknown pre-tokenizer"):
            read(folder, "qwen2")


def test_words_looked_up_before_merging_are_part_of_the_definition(tmp_path: Path) -> None:
    """With tokens that no merges make, only llama.cpp's pre-tokenizers with the same `ignore_merges` will do."""

    def look_up(tokenizer: dict[str, Any]) -> None:
        tokenizer["model"]["ignore_merges"] = True

    def look_up_unreachable(tokenizer: dict[str, Any]) -> None:
        look_up(tokenizer)
        model = tokenizer["model"]
        del model["merges"][-1]

    assert read(changed_copy(tmp_path, "qwen2", "tokenizer.json", look_up), "qwen2").pre == "qwen2"
    folder = changed_copy(tmp_path / "unreachable", "qwen2", "tokenizer.json", look_up_unreachable)
    with pytest.raises(UnsupportedModelError, match="ignore_merges"):
        read(folder, "qwen2")


def test_a_prefix_space_of_the_byte_level_step_is_refused(tmp_path: Path) -> None:
    folder = changed_copy(
        tmp_path, "gpt-2", "tokenizer.json", lambda t: t["pre_tokenizer"].update(add_prefix_space=True)
    )
    with pytest.raises(UnsupportedModelError, match="add_prefix_space"):
        read(folder, "gpt-2")


def test_no_bos_where_the_tokenizer_adds_none(tmp_path: Path) -> None:
    """llama.cpp would add one to every llama-bpe text; the converter leaves that to chance."""
    folder = changed_copy(tmp_path, "llama-bpe", "tokenizer.json", lambda t: t.update(post_processor=None))
    assert as_written(read(folder, "llama-bpe"))["tokenizer.ggml.add_bos_token"] == {"type": "BOOL", "value": False}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model"), "no `model` object"),
        (lambda t: t.update(model=[]), "no `model` object"),
        (lambda t: t["model"].update(vocab=["a", "b"]), "no map from token to id"),
        (lambda t: t["model"].update(vocab={}), "no map from token to id"),
        (lambda t: t["model"]["vocab"].update(a="1"), "token 'a' has id '1', not a number from 0"),
        (lambda t: t["model"]["vocab"].update(a=True), "token 'a' has id True"),
        (lambda t: t["model"]["vocab"].update(a=-1), "token 'a' has id -1"),
        (lambda t: t["model"]["vocab"].update(a=t["model"]["vocab"]["b"]), "tokens 'a' and 'b' both have id"),
        (lambda t: t["model"]["vocab"].update(a=512), "token 'a' has id 512, but .* 512 tokens only"),
        (lambda t: t["model"]["vocab"].update(a=10**30), "has id 10{30}"),
        (lambda t: t["model"]["vocab"].update({"[PAD511]": 510}), r"tokens 510 and 511 both read '\[PAD511\]'"),
        (lambda t: t["model"].update(merges=[]), "no merges"),
        (lambda t: t["model"].pop("merges"), "no merges"),
        (lambda t: t["model"]["merges"].append("a"), "merge 237 is 'a', not two tokens"),
        (lambda t: t["model"]["merges"].append("a b c"), "not two tokens"),
        (lambda t: t["model"]["merges"].append(["a", 3]), r"merge 237 is \['a', 3\], not two tokens"),
        (lambda t: t["model"]["merges"].append(["a", "☃"]), "needs the token '☃', which does not exist"),
        (lambda t: t["added_tokens"].append(7), "added token 7"),
        (lambda t: t["added_tokens"].append({"id": 3}), "needs a text and an id"),
        (lambda t: t["added_tokens"].append({"id": "3", "content": "x"}), "needs a text and an id"),
        (
            lambda t: t["added_tokens"].append({"id": 497, "content": "<x>"}),
            "and '<x>' both have id 497",
        ),
        (lambda t: t["added_tokens"].append({"id": 3, "content": "<x>"}), "'.' and '<x>' both have id 3"),
        (lambda t: t["added_tokens"].append({"id": 509, "content": "a"}), "token 'a' has two ids"),
        (lambda t: t.update(added_tokens={}), None),
        (lambda t: t.update(added_tokens="<x>"), "added_tokens is not a list"),
        (lambda t: t.update(decoder={"type": "Nonsense"}), "its decoder cannot be read"),
    ],
)
def test_damaged_tokenizers_are_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], Any], message: str | None
) -> None:
    folder = changed_copy(tmp_path, "qwen2", "tokenizer.json", change)
    if message is None:
        read(folder, "qwen2", n_vocab=512)
        return
    with pytest.raises(BadInputError, match=message):
        read(folder, "qwen2", n_vocab=512)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t["model"].update(type="WordPiece"), "a WordPiece tokenizer"),
        (lambda t: t["model"].update(type="Unigram", vocab=[["a", 0.0]]), "a Unigram tokenizer"),
        (lambda t: t["model"].update(end_of_word_suffix="</w>"), "end_of_word_suffix '</w>'"),
        (lambda t: t.update(pre_tokenizer=None), "unknown pre-tokenizer"),
        (lambda t: t.update(pre_tokenizer={"type": "Sequence"}), "unknown pre-tokenizer"),
        (lambda t: t.update(pre_tokenizer={"type": "Sequence", "pretokenizers": [3]}), "unknown pre-tokenizer"),
        (lambda t: t.update(pre_tokenizer={"type": "Whitespace"}), "unknown pre-tokenizer"),
    ],
)
def test_foreign_tokenizers_are_refused(tmp_path: Path, change: Callable[[dict[str, Any]], Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        read(changed_copy(tmp_path, "qwen2", "tokenizer.json", change), "qwen2")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"[1]", "holds a JSON list"),
        (b"\xff\xfe{}", "not UTF-8"),
        (b"[" * 200_000, "not JSON"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "Git-LFS pointer"),
    ],
)
@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json", "config.json"])
def test_files_that_are_not_json_objects_are_refused(tmp_path: Path, file: str, content: bytes, message: str) -> None:
    folder = Path(shutil.copytree(GOLDEN / "qwen2", tmp_path / "folder"))
    (folder / file).write_bytes(content)
    with pytest.raises(BadInputError, match=f"{file}: .*{message}"):
        read(folder, "qwen2", n_vocab=512)


def test_a_folder_without_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match=r"no tokenizer\.json and no SentencePiece tokenizer\.model"):
        read_vocabulary(tmp_path, arch="llama", n_vocab=10)


@pytest.mark.parametrize("name", BYTE_LEVEL)
@pytest.mark.parametrize("file", ["tokenizer_config.json", "config.json"])
def test_side_files_with_values_of_other_types_never_crash(tmp_path: Path, name: str, file: str) -> None:
    """Every value replaced by one of another type: read as absent, or refused, never an exception of Python's own."""
    for hostile in (None, 3, -1, "x", [], {}, [[]], {"content": []}, 1e300, [{"name": 1, "template": []}]):
        folder = changed_copy(
            tmp_path, name, file, lambda value, hostile=hostile: value.update(dict.fromkeys(value, hostile))
        )
        try:
            read(folder, name, n_vocab=520)
        except SqStreamError:
            pass
        finally:
            shutil.rmtree(folder)
