"""Replays whose sessions are in Redis as well: what is verified there, what is refused."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from persistence import (
    DiskConfig,
    RedisConfig,
    ShutdownConfig,
    StateConfig,
    StateManager,
)
from persistence.cli.replay_shared import verify_in_redis
from persistence.cli.replayer import CURSOR_ID, ReplayOptions, ReplayProgress, replay
from tests.cli.command import Command, Result
from tests.cli.generated import write_log
from tests.redis_servers import Deployments, RedisServer, free_port, need_binary

pytestmark = pytest.mark.usefixtures("temporary")


REQUESTS = 200


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return write_log(tmp_path / "access.log", REQUESTS)


def change_in_redis(
    server: RedisServer, namespace: str, directory: Path, change: Callable[[StateManager], Any]
) -> None:
    """Let another worker change the sessions of a replay."""

    async def work() -> None:
        config = StateConfig(
            disk=DiskConfig(path=str(directory)),
            redis=RedisConfig(url=server.url, namespace=namespace),
            shutdown=ShutdownConfig(checkpoint=False),
        )
        async with StateManager(config=config) as state:
            await change(state)

    asyncio.run(work())


def sessions_in_redis(server: RedisServer, namespace: str) -> int:
    keys = server.ask("KEYS", f"{namespace}:session:*")
    assert isinstance(keys, list)
    return len(keys)


# --- what is verified -------------------------------------------------------------------------


@pytest.mark.parametrize("write", ["through", "behind"])
def test_every_session_and_the_cursor_are_in_redis(
    command: Command, log: Path, shared_server: RedisServer, write: str
) -> None:
    words = ("--redis", shared_server.url, "--redis-write", write, "--json")
    result = command("replay", log, *words)
    assert result.code == 0, result
    report = result.json
    assert (report["requests"], report["verified"], report["workers"]) == (REQUESTS, True, 1)
    assert report["redis_sessions"] == report["sessions"]
    assert sessions_in_redis(shared_server, report["namespace"]) == report["sessions"] + 1
    assert shared_server.ask("EXISTS", f"{report['namespace']}:session:{{{CURSOR_ID}}}") == 1


def test_a_cluster_holds_them_as_well(
    command: Command, log: Path, deployments: Deployments
) -> None:
    need_binary()
    result = command("replay", log, "--redis", deployments.get("cluster").url, "--json")
    assert result.code == 0, result
    assert result.json["redis_sessions"] == result.json["sessions"] > 0


def test_a_person_is_told_the_namespace(
    command: Command, log: Path, shared_server: RedisServer
) -> None:
    result = command("replay", log, "--redis", shared_server.url, "--namespace", "my-replay")
    assert result.code == 0
    assert "my-replay" in result.out
    assert "all equal" in result.out


def test_a_session_that_is_wrong_only_in_redis_is_found(
    log: Path, shared_server: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ReplayOptions(
        (log,),
        tmp_path / "state",
        redis_url=shared_server.url,
        namespace="n",
        patience_seconds=0.3,
    )
    damaged: list[str] = []

    async def damaged_first(*arguments: Any) -> Any:
        for key in sorted(shared_server.ask("KEYS", "n:session:{*.*"))[:2]:
            shared_server.ask("DEL", key)
            damaged.append(key.decode())
        return await verify_in_redis(*arguments)

    monkeypatch.setattr("persistence.cli.replayer.verify_in_redis", damaged_first)
    report = asyncio.run(replay(options))
    assert not report.verified
    assert report.differing_sessions == len(damaged) == 2
    assert all("in Redis: is missing" in text for text in report.differences)


def test_a_stranger_in_the_namespace_is_found(
    command: Command, log: Path, shared_server: RedisServer, tmp_path: Path
) -> None:
    words = ("replay", log, "--redis", shared_server.url, "--namespace", "mine")
    own = ("--directory", tmp_path / "state")
    assert command(*words, *own).code == 0

    async def create(state: StateManager) -> None:
        await state.create_session(session_id="stranger")

    change_in_redis(shared_server, "mine", tmp_path / "other", create)

    async def again() -> list[str]:
        options = ReplayOptions(
            (log,),
            tmp_path / "state",
            resume=True,
            redis_url=shared_server.url,
            patience_seconds=0.3,
        )
        return (await replay(options)).differences

    assert asyncio.run(again()) == [
        "session 'stranger' in Redis: is there, but no request in the log belongs to it"
    ]


# --- resuming ---------------------------------------------------------------------------------


def test_a_resumed_replay_goes_on_in_its_namespace(
    command: Command, log: Path, shared_server: RedisServer, tmp_path: Path
) -> None:
    words = ("replay", log, "--redis", shared_server.url, "--directory", tmp_path / "state")
    first = command(*words, "--json").json
    again = command(*words, "--resume", "--json").json
    assert (again["applied"], again["resumed_at"], again["verified"]) == (0, REQUESTS, True)
    assert again["namespace"] == first["namespace"]
    command(*words).assert_refused("--resume")


def test_a_replay_is_resumed_on_a_machine_that_has_never_seen_it(
    command: Command, log: Path, shared_server: RedisServer, tmp_path: Path
) -> None:
    words = ("replay", log, "--redis", shared_server.url, "--namespace", "mine")
    assert command(*words).code == 0
    command(*words).assert_refused("holds a replay already")
    result = command(*words, "--directory", tmp_path / "other", "--resume", "--json")
    assert result.code == 0, result
    report = result.json
    assert (report["applied"], report["resumed_at"]) == (0, REQUESTS)
    assert report["sessions"] == report["redis_sessions"] > 0


def test_resuming_with_another_sharing_is_refused(
    command: Command, log: Path, shared_server: RedisServer, tmp_path: Path
) -> None:
    shared = ("--directory", tmp_path / "shared", "--redis", shared_server.url)
    alone = ("--directory", tmp_path / "alone")
    assert command("replay", log, *shared, "--namespace", "mine").code == 0
    assert command("replay", log, *alone).code == 0
    command("replay", log, *shared, "--resume", "--namespace", "other").assert_refused("'mine'")
    command("replay", log, *shared[:2], "--resume").assert_refused("'mine'", "without Redis")
    command("replay", log, *alone, "--resume", *shared[2:]).assert_refused("without Redis")
    assert sessions_in_redis(shared_server, "other") == 0


# --- refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("http://localhost", "redis.url"),
        ("redis://host:port", "redis.url"),
        ("redis://127.0.0.1:{port}/99", "no such database"),
        ("redis+cluster://127.0.0.1:{port}", "no Redis Cluster"),
    ],
)
@pytest.mark.parametrize("workers", [1, 2])
def test_a_url_that_cannot_work_is_one_clear_line(
    command: Command, log: Path, shared_server: RedisServer, url: str, said: str, workers: int
) -> None:
    url = url.format(port=shared_server.port)
    result = command("replay", log, "--redis", url, "--workers", workers, "--json")
    result.assert_refused(said)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_server_that_is_not_there_is_one_clear_line(
    command: Command, log: Path, workers: int
) -> None:
    url = f"redis://127.0.0.1:{free_port()}"
    result = command("replay", log, "--redis", url, "--workers", workers)
    result.assert_refused("cannot be reached")


@pytest.mark.parametrize("workers", [1, 2])
def test_a_password_that_is_wrong_or_missing_is_one_clear_line(
    command: Command, log: Path, own_server: RedisServer, workers: int
) -> None:
    own_server.ask("CONFIG", "SET", "requirepass", "secret")

    def with_password(password: str) -> Result:
        url = own_server.url.replace("://", f"://{password}")
        return command("replay", log, "--redis", url, "--workers", workers, "--json")

    with_password("").assert_refused("password")
    with_password(":guessed@").assert_refused("password")
    assert "guessed" not in with_password(":guessed@").err
    assert with_password(":secret@").json["verified"] is True


@pytest.mark.parametrize("workers", [1, 2])
def test_a_namespace_of_something_else_is_refused_and_left_alone(
    command: Command, log: Path, shared_server: RedisServer, tmp_path: Path, workers: int
) -> None:
    async def create(state: StateManager) -> None:
        await state.create_session(session_id="mine")

    change_in_redis(shared_server, "shop", tmp_path / "shop", create)
    words = ("--redis", shared_server.url, "--namespace", "shop", "--workers", workers)
    command("replay", log, *words).assert_refused("'shop'", "something else")
    assert sessions_in_redis(shared_server, "shop") == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--namespace", "n"], "--redis"),
        (["--workers", 2], "--redis"),
        (["--redis", "redis://localhost", "--redis-write", "checkpoint"], "through or behind"),
        (
            ["--redis", "redis://localhost", "--redis-write", "behind", "--workers", 2],
            "--redis-write through",
        ),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    command: Command, log: Path, words: list[object], said: str
) -> None:
    command("replay", log, *words).assert_refused(said)


# --- outages ----------------------------------------------------------------------------------


def test_redis_killed_in_the_middle_and_back_empty_has_everything_at_the_end(
    own_server: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("persistence.cli.replay_run._PROGRESS_SECONDS", 0.05)  # so, in the middle
    requests = 2000
    log = write_log(tmp_path / "long.log", requests, clients=100)
    options = ReplayOptions(
        (log,), tmp_path / "state", redis_url=own_server.url, namespace="n", concurrency=2
    )
    killed_at: list[int] = []

    async def scenario() -> Any:
        loop = asyncio.get_running_loop()
        restarts: list[asyncio.Future[Any]] = []

        def kill_in_the_middle(progress: ReplayProgress) -> None:
            if progress.stage == "replay" and progress.done > 0 and not killed_at:
                killed_at.append(progress.done)
                own_server.kill()
                loop.call_later(1.0, restart)  # the time that it is away

        def restart() -> None:
            restarts.append(loop.run_in_executor(None, own_server.start))

        report = await replay(options, kill_in_the_middle)
        await asyncio.gather(*restarts)
        return report

    report = asyncio.run(scenario())
    assert 0 < killed_at[0] < requests  # so many were dealt; applied are fewer
    assert report.verified, report.differences
    assert (report.requests, report.applied) == (requests, requests)
    assert report.redis_sessions == report.sessions
    assert sessions_in_redis(own_server, "n") == report.sessions + 1
