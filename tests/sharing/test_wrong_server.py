"""A shared tier that can never be used leaves no directory behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from persistence import StateConfig, StateManager
from persistence.errors import ConfigError
from tests.engine import names_in
from tests.redis_servers import RedisServer


def config(path: Path, url: str) -> StateConfig:
    return StateConfig.model_validate(
        {"disk": {"path": str(path)}, "redis": {"url": url, "namespace": "wrong"}}
    )


@pytest.mark.parametrize("wrong", ["redis://nobody:wrong@{place}", "redis://{place}/4711"])
async def test_a_wrong_password_or_database_makes_no_directory(
    shared_server: RedisServer, tmp_path: Path, wrong: str
) -> None:
    path = tmp_path / "d"
    url = wrong.format(place=shared_server.url.removeprefix("redis://"))
    with pytest.raises(ConfigError):
        await StateManager(config=config(path, url)).open()
    assert not path.exists()


async def test_an_empty_directory_stays_empty(shared_server: RedisServer, tmp_path: Path) -> None:
    url = f"{shared_server.url}/4711"
    with pytest.raises(ConfigError):
        await StateManager(config=config(tmp_path, url)).open()
    assert not names_in(tmp_path)


async def test_a_foreign_namespace_makes_no_directory(
    shared_server: RedisServer, tmp_path: Path
) -> None:
    path = tmp_path / "d"
    shared_server.ask("SET", "wrong:session:{a}", "mine")
    try:
        with pytest.raises(ConfigError, match=r"redis\.namespace"):
            await StateManager(config=config(path, shared_server.url)).open()
    finally:
        shared_server.ask("DEL", "wrong:session:{a}")
    assert not path.exists()
