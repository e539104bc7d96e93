"""Runs that nobody watches: log lines, run summaries, exit codes, silence, no control codes."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from click.testing import CliRunner, Result

from sq_stream import api, cli
from sq_stream.cli import EPILOG
from sq_stream.demo import model_folder
from sq_stream.errors import InterruptedJobError
from sq_stream.formats.gguf_write import GGUFFile

MODEL = str(model_folder())
SCHEMAS = Path(cli.__file__).parent
LOG = json.loads((SCHEMAS / "log.schema.json").read_text())
SUMMARY = json.loads((SCHEMAS / "summary.schema.json").read_text())
CONTROL = re.compile(r"[^\n -\x7e\xa0-\U0010ffff]")
TEXT = ["--ctx", "128", "--windows", "4", "--cache", "cache"]
FEW = ["--type", "bf16", "--tensor-type", "attn_v=q6_k"]
COMMANDS = {
    "plan": ["plan", MODEL, *FEW, *TEXT],
    "quantize": ["quantize", MODEL, "-o", "x.gguf", *FEW, *TEXT, "--report", "report.json"],
    "inspect": ["inspect", "x.gguf"],
    "verify": ["verify", "x.gguf", "--against", MODEL],
    "eval": ["eval", "x.gguf", "--ref", MODEL, "--windows", "1", "--cache", "cache"],
    "calibrate": ["calibrate", MODEL, *TEXT, "--imatrix-out", "m.gguf"],
    "demo": ["demo", "-o", "kept.gguf", "--prompt", "The captain", "--tokens", "12"],
    "cache list": ["cache", "list", "--cache", "cache"],
    "cache clear": ["cache", "clear", "--cache", "cache"],
}


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli.cli, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("unattended")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


@pytest.fixture(scope="module")
def runs(folder: Path) -> dict[str, tuple[Result, dict[str, Any]]]:
    """Of every command: what it printed with a JSON log, and its summary."""
    found = {}
    for name, arguments in COMMANDS.items():
        result = run(*arguments, "--log-format", "json", "--summary", "summary.json")
        assert result.exit_code == 0, (name, result.stderr)
        found[name] = result, json.loads((folder / "summary.json").read_text())
    return found


def check_lines(stderr: str) -> list[dict[str, Any]]:
    """The lines of a log, which have what the schema says and nothing else."""
    lines = [json.loads(line) for line in stderr.splitlines()]
    for line in lines:
        jsonschema.validate(line, LOG)
        assert line.keys() - LOG["properties"].keys() <= LOG["$defs"][line["event"]]["properties"].keys(), line
    return lines


def check_summary(path: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads(path.read_text())
    jsonschema.validate(summary, SUMMARY)
    assert summary.keys() == SUMMARY["properties"].keys()
    assert not path.with_name(path.name + ".lock").exists()
    return summary


def test_schemas_are_schemas() -> None:
    for schema in (LOG, SUMMARY):
        jsonschema.Draft202012Validator.check_schema(schema)
    with pytest.raises(jsonschema.ValidationError, match="'text' is a required property"):
        jsonschema.validate({"event": "note", "time": 1.0}, LOG)


def test_every_command_is_here() -> None:
    commands = {name for name, command in cli.cli.commands.items() if name != "cache"}
    assert COMMANDS.keys() == commands | {f"cache {name}" for name in cli.cache_group.commands}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_line_of_every_command_is_as_the_schema_says(
    name: str, runs: dict[str, tuple[Result, dict[str, Any]]]
) -> None:
    kinds = {line["event"] for line in check_lines(runs[name][0].stderr)}
    assert {"finished", "tensor_finished", "progress"} <= kinds or name not in ("quantize", "demo")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_leaves_a_summary(name: str, runs: dict[str, tuple[Result, dict[str, Any]]]) -> None:
    summary = runs[name][1]
    jsonschema.validate(summary, SUMMARY)
    assert summary.keys() == SUMMARY["properties"].keys()
    assert (summary["command"], summary["exit_code"], summary["error"]) == (name, 0, None)
    assert summary["ended"] > summary["started"]
    assert summary["notes"] == [
        line["text"] for line in map(json.loads, runs[name][0].stderr.splitlines()) if line["event"] == "note"
    ]


def test_the_summary_says_what_was_made_and_with_what(
    folder: Path, runs: dict[str, tuple[Result, dict[str, Any]]]
) -> None:
    summary = runs["quantize"][1]
    assert summary["result"]["sha256"] == hashlib.sha256((folder / "x.gguf").read_bytes()).hexdigest()
    assert summary["result"]["output"] == "x.gguf"
    assert summary["settings"]["tensor-type"] == {"value": ["attn_v=q6_k"], "from": "command line"}
    assert summary["settings"]["max-ram"] == {"value": "4G", "from": "default"}
    assert summary["settings"]["model_dir"]["value"] == MODEL
    assert summary["versions"]["sq-stream"] == cli.__version__
    assert summary["machine"]["blas"]
    assert 50e6 < summary["result"]["peak_ram"] <= summary["peak_ram"]


def test_the_demo_writes_a_sentence(folder: Path, runs: dict[str, tuple[Result, dict[str, Any]]]) -> None:
    stdout = runs["demo"][0].stdout
    assert "Q4_K" in stdout
    assert len(re.findall(r"[a-z]{2,}", stdout.split("The captain")[-1])) >= 3
    assert (folder / "kept.gguf").is_file()


# Exit codes, one by one


def refused(*arguments: object, exit_code: int, kind: str) -> str:
    """The message of a run that fails, the same in its log and its summary."""
    result = run(*arguments, "--log-format", "json", "--summary", "failed.json")
    error = check_lines(result.stderr)[-1]
    summary = check_summary(Path("failed.json"))
    assert (result.exit_code, summary["exit_code"], error["exit_code"]) == (exit_code,) * 3, result.stderr
    assert (error["event"], error["kind"], summary["result"]) == ("error", kind, None)
    assert summary["error"] == {key: value for key, value in error.items() if key not in ("event", "time")}
    return str(error["message"])


def test_0_done_is_told_by_the_help() -> None:
    assert run("--help").exit_code == 0
    assert set(LOG["$defs"]["error"]["properties"]["exit_code"]["enum"]) | {0} == {
        int(code) for code in re.findall(r"^ +(\d+)  ", EPILOG, re.MULTILINE)
    }


def test_1_a_fault_of_ours(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(api, "plan", fail)
    assert "ZeroDivisionError: oops" in refused("plan", MODEL, exit_code=1, kind="internal")
    assert "in fail" in json.loads(Path("failed.json").read_text())["error"]["traceback"]
    result = run("plan", MODEL)
    assert (result.exit_code, type(result.exception)) == (1, ZeroDivisionError)  # Python shows where


def test_2_wrong_usage(folder: Path) -> None:
    assert "'much' is not a size" in refused("plan", MODEL, "--max-ram", "much", exit_code=2, kind="usage")


@pytest.mark.parametrize("options", [["--log-format", "json"], ["--log-format=json"]])
@pytest.mark.parametrize("wrong", [["--type", "q3_k"], ["--no-such-option"], ["--ctx", "many"]])
def test_2_wrong_usage_before_anything_else(wrong: list[str], options: list[str], folder: Path) -> None:
    for arguments in ([*wrong, *options], [*options, *wrong]):
        result = run("plan", MODEL, *arguments)
        (error,) = check_lines(result.stderr)
        assert (result.exit_code, error["kind"], error["exit_code"]) == (2, "usage", 2)


def test_3_unsupported_model(folder: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(MODEL, tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"model_type": "other", "architectures": ["Other"]}))
    refused("plan", model, exit_code=3, kind="unsupported_model")


def test_4_bad_input(folder: Path) -> None:
    refused("verify", f"{MODEL}/config.json", exit_code=4, kind="bad_input")


def test_5_does_not_fit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused("plan", MODEL, "--effort", "fast", "--max-ram", "10M", exit_code=5, kind="does_not_fit")

    def fail(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(api, "plan", fail)
    assert "ulimit" in refused("plan", MODEL, exit_code=5, kind="does_not_fit")


def test_6_storage(folder: Path) -> None:
    refused("quantize", MODEL, "--effort", "fast", "-o", "nowhere/x.gguf", exit_code=6, kind="storage")


def test_7_verification(folder: Path, runs: dict[str, tuple[Result, dict[str, Any]]], tmp_path: Path) -> None:
    tensor = next(
        t for t in json.loads(run("plan", *COMMANDS["plan"][1:], "--json").stdout)["tensors"] if t["type"] == "Q6_K"
    )
    damaged = bytearray((folder / "x.gguf").read_bytes())
    damaged[tensor["offset"] + 208 : tensor["offset"] + 210] = b"\x00\x7c"  # the first block's d becomes infinite
    (tmp_path / "damaged.gguf").write_bytes(damaged)
    refused("verify", tmp_path / "damaged.gguf", exit_code=7, kind="verification")


def test_75_locked(folder: Path) -> None:
    output = folder / "locked.gguf"
    with GGUFFile.create(output, api.plan(MODEL, output, effort="fast").layout):
        arguments = ["quantize", MODEL, "--effort", "fast", "-o", output]
        assert "another process" in refused(*arguments, exit_code=75, kind="interrupted_job")


# Summaries


def test_a_summary_says_that_the_run_goes_on_and_is_nobody_elses(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def look(*_: object, **__: object) -> None:
        seen.append(json.loads(Path("s.json").read_text()))
        seen.append(run("inspect", MODEL, "--summary", "s.json"))
        seen.append(json.loads(Path("s.json").read_text()))
        raise InterruptedJobError("enough")

    monkeypatch.setattr(api, "plan", look)
    result = run("plan", MODEL, "--summary", "s.json")
    before, other, after = seen
    jsonschema.validate(before, SUMMARY)
    assert (before["exit_code"], before["ended"], before["seconds"]) == (None, None, None)
    assert (other.exit_code, "another process" in other.stderr, other.stdout) == (75, True, "")
    assert after == before
    assert (result.exit_code, check_summary(folder / "s.json")["exit_code"]) == (75, 75)


@pytest.mark.parametrize(
    ("path", "exit_code", "message"),
    [
        (f"{MODEL}/config.json", 2, "among the files of the checkpoint"),
        ("x.gguf", 2, "must end in .json"),
        ("nowhere/s.json", 6, "there is no folder nowhere"),
    ],
)
def test_a_summary_is_put_nowhere_else(path: str, exit_code: int, message: str, folder: Path) -> None:
    result = run("plan", MODEL, "--summary", path)
    assert (result.exit_code, message in result.stderr) == (exit_code, True), result.stderr


def test_a_summary_that_cannot_be_written_in_the_end_is_an_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inspect = api.inspect
    monkeypatch.setattr(api, "inspect", lambda path: os.rename("place", "moved") or inspect(path))
    Path("place").mkdir()
    result = run("inspect", MODEL, "--summary", "place/s.json")
    assert (result.exit_code, "opening place/s.json.partial failed" in result.stderr) == (6, True)


# Silence, and no control codes


@pytest.mark.parametrize("name", ["plan", "inspect", "verify", "cache list"])
def test_quiet_shows_results_only(name: str, runs: dict[str, tuple[Result, dict[str, Any]]]) -> None:
    quiet, told = run(*COMMANDS[name], "--quiet"), run(*COMMANDS[name])
    assert (quiet.exit_code, quiet.stderr, quiet.stdout) == (0, "", told.stdout)
    assert not CONTROL.search(told.stdout + told.stderr)


def test_a_quiet_job_says_nothing_and_a_quiet_failure_one_line(folder: Path) -> None:
    arguments = ["quantize", MODEL, "--effort", "fast", "--type", "bf16", "-o", "quiet.gguf", "-q"]
    done = run(*arguments)
    assert (done.exit_code, done.stdout, done.stderr) == (0, "", "")
    failed = run(*arguments)
    assert (failed.exit_code, failed.stdout, len(failed.stderr.splitlines())) == (2, "", 1)


def test_names_cannot_bring_control_codes(folder: Path) -> None:
    result = run("inspect", "no\x1b[31m\x07such\x9bfile")
    assert "no\\u001b[31m\\u0007such\\u009bfile does not exist" in result.stderr


def on_terminal(arguments: list[str], **environment: str) -> str:
    """What a run shows whose standard error is a terminal."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    command = [sys.executable, "-m", "sq_stream", *arguments]
    process = subprocess.Popen(command, stderr=slave, stdout=slave, env=os.environ | environment)
    os.close(slave)
    shown = b""
    try:
        while part := os.read(master, 65536):
            shown += part
    except OSError:  # Linux says EIO when the other side has closed it
        pass
    os.close(master)
    assert process.wait() == 0
    return shown.decode().replace("\r\n", "\n")


def test_a_bar_is_for_terminals_that_can_show_it(folder: Path) -> None:
    job = ["quantize", MODEL, "--effort", "fast", "--type", "bf16", "--overwrite", "-o", "bar.gguf"]
    bar = on_terminal(job, TERM="xterm", NO_COLOR="1")
    assert "\rencode" in bar
    assert not re.search(r"\x1b\[[0-9;]*m", bar)  # no colors
    assert not CONTROL.search(on_terminal(job, TERM="dumb"))
    piped = subprocess.run([sys.executable, "-m", "sq_stream", *job], capture_output=True, text=True, check=True)
    assert piped.stderr.splitlines()[-1].startswith("bar.gguf: ")
    assert not CONTROL.search(piped.stdout + piped.stderr)
