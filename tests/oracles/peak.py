"""A program's peak memory and processor time, as the kernel counts them."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

# A process starts its life with the peak of the one that started it: this small one stands between.
_MEASURE = """
import json, resource, subprocess, sys
code = subprocess.run(sys.argv[1:], stdout=sys.stderr).returncode
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps([code, used.ru_maxrss, used.ru_utime + used.ru_stime]))
"""


@dataclass(frozen=True)
class Run:
    """A finished program: `peak_bytes` is its peak resident memory, mapped pages included; times in seconds."""

    exit_code: int
    peak_bytes: int
    seconds: float
    cpu_seconds: float  # of all its threads
    log: str


def run_measured(command: Sequence[str]) -> Run:
    """Run `command` to its end; its output is in `log`. Linux."""
    start = time.monotonic()
    measured = subprocess.run(
        [sys.executable, "-I", "-S", "-c", _MEASURE, *command], capture_output=True, text=True, check=True
    )
    exit_code, peak_kib, cpu_seconds = json.loads(measured.stdout)
    return Run(exit_code, peak_kib * 1024, time.monotonic() - start, cpu_seconds, measured.stderr)
