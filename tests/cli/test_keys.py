"""Commands on encrypted directories, and the file with the keys."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from persistence.cli.app import run_command

LINE = '{"id":"a","data":{"text":"nobody may read this"}}\n'


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    Path("lines").write_text(LINE)


def run(*words: str) -> int:
    return run_command(words)


def encrypted() -> None:
    """Make a key file, and a directory that is encrypted with it."""
    assert run("keys", "create", "keys") == 0
    assert run("import", "dir", "--input", "lines", "--key-file", "keys") == 0


def test_a_key_file_is_made_rotated_and_shown_without_showing_a_key(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run("keys", "create", "keys") == 0
    file = Path("keys")
    assert file.stat().st_mode & 0o777 == 0o600
    before = file.read_text()
    assert run("keys", "create", "keys") == 1
    assert file.read_text() == before
    assert run("keys", "rotate", "keys") == 0
    assert file.stat().st_mode & 0o777 == 0o600
    capsys.readouterr()
    assert run("keys", "list", "keys") == 0
    ids = capsys.readouterr().out.split()
    assert len(ids) == 2
    keys = [line.split()[0] for line in file.read_text().splitlines()[1:]]
    assert before.splitlines()[1].split()[0] == keys[0]
    assert not any(key[:8] in "".join(ids) for key in keys)
    assert [path.name for path in Path().iterdir() if ".tmp" in path.name] == []


@pytest.mark.parametrize("content", [None, "no keys at all"])
def test_what_is_no_key_file_is_left_as_it_is(
    capsys: pytest.CaptureFixture[str], content: str | None
) -> None:
    if content is not None:
        Path("keys").write_text(content)
    assert run("keys", "rotate", "keys") == 1
    assert run("keys", "list", "keys") == 1
    assert "Traceback" not in capsys.readouterr().err
    assert Path("keys").exists() == (content is not None)
    assert content is None or Path("keys").read_text() == content


def test_an_encrypted_directory_is_exported_with_its_keys_only(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    encrypted()
    capsys.readouterr()
    assert run("export", "dir") == 1
    said = capsys.readouterr().err
    assert "--key-file" in said
    assert "PERSISTENCE_SECURITY__SECRET_KEYS" in said
    assert run("export", "dir", "--key-file", "nowhere") == 1
    assert run("export", "dir", "--key-file", "keys", "--output", "out") == 0
    assert json.loads(Path("out").read_text())["data"] == {"text": "nobody may read this"}
    monkeypatch.setenv("PERSISTENCE_SECURITY__KEY_FILE", "keys")
    assert run("export", "dir", "--output", "again") == 0
    assert Path("again").read_text() == Path("out").read_text()
    monkeypatch.delenv("PERSISTENCE_SECURITY__KEY_FILE")
    key = Path("keys").read_text().splitlines()[1].split()[0]
    monkeypatch.setenv("PERSISTENCE_SECURITY__SECRET_KEYS", key)
    assert run("export", "dir", "--output", "again") == 0
    monkeypatch.setenv("PERSISTENCE_SECURITY__SECRET_KEYS", "f" * 64)
    capsys.readouterr()
    assert run("export", "dir") == 1
    assert "not among the keys given" in capsys.readouterr().err


def test_a_plain_directory_stays_plain(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("import", "plain", "--input", "lines") == 0
    assert run("keys", "create", "keys") == 0
    assert run("export", "plain", "--key-file", "keys") == 1
    assert "leave --key-file out" in capsys.readouterr().err
    assert run("verify", "plain") == 0
    assert "Encrypted" not in capsys.readouterr().out


def test_inspect_and_verify_do_what_they_can_without_keys(
    capsys: pytest.CaptureFixture[str],
) -> None:
    encrypted()
    capsys.readouterr()
    assert run("inspect", "dir") == 0
    assert "encrypted with key" in capsys.readouterr().out
    assert run("inspect", "dir", "--json") == 0
    [key] = json.loads(capsys.readouterr().out)["keys"]
    assert run("verify", "dir") == 0
    assert "--key-file" in capsys.readouterr().out
    assert run("verify", "dir", "--json", "--key-file", "keys") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["is_encrypted"], found["was_opened"], found["damages"]) == (True, True, [])
    assert run("keys", "create", "other") == 0
    assert run("verify", "dir", "--key-file", "other") == 1
    assert key in capsys.readouterr().err


def test_checkpoints_of_an_encrypted_directory_need_its_keys(
    capsys: pytest.CaptureFixture[str],
) -> None:
    encrypted()
    Path("store").mkdir()
    assert run("checkpoints", "create", "dir", "--store", "store") == 1
    assert "--key-file" in capsys.readouterr().err
    with_keys = ("--store", "store", "--key-file", "keys")
    assert run("checkpoints", "create", "dir", "--reason", "first", *with_keys) == 0
    capsys.readouterr()
    assert run("checkpoints", "list", "--store", "store") == 0
    said = capsys.readouterr().out
    assert "encrypted with key" in said
    assert "first" not in said
    assert run("checkpoints", "list", "--json", *with_keys) == 0
    [info] = json.loads(capsys.readouterr().out)["checkpoints"]
    assert info["reason"] == "first"
    assert run("checkpoints", "restore", "latest", "new", "--store", "store") == 1
    assert not Path("new").exists() or not list(Path("new").glob("*.seg"))
    assert run("checkpoints", "restore", "latest", "restored", *with_keys) == 0
    assert run("checkpoints", "restore", "latest", "dir", "--live", *with_keys) == 0
    for directory in ("restored", "dir"):
        assert run("export", directory, "--key-file", "keys", "--output", "out") == 0
        assert json.loads(Path("out").read_text())["id"] == "a"
    assert run("checkpoints", "delete", info["id"], *with_keys) == 0
