"""Every sequence of up to three operations, and a crash at every point of each of them.

As in ALICE and B3 (see docs/reliability.md): short sequences find what long random ones find late.
A sequence starts on a directory that has something for each operation to do, and with its opening,
so crashes during recovery, and during the merge that follows it, are among the points.

At each point, between any two calls that change the disk, these are looked at: what a killed
process leaves; what a power loss leaves if nothing unsynced is there, if any beginning of it is,
torn at a random byte, and if any part of it is. States that are the same are opened once.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Iterator
from itertools import product
from random import Random
from typing import Final, NamedTuple

from persistence import ManualClock
from tests.disk.memoryfiles import MUTATING, Call, MemoryFiles
from tests.disk.powerloss import Beginning, Loss, Nothing, Scattered
from tests.faults.ledger import Ledger, State
from tests.faults.simulation import stepped
from tests.faults.world import TTL_SECONDS, World, check_checkpoints, check_image

OPERATIONS: Final = (
    "create",
    "update",
    "terminate",
    "spill",
    "rotate",
    "compact",
    "checkpoint",
    "expire",
)
LONGEST: Final = 3
Sequence = tuple[str, ...]


def all_sequences() -> list[Sequence]:
    """Return all 584 of them, the short ones first."""
    return [
        sequence
        for length in range(1, LONGEST + 1)
        for sequence in product(OPERATIONS, repeat=length)
    ]


class Base(NamedTuple):
    """Where every sequence starts."""

    files: MemoryFiles
    ledger: Ledger
    checkpoints: dict[str, State]
    wall_seconds: float


def make_base() -> Base:
    """Return a directory that a killed process left.

    In it are: a session that is only in an old segment, one that was terminated since, a restore
    point, and enough expired sessions for a merge, which nobody has noticed yet.
    """
    with stepped():
        return asyncio.run(_make_base())


async def _make_base() -> Base:
    world = World(1)
    await world.open()
    for step in ("create a", "create t", "rotate", "checkpoint", "terminate t", "update a"):
        await world.do(step)
    for number in range(9):
        await world.state.create_session(
            session_id=f"old {number}",
            data={"x": Random(number).randbytes(5000)},
            ttl_seconds=TTL_SECONDS,
            auto_renew=False,
        )
    await world.do("rotate")
    world.clock.advance(TTL_SECONDS + 1)
    await world.die()
    return Base(world.files, world.ledger, world.checkpoints, world.clock.wall())


class Point(NamedTuple):
    """A moment at which the machine may stop: before `call`."""

    call: str
    files: MemoryFiles
    ledger: Ledger
    checkpoints: dict[str, State]
    wall_seconds: float


class _Watcher:
    """Takes a picture before each call that changes the disk."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.points: list[Point] = []

    def __call__(self, files: MemoryFiles, call: Call) -> None:
        if call.operation in MUTATING and not files.is_dead:
            self.look(str(call))

    def look(self, call: str) -> None:
        """Take a picture now."""
        world = self._world
        self.points.append(
            Point(
                call,
                world.files.after_kill(),
                world.ledger.copy(),
                dict(world.checkpoints),
                world.clock.wall(),
            )
        )


def _world_at(base: Base | Point) -> World:
    world = World(2, base.files.after_kill(), base.ledger.copy(), ManualClock(base.wall_seconds))
    world.checkpoints = dict(base.checkpoints)
    return world


async def _points(base: Base, sequence: Sequence) -> list[Point]:
    """Do a sequence; return its crash points, the moment behind its end included."""
    world = _world_at(base)
    watcher = _Watcher(world)
    world.faults.append(watcher)
    assert await world.open(looks=False)
    target = "a"
    for name in sequence:
        if name == "create":
            target = next(sid for sid in "abcdef" if world.ledger.value(sid) is None)
        takes_session = name in {"create", "update", "terminate", "spill"}
        await world.do(f"{name} {target}" if takes_session else name)
    watcher.look("the end")
    assert world.refusals == [], "nothing fails"
    await world.die()
    return watcher.points


def _losses(point: Point, chance: Random) -> Iterator[tuple[str, Loss]]:
    yield "nothing", Nothing()
    unsynced = point.files.unsynced
    for order in unsynced:
        yield f"up to {order}", Beginning(order)
        part = chance.random()
        yield f"up to {part:.3f} of {order}", Beginning(order, part)
    if unsynced:
        yield "sectors", Scattered(Random(chance.random()))
        yield "bytes", Scattered(Random(chance.random()), torn_at_bytes=True)
        yield "most", Scattered(Random(chance.random()), torn_at_bytes=True, odds=0.85)


def _images(point: Point, chance: Random) -> Iterator[tuple[str, MemoryFiles]]:
    yield "kill", point.files.after_kill()
    for name, loss in _losses(point, chance):
        yield name, point.files.after_power_loss(loss)


def _digest(files: MemoryFiles, point: Point) -> bytes:
    """Return what tells an image from all others, as far as its check is concerned."""
    digest = hashlib.blake2b(digest_size=16)
    for path, data in files.contents().items():
        digest.update(f"{path} {len(data)} ".encode())
        digest.update(data)
    digest.update(repr((files.unsynced, sorted(files.unsynced_names()))).encode())
    outcomes = [(entry.session_id, entry.outcome) for entry in point.ledger.log]
    digest.update(repr((outcomes, sorted(point.checkpoints), point.wall_seconds)).encode())
    return digest.digest()


class Tally:
    """How much has been looked at; sequences that start alike share what is at their start.

    Attributes:
        sequences: how many.
        points: crash points of all of them.
        images: what crashes at those points may leave, of points that are not the same.
        opened: how many of these were different from each other, and so were opened.
        seen: digests.
    """

    def __init__(self) -> None:
        self.sequences = 0
        self.points = 0
        self.images = 0
        self.opened = 0
        self.seen: set[bytes] = set()


def check(base: Base, sequence: Sequence, seed: int, tally: Tally, share: float = 1.0) -> None:
    """Do a sequence; open what a crash at each of its points may leave.

    Args:
        base: where it starts.
        sequence: names of operations.
        seed: of what is torn where.
        tally: what has been looked at already; it is added to.
        share: how many of the states are opened; 1: all.

    Raises:
        AssertionError: something is lost, wrong, or there and should not be; it tells where.
    """
    with stepped():
        asyncio.run(_check(base, sequence, seed, tally, share))


async def _check(base: Base, sequence: Sequence, seed: int, tally: Tally, share: float) -> None:
    sample = Random(f"{seed} {sequence}")
    for number, point in enumerate(await _points(base, sequence)):
        tally.points += 1
        digest = _digest(point.files, point)
        if digest in tally.seen:
            continue
        tally.seen.add(digest)
        for name, files in _images(point, Random(f"{seed} {digest.hex()}")):
            tally.images += 1
            digest = _digest(files, point)
            if (digest in tally.seen and name != "kill") or sample.random() >= share:
                continue
            tally.seen.add(digest)
            tally.opened += 1
            try:
                await _check_image(point, files, restores=name in {"kill", "nothing"})
            except Exception as error:
                where = f"{' '.join(sequence)}, point {number} ({point.call}), {name}: {error}"
                raise AssertionError(where) from error
    tally.sequences += 1


async def _check_image(point: Point, files: MemoryFiles, *, restores: bool) -> None:
    world = _world_at(point)
    found = await check_image(world, files)
    if restores:
        again = files.after_kill()  # killed right after that opening
        world.ledger.replaced(found)
        assert await check_image(world, again) == found
        torn = files.after_power_loss(Scattered(Random(len(found)), torn_at_bytes=True))
        assert await check_image(world, torn) == found  # that opening had removed something
        await check_checkpoints(world, again.after_kill())
