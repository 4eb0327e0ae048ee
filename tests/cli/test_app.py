"""Errors end as one line and an exit code; the entry points work."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from persistence import DiskConfig, StateConfig, StateManager
from persistence.cli import app as app_module
from persistence.cli import main
from tests.cli.command import Command

ROOT = Path(__file__).parents[2]
COMMANDS = ["replay", "demo", "inspect", "verify", "export", "import", "checkpoints"]


@pytest.mark.parametrize("words", [[], ["--help"]])
def test_help_lists_every_command(command: Command, words: list[str]) -> None:
    result = command(*words)
    assert result.code == 0
    for name in COMMANDS:
        assert name in result.out


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(command: Command, name: str) -> None:
    result = command(name, "--help")
    assert result.code == 0
    assert "Usage: persistence " + name in result.out


def test_the_version_is_printed(command: Command) -> None:
    result = command("--version")
    assert result.code == 0
    assert result.out.startswith("persistence ")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["reply"], "reply"),
        (["replay", "--colour", "x"], "--colour"),
        (["replay"], "LOG"),
        (["verify"], "DIR"),
        (["replay", "x.log", "--limit", "many"], "--limit"),
        (["replay", "x.log", "--limit", "0"], "--limit"),
        (["replay", "x.log", "--concurrency", "0"], "--concurrency"),
        (["replay", "x.log", "--memory", "lots"], "'lots' is no size"),
        (["replay", "x.log", "--segment", "-5"], "'-5' is no size"),
    ],
)
def test_a_wrong_command_line_is_one_line(command: Command, words: list[str], said: str) -> None:
    path = "persistence" if words == ["reply"] else f"persistence {words[0]}"
    command(*words).assert_refused(said, f"see '{path} --help'", code=2)


def raising(error: BaseException) -> typer.Typer:
    failing = typer.Typer(rich_markup_mode=None)

    @failing.command()
    def fail(traceback: bool = False) -> None:
        raise error

    return failing


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ZeroDivisionError("oops"), 1, "internal error: ZeroDivisionError: oops (--traceback sho"),
        (PermissionError(13, "Permission denied", "/x"), 1, "/x: Permission denied"),
        (OSError("odd"), 1, "odd"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (ValueError("two\nlines \x1b[31m"), 1, r"two; lines \x1b[31m"),
    ],
)
def test_whatever_is_raised_becomes_one_line(
    command: Command, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, line: str
) -> None:
    monkeypatch.setattr(app_module, "app", raising(error))
    result = command("--no-traceback")
    assert result.code == code
    assert result.err.count("\n") == 1
    assert line in result.err
    assert "Traceback" not in result.err


def test_a_traceback_is_shown_on_request(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app_module, "app", raising(ZeroDivisionError("oops")))
    assert "Traceback" in command("--traceback").err


def test_main_exits_with_the_code(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["verify", "/nothing/there"])
    assert exit_.value.code == 1
    assert capsys.readouterr().err == "persistence: /nothing/there does not exist\n"


def test_the_module_runs_as_a_program() -> None:
    words = [sys.executable, "-m", "persistence.cli", "inspect", "/nothing/there"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "persistence: /nothing/there does not exist\n"


def test_a_reader_that_has_seen_enough_is_no_error_message() -> None:
    words = [sys.executable, "-m", "persistence.cli", "--help"]
    with subprocess.Popen(
        words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
        process.wait()


async def make_directory(path: Path) -> None:
    async with StateManager(config=StateConfig(disk=DiskConfig(path=path))) as state:
        await state.create_session()


@pytest.mark.parametrize(
    ("command_line", "code", "said"),
    [
        ("inspect {dir} >&-", 1, "stdout is closed"),
        ("inspect {dir} --json >&-", 1, "stdout is closed"),
        ("export {dir} >&-", 1, "stdout is closed"),
        ("export {dir} --output {dir}/../x.jsonl >&-", 0, "1 sessions exported"),
        ("import {dir} <&-", 1, "stdin is closed"),
        ("inspect {dir} 2>&-", 0, ""),
    ],
)
def test_a_closed_stream_is_no_internal_error(
    tmp_path: Path, command_line: str, code: int, said: str
) -> None:
    asyncio.run(make_directory(tmp_path / "d"))
    program = f"{sys.executable} -m persistence.cli "
    done = subprocess.run(
        ["bash", "-c", program + command_line.format(dir=tmp_path / "d")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done
    assert said in done.stderr
    assert "internal error" not in done.stderr
    assert "Traceback" not in done.stderr


def test_where_the_locale_has_few_characters_the_others_are_escaped(tmp_path: Path) -> None:
    directory = tmp_path / "größe…"
    asyncio.run(make_directory(directory))
    environ = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "persistence.cli", "inspect", directory],
        capture_output=True,
        env=environ,
        cwd=ROOT,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert rb"gr\xf6\xdfe\u2026" in done.stdout
    assert b"live sessions" in done.stdout


@pytest.mark.parametrize("loading", ["persistence.cli.replay", "persistence.manager", "typer"])
def test_an_interruption_while_the_commands_are_loaded_is_one_line(loading: str) -> None:
    # A finder that stands for Ctrl-C in the middle of the import; then what the script does.
    program = f"""
import sys
class CtrlC:
    def find_spec(name, *_):
        if name == "{loading}":
            raise KeyboardInterrupt
sys.meta_path.insert(0, CtrlC)
from persistence.cli import main
main([])
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, cwd=ROOT, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"persistence: interrupted\n")
