"""Work on what is not trusted, in a process of its own with limits on time, memory and files.

Chat templates are programs, and tokenizers come with regular expressions and rules that a few bytes can make work for
ever or fill any memory; the libraries that run them are native code, which a damaged file may bring down. What happens
in the child process, that process bears.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys

from sq_stream import errors
from sq_stream.errors import SqStreamError

MIB = 2**20
_CHILD = "import sys; sys.path[:] = sys.argv[3:]; from sq_stream.confined import serve; serve(*sys.argv[1:3])"
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
_DONE, _REFUSED = b"done\n", b"refused\n"


class FailedError(Exception):
    """The child process gave no answer; the message says why."""


def call(function: str, request: bytes, *, memory: int, cpu_seconds: int) -> bytes:
    """What `function` ("module:name", from bytes to bytes) makes of `request`.

    Args:
        function: may write no file.
        request: its argument.
        memory: bytes of address space that the child may have, program included.
        cpu_seconds: processor time that it may take; six times as long by the clock.

    Raises:
        FailedError: it exceeded a limit, or broke down.
        SqStreamError: as `function` raised it.
    """
    try:
        child = subprocess.run(
            [sys.executable, "-I", "-c", _CHILD, function, f"{memory}:{cpu_seconds}", *sys.path],
            input=request,
            capture_output=True,
            env={**os.environ, **_ENVIRONMENT},
            timeout=6 * cpu_seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise FailedError(f"it took more than {6 * cpu_seconds} s") from None
    except OSError as error:
        raise FailedError(f"no process could be started for it: {error.strerror}") from error
    if child.returncode < 0:
        raise FailedError(f"it was stopped: at most {cpu_seconds} s and {memory // MIB} MiB are allowed")
    if child.stdout.startswith(_DONE):
        return child.stdout[len(_DONE) :]
    if child.stdout.startswith(_REFUSED):
        kind, _, message = child.stdout[len(_REFUSED) :].decode("utf-8", errors="replace").partition("\n")
        raise getattr(errors, kind)(message)
    lines = child.stderr.decode("utf-8", errors="replace").split("\n")
    raise FailedError(next((line[:200] for line in reversed(lines) if line.strip()), "no answer"))


def serve(function: str, limits: str) -> None:
    """The child process: limit itself, read the request from standard input, write the answer to standard output."""
    import resource

    memory, cpu_seconds = map(int, limits.split(":"))
    module, _, name = function.partition(":")
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    request = sys.stdin.buffer.read()
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds))
    try:
        answer = _DONE + getattr(importlib.import_module(module), name)(request)
    except SqStreamError as error:
        answer = _REFUSED + f"{type(error).__name__}\n{error}".encode("utf-8", errors="replace")
    sys.stdout.buffer.write(answer)


def open_no_more(*modules: str) -> None:
    """From now on this process can open neither a file nor a socket; `modules` are those it may yet import."""
    import resource

    for module in modules:
        importlib.import_module(module)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))
