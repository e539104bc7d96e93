"""A process to which something happens at one of its file-system calls, in a small model's job.

A `Forge` is a process that has everything imported and compiled; each run is a fork of it, so that hundreds take
minutes. Before the run, all calls of `os` that touch files below one folder go through `Faults`: they are counted and
recorded, and at the n-th of them the process is killed, or gets a signal, or the call fails, or the power goes.

Run as a script, with that folder as its argument, this file is the forge.
"""

from __future__ import annotations

import _pyio
import builtins
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tiny_models

WRITES = ("write", "pwrite", "ftruncate", "posix_fallocate", "fsync", "open", "mkdir", "replace", "unlink", "rmdir")
GROWS = ("write", "pwrite", "posix_fallocate", "fsync", "open", "mkdir")  # what fails where no space is left
READS = ("read", "preadv")
CALLS = (*WRITES, *READS)

Fault = dict[str, Any]


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    code: int  # of the exit, or minus the number of the signal that killed it
    calls: list[str]  # "fsync out.gguf.partial", of a run that was not killed
    log: list[dict[str, Any]]  # its events
    error: str  # what is on standard error besides

    def notes(self) -> list[str]:
        return [event["text"] for event in self.log if event["event"] == "note"]

    @property
    def message(self) -> str:
        return next((event["message"] for event in self.log if event["event"] == "error"), self.error)

    @property
    def tensors(self) -> set[str]:
        """Finished in this run."""
        return {event["name"] for event in self.log if event["event"] == "tensor_finished"}


class Forge:
    """The process that runs are forked from; what they write is in `folder`/work."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.work = folder, folder / "work"
        write_model(folder / "model")
        write_text(folder / "text.txt")
        write_text(folder / "other.txt", seed=1)
        environment = {**os.environ, "NUMBA_THREADING_LAYER": "workqueue"}  # the one that survives a fork
        command = [sys.executable, __file__, str(folder)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"

    def run(self, arguments: list[str], fault: Fault | None = None) -> Outcome:
        """Run a command line, in a fork."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"arguments": arguments, "fault": fault or {}}) + "\n")
        self._process.stdin.flush()
        reply = json.loads(self._process.stdout.readline())
        lines = (self.folder / "stderr").read_text(errors="replace").splitlines()
        log = [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]
        rest = "\n".join(line for line in lines if not line.startswith("{"))
        calls = self.folder / "calls"
        return Outcome(reply, calls.read_text().splitlines() if calls.exists() else [], log, rest)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


class Faults:
    """Counts the calls that touch files below `root`, and lets the fault happen at the right one.

    A fault is {"kind", "n", "calls"}: at the n-th of the `calls` named (default: all that write)
      kill     the process is killed, a write being half done;
      signal   it gets a "number";
      shell    a "command" is run before the call;
      fail     the call fails with "errno", and so do all later ones of the kind if it is "lasting";
      power    the power goes: see `Disk`, with "seed".
    {"after", "number"} is a signal (default: SIGKILL) after that many seconds.
    """

    def __init__(self, root: Path, fault: Fault) -> None:
        self.root, self.fault = str(root), fault
        self.calls: list[str] = []
        self.count = 0
        self.lock = threading.RLock()
        self.disk = Disk(root) if fault.get("kind") == "power" else None
        self.real: dict[str, Callable[..., Any]] = {name: getattr(os, name) for name in CALLS}

    def install(self) -> None:
        for name in CALLS:
            setattr(os, name, self.wrapped(name))
        builtins.open = io.open = _pyio.open  # it is written in Python, and calls `os`

    def wrapped(self, name: str) -> Callable[..., Any]:
        real = self.real[name]

        def call(*args: Any, **options: Any) -> Any:
            path = self.path_of(args[0], options)
            if not path.startswith(self.root + "/work"):
                return real(*args, **options)
            with self.lock:
                counts = not (name == "open" and not args[1] & os.O_CREAT)
                if counts:
                    self.calls.append(f"{name} {path[len(self.root) + 6 :]}")
                    if name in self.fault.get("calls", WRITES):
                        self.before(name, real, args)
                result = real(*args, **options)
                if self.disk is not None:
                    self.disk.after(name, path, str(args[1]) if name == "replace" else "")
                return result

        return call

    def path_of(self, target: Any, options: dict[str, Any]) -> str:
        if isinstance(target, int):
            return os.readlink(f"/proc/self/fd/{target}").removesuffix(" (deleted)")
        path = os.fspath(target)
        if (folder := options.get("dir_fd")) is not None:
            path = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), path)
        return os.path.abspath(path)

    def before(self, name: str, real: Callable[..., Any], args: tuple[Any, ...]) -> None:
        self.count += 1
        now = self.count == self.fault.get("n")
        kind = self.fault.get("kind")
        if kind == "fail" and (now or (self.fault.get("lasting") and self.count > self.fault["n"])):
            raise OSError(self.fault["errno"], os.strerror(self.fault["errno"]))
        if not now:
            return
        if kind == "signal":
            os.kill(os.getpid(), self.fault["number"])
        elif kind == "shell":
            os.system(self.fault["command"])
        elif kind == "kill":
            if name in ("write", "pwrite"):
                real(args[0], memoryview(args[1]).cast("B")[: memoryview(args[1]).nbytes // 2], *args[2:])
            os.kill(os.getpid(), signal.SIGKILL)
        elif kind == "power":
            assert self.disk is not None
            self.disk.lose_power(random.Random(self.fault["seed"]), self.real)
            os.kill(os.getpid(), signal.SIGKILL)


class Disk:
    """What of the files below a folder has been synced, and what a power cut leaves of the rest.

    A file has the contents of its last fsync; a folder has the names of its own. What was written or renamed since may
    be there or not: each file and each folder by itself, a folder as it was at any moment since its last fsync.
    """

    def __init__(self, root: Path) -> None:
        self.root = root / "work"
        self.synced: dict[int, bytes] = {}  # by inode
        self.names: dict[str, list[dict[str, int]]] = {}  # of each folder: as synced, then after each change
        self.folders: dict[int, str] = {}  # by inode
        for folder, _, files in os.walk(self.root):
            self.names[folder] = [self.listing(folder)]
            self.folders[os.stat(folder).st_ino] = folder
            for name in files:
                path = os.path.join(folder, name)
                self.synced[os.stat(path).st_ino] = Path(path).read_bytes()

    @staticmethod
    def listing(folder: str) -> dict[str, int]:
        return {entry.name: entry.inode() for entry in os.scandir(folder)}

    def after(self, name: str, path: str, target: str) -> None:
        """Take note of a call that has been made."""
        if name == "fsync" and os.path.isdir(path):
            self.names[path] = [self.listing(path)]
        elif name == "fsync" and os.path.exists(path):
            self.synced[os.stat(path).st_ino] = Path(path).read_bytes()
        elif name in ("open", "mkdir", "unlink", "rmdir", "replace"):
            for folder in {os.path.dirname(path), os.path.dirname(target) or os.path.dirname(path)}:
                if os.path.isdir(folder):
                    self.names.setdefault(folder, [{}]).append(self.listing(folder))
            if name == "mkdir":
                self.names[path] = [{}]
                self.folders[os.stat(path).st_ino] = path

    def lose_power(self, chance: random.Random, real: dict[str, Callable[..., Any]]) -> None:
        """Put the folder into a state in which a disk may be after a power cut."""
        for name, function in real.items():
            setattr(os, name, function)
        builtins.open = io.open = _pyio.open
        found = {}
        for folder, _, files in os.walk(self.root):
            for name in files:
                path = os.path.join(folder, name)
                found[os.stat(path).st_ino] = Path(path).read_bytes()
        tree: dict[str, bytes | None] = {}
        strict = chance.random() < 0.5  # nothing that was not synced survives

        def add(folder: str) -> None:
            states = self.names.get(folder, [{}])
            for name, inode in (states[0] if strict else chance.choice(states)).items():
                path = os.path.join(folder, name)
                if self.folders.get(inode) == path:
                    tree[path] = None
                    add(path)
                else:
                    tree[path] = self.contents(inode, found.get(inode), strict, chance)

        add(str(self.root))
        shutil.rmtree(self.root)
        self.root.mkdir()
        for path, data in tree.items():
            if data is None:
                os.mkdir(path)
            else:
                Path(path).write_bytes(data)

    def contents(self, inode: int, now: bytes | None, strict: bool, chance: random.Random) -> bytes:
        """As synced, as last written, or some pages of both."""
        old = self.synced.get(inode, b"")
        if strict or now is None or chance.random() < 0.3:
            return old
        old = old.ljust(len(now), b"\0")
        pages = (slice(at, min(at + 4096, len(now))) for at in range(0, len(now), 4096))
        return b"".join((now if chance.random() < 0.5 else old)[page] for page in pages)


CTX, WINDOWS = 64, 72  # in three batches


def write_model(folder: Path) -> Path:
    """A tiny model with a tokenizer of bytes."""
    config = {**tiny_models.MODELS["llama"].config, "hidden_size": 64, "intermediate_size": 96}
    weights = tiny_models.llama(tiny_models.Random("faults"), config)
    tiny_models.write_checkpoint(folder, config, weights)
    vocabulary = {token: i for i, token in enumerate([*_byte_characters(), "er"])}
    added = [
        {"id": i, "content": f"<|{i}|>", "special": True, "normalized": False, "lstrip": False, "rstrip": False,
         "single_word": False}
        for i in range(len(vocabulary), tiny_models.N_VOCAB)
    ]  # fmt: skip
    tokenizer = {
        "version": "1.0", "added_tokens": added, "normalizer": None, "post_processor": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "vocab": vocabulary, "merges": ["e r"]},
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


def _byte_characters() -> list[str]:
    """What byte-level tokenizers write for each byte: itself where it can be seen, else a character from 256 on."""
    seen = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte if byte in seen else next(others)) for byte in range(256)]


def write_text(path: Path, seed: int = 0) -> Path:
    """Text for calibrating: words that do not repeat."""
    chance = random.Random(seed)
    words = ["".join(chance.choices("abcdefghijklmnopqrstuvwxyz", k=chance.randint(2, 9))) for _ in range(3000)]
    path.write_text("\n\n".join(" ".join(words[i : i + 200]) for i in range(0, len(words), 200)))
    return path


def quantize_arguments(folder: Path, *more: str) -> list[str]:
    """A job, calibrated but for --effort=fast; everything that it writes is below folder/work."""
    work = folder / "work"
    text = [] if "--effort=fast" in more else ["--calib", str(folder / "text.txt")]
    return [
        "quantize", str(folder / "model"), "-o", str(work / "out.gguf"), *text, "--ctx", str(CTX), "--windows",
        str(WINDOWS), "--cache", str(work / "cache"), "--threads", "1", "--log-format", "json", *more,
    ]  # fmt: skip


def eval_arguments(folder: Path, *more: str) -> list[str]:
    """An evaluation of the job's file, whose report is out.json."""
    work = folder / "work"
    return [
        "eval", str(work / "out.gguf"), "--ref", str(folder / "model"), "--text", str(folder / "other.txt"),
        "--ctx", str(CTX), "--windows", "40", "--cache", str(work / "cache"), "--threads", "1",
        "--report", str(work / "eval.json"), "--log-format", "json", *more,
    ]  # fmt: skip


def report(folder: Path) -> str:
    return f"--report={folder / 'work' / 'report.json'}"


def _serve(folder: Path) -> None:
    """Fork a run for each line of standard input, and print how it ended."""
    from sq_stream.cli import cli, console

    console.JSON_INTERVAL = 0  # tests look at all progress

    def run(arguments: list[str], fault: Fault) -> int:
        for name in ("stderr", "calls"):
            (folder / name).unlink(missing_ok=True)
        child = os.fork()
        if child == 0:
            code = 1
            try:
                with open(folder / "stderr", "w") as errors, open(os.devnull, "w") as nothing:
                    os.dup2(errors.fileno(), 2)
                    os.dup2(nothing.fileno(), 1)
                signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in jobs in a shell's background
                faults = Faults(folder, fault)
                faults.install()
                try:
                    cli(arguments)
                except SystemExit as end:
                    code = int(end.code or 0)
                finally:
                    (folder / "calls").write_text("\n".join(faults.calls))
            finally:
                sys.stderr.flush()
                os._exit(code)
        if "after" in fault:
            time.sleep(fault["after"])
            os.kill(child, fault.get("number", signal.SIGKILL))
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    (folder / "work").mkdir()
    output = os.dup(1)
    for number in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), number)
    whole = quantize_arguments(folder, report(folder))
    for arguments in (whole, [*whole, "--effort=best", "--fresh", "--overwrite"], eval_arguments(folder)):
        try:
            cli(arguments)
        except SystemExit as end:
            if end.code:
                raise
    shutil.rmtree(folder / "work")
    (folder / "work").mkdir()
    os.write(output, b"ready\n")
    for line in sys.stdin:
        request = json.loads(line)
        code = run(request["arguments"], request["fault"])
        os.write(output, f"{code}\n".encode())


if __name__ == "__main__":
    _serve(Path(sys.argv[1]))
