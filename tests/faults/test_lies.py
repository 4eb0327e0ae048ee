"""A device that lies about syncs. Nothing can be promised then but this: nothing wrong is shown."""

from __future__ import annotations

from random import Random

import pytest

from persistence import ManualClock, StateManager, errors
from tests.disk.memoryfiles import MemoryFiles, lie
from tests.disk.powerloss import Beginning, Loss, Nothing, Scattered
from tests.faults import nthcall
from tests.faults.simulation import stepped
from tests.faults.world import World
from tests.support import abandon

SYNCS = ("sync_data", "sync", "sync_directory")


async def shows_only_what_was_submitted(world: World, files: MemoryFiles) -> int:
    """Open the directory if that is possible; return how many sessions can be read."""
    state = StateManager(config=world.config, clock=ManualClock(world.clock.wall()), files=files)
    try:
        await state.open()
    except errors.PersistenceError:
        return 0
    readable = 0
    try:
        for sid in [*await state.get_active_sessions(), *world.ledger.ever]:
            try:
                session = await state.get_session(sid)
            except errors.CorruptionError:
                continue
            if session is not None:
                assert session.data in world.ledger.ever[sid], f"{sid}: nobody ever wrote that"
                readable += 1
        await state.create_session(session_id="afterwards")
        assert await state.has_session("afterwards")
    finally:
        await abandon(state)
    return readable


@pytest.mark.parametrize("seed", range(6))
async def test_after_lies_and_a_power_loss_nothing_is_shown_that_nobody_wrote(seed: int) -> None:
    chance = Random(seed)
    with stepped():
        world = World(seed)
        world.watches = False  # the lies would be seen at once
        steps = [step for step in nthcall.script(seed, 160) if step != "goback"]
        kinds = [kind for kind in SYNCS if chance.random() < 0.6] or ["sync_data"]
        world.faults.append(lie(kinds, nth=chance.randrange(1, 60)))
        await world.run(steps)
        await world.die()
        orders = chance.sample(world.files.unsynced, min(4, len(world.files.unsynced)))
        losses: list[Loss] = [Nothing()]
        losses += [Beginning(order, chance.random()) for order in orders]
        losses += [Scattered(Random(n), torn_at_bytes=bool(n % 2)) for n in range(6)]
        readable = 0
        for loss in losses:
            left = world.files.after_power_loss(loss)
            readable += await shows_only_what_was_submitted(world, left)
        assert readable > 0
