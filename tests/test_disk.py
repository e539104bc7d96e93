"""Real file systems that are full or cannot be written, and inputs that vanish or change in the middle of a job."""

from __future__ import annotations

import errno
import os
import random
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from faults import READS, WRITES, Forge, eval_arguments
from histories import History, Whole, empty, names

SEED = int(os.environ.get("SQ_STREAM_TEST_SEED", "1"))
Remount = Callable[[str], str]


@pytest.fixture(scope="module", params=["fast", "balanced", "best"])
def job(request: pytest.FixtureRequest, forge: Forge) -> Whole:
    """Of each effort."""
    if request.param == "fast":
        return Whole(forge, "--effort=fast")
    job: Whole = request.getfixturevalue("whole" if request.param == "balanced" else "best")
    return job


@pytest.fixture
def remount(forge: Forge) -> Iterator[Remount]:
    """The forge's work lies on a file system of its own; how to mount it with another option."""
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", forge.work], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("no right to mount a file system")
    yield lambda option: f"mount -o remount,{option} {forge.work}"
    subprocess.run(["umount", "-l", forge.work], check=True)


def call(command: str) -> None:
    subprocess.run(command, shell=True, check=True)


def files(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in names(folder) if (folder / name).is_file()}


@pytest.mark.parametrize("sizes", [3, pytest.param(40, marks=pytest.mark.slow)])
def test_a_disk_that_is_too_small_at_any_stage(sizes: int, job: Whole, forge: Forge, remount: Remount) -> None:
    """It shrinks behind the plan's back: exit code 6, nothing that looks finished, and it goes on on a larger one."""
    paths = [path for name, _, path in (line.partition(" ") for line in job.outcome.calls) if name in WRITES]
    n = next((i for i, path in enumerate(paths, 1) if path.endswith("/pass")), 1)  # nothing is refused now
    least, most = (len(job.bytes) // 1024 + 16, 8192) if job.cache else (8, 128)  # KiB
    failed = 0
    for i in range(sizes):
        call(remount("size=64m"))
        history = History(forge, job)
        size = int(least * (most / least) ** (i / (sizes - 1)))
        outcome = history.run({"kind": "shell", "n": n, "command": remount(f"size={size}k")})
        assert outcome.code in (0, 6), outcome.message
        print(f"{size} KiB: {outcome.code}, {[event['event'] for event in outcome.log][-2:]}")
        if outcome.code == 6:
            failed += 1
            assert os.strerror(errno.ENOSPC) in outcome.message
            assert not (forge.work / "out.gguf").exists()
            assert not (forge.work / "report.json").exists()
            call(remount("size=64m"))
            history.finish()
    assert 0 < failed < sizes


@pytest.mark.parametrize("runs", [1, pytest.param(30, marks=pytest.mark.slow)])
def test_a_disk_that_others_fill_up(runs: int, job: Whole, forge: Forge, remount: Remount) -> None:
    filler, chance = forge.work / "filler", random.Random(SEED)
    for _ in range(runs):
        history = History(forge, job)
        n = chance.randint(1, job.count(WRITES) // 2)
        outcome = history.run({"kind": "shell", "n": n, "command": f"cat /dev/zero > {filler} 2> /dev/null"})
        assert (outcome.code, os.strerror(errno.ENOSPC) in outcome.message) == (6, True), outcome.message
        assert not (forge.work / "out.gguf").exists()
        filler.unlink()
        history.finish()


def test_a_file_system_that_cannot_be_written(whole: Whole, forge: Forge, remount: Remount) -> None:
    """Of each command; what an interrupted job has left there is kept."""
    for interrupted in (False, True):
        history = History(forge, whole)
        if interrupted:
            history.run({"kind": "kill", "n": whole.count(WRITES) // 2})
        call(remount("ro"))
        before = files(forge.work)
        without_report = [argument for argument in whole.arguments if not argument.startswith("--report")]
        for arguments in (whole.arguments, without_report):
            refused = forge.run(arguments)
            assert (refused.code, "cannot be written" in refused.message) == (6, True), refused.message
            assert files(forge.work) == before
        call(remount("rw"))
        history.finish()
    call(remount("ro"))
    before = files(forge.work)
    refused = forge.run(eval_arguments(forge.folder))
    assert refused.code == 6, refused.message
    assert files(forge.work) == before


@contextmanager
def restored(path: Path) -> Iterator[None]:
    """With its contents and its time of change, afterwards."""
    data, status = path.read_bytes(), path.stat()
    try:
        yield
    finally:
        path.write_bytes(data)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize(
    ("name", "change", "now", "then"),
    [
        ("model/model.safetensors", "rm {}", 0, 4),  # what is open can be read
        ("model/model.safetensors", "truncate -s 20000 {}", 6, 4),
        ("model/model.safetensors", "touch {}", 6, 2),
        ("model/tokenizer.json", "rm {}", 0, 4),
        ("text.txt", "rm {}", 0, 2),  # it is read at the start
        ("text.txt", "echo x >> {}", 0, 2),
    ],
)
def test_an_input_that_vanishes_or_changes(
    name: str, change: str, now: int, then: int, forge: Forge, whole: Whole
) -> None:
    """In the middle of a job, and until the next one."""
    path, n = forge.folder / name, whole.count(WRITES) // 3
    command = change.format(path)
    with restored(path):
        history = History(forge, whole)
        outcome = history.run({"kind": "shell", "n": n, "command": command})
        assert outcome.code == now, outcome.message
        assert (forge.work / "out.gguf").exists() == (now == 0)
    history.finish()
    with restored(path):
        history = History(forge, whole)
        assert history.run({"kind": "shell", "n": 2 * n, "command": f"{command}; kill -9 $PPID"}).code == -9
        before = files(forge.work)
        refused = forge.run(whole.arguments)
        assert refused.code == then, refused.message
        assert files(forge.work) == before
    history.finish()


def test_a_file_that_shrinks_while_it_is_evaluated(forge: Forge, whole: Whole) -> None:
    empty(forge.work)
    (forge.work / "out.gguf").write_bytes(whole.bytes)
    shrink = {"kind": "shell", "n": 3, "calls": READS, "command": f"truncate -s 9000 {forge.work / 'out.gguf'}"}
    outcome = forge.run(eval_arguments(forge.folder), shrink)
    assert (outcome.code, "shrank while in use" in outcome.message) == (6, True), outcome.message
    assert not (forge.work / "eval.json").exists()
