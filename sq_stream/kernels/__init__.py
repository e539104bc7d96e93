"""Numba leaves: arrays in, arrays out, no I/O, no policy.

Compiled kernels are kept on disk. Numba by itself notices a change only in the file of the function that is called,
not in those of the leaves compiled into it, so they are kept in a folder named after all of these sources: an upgrade
never runs old code.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from pathlib import Path

import numba

from sq_stream.formats.storage import user_cache


def _cache_folder() -> Path:
    """The first writable of: what NUMBA_CACHE_DIR says, this package, the user's cache, a temporary folder."""
    here = Path(__file__).parent
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(here.glob("*.py")))).hexdigest()[:16]
    chosen = [Path(numba.config.CACHE_DIR)] if numba.config.CACHE_DIR else []
    for parent in (*chosen, here / "__pycache__", user_cache()):
        folder = parent / f"kernels-{digest}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(folder, os.W_OK):
            for other in parent.glob("kernels-*"):
                if other != folder:
                    shutil.rmtree(other, ignore_errors=True)
            return folder
    return Path(tempfile.mkdtemp(prefix="sq-stream-kernels-"))


numba.config.CACHE_DIR = str(_cache_folder())
