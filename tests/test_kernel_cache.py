"""Where compiled kernels are kept: in a folder of their own for each state of their sources."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numba
import numpy as np
import pytest

import sq_stream
from sq_stream.formats.blocks import Q8_0
from sq_stream.kernels.codec import encode


@pytest.fixture
def kernels(tmp_path: Path) -> Path:
    """The kernels of a copy of the package."""
    source, copy = Path(sq_stream.__file__).parent, tmp_path / "sq_stream"
    ignore = shutil.ignore_patterns("__pycache__")
    for part in ("kernels", "formats"):
        shutil.copytree(source / part, copy / part, ignore=ignore)
    for file in ("__init__.py", "errors.py"):
        shutil.copy(source / file, copy)
    return copy / "kernels"


def cache_folder(kernels: Path, **environment: str) -> Path:
    env = {k: v for k, v in os.environ.items() if k != "NUMBA_CACHE_DIR"} | {"PYTHONPATH": str(kernels.parents[1])}
    code = "import numba, sq_stream.kernels as kernels; print(kernels.__file__, numba.config.CACHE_DIR, sep='\\n')"
    command = [sys.executable, "-P", "-c", code]
    out = subprocess.run(command, capture_output=True, text=True, check=True, env=env | environment).stdout
    imported, folder = out.splitlines()
    assert Path(imported).parent == kernels
    return Path(folder)


def test_numba_keeps_compiled_kernels_there() -> None:
    encode(np.ones((1, 32), np.float32), Q8_0)
    assert list(Path(numba.config.CACHE_DIR).rglob("*.nbi"))


def test_a_changed_leaf_leaves_the_old_code_behind(kernels: Path) -> None:
    before = cache_folder(kernels)
    assert cache_folder(kernels) == before
    with open(kernels / "affine_fit.py", "a") as leaf:
        leaf.write("# changed\n")
    after = cache_folder(kernels)
    assert after != before
    assert (before.exists(), after.is_dir()) == (False, True)


def test_an_unwritable_package_uses_the_cache_of_the_user(kernels: Path, tmp_path: Path) -> None:
    (kernels / "__pycache__").write_text("a file where the folder would be")
    folder = cache_folder(kernels, XDG_CACHE_HOME=str(tmp_path / "cache"), PYTHONDONTWRITEBYTECODE="1")
    assert folder.parent == tmp_path / "cache" / "sq-stream"


def test_the_folder_that_the_user_names_comes_first(kernels: Path, tmp_path: Path) -> None:
    assert cache_folder(kernels, NUMBA_CACHE_DIR=str(tmp_path / "mine")).parent == tmp_path / "mine"
