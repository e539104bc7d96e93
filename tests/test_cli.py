"""The command line: arguments, output, errors, exit codes."""

from __future__ import annotations

import importlib.util
import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from sq_stream import errors
from sq_stream.cli import EPILOG, cli
from sq_stream.demo import model_folder

ROOT = Path(__file__).parent.parent
MODEL = str(model_folder())


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def demo_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli") / "demo.gguf"
    result = run("quantize", MODEL, "--effort", "fast", "-o", path, "--log-format", "json")
    assert result.exit_code == 0, result.output
    return path


def test_starting_up_loads_no_compiler() -> None:
    code = "import sys, sq_stream.cli; sys.exit('numba' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_reference_in_the_docs_is_up_to_date() -> None:
    spec = importlib.util.spec_from_file_location("generate_cli", ROOT / "docs" / "generate_cli.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.PAGE.read_text(encoding="utf-8") == module.render(), "run python docs/generate_cli.py"


def test_help_imports_nothing_heavy() -> None:
    code = "import sys\nfrom sq_stream.cli import cli\ncli(['--help'], standalone_mode=False)\nprint(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"numpy", "numba", "gguf", "tokenizers", "sentencepiece", "psutil", "tqdm"} & set(modules)


def test_exit_codes_of_the_help_are_those_of_the_errors() -> None:
    documented = {int(code) for code in re.findall(r"^ +(\d+)  ", EPILOG, re.MULTILINE)}
    raised = {e.exit_code for e in vars(errors).values() if isinstance(e, type) and issubclass(e, errors.SqStreamError)}
    assert documented == raised | {0}


@pytest.mark.parametrize(
    ("arguments", "exit_code", "message"),
    [
        (["quantize", "no-such-folder"], 4, "no-such-folder does not exist"),
        (["quantize", MODEL, "--effort", "fast", "--max-ram", "much"], 2, "'much' is not a size"),
        (["quantize", MODEL, "--effort", "fast", "--max-ram", "10M"], 5, "the smallest that works is --max-ram"),
        (["quantize", MODEL, "--effort", "fast", "--threads", "100000"], 2, "--threads 100000"),
        (["quantize", MODEL, "--effort", "fast", "--type", "q3_k"], 2, "Invalid value for '--type'"),
        (["quantize", MODEL, "--effort", "fast", "--tensor-type", "ffn_down"], 2, "PATTERN=TYPE"),
        (["quantize", MODEL, "--effort", "fast", "--tensor-type", "ffn_dwon=q6_k"], 2, "ffn_dwon"),
        (["quantize", MODEL, "--effort", "fast", "-o", "no-such-folder/x.gguf"], 6, "no-such-folder"),
        (["quantize", MODEL, "--effort", "fast", "-o", "."], 2, "is a folder"),
        (
            ["quantize", MODEL, "--effort", "fast", "-o", f"{MODEL}/model.safetensors", "--overwrite"],
            2,
            "among the files of the checkpoint",
        ),
        (["quantize", MODEL, "--report", "x.pdf"], 2, "must end in .html for a page or in .json"),
        (["quantize", MODEL, "--report", "no-such-folder/x.html"], 6, "there is no folder no-such-folder"),
        (["quantize", MODEL, "--report", f"{MODEL}/config.json"], 2, "among the files of the checkpoint"),
        (["eval", "x.gguf", "--ref", MODEL, "--report", f"{MODEL}/x.html"], 2, "among the files of the checkpoint"),
        (["calibrate", MODEL, "--calib", "no-such-file"], 2, "no-such-file: no such calibration file"),
        (["calibrate", MODEL, "--calib", MODEL], 6, "Is a directory"),
        (["calibrate", MODEL, "--calib", f"{MODEL}/model.safetensors"], 4, "convert it to UTF-8"),
        (["calibrate", MODEL, "--calib", f"{MODEL}/config.json"], 4, "not a list or array of token ids"),
        (["calibrate", MODEL, "--calib", f"{MODEL}/README.md"], 4, "tokens make 1/0/0 windows of 512 tokens"),
        (["calibrate", MODEL, "--ctx", "63"], 2, "--ctx 63: a window has 64 to"),
        (["calibrate", MODEL, "--windows", "0"], 2, "--windows 0: at least one window is needed"),
        (["calibrate", MODEL, "--imatrix-out", "no-such-folder/m.gguf"], 6, "no-such-folder"),
        (["quantize", MODEL, "--calib", f"{MODEL}/config.json"], 4, "not a list or array of token ids"),
        (["quantize", MODEL, "--windows", "0"], 2, "--windows 0: at least one window is needed"),
        (["quantize", MODEL, "--imatrix", "no-such-file"], 2, "no-such-file: no such importance matrix"),
        (["quantize", MODEL, "--imatrix", f"{MODEL}/model.safetensors"], 4, "is no importance matrix"),
        (["verify", f"{MODEL}/config.json"], 4, "config.json"),
        (["inspect", "no-such-file"], 4, "no-such-file"),
    ],
)
def test_errors(
    arguments: list[str], exit_code: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    result = run(*arguments)
    assert (result.exit_code, message in result.stderr) == (exit_code, True), result.stderr
    assert not list(tmp_path.iterdir())


def test_events_are_json_lines(tmp_path: Path) -> None:
    result = run(
        "quantize", MODEL, "--effort", "fast", "-o", tmp_path / "x.gguf", "--type", "q8_0", "--log-format", "json"
    )
    events = [json.loads(line) for line in result.stderr.splitlines()]
    kinds = [e["event"] for e in events]
    assert kinds[:2] == ["note", "stage_started"]  # the note is about Unicode normalization
    assert kinds[-1] == "finished"
    assert {"progress", "tensor_finished"} <= set(kinds)
    assert events[-1]["n_bytes"] == (tmp_path / "x.gguf").stat().st_size


def test_errors_are_json_lines_too(demo_file: Path) -> None:
    result = run("quantize", MODEL, "--effort", "fast", "-o", demo_file, "--log-format", "json")
    error = json.loads(result.stderr.splitlines()[-1])
    assert (result.exit_code, error["event"], error["kind"], error["exit_code"]) == (2, "error", "usage", 2)
    assert "--overwrite" in error["message"]


def test_plan_tells_the_size_of_the_file(demo_file: Path) -> None:
    plan = json.loads(run("plan", MODEL, "--effort", "fast", "--json").stdout)
    assert plan["output_bytes"] == demo_file.stat().st_size
    assert plan["tensor_bytes"] == sum(t["n_bytes"] for t in plan["tensors"])
    text = run("plan", MODEL, "--effort", "fast").stdout
    assert all(t["name"] in text and t["type"] in text for t in plan["tensors"])


def test_inspect_shows_both_kinds_of_model(demo_file: Path) -> None:
    checkpoint, file = (json.loads(run("inspect", path, "--json").stdout) for path in (MODEL, demo_file))
    assert checkpoint["architecture"] == file["metadata"]["general.architecture"] == "qwen35"
    assert checkpoint["n_parameters"] == file["n_parameters"]
    assert file["metadata"]["general.quantized_by"].startswith("sq-stream ")
    assert "token_embd.weight" in run("inspect", demo_file).stdout


def test_verify_compares_with_the_source(demo_file: Path) -> None:
    checks = json.loads(run("verify", demo_file, "--against", MODEL, "--json").stdout)
    errors_of = {c["name"]: c["relative_error"] for c in checks}
    assert errors_of["output_norm.weight"] == 0
    assert 0.001 < errors_of["blk.0.ffn_gate.weight"] < 0.12
    assert "every block decodes" in run("verify", demo_file).stdout


def test_verify_finds_a_block_that_decodes_to_infinity(demo_file: Path, tmp_path: Path) -> None:
    plan = json.loads(run("plan", MODEL, "--effort", "fast", "--json").stdout)
    offset = next(t["offset"] for t in plan["tensors"] if t["type"] == "Q4_K")
    damaged = bytearray(demo_file.read_bytes())
    damaged[offset : offset + 2] = b"\x00\x7c"  # the first block's d becomes infinite
    (tmp_path / "damaged.gguf").write_bytes(damaged)
    result = run("verify", tmp_path / "damaged.gguf")
    assert result.exit_code == 7
    assert "[0, " in result.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_job_in_order_and_the_same_command_resumes(
    number: signal.Signals, tmp_path: Path, demo_file: Path
) -> None:
    output = tmp_path / "out.gguf"
    command = [
        sys.executable,
        "-m",
        "sq_stream",
        "quantize",
        MODEL,
        "--effort",
        "fast",
        "-o",
        str(output),
        "--log-format",
        "json",
    ]
    previous = signal.signal(number, signal.SIG_DFL)  # ignored in jobs that a shell started in the background
    try:
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    finally:
        signal.signal(number, previous)
    with process:
        assert process.stderr is not None
        for line in process.stderr:
            if json.loads(line).get("stage") == "encode":  # a tensor later, it may be done before the signal comes
                process.send_signal(number)
                break
        events = [json.loads(line) for line in process.stderr.read().splitlines()]
    assert (process.returncode, events[-1]["kind"]) == (75, "interrupted_job")
    assert not output.exists()
    result = run(*command[3:])
    assert result.exit_code == 0, result.stderr
    assert ("resuming" in result.stderr) == any(event["event"] == "tensor_finished" for event in events)
    assert output.read_bytes() == demo_file.read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["out.gguf"]
