"""Where compiled kernels are kept: in a folder of their own for each state of their sources."""

from __future__ import annotations

import errno
import importlib
import os
import pkgutil
import shutil
import subprocess
import sys
from pathlib import Path

import numba
import numpy as np
import pytest
from numba.core.dispatcher import Dispatcher

from sq_stream import api
from sq_stream import kernels as package
from sq_stream.demo import model_folder
from sq_stream.events import Event, Note
from sq_stream.formats.blocks import Q8_0
from sq_stream.job.plan import Plan
from sq_stream.kernels import jit
from sq_stream.kernels.codec import encode


@pytest.fixture
def kernels(tmp_path: Path) -> Path:
    """The kernels of a copy of the package."""
    source, copy = Path(package.__file__).parents[1], tmp_path / "sq_stream"
    ignore = shutil.ignore_patterns("__pycache__")
    for part in ("kernels", "formats"):
        shutil.copytree(source / part, copy / part, ignore=ignore)
    for file in ("__init__.py", "errors.py"):
        shutil.copy(source / file, copy)
    return copy / "kernels"


def run_with(kernels: Path, code: str, **environment: str) -> list[str]:
    """The lines that `code` prints in a new process."""
    env = {k: v for k, v in os.environ.items() if k != "NUMBA_CACHE_DIR"} | {"PYTHONPATH": str(kernels.parents[1])}
    command = [sys.executable, "-P", "-c", f"from sq_stream.kernels import jit; print(jit.__file__)\n{code}"]
    out = subprocess.run(command, capture_output=True, text=True, check=True, env=env | environment).stdout
    imported, *lines = out.splitlines()
    assert Path(imported).parent == kernels
    return lines


def cache_folder(kernels: Path, **environment: str) -> Path:
    (folder,) = run_with(kernels, "import numba; print(numba.config.CACHE_DIR)", **environment)
    return Path(folder)


ENCODE = """
import numpy as np
from sq_stream.formats.blocks import Q8_0
from sq_stream.kernels import codec, q8_0
print(codec.encode(np.linspace(-1, 1, 32, dtype=np.float32)[None], Q8_0).tobytes().hex())
print(sum(q8_0._encode_rows.stats.cache_hits.values()), jit.cache_failure())
"""
FULL_DISK = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))\n"


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


def test_every_kernel_that_is_called_from_python_survives_its_cache() -> None:
    for info in pkgutil.iter_modules(package.__path__, "sq_stream.kernels."):
        for name, value in vars(importlib.import_module(info.name)).items():
            if isinstance(value, Dispatcher):
                assert isinstance(value._cache, jit._Cache), f"{info.name}.{name}: use kernels.jit"


def test_a_full_disk_costs_the_cache_alone(kernels: Path, tmp_path: Path) -> None:
    there = {"NUMBA_CACHE_DIR": str(tmp_path / "numba")}
    block, outcome = run_with(kernels, FULL_DISK + ENCODE, **there)
    assert outcome == "0 File too large"
    assert not [path for path in (tmp_path / "numba").rglob("*") if path.is_file()]
    assert run_with(kernels, ENCODE, **there) == [block, "0 None"]
    assert run_with(kernels, ENCODE, **there) == [block, "1 None"]


def test_a_damaged_cache_is_made_again(kernels: Path, tmp_path: Path) -> None:
    there = {"NUMBA_CACHE_DIR": str(tmp_path)}
    block, _ = run_with(kernels, ENCODE, **there)
    for suffix in ("nbi", "nbc"):
        for path in tmp_path.rglob(f"*.{suffix}"):
            path.write_bytes(path.read_bytes()[:-9])  # as a power cut may leave it
        assert run_with(kernels, ENCODE, **there) == [block, "0 None"]
        assert run_with(kernels, ENCODE, **there) == [block, "1 None"]


REMEMBER = """
from sq_stream.kernels import cache
cache.mark_kept({"Q8_0"})
"""
RECALL = """
from sq_stream.kernels import cache
print(*cache.kept_kernels(["Q8_0", "Q4_K"]))
"""


def test_what_is_compiled_is_known_for_this_processor_and_these_sources(kernels: Path, tmp_path: Path) -> None:
    there = {"NUMBA_CACHE_DIR": str(tmp_path)}
    assert run_with(kernels, RECALL, **there) == [""]
    run_with(kernels, REMEMBER, **there)
    assert run_with(kernels, RECALL, **there) == ["Q8_0"]
    assert run_with(kernels, RECALL, NUMBA_CPU_NAME="generic", **there) == [""]
    (kernels / "q8_0.py").write_text((kernels / "q8_0.py").read_text() + "# changed\n")
    assert run_with(kernels, RECALL, **there) == [""]


def test_compiled_kernels_change_the_predicted_memory_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def planned(kept: set[str]) -> Plan:
        monkeypatch.setattr("sq_stream.job.plan.kept_kernels", lambda uses: kept & uses)
        with (job := api.plan(model_folder(), tmp_path / "x.gguf", effort="fast", max_ram="400M")).checkpoint:
            return job

    cold, partly, warm = planned(set()), planned({"Q4_K"}), planned({"Q4_K", "Q6_K"})
    assert warm.budget.peak_ram < partly.budget.peak_ram < cold.budget.peak_ram <= 400 * 2**20
    assert warm.budget.tile_weights == cold.budget.tile_weights
    assert warm.layout.header == cold.layout.header


def test_a_finished_job_remembers_its_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[set[str]] = []
    monkeypatch.setattr("sq_stream.job.run.mark_kept", seen.append)
    api.quantize(model_folder(), tmp_path / "x.gguf", effort="fast", recipe="q8_0")
    assert seen == [{"Q8_0", "Q8_0-decoded"}]


def test_the_user_is_told_that_kernels_are_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Event] = []
    marked: list[set[str]] = []
    monkeypatch.setattr("sq_stream.job.run.mark_kept", marked.append)
    monkeypatch.setattr(jit, "_failures", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))])
    api.quantize(model_folder(), tmp_path / "x.gguf", effort="fast", recipe="q8_0", on_event=seen.append)
    notes = [event.text for event in seen if isinstance(event, Note) and "kernels" in event.text]
    assert notes == ["compiled kernels could not be kept (No space left on device): the next run compiles them again"]
    assert not marked
