"""The tokenizers of tests/golden/vocabularies, texts that are hard to split, and vocabulary-only GGUF files."""

from __future__ import annotations

import json
import lzma
import shutil
from pathlib import Path

import gguf

from sq_stream.formats.metadata import Entry, ValueType
from sq_stream.text.vocabulary import Vocabulary

GOLDEN = Path(__file__).parent / "golden" / "vocabularies"

NASTY = (
    "",
    " ",
    "   ",
    "\n",
    "\t",
    "\r\n\r\n",
    " \n \t\n\n   \t\t\r\n x",
    "a  b   c    d\n\n\n\ne \u00a0f\u3000g\u2009h\u200bi\u0085j\u000bk\u000cl",
    "trailing spaces   ",
    "   leading spaces",
    "Hello, world! (How are you?)",
    "I'll we've you're it's I'm he'd don't I'LL WE'VE IT'S o'clock 'tis 's'S '''' ''ll",
    "0 1 12 123 1234 12345 1234567890 3.14159 1,000,000 0x1F 1e-9 2³ ½ ⅓ Ⅷ ٣٤٥ १२३ ４５６ ①②③",
    "def f(x):\n    return {'a': [x**2, x//3], \"b\": None}  # comment\n\n\tif __name__ == '__main__':\n\t\tpass\n",
    '<?php echo $a->b(); ?> &amp; <div class="x">é</div> //TODO /* x */ C:\\dir\\file ~/.config a=b&c=d#e',
    "日本語の文章。東京は日本の首都です、たぶん！カタカナｶﾀｶﾅ",
    "中文句子，没有空格。北京是中国的首都；價值連城",
    "한국어 문장입니다. 서울은 대한민국의 수도",
    "Съешь же ещё этих мягких французских булок, Ёлка ЁЛКА",
    "Ελληνικά: Ο ΣΊΣΥΦΟΣ έσπρωχνε τον βράχο",
    "السلام عليكم ورحمة الله، كيف حالك؟ שלום עולם\u200f \u202eabc\u202c",
    "हिन्दी में क्षत्रिय श्री भारत்தமிழ் ไทยภาษา ខ្មែរ မြန်မာ",
    "😀🚀🦙 👩‍💻👨‍👩‍👧‍👦 👍🏽 🇩🇪🇯🇵 ✊🏿❤️ ☃️ 🏴󠁧󠁢󠁥󠁮󠁧󠁿",
    "café naïve Å Ω ﬁ ﬀ İstanbul ıI ſ ß ẞ Ǆ ǅ ǆ",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa" * 4,
    "ThisIsAVeryLongWordWithoutAnySpaces" * 12,
    "======= ------- ....... !!!!!!! ??????? ####### \\\\\\\\ //// (((( ]]]] ``` ~~~ ^^^ |||| $$$ +++ <<<>>>",
    '...!?,;: "quoted" “curly” ‘single’ «guillemets» — – … ‰ † • · § ¶ © ® ™ ° ± × ÷ ≠ ≈ ∞ ∑ √ € £ ¥ ₿',
    "\u0000\u0001\u001f\u007f\u0080\u009f\u00ad\ufeff\ufffd\ufffe\uffff",
    "\U0001f9ff\U00020000\U0010ffff\ue000\U000f0000",
    "zebra  zebra zebras 日本 日本語 ▁under▁score ĠÄ ",
    "x" + "\n" * 40 + "y" + " " * 70 + "z",
    "MiXeD CaSe WORDS camelCase PascalCase snake_case SCREAMING_CASE iPhone eBay McDonald ÉCOLE École éCOLE",
)
"""Texts in composed form (NFC) without special tokens."""

DECOMPOSED = (
    "e\u0301cole A\u030angstro\u0308m n\u0303",
    "n\u0303\u0301\u0323o\u0302\u0302",
    "한국어 \u1100\u1161\u11a8",
)
"""Texts with combining marks that NFC would compose or reorder."""


def folder_of(name: str, scratch: Path) -> Path:
    """The folder of a golden tokenizer, its tokenizer.json unpacked into `scratch` where it is stored compressed."""
    folder = GOLDEN / name
    packed = folder / "tokenizer.json.xz"
    if not packed.exists():
        return folder
    copy = scratch / name
    if not copy.exists():
        shutil.copytree(folder, copy)
        (copy / "tokenizer.json").write_bytes(lzma.decompress(packed.read_bytes()))
    return copy


def write_gguf(path: Path, arch: str, vocabulary: Vocabulary) -> None:
    """A GGUF file with nothing but the vocabulary."""
    writer = gguf.GGUFWriter(path, arch)
    for entry in vocabulary.metadata:
        _add(writer, entry)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


def _add(writer: gguf.GGUFWriter, entry: Entry) -> None:
    element = None if entry.element is None else gguf.GGUFValueType(entry.element)
    writer.add_key_value(entry.key, entry.value, gguf.GGUFValueType(entry.type), element)
    assert entry.type is not ValueType.ARRAY or element is not None


NAMES = tuple(sorted(path.parent.name for path in GOLDEN.glob("*/expected.json")))
SENTENCEPIECE = ("gemma", "llama-json", "llama-spm")
BYTE_LEVEL = tuple(name for name in NAMES if name not in (*SENTENCEPIECE, "smollm2"))
ARCHITECTURES = {"qwen2": "qwen2", "qwen35": "qwen35", "gemma": "gemma3"}  # others: "llama"


def n_vocab_of(folder: Path) -> int:
    """`vocab_size` of a folder's config.json."""
    config = json.loads((folder / "config.json").read_text("utf-8"))
    return int({**config, **config.get("text_config", {})}["vocab_size"])
