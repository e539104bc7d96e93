"""What a confined process is asked to do in the tests: to write, to take too much, to break down."""

import os
from pathlib import Path


def answer(request: bytes) -> bytes:
    return request[::-1]


def write(request: bytes) -> bytes:
    Path(request.decode()).write_bytes(b"x")
    return b""


def fill(request: bytes) -> bytes:
    return bytes(2**40) + request


def spin(request: bytes) -> bytes:
    while request is not None:
        pass
    return b""


def abort(request: bytes) -> bytes:
    os.abort()
