"""Options of a replay that do not go together."""

from __future__ import annotations

from pathlib import Path

from tests.cli.command import Command


def test_when_redis_learns_needs_a_redis(command: Command, tmp_path: Path) -> None:
    log = tmp_path / "access.log"
    log.write_text("")
    where = tmp_path / "d"
    ran = command("replay", log, "--directory", where, "--redis-write", "behind")
    assert ran.code != 0
    assert "--redis-write needs --redis" in ran.err
    assert not where.exists()
