"""A session that outlives its worker: create, update, edit, restart, read, terminate."""
# ruff: noqa: T201 - an example prints

import asyncio
from decimal import Decimal

from persistence import DiskConfig, StateConfig, StateManager

CONFIG = StateConfig(disk=DiskConfig(path=".persistence/quickstart"))


async def work() -> str:
    """Be a worker: open the directory, keep a session, end."""
    async with StateManager(config=CONFIG) as state:
        sid = await state.create_session(user_id="ada", ttl_seconds=600, data={"cart": []})
        await state.update_session_data(sid, "page", "/book/dune")
        async with state.edit(sid) as draft:  # several changes: all of them or none
            draft["cart"].append({"book": "Dune", "price": Decimal("9.99")})
            draft["total"] = Decimal("9.99")
        return sid  # each update was on the disk when its await returned


async def work_on(sid: str) -> None:
    """Be the next worker: the session is as the last one left it."""
    async with StateManager(config=CONFIG) as state:
        session = await state.get_session(sid)
        assert session is not None, "it would be, after ten minutes without an access"
        print(f"version {session.version} of {session.user_id}'s session: {session.data}")
        await state.terminate_session(sid)
        print(f"terminated: {await state.get_session(sid)}")


if __name__ == "__main__":
    asyncio.run(work_on(asyncio.run(work())))
