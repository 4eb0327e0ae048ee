"""Checkpoints on the command line: listed, made, restored, deleted, in Redis and in a directory."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from crc32c import crc32c

from persistence import StateManager
from persistence.checkpoint.manifest import FORMAT_VERSION
from persistence.cli import screen
from tests.cli.command import Command, Result, locked
from tests.engine import config_for, contents
from tests.redis_servers import Group, RedisServer, free_port

Place = list[str]
COUNT = 40


def with_state(
    directory: Path, work: Callable[[StateManager], Awaitable[Any]], **sections: dict[str, Any]
) -> Any:
    """Open a directory, do something with it, and close it."""

    async def opened() -> Any:
        config = config_for(directory, **{"shutdown": {"checkpoint": False}, **sections})
        async with StateManager(config=config) as state:
            return await work(state)

    return asyncio.run(opened())


def sessions_of(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = with_state(directory, contents)
    return found


def put(directory: Path, count: int, text: str) -> dict[str, Any]:
    """Give `count` sessions a value; return all that are there."""

    async def fill(state: StateManager) -> dict[str, Any]:
        for number in range(count):
            async with state.edit((await state.get_or_create_session(f"s {number}")).id) as draft:
                draft["text"] = text
        return await contents(state)

    found: dict[str, Any] = with_state(directory, fill)
    return found


def opened_by_url(url: str) -> Place:
    return ["--store", url, "--namespace", "shop"]


@pytest.fixture(params=["directory", "redis", "config"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """Says where checkpoints are, in each way."""
    if request.param == "directory":
        (tmp_path / "checkpoints").mkdir()
        return ["--store", str(tmp_path / "checkpoints")]
    server: RedisServer = request.getfixturevalue("shared_server")
    if request.param == "redis":
        return opened_by_url(server.url)
    file = tmp_path / "worker.toml"
    file.write_text(f'[redis]\nurl = "{server.url}"\n[checkpoint]\nkeep = 2\n')
    return ["--config", str(file)]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A directory with sessions."""
    put(tmp_path / "state", COUNT, "first")
    return tmp_path / "state"


@pytest.fixture
def redis_place(shared_server: RedisServer) -> Place:
    return opened_by_url(shared_server.url)


def ids_in(command: Command, place: Place) -> list[str]:
    result = command("checkpoints", "list", *place, "--json")
    assert result.code == 0, result
    return [each["id"] for each in result.json["checkpoints"]]


def made(command: Command, place: Place, directory: Path, *words: str) -> str:
    result = command("checkpoints", "create", directory, *place, "--json", *words)
    assert result.code == 0, result
    return str(result.json["id"])


# --- what works -----------------------------------------------------------------------------------


def test_what_is_made_can_be_listed_restored_and_deleted(
    command: Command, place: Place, directory: Path, tmp_path: Path
) -> None:
    result = command("checkpoints", "create", directory, *place, "--reason", "before\x1b the move")
    assert result.code == 0, result
    assert result.err == ""
    assert f"full, {COUNT} sessions" in result.out
    first = sessions_of(directory)
    second = put(directory, 2, "second")
    newest = made(command, place, directory)
    oldest, listed = ids_in(command, place)
    assert listed == newest

    result = command("checkpoints", "list", *place)
    header, *lines = result.out.splitlines()
    assert header.split() == [
        "ID",
        "TIME",
        "(UTC)",
        "KIND",
        "SESSIONS",
        "BYTES",
        "REASON",
        "PROBLEM",
    ]
    assert [line.split()[0] for line in lines] == [oldest, newest]
    assert [line.split()[3:5] for line in lines] == [["full", "40"], ["incremental", "40"]]
    assert r"before\x1b the move" in lines[0]

    result = command("checkpoints", "restore", "latest", tmp_path / "new", *place)
    assert (result.code, result.err) == (0, ""), result
    assert newest in result.out
    assert sessions_of(tmp_path / "new") == second
    assert command("checkpoints", "restore", oldest, tmp_path / "old", *place).code == 0
    assert sessions_of(tmp_path / "old") == first

    assert command("checkpoints", "delete", oldest, *place).out == f"Deleted {oldest}.\n"
    assert ids_in(command, place) == [newest]
    assert command("checkpoints", "restore", newest, tmp_path / "again", *place).code == 0
    assert sessions_of(tmp_path / "again") == second


def test_a_directory_goes_back_only_when_it_is_asked_to(
    command: Command, place: Place, directory: Path
) -> None:
    first = sessions_of(directory)
    made(command, place, directory)
    second = put(directory, COUNT + 1, "second")
    words = ["checkpoints", "restore", "latest", directory, *place]
    command(*words).assert_refused("holds a log already", "--live")
    assert sessions_of(directory) == second
    result = command(*words, "--live", "--json")
    assert result.code == 0, result
    assert (result.json["sessions"], result.json["skipped"]) == (COUNT, [])
    assert sessions_of(directory) == first


def test_a_live_restore_with_a_workers_configuration_reaches_the_workers_that_share(
    command: Command, shared_server: RedisServer, tmp_path: Path
) -> None:
    file = tmp_path / "worker.toml"
    file.write_text(f'[redis]\nurl = "{shared_server.url}"\n')

    async def fill(state: StateManager) -> None:
        await state.create_session(session_id="kept", data={"n": 1})
        await state.create_checkpoint()
        await state.update_session_data("kept", "n", 2)
        await state.create_session(session_id="later")

    async def look(state: StateManager) -> list[Any]:
        found = [await state.get_session(sid, fresh=True) for sid in ("kept", "later")]
        return [session and session.data for session in found]

    redis = {"url": shared_server.url}
    with_state(tmp_path / "state", fill, redis=redis)
    assert with_state(tmp_path / "other", look, redis=redis) == [{"n": 2}, {}]
    words = ["checkpoints", "restore", "latest", tmp_path / "state", "--live", "--config", file]
    result = command(*words)
    assert result.code == 0, result
    assert with_state(tmp_path / "other", look, redis=redis) == [{"n": 1}, None]


@pytest.mark.parametrize("said", ["url", "directory", "nothing"])
def test_a_live_restore_of_shared_sessions_takes_the_workers_configuration(
    command: Command, shared_server: RedisServer, tmp_path: Path, said: str
) -> None:
    async def fill(state: StateManager) -> None:
        await state.create_session(session_id="kept", data={"n": 1})
        await state.create_checkpoint()
        await state.update_session_data("kept", "n", 2)

    redis = {"url": shared_server.url}
    kept = {} if said == "url" else {"store": str(tmp_path / "state-checkpoints")}
    with_state(tmp_path / "state", fill, redis=redis, checkpoint=kept)
    places: dict[str, list[object]] = {
        "url": ["--store", shared_server.url],
        "directory": ["--store", tmp_path / "state-checkpoints"],
        "nothing": [],
    }
    place = places[said]
    words = ["checkpoints", "restore", "latest", tmp_path / "state", "--live"]
    command(*words, *place).assert_refused(f"{tmp_path}/state shares its sessions", "--config")
    after = with_state(tmp_path / "state", contents, redis=redis)
    assert after == {"kept": {"n": 2}}
    # Into a new directory nothing of a worker's is undone.
    assert command(*words[:3], tmp_path / "new", *(place or ["--store", kept["store"]])).code == 0


def test_a_configuration_says_also_that_nothing_is_shared_any_more(
    command: Command, shared_server: RedisServer, tmp_path: Path
) -> None:
    async def fill(state: StateManager) -> None:
        await state.create_session(session_id="kept", data={"n": 1})
        await state.create_checkpoint()
        await state.update_session_data("kept", "n", 2)

    with_state(tmp_path / "state", fill, redis={"url": shared_server.url})
    file = tmp_path / "worker.toml"
    file.write_text(f'[redis]\nurl = "{shared_server.url}"\nwrite = "checkpoint"\n')
    words = ["checkpoints", "restore", "latest", tmp_path / "state", "--live", "--config", file]
    assert command(*words).code == 0
    assert sessions_of(tmp_path / "state") == {"kept": {"n": 1}}


def test_without_a_place_a_checkpoint_goes_where_a_worker_puts_it(
    command: Command, directory: Path
) -> None:
    one = made(command, [], directory)
    beside = directory.with_name("state-checkpoints")
    assert ids_in(command, ["--store", str(beside)]) == [one]


def test_the_environment_can_say_where(
    command: Command, directory: Path, shared_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PERSISTENCE_REDIS__URL", shared_server.url)
    one = made(command, [], directory)
    assert ids_in(command, []) == [one]


def test_nothing_is_dropped_where_nobody_said_how_many_stay(
    command: Command, directory: Path, redis_place: Place, tmp_path: Path
) -> None:
    ids = []
    for number in range(7):
        put(directory, 1, str(number))
        ids.append(made(command, redis_place, directory))
    assert ids_in(command, redis_place) == ids
    file = tmp_path / "worker.toml"
    url = redis_place[1]
    file.write_text(f'[redis]\nurl = "{url}"\nnamespace = "shop"\n[checkpoint]\nkeep = 2\n')
    last = made(command, ["--config", str(file)], directory)
    assert ids_in(command, redis_place) == [ids[-1], last]


def test_every_deployment_has_them(
    command: Command, directory: Path, deployment: Group, tmp_path: Path
) -> None:
    place = opened_by_url(deployment.url)
    one = made(command, place, directory)
    assert ids_in(command, place) == [one]
    assert command("checkpoints", "restore", one, tmp_path / "new", *place).code == 0
    assert sessions_of(tmp_path / "new") == sessions_of(directory)
    assert command("checkpoints", "delete", one, *place).code == 0
    result = command("checkpoints", "list", *place)
    assert (result.code, result.out) == (0, "")
    assert "no checkpoint" in result.err


def test_a_terminal_sees_a_bar(
    command: Command,
    directory: Path,
    redis_place: Place,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(screen, "_is_seen", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")
    result = command("checkpoints", "create", directory, *redis_place)
    assert "create" in result.err
    assert "create " not in result.out
    result = command("checkpoints", "restore", "latest", tmp_path / "new", *redis_place)
    assert "restore" in result.err


# --- what is damaged ------------------------------------------------------------------------------


def damage_newest(server: RedisServer, checkpoint_id: str) -> None:
    [key] = [
        key for key in server.ask("KEYS", "shop:checkpoint:*") if checkpoint_id in key.decode()
    ]
    data = bytearray(server.ask("GET", key))
    data[len(data) // 2] ^= 4
    server.ask("SET", key, bytes(data))


def test_what_is_skipped_is_said(
    command: Command,
    directory: Path,
    shared_server: RedisServer,
    redis_place: Place,
    tmp_path: Path,
) -> None:
    first = sessions_of(directory)
    older = made(command, redis_place, directory)
    put(directory, 3, "second")
    newer = made(command, redis_place, directory)
    damage_newest(shared_server, newer)
    result = command("checkpoints", "restore", "latest", tmp_path / "new", *redis_place)
    assert result.code == 1
    assert result.err.startswith(f"skipped, because it is damaged: {newer}: ")
    assert result.err.count("\n") == 1
    assert f"Restored {older}" in result.out
    assert sessions_of(tmp_path / "new") == first
    words = ["checkpoints", "restore", newer, directory, "--live", "--json", *redis_place]
    result = command(*words)
    assert (result.code, result.json["id"]) == (1, older)
    assert result.json["skipped"][0][0] == newer


def test_where_all_are_damaged_nothing_is_restored_and_one_line_says_so(
    directory: Path,
    shared_server: RedisServer,
    redis_place: Place,
    command: Command,
    tmp_path: Path,
) -> None:
    one = made(command, redis_place, directory)
    damage_newest(shared_server, one)
    # As a shell sees it: with nothing that collects what is logged.
    words = ["checkpoints", "restore", "latest", str(tmp_path / "new"), *redis_place]
    done = subprocess.run(
        [sys.executable, "-m", "persistence.cli", *words],
        capture_output=True,
        text=True,
        check=False,
        env={name: text for name, text in os.environ.items() if "PERSISTENCE" not in name},
    )
    Result(done.returncode, done.stdout, done.stderr).assert_refused(one, "damaged")
    assert sessions_of(tmp_path / "new") == {}


@pytest.mark.parametrize("is_newer", [True, False])
def test_a_manifest_that_cannot_be_read_is_listed_as_that(
    command: Command,
    directory: Path,
    shared_server: RedisServer,
    redis_place: Place,
    tmp_path: Path,
    is_newer: bool,
) -> None:
    one = made(command, redis_place, directory)
    data = shared_server.ask("HGET", "shop:checkpoints", one)
    data = data[:8] + bytes([FORMAT_VERSION + is_newer]) + data[9:-4]
    data += crc32c(data).to_bytes(4, "little") if is_newer else b"oops"
    shared_server.ask("HSET", "shop:checkpoints", one, data)
    words = ["checkpoints", "restore", one, tmp_path / "new", *redis_place]
    command(*words).assert_refused(one, "newer version" if is_newer else "damaged")
    result = command("checkpoints", "list", *redis_place)
    assert result.code == 0
    assert "damaged" in result.out.splitlines()[1]
    assert command("checkpoints", "delete", one, *redis_place).code == 0
    assert ids_in(command, redis_place) == []


# --- what is wrong --------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", ["nonsense", "../../x", "latest"])
def test_an_id_that_does_not_exist_changes_nothing(
    command: Command, place: Place, tmp_path: Path, wanted: str
) -> None:
    result = command("checkpoints", "restore", wanted, tmp_path / "new", *place)
    result.assert_refused("there is no checkpoint")
    assert not (tmp_path / "new").exists()
    command("checkpoints", "delete", wanted, *place).assert_refused("there is no checkpoint")


@pytest.mark.parametrize("scheme", ["redis", "redis+cluster", "redis+sentinel"])
def test_a_server_that_does_not_answer_is_one_line(
    command: Command, directory: Path, tmp_path: Path, scheme: str
) -> None:
    url = f"{scheme}://:secret@127.0.0.1:{free_port()}"
    place = ["--store", url + ("/shop" if scheme == "redis+sentinel" else "")]
    for words in (
        ["list"],
        ["create", directory],
        ["restore", "latest", tmp_path / "new"],
        ["restore", "latest", directory, "--live"],
        ["delete", "x" * 43],
    ):
        result = command("checkpoints", *words, *place)
        result.assert_refused()
        assert "secret" not in result.err
        assert "password" not in result.err
    assert not (tmp_path / "new").exists()


def test_a_wrong_password_is_one_line_without_it(
    command: Command, directory: Path, own_server: RedisServer, tmp_path: Path
) -> None:
    own_server.ask("CONFIG", "SET", "requirepass", "right")
    for secret in (":wrong@", ""):
        place = ["--store", own_server.url.replace("://", f"://{secret}")]
        for words in (["list"], ["create", directory], ["restore", "latest", tmp_path / "new"]):
            result = command("checkpoints", *words, *place)
            result.assert_refused()
            assert "wrong@" not in result.err
            assert ":wrong" not in result.err
    made(command, ["--store", own_server.url.replace("://", "://:right@")], directory)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["list"], "--store"),
        (["list", "--store", "no such directory"], "no such directory"),
        (["list", "--store", "http://127.0.0.1"], "redis.url"),
        (["list", "--store", "redis://127.0.0.1", "--namespace", "a b"], "namespace"),
        (["list", "--store", "/tmp", "--namespace", "a"], "--namespace"),
        (["list", "--store", "/tmp", "--config", "x.toml"], "--config"),
        (["list", "--config", "no such file"], "no such file"),
        (["create", "no such directory"], "no such directory"),
        (["restore", "latest", "no such directory", "--live", "--store", "/tmp"], "no such"),
    ],
)
def test_what_makes_no_sense_is_refused(command: Command, words: list[str], said: str) -> None:
    command("checkpoints", *words).assert_refused(said)


@pytest.mark.parametrize("name", ["list", "create", "restore", "delete"])
def test_each_explains_itself(command: Command, name: str) -> None:
    result = command("checkpoints", name, "--help")
    assert result.code == 0
    assert f"Usage: persistence checkpoints {name}" in result.out
    assert name in command("checkpoints", "--help").out


def test_a_directory_that_is_open_elsewhere_is_refused(
    command: Command, directory: Path, redis_place: Place
) -> None:
    made(command, redis_place, directory)
    with locked(directory):
        command("checkpoints", "create", directory, *redis_place).assert_refused(str(directory))
        words = ["checkpoints", "restore", "latest", directory, *redis_place]
        command(*words).assert_refused(str(directory))
        command(*words, "--live").assert_refused(str(directory))


def test_a_directory_of_something_else_is_left_alone(
    command: Command, directory: Path, redis_place: Place, tmp_path: Path
) -> None:
    made(command, redis_place, directory)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"cat")
    words = ["checkpoints", "restore", "latest", tmp_path / "photos", *redis_place]
    command(*words).assert_refused("photos")
    assert [each.name for each in (tmp_path / "photos").iterdir()] == ["cat.jpg"]


@pytest.mark.parametrize("is_sealed", [True, False], ids=["sealed", "plain"])
def test_wrong_keys_leave_no_directory_that_the_right_ones_do_not_open(
    command: Command, tmp_path: Path, is_sealed: bool
) -> None:
    """A directory is encrypted or plain for good: one made on the way is in the way of the next."""
    keys, store, new = tmp_path / "keys", tmp_path / "store", tmp_path / "new"
    assert command("keys", "create", keys).code == 0
    with_keys = ["--key-file", keys]
    right, wrong = (with_keys, []) if is_sealed else ([], with_keys)
    security = {"key_file": str(keys), "encrypt": True} if is_sealed else {}
    with_state(
        tmp_path / "state", lambda state: state.create_session(session_id="a"), security=security
    )
    made = command("checkpoints", "create", tmp_path / "state", "--store", store, *right)
    assert made.code == 0, made.err
    restore = ["checkpoints", "restore", "latest", new, "--store", store]
    command(*restore, *wrong).assert_refused("encrypted")
    assert not new.exists()
    assert command(*restore, *right).code == 0
