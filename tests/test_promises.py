"""docs/promises.md: each promise names the test that keeps it, and there is such a test."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).parent
PAGE = (TESTS.parent / "docs" / "promises.md").read_text()
DEFINED = {
    path.stem: set(re.findall(r"^ *def (test_\w+)\(", path.read_text(), re.MULTILINE))
    for path in TESTS.glob("test_*.py")
}


def test_what_is_named_is_there() -> None:
    files = set(re.findall(r"\b(test_\w+)\.py", PAGE))
    names = set(re.findall(r"\btest_\w+\b(?!\.py)", PAGE))
    assert len(files) > 10
    assert len(names) > 50
    assert files <= DEFINED.keys()
    assert names <= set.union(*DEFINED.values())
    for file, name in re.findall(r"\b(test_\w+)\.py::(test_\w+)", PAGE):
        assert name in DEFINED[file], f"{file}.py has no {name}"


def test_every_promise_names_a_test() -> None:
    tables = re.findall(r"^\| promise \| kept by \|\n\| --- \| --- \|\n((?:\|.*\|\n)+)", PAGE, re.MULTILINE)
    assert len(tables) == PAGE.count("| kept by |") > 3
    for table in tables:
        for row in table.splitlines():
            kept_by = row.split("|")[-2]
            assert "test_" in kept_by or "all of" in kept_by, row
