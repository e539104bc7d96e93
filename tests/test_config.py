"""Settings from a file: what holds over what, and what is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from sq_stream.cli import cli
from sq_stream.cli.config import option_name
from sq_stream.demo import model_folder

MODEL = str(model_folder())


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(a) for a in arguments])


def settings(*arguments: object) -> dict[str, Any]:
    """Of a run that is refused before it does anything, from its summary: (value, where it is from) by name."""
    assert run(*arguments, "--summary", "summary.json").exit_code == 4
    fields = json.loads(Path("summary.json").read_text())["settings"]
    return {name: (setting["value"], setting["from"]) for name, setting in fields.items()}


def test_the_command_line_holds_over_the_file_and_the_file_over_the_default() -> None:
    Path("sq-stream.toml").write_text(
        '[quantize]\nmax-ram = "700M"\nctx = 256\npure = true\ntensor-type = ["ffn_down=q6_k", "attn=q8_0"]\n'
    )
    found = settings("quantize", "no-model", "--ctx", "128")
    assert found["ctx"] == (128, "command line")
    assert found["max-ram"] == ("700M", "config file")
    assert found["pure"] == (True, "config file")
    assert found["tensor-type"] == (["ffn_down=q6_k", "attn=q8_0"], "config file")
    assert found["windows"] == (360, "default")


def test_a_named_file_takes_the_place_of_the_one_in_the_folder() -> None:
    Path("sq-stream.toml").write_text("[quantize]\nctx = 256\n")
    Path("other.toml").write_text("[quantize]\nwindows = 7\n")
    found = settings("quantize", "no-model", "--config", "other.toml")
    assert (found["ctx"], found["windows"]) == ((512, "default"), (7, "config file"))
    assert settings("quantize", "no-model", "--config", os.devnull)["ctx"] == (512, "default")


@pytest.mark.parametrize("command", ["plan", "calibrate"])
def test_plan_and_calibrate_do_as_quantize_would(command: str) -> None:
    Path("sq-stream.toml").write_text(
        f"[quantize]\nctx = 256\nwindows = 9\noverwrite = true\nquiet = true\n[{command}]\nwindows = 7\n"
    )
    found = settings(command, "no-model")
    assert (found["ctx"][0], found["windows"][0], found["quiet"][0]) == (256, 7, False)


def test_the_file_is_named_where_it_is_used() -> None:
    Path("sq-stream.toml").write_text("[inspect]\njson = true\n")
    result = run("inspect", MODEL)
    assert json.loads(result.stdout)["architecture"] == "qwen35"
    assert result.stderr == "settings from sq-stream.toml: json\n"


def test_required_options_and_those_of_subcommands_can_be_in_it() -> None:
    Path("sq-stream.toml").write_text('[eval]\nref = "no-model"\n[cache.list]\ncache = "here"\njson = true\n')
    assert settings("eval", "x.gguf")["ref"] == ("no-model", "config file")
    assert run("cache", "list").stdout == "[]\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[quantize]\nmax-rma = "1G"', "[quantize] max-rma is no option of this command: did you mean max-ram?"),
        ('[quantize]\nmax_ram = "1G"', "did you mean max-ram?"),
        ('[quantise]\nmax-ram = "1G"', "[quantise] is no command: did you mean quantize?"),
        ("[x]", "[x] is no command: there are"),
        ('[plan]\nmodel_dir = "x"', "[plan] model_dir is no option of this command"),
        ('[plan]\nconfig = "x"', "[plan] config is no option of this command"),
        ("[plan]\nhelp = true", "[plan] help is no option of this command"),
        ('max-ram = "1G"', "max-ram is outside of a command's table, such as [quantize]"),
        ('[cache]\ncache = "x"', "cache.cache is outside of a command's table, such as [cache.list]"),
        ("[quantize]\nmax-ram = 4", "[quantize] max-ram = 4: expected a text in quotes"),
        ('[quantize]\nctx = "512"', "[quantize] ctx = '512': expected a whole number"),
        ("[quantize]\nctx = true", "[quantize] ctx = True: expected a whole number"),
        ("[quantize]\nctx = 51.2", "[quantize] ctx = 51.2: expected a whole number"),
        ("[quantize]\npure = 1", "[quantize] pure = 1: expected true or false"),
        ('[quantize]\ncalib = "a.txt"', "[quantize] calib = 'a.txt': expected a list of texts"),
        ("[quantize]\ncalib = [1]", "[quantize] calib = [1]: expected a list of texts"),
        ('[quantize]\neffort = "bset"', "[quantize] effort: 'bset' is not one of"),
        ("[demo]\ntokens = 201", "[demo] tokens: 201 is not in the range"),
        ("[quantize\n", "c.toml is no TOML file"),
        ("[quantize]\nctx = 1\nctx = 2", "c.toml is no TOML file"),
    ],
)
def test_what_is_not_meant_is_refused_by_every_command(text: str, message: str) -> None:
    Path("c.toml").write_text(text)
    result = run("cache", "list", "--config", "c.toml")
    assert (result.exit_code, message in result.stderr) == (2, True), result.stderr
    assert "c.toml" in result.stderr


@pytest.mark.parametrize(("data", "message"), [(None, "No such file"), (b"\xff", "no TOML file")])
def test_a_file_that_cannot_be_read_is_refused(data: bytes | None, message: str) -> None:
    if data is not None:
        Path("c.toml").write_bytes(data)
    result = run("cache", "list", "--config", "c.toml")
    assert (result.exit_code, message in result.stderr) == (2, True), result.stderr


def test_every_option_of_every_command_can_be_in_it() -> None:
    """Its default, or a value of its type, is accepted under its long name."""

    def walk(command: click.Command, *names: str) -> None:
        if isinstance(command, click.Group):
            for name, sub in command.commands.items():
                walk(sub, *names, name)
            return
        options = [p for p in command.params if isinstance(p, click.Option) and p.name != "config"]
        lines = [f"[{'.'.join(names)}]", *(f"{option_name(o)} = {example(o)}" for o in options)]
        Path("c.toml").write_text("\n".join(lines))
        result = run("cache", "clear", "--config", "c.toml", "--summary", "x.json", "--cache", "x")
        assert result.exit_code == 0, result.stderr

    def example(option: click.Option) -> str:
        if option.is_flag:
            return "false"
        if option.type.name.startswith("integer"):
            return "1"
        text = f'"{getattr(option.type, "choices", ["x"])[0]}"'
        return f"[{text}]" if option.multiple else text

    walk(cli)
