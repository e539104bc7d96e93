"""Killed, powered off or out of disk at any call: what is finished is kept, and the file is the same in the end.

By default some dozens of runs, with `-m slow` hundreds; each is random by the seed that is printed.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from faults import CALLS, GROWS, READS, WRITES, Fault, Forge, eval_arguments, write_text
from histories import History, Whole, empty, names

from sq_stream.demo import model_folder
from sq_stream.formats.journal import Journal, read_journal

SEED = int(os.environ.get("SQ_STREAM_TEST_SEED", "1"))


@pytest.fixture(params=["balanced", "best"])
def job(request: pytest.FixtureRequest, whole: Whole) -> Whole:
    """Of either effort."""
    return whole if request.param == "balanced" else request.getfixturevalue("best")


def repeated(few: int, many: int) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("runs", [few, pytest.param(many, marks=pytest.mark.slow)])


def interrupted_at_random(forge: Forge, whole: Whole, runs: int, fault: Callable[[random.Random], Fault]) -> list[int]:
    """Jobs that are interrupted up to three times until `runs` were; returns the exit codes."""
    chance, codes = random.Random(SEED), []
    print(f"seed {SEED}, {runs} runs")
    while len(codes) < runs:
        history = History(forge, whole)
        for _ in range(min(chance.randint(1, 3), runs - len(codes))):
            if history.is_finished:
                break
            codes.append(history.run(fault(chance)).code)
        history.finish()
    return codes


@repeated(6, 120)
def test_killed_at_any_call(forge: Forge, job: Whole, runs: int) -> None:
    n = job.count(WRITES)
    codes = interrupted_at_random(forge, job, runs, lambda r: {"kind": "kill", "n": r.randint(1, n)})
    assert codes.count(-signal.SIGKILL) > runs / 3  # a resumed run may be over before


@repeated(3, 60)
def test_killed_at_any_time(forge: Forge, job: Whole, runs: int) -> None:
    codes = interrupted_at_random(forge, job, runs, lambda r: {"after": r.uniform(0.0, 0.9)})
    assert -signal.SIGKILL in codes


@repeated(5, 100)
def test_a_power_cut_at_any_call(forge: Forge, job: Whole, runs: int) -> None:
    """What was not synced is lost, or partly so: contents and names, each by itself."""
    n = job.count(WRITES)
    interrupted_at_random(
        forge, job, runs, lambda r: {"kind": "power", "n": r.randint(1, n), "seed": r.randint(0, 2**30)}
    )


def test_other_threads_and_memory_go_on(forge: Forge, job: Whole) -> None:
    history = History(forge, job)
    history.run({"kind": "kill", "n": job.count(WRITES) // 2})
    outcome = forge.run([*job.arguments, "--threads", "2", "--max-ram", "1G"])
    assert outcome.code == 0, outcome.message
    assert any("resuming" in note for note in outcome.notes())
    history.finish()


@pytest.mark.parametrize("damage", [b"", None])
def test_lost_streams_are_made_again(damage: bytes | None, forge: Forge, best: Whole) -> None:
    """What lies between the branches of the effort best is damaged or gone: what is encoded is kept."""
    history = History(forge, best)
    journaled = [i for i, line in enumerate(best.outcome.calls) if ".streams" in line]
    history.run({"kind": "kill", "calls": CALLS, "n": journaled[len(journaled) * 3 // 4]})
    streams = list((forge.work / "out.gguf.streams").rglob("*.zst"))
    assert streams
    for path in streams:
        path.unlink() if damage is None else path.write_bytes(damage)
    history.layers["encode"] = 0
    history.finish()


@repeated(4, 100)
def test_a_signal_at_any_call(forge: Forge, whole: Whole, runs: int) -> None:
    n = whole.count(WRITES)
    signals = [int(signal.SIGINT), int(signal.SIGTERM)]
    history = History(forge, whole)
    chance = random.Random(SEED)
    for _ in range(runs):
        outcome = history.run({"kind": "signal", "n": chance.randint(1, n), "number": chance.choice(signals)})
        assert outcome.code in (0, 75), outcome.message
        if outcome.code == 75:
            assert "the same command goes on" in outcome.message
        if outcome.code == 0 or chance.random() < 0.3:
            history.finish() if outcome.code else None
            history = History(forge, whole)


FAILURES = [
    (errno.ENOSPC, GROWS, True),
    (errno.EIO, ("fsync",), False),
    (errno.EIO, ("write", "pwrite", "ftruncate", "replace", "mkdir", "open"), False),
    (errno.EIO, READS, True),
    (errno.EROFS, tuple(name for name in WRITES if name != "fsync"), True),
]


@repeated(3, 60)
@pytest.mark.parametrize(("number", "calls", "lasting"), FAILURES)
def test_a_call_that_fails(
    number: int, calls: tuple[str, ...], lasting: bool, runs: int, forge: Forge, whole: Whole
) -> None:
    """Exit code 6 and nothing that looks finished, unless no harm is done."""
    n, chance = whole.count(calls), random.Random(SEED + number)
    for at in [n - 1, *(chance.randint(1, n) for _ in range(runs - 1))]:
        history = History(forge, whole)
        outcome = history.run({"kind": "fail", "n": at, "errno": number, "calls": calls, "lasting": lasting})
        assert outcome.code in (0, 6), f"{at}: {outcome.message}"
        if outcome.code == 6:
            assert os.strerror(number) in outcome.message
            assert not (forge.work / "out.gguf").exists()
        else:
            assert (forge.work / "out.gguf").read_bytes() == whole.bytes
            shutil.rmtree(forge.work)
            continue
        history.finish()


def is_between(path: str) -> bool:
    """Whether a file is of a residual stream, the last generation of which may be lost, and not of parameters."""
    return ".streams/" in path and "/parameters/" not in path


def test_what_is_journaled_is_on_the_disk(job: Whole) -> None:
    """Data is synced before the line that tells of it, that line before it is believed; a rename, with its folder."""
    calls = [tuple(line.split(" ", 1)) for line in job.outcome.calls]
    unsynced: set[str] = set()
    renamed: dict[str, str] = {}  # folder -> file
    journals = 0
    for name, path in calls:
        folder = path.rpartition("/")[0]
        if name in ("write", "pwrite") and path.endswith("journal") and not renamed:
            journals += 1
            own = {other for other in unsynced if other.startswith(folder) and not is_between(other)}
            assert not own, f"{path} tells of what is not synced: {own}"
        if name in ("write", "pwrite"):
            unsynced.add(path)
        elif name == "fsync":
            unsynced.discard(path)
            renamed.pop(path, None)
        elif name == "unlink":
            if ".streams/" in path:  # the branch before is in the journal, so that what it led to has to be there
                assert not {other for other in unsynced if ".streams/" in other and ".streams/refine/" not in other}
            unsynced.discard(path)
        elif name == "replace":
            assert path not in unsynced
            renamed[folder] = path
        if name in ("write", "pwrite", "unlink"):
            assert not renamed, f"{renamed} was renamed, and its folder not synced"
    assert journals > len(job.outcome.tensors)


def test_two_runs_on_one_file(forge: Forge, whole: Whole) -> None:
    """The second one ends at once and touches nothing; a lock whose process is gone is none."""
    history = History(forge, whole)
    history.run({"kind": "kill", "n": whole.count(WRITES) // 2})
    journal = forge.work / "out.gguf.journal"
    journal.write_bytes(journal.read_bytes() + b"0badc0de {")  # a line that the first one is just writing
    before = {path: path.read_bytes() for path in forge.work.rglob("*") if path.is_file()}
    with open(forge.work / "out.gguf.partial", "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        for more in ([], ["--fresh"]):
            outcome = forge.run([*whole.arguments, *more])
            assert (outcome.code, "another process is at work on" in outcome.message) == (75, True)
    assert {path: path.read_bytes() for path in forge.work.rglob("*") if path.is_file()} == before
    history.finish()


def test_two_runs_on_one_cache_or_report(forge: Forge, whole: Whole) -> None:
    for name in ("report.json.partial", "cache/*/lock"):
        history = History(forge, whole)
        history.run({"kind": "kill", "n": whole.count(WRITES) - 60})
        path = next(forge.work.glob(name), forge.work / name)
        with open(path, "ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            outcome = history.run()
            assert (outcome.code, f"another process is at work on {path}" in outcome.message) == (75, True)
        history.finish()


def write_card(folder: Path) -> None:
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")


CHANGES: dict[str, tuple[list[str], Callable[[Forge], None] | None]] = {
    "checkpoint": ([], lambda forge: os.utime(forge.folder / "model" / "model.safetensors", ns=(1, 1))),
    "calibration text": ([], lambda forge: write_text(forge.folder / "text.txt", seed=2) and None),
    "type": (["--type", "q6_k"], None),
    "pure": (["--pure"], None),
    "tensor_types": (["--tensor-type", "ffn_down=q8_0"], None),
    "effort": (["--effort", "fast"], None),
    "pre": (["--pre", "smollm"], None),
    "importance matrix": (["--imatrix"], None),
    "version of sq-stream": ([], None),
    "header": (
        [],
        lambda forge: (forge.folder / "model" / "README.md").write_text("---\nlicense: mit\n---\n") and None,
    ),
}


@pytest.mark.parametrize("what", CHANGES)
def test_another_job_is_not_gone_on_with(what: str, forge: Forge, whole: Whole, tmp_path: Path) -> None:
    """It says what differs and keeps what is there; `--fresh` starts over."""
    history = History(forge, whole)
    history.run({"kind": "kill", "n": whole.count(WRITES) * 2 // 3})
    more, change = CHANGES[what]
    arguments = [argument for argument in whole.arguments if not argument.startswith("--report")]
    if what in ("effort", "importance matrix"):
        arguments = [a for a in arguments if a != "--calib" and a != str(forge.folder / "text.txt")]
    if what == "importance matrix":
        path = tmp_path / "m.gguf"
        made = forge.run(["calibrate", *whole.arguments[1:2], *calibration_arguments(forge), f"--imatrix-out={path}"])
        assert made.code == 0, made.message
        more = ["--imatrix", str(path)]
    saved = tmp_path / "saved"
    shutil.copytree(forge.folder / "model", saved)
    text = (forge.folder / "text.txt").read_bytes()
    journal = forge.work / "out.gguf.journal"
    original = journal.read_bytes()
    try:
        if change is not None:
            change(forge)
        if what == "version of sq-stream":
            header, records, _ = read_journal(journal)
            with Journal.create(journal, {**header, what: "0.0.1"}) as other:
                for record in records:
                    other.append(record)
        before = (forge.work / "out.gguf.partial").read_bytes(), journal.read_bytes()
        refused = forge.run([*arguments, *more])
        assert refused.code == 2
        assert f"an interrupted run that differs in {what}" in refused.message.replace(
            "calibration text, importance", "importance"
        )
        assert ((forge.work / "out.gguf.partial").read_bytes(), journal.read_bytes()) == before
        assert forge.run([*arguments, *more, "--fresh"]).code == 0
        assert not journal.exists()
    finally:
        shutil.copytree(saved, forge.folder / "model", dirs_exist_ok=True)
        (forge.folder / "model" / "README.md").unlink(missing_ok=True)
        (forge.folder / "text.txt").write_bytes(text)
        assert original


def calibration_arguments(forge: Forge) -> list[str]:
    return ["--calib", str(forge.folder / "text.txt"), "--ctx", "64", "--windows", "72", "--cache",
            str(forge.work / "cache"), "--threads", "1", "--log-format", "json"]  # fmt: skip


@repeated(3, 60)
def test_a_calibration_and_its_export(runs: int, forge: Forge, whole: Whole) -> None:
    path = forge.work / "m.gguf"
    arguments = ["calibrate", str(forge.folder / "model"), *calibration_arguments(forge), f"--imatrix-out={path}"]
    empty(forge.work)
    first = forge.run(arguments)
    assert first.code == 0, first.message
    expected, left = path.read_bytes(), names(forge.work)
    n, chance = sum(line.split()[0] in WRITES for line in first.calls), random.Random(SEED)
    for i in range(runs):
        empty(forge.work)
        fail: Fault = {"kind": "fail", "errno": errno.ENOSPC, "calls": GROWS, "lasting": True}
        fault = [{"kind": "kill"}, fail, {"kind": "power", "seed": i}][i % 3]
        outcome = forge.run(arguments, {**fault, "n": chance.randint(1, n) if i > 2 else n - 5 * i})
        assert outcome.code in (0, 6, -signal.SIGKILL), outcome.message
        assert not path.exists() or path.read_bytes() == expected
        assert forge.run(arguments).code == 0
        assert path.read_bytes() == expected
        assert names(forge.work) == left


@repeated(4, 60)
def test_an_evaluation(runs: int, forge: Forge, whole: Whole) -> None:
    """It starts over, and what a killed one leaves is removed."""
    path = forge.work / "eval.json"

    def restart() -> None:
        empty(forge.work)
        (forge.work / "out.gguf").write_bytes(whole.bytes)

    def scores() -> Any:
        return json.loads(path.read_text())["evaluation"]["suites"]

    restart()
    first = forge.run(eval_arguments(forge.folder))
    assert first.code == 0, first.message
    expected, left, chance = scores(), names(forge.work), random.Random(SEED)
    for i in range(runs):
        restart()
        calls = READS if i % 4 == 3 else GROWS if i % 4 == 2 else WRITES
        fault = {"kind": ["kill", "signal", "fail", "fail"][i % 4], "number": 15, "lasting": True, "calls": calls}
        n = sum(line.split()[0] in calls for line in first.calls)
        fault["errno"] = errno.EIO if calls is READS else errno.ENOSPC
        outcome = forge.run(eval_arguments(forge.folder), {**fault, "n": chance.randint(1, n)})
        assert outcome.code in ((-9,), (75, 0), (6, 0), (6,))[i % 4], outcome.message
        assert not path.exists() or scores() == expected
        again = forge.run(eval_arguments(forge.folder))
        assert again.code == 0, again.message
        assert scores() == expected
        assert names(forge.work) == left


@pytest.mark.parametrize("command", ["plan", "verify", "inspect", "eval", "cache"])
def test_a_signal_in_the_other_commands(command: str, forge: Forge, whole: Whole) -> None:
    empty(forge.work)
    output = forge.work / "out.gguf"
    output.write_bytes(whole.bytes)
    shutil.copytree(forge.folder / "model", forge.work / "model")
    arguments = {
        "plan": ["plan", str(forge.work / "model"), "--effort", "fast"],
        "verify": ["verify", str(output), "--against", str(forge.work / "model"), "--log-format", "json"],
        "inspect": ["inspect", str(forge.work / "model")],
        "eval": eval_arguments(forge.folder),
        "cache": ["cache", "clear", "--cache", str(forge.work)],
    }[command]
    if command == "cache":
        shutil.copytree(forge.work / "model", forge.work / "entry")
        Journal.create(forge.work / "entry" / "journal", {"about": {"model": "", "n_tokens": 1}, "steps": 1}).close()
    for number in (signal.SIGINT, signal.SIGTERM):
        fault = {"kind": "signal", "n": 2, "number": int(number), "calls": (*READS, "unlink")}
        outcome = forge.run(arguments, fault)
        assert (outcome.code, "the same command" in outcome.message) == (75, True), outcome.message


def test_a_command_that_python_cannot_interrupt_ends_too() -> None:
    code = """
import hashlib, threading
from sq_stream.cli import console
console.Interrupts.__init__.__globals__["GRACE"] = 0.1
with console.Console("json"):
    threading.Timer(0.5, print, ("working",), {"flush": True}).start()  # when the next line is at work
    hashlib.pbkdf2_hmac("sha512", b"", b"", 2**31 - 1)
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=120)
    assert (process.returncode, json.loads(errors)["kind"]) == (75, "interrupted_job")


@pytest.mark.parametrize("number", [signal.SIGTERM])
def test_a_signal_while_kernels_are_compiled(number: signal.Signals, tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "sq_stream", "quantize", str(model_folder()), "--effort", "fast", "-o",
        str(tmp_path / "out.gguf"), "--log-format", "json",
    ]  # fmt: skip
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path / "kernels")}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if json.loads(line).get("stage") == "encode":
                process.send_signal(number)
                break
        _, rest = process.communicate(timeout=120)
    assert (process.returncode, json.loads(rest.splitlines()[-1])["kind"]) == (75, "interrupted_job")
