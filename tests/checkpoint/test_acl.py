"""A user with exactly the rules that docs/redis.md names can make and restore checkpoints."""

from __future__ import annotations

import re
from pathlib import Path

from persistence import StateManager
from tests.engine import config_for, contents
from tests.redis_servers import Group
from tests.sharing.support import sharing_of

DOCS = Path(__file__).parents[2] / "docs" / "redis.md"


def documented_rules(namespace: str) -> list[str]:
    """Return the rules of the command in the docs, and what they say checkpoints need as well."""
    text = DOCS.read_text(encoding="utf-8")
    command = re.search(r"^ACL SETUSER worker (.*?)^```", text, re.MULTILINE | re.DOTALL)
    more = re.search(r"Checkpoints need `([^`]+)` as well", text)
    assert command, "docs/redis.md has the command"
    assert more, "docs/redis.md has what checkpoints need"
    words = command[1].replace("\\\n", " ").replace("NAMESPACE", namespace).split()
    return words + more[1].split()


async def test_a_user_with_exactly_the_documented_rules_can_make_and_restore_checkpoints(
    tmp_path: Path, deployment: Group
) -> None:
    servers = [it for it in deployment.servers if "redis_mode:sentinel" not in it.told("INFO")]
    for server in servers:
        server.ask("ACL", "SETUSER", "worker", "reset", *documented_rules("test"))
    url = deployment.url.replace("://", "://worker:PASSWORD@")
    try:
        config = config_for(
            tmp_path, redis={"namespace": "test"}, checkpoint={"keep": 2, "store": "redis"}
        )
        async with StateManager(url, config) as state:
            sid = await state.create_session(data={"n": 0})
            made = [await state.create_checkpoint()]
            for count in range(1, 5):
                await state.update_session_data(sid, "n", count)
                made.append(await state.create_checkpoint())
            assert [info.id for info in await state.list_checkpoints()] == [
                info.id for info in made[-2:]
            ]
            restored = await state.restore_checkpoint(made[-2].id)
            assert (restored.id, restored.skipped) == (made[-2].id, ())
            assert await contents(state) == {sid: {"n": 3}}
            await state.delete_checkpoint(made[-2].id)
            assert sharing_of(state).is_up
    finally:
        for server in servers:
            server.ask("ACL", "DELUSER", "worker")
