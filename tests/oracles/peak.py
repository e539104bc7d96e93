"""A program's peak memory and processor time, as the kernel counts them, and a program under the kernel's limit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")

# A process starts its life with the peak of the one that started it: this small one stands between.
_MEASURE = """
import json, os, resource, subprocess, sys
join = sys.argv[1]
def enter():
    if join:
        with open(join, "w") as file:
            file.write(str(os.getpid()))
code = subprocess.run(sys.argv[2:], stdout=sys.stderr, preexec_fn=enter).returncode
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps([code, used.ru_maxrss, used.ru_utime + used.ru_stime]))
"""


@dataclass(frozen=True)
class Run:
    """A finished program: `peak_bytes` is its peak resident memory, mapped pages included; times in seconds."""

    exit_code: int  # -9 where the kernel stopped it at its limit
    peak_bytes: int
    seconds: float
    cpu_seconds: float  # of all its threads
    log: str
    limited_by_kernel: bool = False


def run_measured(command: Sequence[str], *, _processes: Path | None = None) -> Run:
    """Run `command` to its end; its output is in `log`. Linux."""
    start = time.monotonic()
    measured = subprocess.run(
        [sys.executable, "-I", "-S", "-c", _MEASURE, str(_processes or ""), *command],
        capture_output=True,
        text=True,
        check=True,
    )
    exit_code, peak_kib, cpu_seconds = json.loads(measured.stdout)
    return Run(
        exit_code, peak_kib * 1024, time.monotonic() - start, cpu_seconds, measured.stderr, _processes is not None
    )


def run_limited(command: Sequence[str], limit_bytes: int) -> Run:
    """Run `command` in a memory cgroup of `limit_bytes`, swap forbidden, where the machine lets us make one.

    The kernel counts there all that the program keeps: its own pages, mapped ones, page tables, and cached pages of
    files, which it takes back first; what it cannot keep below the limit it kills. Where there is no cgroup, the peak
    is only measured: compare it yourself.
    """
    with _limit(limit_bytes) as processes:
        return run_measured(command, _processes=processes)


@contextmanager
def _limit(limit_bytes: int) -> Iterator[Path | None]:
    """The file of a new cgroup that a process writes itself into; None where there can be none."""
    for parent in _own_cgroups():
        try:
            folder = Path(tempfile.mkdtemp(prefix="sq-stream-", dir=parent))
        except OSError:
            continue
        try:
            yield folder / "cgroup.procs" if _set_limit(folder, limit_bytes) else None
            return
        finally:
            folder.rmdir()
    yield None


def _own_cgroups() -> Iterator[Path]:
    """Where this process may perhaps make a cgroup: below its own, beside it, or at the top; of version 1 or 2."""
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            number, controllers, path = line.split(":", 2)
            if "memory" in controllers.split(","):
                mount = CGROUPS / "memory"
            elif number == "0" and (CGROUPS / "cgroup.controllers").exists():
                mount = CGROUPS
            else:
                continue
            own = mount / path.lstrip("/")
            yield from (place for place in (own, own.parent, mount) if place.is_relative_to(mount) and place.is_dir())


def _set_limit(folder: Path, limit_bytes: int) -> bool:
    """Whether the kernel took the limit."""
    try:
        if (folder / "memory.max").exists():
            (folder / "memory.max").write_text(str(limit_bytes))
            with suppress(OSError):
                (folder / "memory.swap.max").write_text("0")
        else:
            (folder / "memory.limit_in_bytes").write_text(str(limit_bytes))
            with suppress(OSError):
                (folder / "memory.memsw.limit_in_bytes").write_text(str(limit_bytes))
        return os.access(folder / "cgroup.procs", os.W_OK)
    except OSError:
        return False


def is_in_memory(folder: Path) -> bool:
    """Whether files in `folder` are memory, which the kernel cannot take back: a limit would count them."""
    found = subprocess.run(["stat", "-f", "-c", "%T", str(folder)], capture_output=True, text=True, check=False)
    return found.stdout.strip() in ("tmpfs", "ramfs")
