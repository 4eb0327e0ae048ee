"""Export and import: typed values survive, nothing is half-imported."""

from __future__ import annotations

import asyncio
import io
import os
import stat
import sys
from collections.abc import Awaitable, Callable
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from persistence import DiskConfig, SessionMetadata, ShutdownConfig, StateConfig, StateManager
from persistence.cli.app import run_command
from persistence.cli.export import sessions_in
from persistence.cli.jsonl import decode, encode
from tests.cli.command import Command, locked

DATA: dict[str, Any] = {
    "plain": {"a": [1, 2.5, None, True, "ü\n"]},
    "time": datetime(2026, 2, 28, 1, 2, 3, 4, timezone(timedelta(hours=5, minutes=30))),
    "day": date(2026, 2, 28),
    "uuid": UUID(int=5),
    "price": Decimal("1.50"),
    "set": {1, "a"},
    "frozen": frozenset({(1, 2)}),
    "raw": b"\x00\xff",
    "array": bytearray(b"x"),
    "big": 2**200,
    "keys": {1: "one", (2, 3): "pair"},
    "tag-like": {"$date": "2026-02-28"},
    "$date": float("inf"),
}


def with_state(
    directory: Path, work: Callable[[StateManager], Awaitable[None]], **sections: dict[str, Any]
) -> None:
    async def opened() -> None:
        config = StateConfig(
            disk=DiskConfig(path=str(directory)),
            shutdown=ShutdownConfig(checkpoint=False),
            **sections,  # type: ignore[arg-type]
        )
        async with StateManager(config=config) as state:
            await work(state)

    asyncio.run(opened())


def contents(directory: Path) -> dict[str, tuple[Any, ...]]:
    async def collected() -> dict[str, tuple[Any, ...]]:
        return {
            session.id: (
                session.data,
                session.user_id,
                session.metadata,
                session.ttl_seconds,
                session.auto_renew,
                session.max_requests,
            )
            async for session in sessions_in(directory, [])
        }

    return asyncio.run(collected())


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A directory with sessions of every kind."""

    async def fill(state: StateManager) -> None:
        await state.create_session(
            session_id="full",
            user_id="user1",
            metadata=SessionMetadata("203.0.113.9", "curl", "web", {"tenant": (1, "acme")}),
            ttl_seconds=600,
            data=DATA,
            max_requests=7,
            auto_renew=False,
        )
        await state.create_session(session_id="for ever", ttl_seconds=0, data={"a": 1})
        await state.create_session(session_id="日本\n\x1b")

    with_state(tmp_path / "source", fill)
    return tmp_path / "source"


def test_what_is_exported_can_be_imported_and_is_the_same(
    command: Command, source: Path, tmp_path: Path
) -> None:
    lines = tmp_path / "sessions.jsonl"
    assert command("export", source, "--output", lines).code == 0
    assert len(lines.read_bytes().splitlines()) == 3
    result = command("import", tmp_path / "target", "--input", lines)
    assert result.code == 0, result.err
    assert "3 sessions created" in result.err
    before, after = contents(source), contents(tmp_path / "target")
    full, full_again = before.pop("full"), after.pop("full")
    assert full[:3] == full_again[:3]
    assert full_again[3] == pytest.approx(600, abs=60)  # not renewed: keeps its deadline
    assert full[4:] == full_again[4:] == (False, 7)
    assert before == after


@pytest.mark.parametrize(
    ("written", "read"), [([], []), (["--output", "-"], ["--input", "-"])], ids=["default", "dash"]
)
def test_stdout_and_stdin_are_the_defaults_and_have_a_name(
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    written: list[str],
    read: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)  # where no file of that name may appear
    stdout = io.TextIOWrapper(io.BytesIO())
    monkeypatch.setattr(sys, "stdout", stdout)
    assert run_command(["export", str(source), *written]) == 0
    exported = stdout.buffer.getvalue()
    assert exported.count(b"\n") == 3
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(exported)))
    assert run_command(["import", str(tmp_path / "target"), *read]) == 0
    assert contents(tmp_path / "target").keys() == contents(source).keys()
    assert not (tmp_path / "-").exists()


def test_exporting_does_not_change_the_sessions(
    command: Command, source: Path, tmp_path: Path
) -> None:
    exports = []
    for number in range(2):
        output = tmp_path / f"{number}.jsonl"
        assert command("export", source, "--output", output).code == 0
        exports.append({line["id"]: line for line in map(decode, output.read_bytes().splitlines())})
    assert exports[0].keys() == exports[1].keys()
    for sid, before in exports[0].items():
        after = exports[1][sid]
        for name in ("created_at", "last_accessed", "expires_at"):
            if name in before:  # two clocks meet at each opening: to the millisecond is the same
                drift = before.pop(name) - after.pop(name)
                assert abs(drift.total_seconds()) < 0.005, name
        assert before == after


def test_damaged_sessions_are_named_and_hold_back_no_others(
    command: Command, source: Path, tmp_path: Path
) -> None:
    segment = next(path for path in source.iterdir() if b"203.0.113.9" in path.read_bytes())
    data = segment.read_bytes()
    segment.write_bytes(data.replace(b"203.0.113.9", b"203.0.113.8"))
    output = tmp_path / "sessions.jsonl"
    result = command("export", source, "--output", output)
    assert result.code == 1
    assert f"left out: {segment} at offset" in result.err
    assert "session 'full'" in result.err
    assert {line["id"] for line in map(decode, output.read_bytes().splitlines())} == {
        "for ever",
        "日本\n\x1b",
    }


@pytest.mark.parametrize("how", ["missing", "damaged"])
def test_a_whole_segment_that_is_damaged_is_named_and_fails_the_export(
    command: Command, source: Path, tmp_path: Path, how: str
) -> None:
    segment = next(source.glob("*.seg"))
    if how == "missing":
        segment.unlink()
    else:
        segment.write_bytes(bytes(segment.stat().st_size))
    result = command("export", source, "--output", tmp_path / "sessions.jsonl")
    assert result.code == 1
    assert f"left out: {segment} at offset" in result.err
    assert "0 sessions exported" in result.err


def test_a_session_whose_very_id_is_damaged_fails_the_export(
    command: Command, source: Path, tmp_path: Path
) -> None:
    segment = next(source.glob("*.seg"))
    segment.write_bytes(segment.read_bytes().replace(b"for ever", b"for evil"))
    result = command("export", source, "--output", tmp_path / "sessions.jsonl")
    assert result.code == 1
    assert f"left out: {segment} at offset" in result.err
    assert "2 sessions exported" in result.err


def test_fixed_deadlines_and_limits_on_a_lifetime_are_transferred(
    command: Command, tmp_path: Path
) -> None:
    async def fill(state: StateManager) -> None:
        await state.create_session(session_id="fixed", ttl_seconds=600, auto_renew=False)
        await state.create_session(session_id="renewed", ttl_seconds=600)
        await state.create_session(session_id="never", ttl_seconds=0)

    times: list[dict[str, tuple[Any, ...]]] = []
    limited = {"max_lifetime_seconds": 5000, "cleanup_interval_seconds": 0}
    with_state(tmp_path / "a", fill, session=limited)
    for source, target in (("a", "b"), ("b", "c")):
        lines = tmp_path / f"{source}.jsonl"
        assert command("export", tmp_path / source, "--output", lines).code == 0
        assert command("import", tmp_path / target, "--input", lines).code == 0
        read = list(map(decode, lines.read_bytes().splitlines()))
        times.append({line["id"]: (line["ttl_seconds"], line["lifetime_ends_at"]) for line in read})
        times[-1]["fixed deadline"] = tuple(
            line["expires_at"] for line in read if line["id"] == "fixed"
        )
        times[-1]["never"] += tuple(line["expires_at"] for line in read if line["id"] == "never")
    assert times[0] == times[1]
    assert times[0]["fixed"][0] == 600
    assert times[0]["never"][1] == times[0]["never"][2]


def test_an_export_that_fails_leaves_the_file_of_before(
    command: Command, source: Path, tmp_path: Path
) -> None:
    output = tmp_path / "sessions.jsonl"
    output.write_text("of before")

    with locked(source):
        command("export", source, "--output", output).assert_refused("in use")
    (tmp_path / "folder").mkdir()
    command("export", source, "--output", tmp_path / "folder" / "no" / "file").assert_refused("no")
    command("export", tmp_path / "nothing", "--output", output).assert_refused("does not exist")
    command("export", tmp_path / "folder", "--output", output).assert_refused("not a directory of")
    assert output.read_text() == "of before"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "folder",
        "sessions.jsonl",
        "source",
    ]


def test_an_export_is_as_private_as_what_it_replaces_and_touches_no_other_file(
    command: Command, source: Path, tmp_path: Path
) -> None:
    other = tmp_path / "sessions.jsonl.partial"
    other.write_text("of somebody else")
    for number, mode in enumerate((None, 0o600, 0o644)):
        output = tmp_path / "sessions.jsonl"
        if mode is not None:
            output.chmod(mode)
        assert command("export", source, "--output", output).code == 0, number
        assert stat.S_IMODE(output.stat().st_mode) == (mode or 0o600)
    assert other.read_text() == "of somebody else"
    assert {path.name for path in tmp_path.iterdir()} == {other.name, "sessions.jsonl", "source"}


def test_what_is_no_file_is_written_to_and_stays_what_it_is(
    command: Command, source: Path, tmp_path: Path
) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with os.fdopen(os.open(pipe, os.O_RDONLY | os.O_NONBLOCK), "rb") as reader:
        assert command("export", source, "--output", pipe).code == 0
        assert len(reader.read().splitlines()) == len(contents(source))
    assert pipe.is_fifo()


def test_a_full_device_fails_an_export(command: Command, source: Path, tmp_path: Path) -> None:
    full = tmp_path / "link"  # what goes wrong here must not harm the machine
    full.symlink_to("/dev/full")
    command("export", source, "--output", full).assert_refused("No space left on device")
    assert Path("/dev/full").is_char_device()
    assert full.is_symlink()


def test_behind_a_link_the_file_is_replaced_and_not_the_link(
    command: Command, source: Path, tmp_path: Path
) -> None:
    target, link = tmp_path / "target.jsonl", tmp_path / "link.jsonl"
    target.write_bytes(b"")
    link.symlink_to(target)
    assert command("export", source, "--output", link).code == 0
    assert link.is_symlink()
    assert len(target.read_bytes().splitlines()) == len(contents(source))


def test_a_directory_is_no_file_to_export_to(
    command: Command, source: Path, tmp_path: Path
) -> None:
    command("export", source, "--output", tmp_path).assert_refused(str(tmp_path), "is a directory")


def write_lines(path: Path, *lines: bytes) -> Path:
    path.write_bytes(b"".join(lines))
    return path


def test_a_byte_order_mark_and_windows_line_ends_are_no_faults(
    command: Command, tmp_path: Path
) -> None:
    line = encode({"id": "s"}).replace(b"\n", b"\r\n")
    lines = write_lines(tmp_path / "x.jsonl", b"\xef\xbb\xbf", line, b"\r\n")
    assert command("import", tmp_path / "target", "--input", lines).code == 0
    assert contents(tmp_path / "target").keys() == {"s"}


def test_existing_sessions_are_refused_as_a_whole(
    command: Command, source: Path, tmp_path: Path
) -> None:
    before = contents(source)
    lines = write_lines(
        tmp_path / "x.jsonl", encode({"id": "new"}), b"\n", encode({"id": "for ever"})
    )
    command("import", source, "--input", lines).assert_refused("line 3", "'for ever' exists")
    assert contents(source) == before


def test_replacing_makes_a_session_what_its_line_says(
    command: Command, source: Path, tmp_path: Path
) -> None:
    lines = write_lines(
        tmp_path / "x.jsonl",
        encode({"id": "full", "data": {"b": 2}, "user_id": "user2", "ttl_seconds": 60}),
        encode({"id": "for ever", "data": {"a": 2}, "ttl_seconds": 0}),
        encode({"id": "new", "data": {"c": 3}, "ttl_seconds": 50, "max_requests": 5}),
    )
    result = command("import", source, "--input", lines, "--replace")
    assert result.code == 0, result.err
    assert "1 sessions created, 2 replaced" in result.err
    found = contents(source)
    nobody = SessionMetadata()
    assert found["full"] == ({"b": 2}, "user2", nobody, 60, True, None)
    assert found["for ever"] == ({"a": 2}, None, nobody, 0, True, None)
    assert found["new"] == ({"c": 3}, None, nobody, 50, True, 5)
    assert len(found) == 4


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"{", "not JSON"),
        (b'{"id": ""}', "line 2"),
        (b'{"id": "' + b"x" * 513 + b'"}', "line 2"),
        (b'{"id": "\\ud800"}', "line 2"),
        (b'{"id": "s", "data": {"a": "\\ud800"}}', "field 'a'"),
        (b'{"id": "s", "data": {"a": {"$what": 1}}}', "unknown tag"),
        (b'{"id": "s", "metadata": {"shoe_size": 1}}', "shoe_size"),
        (b'{"id": "s", "ttl_seconds": -5}', "ttl_seconds"),
        (b'{"id": "s", "ttl_seconds": {"$float": "nan"}}', "ttl_seconds"),
        (b'{"id": "s", "user_id": 5}', "user_id"),
        (b'{"id": "s", "max_requests": -1}', "max_requests"),
        (b'{"id": "s", "max_requests": {"$int": "1180591620717411303424"}}', "max_requests"),
        (b'{"id": "s", "ttl_seconds": 1e12}', "ttl_seconds"),
        (b'{"id": "s", "data": {"\\ud800": 1}}', "its name has lone surrogates"),
        (b'{"id": "s", "user_id": "\\ud800"}', "user_id"),
        (b'{"id": "s", "metadata": {"attributes": 5}}', "attributes"),
        (b'{"id": "s", "metadata": {"client_ip": 5}}', "client_ip"),
        (b'{"id": "s", "data": {"a": 1, "b": 2, "a": 3}}', "the key 'a' is there twice"),
        (b'{"id": "s", "id": "t"}', "the key 'id' is there twice"),
        (b'{"id": "s", "expires_at": {"$datetime": "9999-12-31T23:59:59-23:59"}}', "100 years"),
    ],
)
@pytest.mark.parametrize("options", [[], ["--replace"]], ids=["new", "replace"])
def test_a_bad_line_is_named_and_nothing_is_imported(
    command: Command, tmp_path: Path, line: bytes, said: str, options: list[str]
) -> None:
    lines = write_lines(tmp_path / "x.jsonl", encode({"id": "good"}), line + b"\n")
    target = tmp_path / "target"
    command("import", target, "--input", lines, *options).assert_refused("line 2", said)
    assert not target.exists()


def test_a_session_over_the_size_limit_is_refused_before_anything_is_written(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("persistence.cli.import_.GIB", 1000)
    lines = write_lines(
        tmp_path / "x.jsonl", encode({"id": "good"}), encode({"id": "s", "data": {"a": "x" * 1000}})
    )
    command("import", tmp_path / "target", "--input", lines).assert_refused("line 2", "at most")
    assert not (tmp_path / "target").exists()


def test_a_session_twice_in_a_file_is_refused_at_its_second_line(
    command: Command, tmp_path: Path
) -> None:
    lines = write_lines(
        tmp_path / "x.jsonl",
        encode({"id": "s", "data": {"a": 1}}),
        encode({"id": "s", "data": {"a": 2}}),
    )
    command("import", tmp_path / "target", "--input", lines).assert_refused("line 2", "second time")
    assert not (tmp_path / "target").exists()
    assert command("import", tmp_path / "target", "--input", lines, "--replace").code == 0
    assert contents(tmp_path / "target")["s"][0] == {"a": 2}


def test_what_has_expired_is_left_out(command: Command, tmp_path: Path) -> None:
    past = datetime(2020, 1, 1, tzinfo=UTC)
    lines = write_lines(
        tmp_path / "x.jsonl", encode({"id": "old", "expires_at": past}), encode({"id": "new"})
    )
    result = command("import", tmp_path / "target", "--input", lines)
    assert "1 sessions created, 0 replaced, 1 left out" in result.err
    assert contents(tmp_path / "target").keys() == {"new"}


def test_importing_into_a_directory_that_is_open_is_refused(
    command: Command, source: Path, tmp_path: Path
) -> None:
    lines = write_lines(tmp_path / "x.jsonl", encode({"id": "new"}))
    with locked(source):
        command("import", source, "--input", lines).assert_refused("in use")


def test_a_missing_input_is_named(command: Command, tmp_path: Path) -> None:
    command("import", tmp_path / "t", "--input", tmp_path / "none").assert_refused("none")
    assert not (tmp_path / "t").exists()


def test_values_nested_as_deep_as_a_record_holds_are_transferred(
    command: Command, tmp_path: Path
) -> None:
    value: Any = 1
    for _ in range(500):
        value = {1: value}

    async def fill(state: StateManager) -> None:
        await state.create_session(session_id="deep", data={"a": value})

    with_state(tmp_path / "source", fill)
    lines = tmp_path / "x.jsonl"
    assert command("export", tmp_path / "source", "--output", lines).code == 0
    result = command("import", tmp_path / "target", "--input", lines)
    assert result.code == 0, result.err
    assert contents(tmp_path / "target")["deep"][0]["a"] == value


def test_lines_tell_versions_and_times_for_information(
    command: Command, source: Path, tmp_path: Path
) -> None:
    lines = tmp_path / "x.jsonl"
    command("export", source, "--output", lines)
    full = next(
        line for line in map(decode, lines.read_bytes().splitlines()) if line["id"] == "full"
    )
    assert full["version"] == 1
    lives = full["expires_at"] - full["created_at"]
    assert lives.total_seconds() == pytest.approx(600, abs=0.01)
