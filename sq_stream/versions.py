"""What made a result: versions of the program and its libraries, and the code that they chose for the processor."""

from __future__ import annotations

import platform
import sys
from importlib.metadata import version
from pathlib import Path

from sq_stream import __version__

LIBRARIES = ("numpy", "numba", "llvmlite", "tokenizers", "sentencepiece", "gguf")


def versions() -> dict[str, str]:
    """Of sq-stream, Python, and the libraries that a file's bytes may depend on."""
    libraries = {name: version(name) for name in LIBRARIES}
    return {"sq-stream": __version__, "python": platform.python_version(), **libraries}


def machine() -> dict[str, str]:
    """System and processor, and once NumPy is there, for what processor BLAS has code in use."""
    facts = {"system": platform.platform(terse=True), "machine": platform.machine(), "processor": _processor()}
    if "numpy" in sys.modules:
        from threadpoolctl import threadpool_info

        for library in threadpool_info():
            if library["user_api"] == "blas":
                facts["blas"] = (
                    f"{library['internal_api']} {library['version']} {library.get('architecture', '')}".strip()
                )
    return facts


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
