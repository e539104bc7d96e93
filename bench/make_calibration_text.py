"""Make sq_stream/calibrate/text/documents.jsonl.zst, the packaged calibration text, from its sources.

    python bench/make_calibration_text.py --books DIR --python DIR --go DIR --llama DIR --underscore FILE
        --httpd DIR --sqlite DIR --jargon FILE --wikipedia FILE --out sq_stream/calibrate/text/documents.jsonl.zst

What each source is, its version and its licence: sq_stream/calibrate/text/SOURCES.md. Our own text is in
bench/calibration_text. The same sources give the same bytes. Needs `mwparserfromhell`.
"""

from __future__ import annotations

import argparse
import ast
import bz2
import hashlib
import json
import random
import re
import textwrap
import xml.etree.ElementTree
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import mwparserfromhell
import zstandard
from manual_pages import Page, httpd_page, sqlite_body

OWN = Path(__file__).parent / "calibration_text"
CHAPTER = re.compile(r"^(?:chapter [0-9]+.*|[IVXL]+\. \S.*)$", re.IGNORECASE | re.MULTILINE)
SPECIAL = re.compile(r"<\|[^|\n]*\|>|</?s>|<pad>|<unk>|<[be]os>|\[/?INST\]|<(?:start|end)_of_turn>|<｜")
LANGUAGES = {
    "fr": ("French", 36_000),
    "de": ("German", 26_000),
    "es": ("Spanish", 26_000),
    "tr": ("Turkish", 14_000),
    "ja": ("Japanese", 16_000),
    "ko": ("Korean", 14_000),
    "zh-cn": ("Chinese", 8_000),
    "pt-br": ("Portuguese", 14_000),
    "ru": ("Russian", 8_000),
}
WORDS = {
    "en": "the of and is to that",
    "fr": "le la les des est une",
    "de": "der die das und ist nicht",
    "es": "el los las del una que",
    "pt-br": "os uma para que não em",
    "tr": "bir ve için bu olarak ile",
}
SCRIPTS = {"ja": r"[\u3040-\u30ff]", "ko": r"[\uac00-\ud7af]", "ru": r"[\u0400-\u04ff]", "zh-cn": r"[\u4e00-\u9fff]"}


def is_written_in(language: str, text: str) -> bool:
    """Whether `text` is in `language`: many folders of the manual hold pages that nobody has translated."""
    for name, characters in SCRIPTS.items():
        if len(re.findall(characters, text)) > len(text) / 20:
            return name == language
    words = re.findall(r"\w+", text.lower())
    counts = {name: sum(words.count(word) for word in common.split()) for name, common in WORDS.items()}
    return language == max(counts, key=lambda name: counts[name])


@dataclass(frozen=True)
class Document:
    """One document of the archive: a text, or the turns of a dialogue."""

    id: str
    kind: str
    text: str = ""
    messages: tuple[tuple[str, str], ...] = ()

    def line(self) -> str:
        entry: dict[str, object] = {"id": self.id, "kind": self.kind}
        if self.messages:
            entry["messages"] = [{"role": role, "content": content} for role, content in self.messages]
        else:
            entry["text"] = self.text
        return json.dumps(entry, ensure_ascii=False)

    def size(self) -> int:
        return len(self.text) + sum(len(content) for _, content in self.messages)


def shuffled(names: Iterable[str]) -> list[str]:
    """`names` in an order that depends on nothing but themselves."""
    return sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())


def excerpt(text: str, size: int) -> str:
    """The beginning of `text`, up to a blank line at about `size` characters."""
    text = re.sub(r"\n{4,}", "\n\n\n", text.replace("\r\n", "\n").strip("\n"))
    end = text.find("\n\n", size)
    return (text if end < 0 or len(text) < size * 1.3 else text[:end]) + "\n"


def take(documents: Iterable[Document], total: int) -> Iterator[Document]:
    """The first of `documents` that have `total` characters together; those with special tokens are left out."""
    for document in documents:
        if total <= 0:
            return
        if not SPECIAL.search(document.text) and document.size() > 1000:
            total -= document.size()
            yield document


def books(folder: Path) -> Iterator[Document]:
    for path in sorted(folder.glob("*.txt")):
        if not path.name.startswith(("austen", "chesterton", "melville")):
            continue
        text = path.read_text("utf-8", errors="replace")
        starts = [match.start() for match in CHAPTER.finditer(text)]
        chapters = [text[a:b] for a, b in pairwise([*starts, len(text)]) if b - a > 3000]
        parts = (Document(f"{path.stem}/{i:03d}", "prose", excerpt(part, 6000)) for i, part in enumerate(chapters))
        yield from take(sorted(parts, key=lambda document: shuffled_key(document.id)), 82_000)


def shuffled_key(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


def code(name: str, root: Path, pattern: str, total: int, avoid: str = "(?!)") -> Iterator[Document]:
    paths = {str(path.relative_to(root)): path for path in root.glob(pattern) if 2500 < path.stat().st_size < 30_000}
    names = (n for n in shuffled(paths) if not re.search(avoid, n))
    texts = ((n, paths[n].read_text("utf-8", errors="replace")) for n in names)
    yield from take((Document(f"{name}/{n}", "code", excerpt(text, 7000)) for n, text in texts), total)


def underscore(path: Path) -> Iterator[Document]:
    text = path.read_text("utf-8")
    for i in range(0, len(text) - 6000, 12_000):
        start = text.find("\n\n", i) + 2 if i else 0
        yield Document(f"underscore/{i // 12_000}", "code", excerpt(text[start:], 6000))


def manuals(httpd: Path, sqlite: Path) -> Iterator[Document]:
    """English technical prose."""
    pages = {str(path.relative_to(httpd / "en")): path for path in (httpd / "en").rglob("*.html")}
    mine = [name for name in shuffled(pages) if language_of(name) == "en" and not name.startswith("mod/quick")]
    english = ((n, text) for n in mine if is_written_in("en", text := httpd_page(pages[n]).text()))
    yield from take((Document(f"httpd/en/{n}", "technical", excerpt(text, 5500)) for n, text in english), 55_000)
    skipped = re.compile("sitemap|changes|chronology|news|index|crossref|doclist|lang_|rescode|opcode|c3ref|syntax|faq")
    names = [p.name for p in sqlite.glob("*.html") if not skipped.search(p.name) and p.stat().st_size > 15_000]
    texts = ((n, Page(sqlite_body(sqlite / n)).text()) for n in shuffled(names))
    yield from take((Document(f"sqlite/{n}", "technical", excerpt(text, 6000)) for n, text in texts), 85_000)


def language_of(page: str) -> str:
    """The one language that a page of the manual is taken in, so that no split holds another's translation."""
    fixed = {"howto/htaccess.html": "pt-br", "new_features_2_2.html": "pt-br", "new_features_2_0.html": "pt-br"}
    choices = ("en", "en", "fr", "fr", "de", "es", "tr", "ja", "ko", "zh-cn", "ru", "dialogue", "dialogue")
    return fixed.get(page) or choices[shuffled_key(page)[0] % len(choices)]


def languages(httpd: Path) -> Iterator[Document]:
    used: set[str] = set()
    for language, (_, total) in sorted(
        LANGUAGES.items(), key=lambda item: len(list((httpd / item[0]).rglob("*.html")))
    ):
        root = httpd / language
        pages = {str(path.relative_to(root)): path for path in root.rglob("*.html")}
        free = [n for n in shuffled(pages) if n not in used and language_of(n) not in ("en", "dialogue")]
        free = [n for n in free if not re.search("index|sitemap|quickref|directives", n)]
        free.sort(key=lambda n: language_of(n) != language)
        texts = (
            Document(f"httpd/{language}/{n}", "languages", excerpt(httpd_page(pages[n]).text(), 5000)) for n in free
        )
        for document in take((d for d in texts if is_written_in(language, d.text)), total):
            used.add(document.id.split("/", 2)[2])
            yield document


def encyclopedia(dump: Path) -> Iterator[Document]:
    """Articles of an excerpt of Wikipedia: their running text and headings, down to the lists at their end."""
    pages: dict[str, str] = {}
    title = ""
    with bz2.open(dump) as file:
        for _, element in xml.etree.ElementTree.iterparse(file):
            tag = element.tag.rpartition("}")[2]
            if tag == "title":
                title = element.text or ""
            elif tag == "text" and ":" not in title and not (element.text or "").startswith("#"):
                pages[title] = element.text or ""
    ends = re.compile(r"^== *(?:See also|References|Notes|Footnotes|Bibliography|External links|Further reading)", re.M)
    long = {name: text for name, text in pages.items() if len(text) > 15_000}
    texts = ((name, article(ends.split(long[name])[0])) for name in shuffled(long))
    yield from take(
        (Document(f"wikipedia/{name}", "encyclopedia", excerpt(text, 6800)) for name, text in texts), 490_000
    )


def article(markup: str) -> str:
    """The text of wiki markup without templates, tables, pictures and notes; headings as in Markdown."""
    code = mwparserfromhell.parse(markup)
    for node in [*code.filter_tags(matches=lambda n: n.tag in ("ref", "table", "gallery", "math"))]:
        with suppress(ValueError):
            code.remove(node)
    for link in code.filter_wikilinks(matches=lambda n: re.match(r"(?i)(?:file|image|category):", str(n.title))):
        with suppress(ValueError):
            code.remove(link)
    for heading in code.filter_headings():
        code.replace(heading, f"{'#' * heading.level} {heading.title.strip_code().strip()}")
    text = re.sub(r"\(\s*[;,]?\s*\)", "", code.strip_code())
    lines = (" ".join(line.split()) for line in text.splitlines())
    kept = [line for line in lines if line.startswith("#") or len(line) > 80 or line.startswith("*")]
    return "\n\n".join(kept)


def entries(jargon: Path) -> list[tuple[str, str]]:
    """Term and definition of the Jargon File, of a middling length."""
    text = jargon.read_text("utf-8", errors="replace")
    found = re.findall(r"^(\S[^\n]{2,30})\n((?:(?: +[^\n]*)?\n)+)", text, re.MULTILINE)
    unmarked = [(term.strip(), re.sub(r"[{}]", "", textwrap.dedent(rest)).strip()) for term, rest in found]
    return [(term, rest) for term, rest in unmarked if 250 < len(rest) < 1800 and not SPECIAL.search(rest)]


def jargon_documents(found: list[tuple[str, str]]) -> Iterator[Document]:
    for i in range(0, 14 * 6, 6):
        yield Document(
            f"jargon/{i // 6:02d}", "technical", "\n\n".join(f"{t}\n{d}" for t, d in found[i : i + 6]) + "\n"
        )


def jargon_dialogues(found: list[tuple[str, str]]) -> Iterator[Document]:
    asks = ("What does “{}” mean in hacker slang?", "And “{}”?", "Where does the term “{}” come from?")
    for i in range(0, 10 * 3, 3):
        turns = [
            turn
            for ask, (term, definition) in zip(asks, found[i : i + 3], strict=True)
            for turn in (("user", ask.format(term)), ("assistant", plain(definition)))
        ]
        yield Document(f"dialogue/jargon/{i // 3}", "dialogue", messages=tuple(turns))


def plain(text: str) -> str:
    """Paragraphs without hard line breaks."""
    return "\n\n".join(" ".join(part.split()) for part in re.split(r"\n\s*\n", text) if part.strip())


def code_dialogues(root: Path, taken: set[str]) -> Iterator[Document]:
    """Functions of modules that are not among the code documents, asked for and explained by their docstrings."""
    free = [p for p in sorted(root.glob("*.py")) if p.name not in taken and p.stat().st_size < 120_000]
    found = 0
    for name in shuffled(path.name for path in free):
        text = (root / name).read_text("utf-8", errors="replace")
        functions = [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef) and len(node.body) > 2]
        for node in functions[:2]:
            doc, source = ast.get_docstring(node), ast.get_source_segment(text, node) or ""
            if not doc or not 120 < len(doc) < 1200 or not 400 < len(source) < 2600:
                continue
            without = source.split('"""')
            block = (
                f"```python\n{without[0].rstrip()}{without[2]}\n```"
                if len(without) == 3
                else f"```python\n{source}\n```"
            )
            ask = (
                (f"Write a Python function `{node.name}` for me:\n\n{doc}", block),
                (f"What does this function of the module `{name[:-3]}` do?\n\n{block}", doc),
            )[found % 2]
            yield Document(
                f"dialogue/python/{name}/{node.name}", "dialogue", messages=(("user", ask[0]), ("assistant", ask[1]))
            )
            found += 1
        if found >= 26:
            return


def translations(httpd: Path) -> Iterator[Document]:
    """Paragraphs of the same manual page in two languages."""
    for language in ("fr", "de", "es", "tr", "ja", "ko"):
        name, made = LANGUAGES[language][0], 0
        pages = [str(p.relative_to(httpd / language)) for p in (httpd / language).rglob("*.html")]
        for page in (p for p in shuffled(pages) if language_of(p) == "dialogue" and (httpd / "en" / p).exists()):
            pair = [httpd_page(httpd / code / page).paragraphs for code in ("en", language)]
            if [tag for tag, _ in pair[0]] != [tag for tag, _ in pair[1]]:
                continue
            both = [
                (a[1], b[1]) for a, b in zip(*pair, strict=True) if a[0] == "p" and 100 < len(a[1]) < 700 and a != b
            ]
            if not all(is_written_in(code, "\n".join(x[i] for x in both)) for i, code in enumerate(("en", language))):
                continue
            turns: list[tuple[str, str]] = []
            for i, (english, other) in enumerate(both[:4]):
                if i % 2:
                    turns += [("user", f"And into English:\n\n{other}"), ("assistant", english)]
                else:
                    turns += [("user", f"Translate into {name}:\n\n{english}"), ("assistant", other)]
            if len(turns) >= 4:
                made += 1
                yield Document(f"dialogue/httpd/{language}/{page}", "dialogue", messages=tuple(turns))
            if made == 3:
                break


def faq(sqlite: Path) -> Iterator[Document]:
    """The questions and answers of SQLite's FAQ, three to a dialogue."""
    html = (sqlite / "faq.html").read_text("utf-8", errors="replace")
    found = re.findall(r"<p><b>\(\d+\) (.*?)</b></p>\s*<blockquote>(.*?)</blockquote>", html, re.DOTALL)
    pairs = [(Page(q).paragraphs[0][1], "\n\n".join(t for _, t in Page(a).paragraphs)) for q, a in found]
    for i in range(0, len(pairs) - 2, 3):
        turns = [turn for q, a in pairs[i : i + 3] for turn in (("user", q), ("assistant", a))]
        yield Document(f"dialogue/sqlite/{i // 3}", "dialogue", messages=tuple(turns))


def arithmetic() -> Iterator[Document]:
    """Worked sums in the way of a school book."""
    for i in range(12):
        rng = random.Random(i)
        turns: list[tuple[str, str]] = []
        for _ in range(3):
            a, b = rng.randrange(120, 990), rng.randrange(12, 99)
            tens, ones = b // 10 * 10, b % 10
            turns += [
                ("user", f"What is {a} × {b}? Show the steps."),
                (
                    "assistant",
                    f"Split {b} into {tens} + {ones}.\n\n1. {a} × {tens} = {a * tens}\n2. {a} × {ones} = {a * ones}\n"
                    f"3. {a * tens} + {a * ones} = {a * b}\n\nSo {a} × {b} = **{a * b}**.",
                ),
            ]
        price, count, percent = rng.randrange(4, 60), rng.randrange(3, 30), rng.choice((5, 10, 15, 20, 25))
        total = price * count * (100 - percent) / 100
        turns += [
            ("user", f"{count} tickets at €{price} each, with {percent}% off the total. What do I pay?"),
            (
                "assistant",
                f"Without the discount you would pay {count} × €{price} = €{price * count}. The discount is {percent}% "
                f"of that: €{price * count * percent / 100:.2f}. What remains is **€{total:.2f}**.",
            ),
        ]
        yield Document(f"dialogue/arithmetic/{i:02d}", "dialogue", messages=tuple(turns))


def own() -> Iterator[Document]:
    """Our own text: files of documents that begin with a line `=== kind/name`; in dialogues turns with `@role`."""
    for path in sorted(OWN.glob("*.txt")):
        parts = re.split(r"^=== (\S+)\n", path.read_text("utf-8"), flags=re.MULTILINE)
        for name, text in zip(parts[1::2], parts[2::2], strict=True):
            kind = name.split("/")[0]
            if kind == "dialogue":
                turns = re.split(r"^@(system|user|assistant)\n", text, flags=re.MULTILINE)
                messages = zip(turns[1::2], (turn.strip() for turn in turns[2::2]), strict=True)
                yield Document(f"own/{name}", kind, messages=tuple(messages))
            else:
                yield Document(f"own/{name}", kind, text.strip() + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("books", "python", "go", "llama", "underscore", "httpd", "sqlite", "jargon", "wikipedia", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    args = parser.parse_args()
    python = list(code("python", args.python, "*.py", 150_000, avoid="^(this|_sysconfigdata.*|antigravity)"))
    terms = dict(entries(args.jargon))
    found = [(term, terms[term]) for term in shuffled(terms)]
    documents = [
        *books(args.books),
        *encyclopedia(args.wikipedia),
        *python,
        *code("go", args.go, "*/*.go", 90_000, avoid=r"_test\.go|^cmd|^vendor|table|example"),
        *code("llama.cpp", args.llama, "src/*.cpp", 40_000),
        *code("llama.cpp", args.llama, "common/*.h", 24_000),
        *code("llama.cpp", args.llama, "scripts/*.sh", 16_000),
        *code("llama.cpp", args.llama, "tools/**/*.ts", 30_000, avoid="test|node_modules|spec"),
        *underscore(args.underscore),
        *manuals(args.httpd, args.sqlite),
        *jargon_documents(found),
        *languages(args.httpd),
        *jargon_dialogues(found[100:]),
        *code_dialogues(args.python, {document.id.split("/")[1] for document in python}),
        *translations(args.httpd),
        *faq(args.sqlite),
        *arithmetic(),
        *own(),
    ]
    assert len({document.id for document in documents}) == len(documents)
    text = "".join(f"{document.line()}\n" for document in documents).encode()
    args.out.write_bytes(zstandard.ZstdCompressor(level=19).compress(text))
    for kind in dict.fromkeys(document.kind for document in documents):
        sizes = [document.size() for document in documents if document.kind == kind]
        print(f"{kind:10} {len(sizes):4} documents {sum(sizes):8} characters")
    print(f"{len(text)} bytes, compressed {args.out.stat().st_size}")


if __name__ == "__main__":
    main()
