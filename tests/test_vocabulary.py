"""Vocabulary metadata: equal to what llama.cpp's converter writes, and clear errors for what cannot be used."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from golden.make_vocabularies import describe, train_sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from vocabularies import ARCHITECTURES, BYTE_LEVEL, GOLDEN, NAMES, folder_of, n_vocab_of

from sq_stream.errors import BadInputError, SqStreamError, UnsupportedModelError, UsageError
from sq_stream.text.spm_proto import parse_model
from sq_stream.text.vocabulary import Vocabulary, read_vocabulary

# The converter gives every token of a SentencePiece-like tokenizer.json the same score, so that llama.cpp merges from
# left to right; ours follow the merges.
BETTER_THAN_THE_CONVERTER = {"llama-json": ("tokenizer.ggml.scores",)}


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
    written = as_written(vocabulary)
    for key in BETTER_THAN_THE_CONVERTER.get(name, ()):
        assert written.pop(key) != expected.pop(key)
    assert written == expected
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
        (lambda t: t["decoder"].update(trim_offsets="x"), "its decoder cannot be read"),
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
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"[1]", "holds a JSON list"),
        (b"\xff\xfe{}", "not UTF-8"),
        (b"[" * 200_000, "not valid JSON"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "Git-LFS pointer"),
    ],
)
@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json", "config.json"])
def test_files_that_are_not_json_objects_are_refused(tmp_path: Path, file: str, content: bytes, message: str) -> None:
    folder = Path(shutil.copytree(GOLDEN / "qwen2", tmp_path / "folder"))
    (folder / file).write_bytes(content)
    with pytest.raises(BadInputError, match=f"{file}.*{message}"):
        read(folder, "qwen2", n_vocab=512)


def test_a_folder_without_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match=r"no tokenizer\.json and no SentencePiece tokenizer\.model"):
        read_vocabulary(tmp_path, arch="llama", n_vocab=10)


@pytest.mark.parametrize("name", BYTE_LEVEL)
@pytest.mark.parametrize("file", ["tokenizer_config.json", "config.json"])
def test_side_files_with_values_of_other_types_never_crash(tmp_path: Path, name: str, file: str) -> None:
    """Every value replaced by one of another type: read as absent, or refused, never an exception of Python's own."""
    for hostile in (
        None,
        3,
        -1,
        "x",
        [],
        {},
        [[]],
        {"content": []},
        1e300,
        [{"name": 1, "template": []}, {"name": {"content": "x"}}],
    ):
        folder = changed_copy(
            tmp_path, name, file, lambda value, hostile=hostile: value.update(dict.fromkeys(value, hostile))
        )
        try:
            read(folder, name, n_vocab=520)
        except SqStreamError:
            pass
        finally:
            shutil.rmtree(folder)


def spm_copy(tmp_path: Path, name: str = "llama-spm") -> Path:
    return Path(shutil.copytree(GOLDEN / name, tmp_path / "folder"))


def test_added_tokens_without_embedding_are_left_out_and_told(tmp_path: Path) -> None:
    vocabulary = read(GOLDEN / "llama-spm", "llama-spm")
    assert vocabulary.notes == ("added tokens without an embedding are left out: [TOO FAR] (640)",)


def test_more_pieces_than_embeddings_are_refused() -> None:
    with pytest.raises(BadInputError, match="600 pieces, but the model has embeddings for 599 tokens only"):
        read(GOLDEN / "llama-spm", "llama-spm", n_vocab=599)


def test_user_defined_pieces_stay_user_defined(tmp_path: Path) -> None:
    """As in the golden folder, where tokenizer_config.json lists them."""
    folder = spm_copy(tmp_path, "gemma")
    (folder / "tokenizer_config.json").write_text("{}")
    types, listed = (as_list(read(path, "gemma"), "token_type") for path in (folder, GOLDEN / "gemma"))
    texts = as_list(read(folder, "gemma"), "tokens")
    assert [text for text, kind in zip(texts, types, strict=True) if kind == 4] == [
        *("<unused0>", "<start_of_turn>", "\n\n", "  ", "    ", "<table>")
    ]
    assert (
        sum(kind == 4 for kind in listed) == 4
    )  # the converter takes <unused0> and <start_of_turn> for control tokens


def as_list(vocabulary: Vocabulary, name: str) -> list[Any]:
    return next(entry.value for entry in vocabulary.metadata if entry.key == f"tokenizer.ggml.{name}")


@pytest.mark.parametrize("content", [b"", b"junk", b"\x0a\x80", b"\x0a\x03\x0a\x01\xff", b"\xff" * 99, b"\x08\x01"])
def test_files_that_are_no_sentencepiece_model_are_refused(tmp_path: Path, content: bytes) -> None:
    folder = spm_copy(tmp_path)
    (folder / "tokenizer.model").write_bytes(content)
    with pytest.raises(BadInputError, match=r"tokenizer\.model: not a SentencePiece model"):
        read(folder, "llama-spm")


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_damaged_sentencepiece_models_never_crash(data: st.DataObject) -> None:
    content = bytearray((GOLDEN / "llama-spm" / "tokenizer.model").read_bytes())
    for _ in range(data.draw(st.integers(0, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    with suppress(ValueError):
        model = parse_model(bytes(content[: data.draw(st.integers(0, len(content)))]))
        assert len(model.texts) == len(model.scores) == len(model.types) > 0


def test_unigram_models_are_refused(tmp_path: Path) -> None:
    folder = spm_copy(tmp_path)
    (folder / "tokenizer.model").write_bytes(train_sentencepiece({"model_type": "unigram"}, 550))
    with pytest.raises(UnsupportedModelError, match=r"SentencePiece model of type 1; llama\.cpp's needs BPE"):
        read(folder, "llama-spm")


def test_normalizing_models_are_told(tmp_path: Path) -> None:
    folder = spm_copy(tmp_path)
    (folder / "tokenizer.model").write_bytes(train_sentencepiece({"normalization_rule_name": "nmt_nfkc"}))
    assert any("rewrites text" in note for note in read(folder, "llama-spm").notes)


def test_the_space_before_a_text_is_the_models(tmp_path: Path) -> None:
    folder = spm_copy(tmp_path)
    assert "tokenizer.ggml.add_space_prefix" not in as_written(read(folder, "llama-spm"))  # llama.cpp adds one
    (folder / "tokenizer.model").write_bytes(train_sentencepiece({"add_dummy_prefix": False}))
    assert as_written(read(folder, "llama-spm"))["tokenizer.ggml.add_space_prefix"] == {"type": "BOOL", "value": False}


def test_a_rank_table_called_tokenizer_model_is_passed_over(tmp_path: Path) -> None:
    folder = spm_copy(tmp_path, "llama-bpe")
    (folder / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")
    assert read(folder, "llama-bpe").pre == "llama-bpe"


def test_pre_tokenizers_are_not_for_sentencepiece() -> None:
    assert read(GOLDEN / "llama-spm", "llama-spm", pre="default").pre == "default"
    with pytest.raises(UsageError, match="--pre qwen2: this is a SentencePiece tokenizer"):
        read(GOLDEN / "llama-spm", "llama-spm", pre="qwen2")


@pytest.mark.parametrize("flag", ["lstrip", "rstrip", "single_word"])
def test_added_tokens_that_take_spaces_are_told(tmp_path: Path, flag: str) -> None:
    assert not any("added tokens" in note for note in read(GOLDEN / "smollm", "smollm").notes)
    folder = changed_copy(tmp_path, "smollm", "tokenizer.json", lambda t: t["added_tokens"][1].update({flag: True}))
    assert any("within words; not so here: <|im_start|>" in note for note in read(folder, "smollm").notes)


def test_gemma_needs_its_sentencepiece_model(tmp_path: Path) -> None:
    folder = spm_copy(tmp_path, "gemma")
    (folder / "tokenizer.model").unlink()
    with pytest.raises(UnsupportedModelError, match=r"add the tokenizer\.model"):
        read(folder, "gemma")


def swap_merges(tokenizer: dict[str, Any]) -> None:
    merges = tokenizer["model"]["merges"]
    produced = ["".join(merge) for merge in merges]
    i = next(i for i in range(len(merges) - 2) if produced[i] == produced[i + 1])
    merges[i + 1], merges[-1] = merges[-1], merges[i + 1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (swap_merges, "do not stand together, so it is not made of a SentencePiece model"),
        (lambda t: t["model"]["merges"].pop(), "pairs of tokens make a token, so it is not"),
        (lambda t: t.update(normalizer={"type": "NFKC"}), "NFKC before byte-fallback BPE"),
        (lambda t: t.update(pre_tokenizer={"type": "Whitespace"}), "Whitespace before byte-fallback BPE"),
    ],
)
def test_tokenizers_that_scores_cannot_follow_are_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        read(changed_copy(tmp_path, "llama-json", "tokenizer.json", change), "llama-json")
