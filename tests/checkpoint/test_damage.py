"""Damage of any one chunk: it is found, the checkpoint before is restored, and that is said."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from persistence import StateManager
from persistence.checkpoint.catalogue import list_checkpoints
from persistence.checkpoint.directory_store import DirectoryStore, chunk_name
from persistence.checkpoint.manifest import decode_manifest
from persistence.checkpoint.redis_store import RedisStore
from persistence.checkpoint.stores import ChunkKey, ChunkUnreadable
from persistence.disk.files import Files
from persistence.disk.threads import Threads
from persistence.errors import CheckpointDamaged, DirectoryNotUsable
from tests.checkpoint.support import checkpoint, restored
from tests.engine import KIB, Start, contents
from tests.redis_servers import RedisServer


async def fill(state: StateManager, ids: range, text: str) -> None:
    for number in ids:
        async with state.edit((await state.get_or_create_session(f"s{number}")).id) as draft:
            draft["text"] = f"{text} {number} " * 20


@pytest.fixture
async def worker(
    start: Start, shared_server: RedisServer, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> StateManager:
    """A worker whose checkpoints have several chunks each."""
    monkeypatch.setattr("persistence.checkpoint.create.CHUNK_BYTES", 4 * KIB)
    monkeypatch.setattr("persistence.checkpoint.plan.CHUNK_BYTES", 4 * KIB)
    url = shared_server.url
    return await start(
        redis={"url": url, "namespace": namespace, "write": "checkpoint"},
        checkpoint={"compression": "none"},
        shutdown={"checkpoint": False},
    )


async def three_checkpoints(
    worker: StateManager, redis: Any, namespace: str
) -> tuple[list[str], list[dict[str, Any]]]:
    """Make a full one, another full one, and an incremental one; return ids and states."""
    infos, states = [], []
    for ids, text in ((range(60), "first"), (range(60, 120), "second"), (range(40), "third")):
        await fill(worker, ids, text)
        if text == "second":  # the directory forgets the first: the next one is full
            await worker.restore_checkpoint("latest")
            await fill(worker, ids, text)
        infos.append(await worker.create_checkpoint(text))
        states.append(await contents(worker))
    assert [info.kind for info in infos] == ["full", "full", "incremental"]
    return [info.id for info in infos], states


async def test_any_one_damaged_chunk_is_found_and_the_one_before_restored(
    worker: StateManager, redis: Any, namespace: str, caplog: pytest.LogCaptureFixture
) -> None:
    ids, states = await three_checkpoints(worker, redis, namespace)
    store = RedisStore(redis, namespace)
    manifests = {one: decode_manifest(data, one) for one, data in (await store.manifests()).items()}
    needs = {
        one: {(chunk.checkpoint, chunk.number) for chunk in manifest.chunks}
        for one, manifest in manifests.items()
    }
    keys = await store.chunks()
    present = [key for key, size in zip(keys, await store.chunk_bytes(keys), strict=True) if size]
    assert len(present) == len(await redis.keys(f"{namespace}:checkpoint:*"))
    for one in ids:
        assert len([key for key in present if key.checkpoint == one]) > 2
    for number, key in enumerate(present):
        name = store.chunk_key(key)
        intact = await redis.get(name)
        damaged = bytearray(intact)
        damaged[number * 997 % len(damaged)] ^= 1 << number % 8
        await redis.set(name, bytes(damaged))
        # What does not need it is restored; in front of that, everything is passed over.
        expected = next(one for one in reversed(ids) if key not in needs[one])
        passed_over = [one for one in reversed(ids) if one > expected]
        caplog.clear()
        with caplog.at_level(logging.ERROR, "persistence.checkpoint"):
            restored = await worker.restore_checkpoint()
        assert restored.id == expected
        assert [one for one, _ in restored.skipped] == passed_over
        assert all(f"chunk {key.number} of {key.checkpoint}" in why for _, why in restored.skipped)
        assert len(caplog.messages) == len(passed_over)
        assert await contents(worker) == states[ids.index(expected)]
        await redis.set(name, intact)
    restored = await worker.restore_checkpoint()
    assert (restored.id, restored.skipped) == (ids[-1], ())
    assert await contents(worker) == states[-1]


async def test_a_damaged_chunk_of_all_there_are_changes_nothing(
    worker: StateManager, redis: Any, namespace: str
) -> None:
    await fill(worker, range(60), "first")
    info = await worker.create_checkpoint()
    await fill(worker, range(10), "later")
    before = await contents(worker)
    for name in await redis.keys(f"{namespace}:checkpoint:*"):
        intact = await redis.get(name)
        await redis.set(name, intact[:-1])
        with pytest.raises(CheckpointDamaged, match=info.id):
            await worker.restore_checkpoint()
        await redis.set(name, intact)
        assert await contents(worker) == before


# --- what stands in the place of a chunk is no chunk ----------------------------------------------

Spoil = Callable[[Any, str], Awaitable[Any]]
OTHER_TYPES: dict[str, Spoil] = {
    "list": lambda redis, key: redis.rpush(key, "x"),
    "hash": lambda redis, key: redis.hset(key, "f", "x"),
    "empty": lambda redis, key: redis.set(key, b""),
}


@pytest.mark.parametrize("kind", OTHER_TYPES)
async def test_another_type_in_the_place_of_a_chunk_is_damage(
    start: Start, redis: Any, namespace: str, tmp_path: Path, kind: str
) -> None:
    store = RedisStore(redis, namespace)
    state = await start()
    await fill(state, range(20), "first")
    older = await checkpoint(state, store)
    expected = await contents(state)
    await fill(state, range(3), "second")
    newer = await checkpoint(state, store)
    key = store.chunk_key(ChunkKey(newer.id, 0))
    await redis.delete(key)
    await OTHER_TYPES[kind](redis, key)
    info, found = await restored(store, tmp_path / "new")
    assert (info.id, found) == (older.id, expected)
    [(skipped, why)] = info.skipped
    assert skipped == newer.id
    assert f"chunk 0 of {newer.id}" in why
    assert (await checkpoint(state, store)).kind == "full"


class SpoiledFiles(Files):
    """The system's files, but for those in `errors`, by the end of their path."""

    def __init__(self) -> None:
        self.errors: dict[str, int] = {}

    def open_read(self, path: str) -> int:
        for name, code in self.errors.items():
            if path.endswith(name):
                raise OSError(code, os.strerror(code), path)
        return super().open_read(path)


@pytest.fixture
def store_files() -> SpoiledFiles:
    return SpoiledFiles()


@pytest.fixture
def directory_store(tmp_path: Path, threads: Threads, store_files: SpoiledFiles) -> DirectoryStore:
    return DirectoryStore(str(tmp_path / "checkpoints"), threads, store_files)


def spoil(path: Path, kind: str, store_files: SpoiledFiles) -> None:
    """Put something else in the place of a file, or let it be unreadable."""
    if kind in ("directory", "fifo", "loop"):
        path.unlink()
    if kind == "directory":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "loop":
        path.symlink_to(path)
    else:
        store_files.errors[path.name] = getattr(errno, kind)


@pytest.mark.parametrize("kind", ["directory", "fifo", "loop", "EIO", "EBADMSG"])
async def test_no_file_in_the_place_of_a_chunk_is_damage(
    start: Start,
    directory_store: DirectoryStore,
    tmp_path: Path,
    store_files: SpoiledFiles,
    kind: str,
) -> None:
    state = await start()
    await fill(state, range(20), "first")
    older = await checkpoint(state, directory_store)
    expected = await contents(state)
    await fill(state, range(3), "second")
    newer = await checkpoint(state, directory_store)
    path = tmp_path / "checkpoints" / chunk_name(ChunkKey(newer.id, 0))
    spoil(path, kind, store_files)
    info, found = await restored(directory_store, tmp_path / "new")
    assert (info.id, found) == (older.id, expected)
    [(skipped, why)] = info.skipped
    assert skipped == newer.id
    assert str(path) in why
    assert (await checkpoint(state, directory_store, keep=1)).kind == "full"
    # Nobody lists it any more: what can be removed is, and the rest holds nothing up.
    await fill(state, range(3), "third")
    assert (await checkpoint(state, directory_store, keep=1)).kind == "incremental"
    left = [each.name for each in (tmp_path / "checkpoints").iterdir()]
    assert (path.name in left) == (kind == "directory")


async def test_no_file_in_the_place_of_a_manifest_is_damage(
    start: Start, directory_store: DirectoryStore, tmp_path: Path
) -> None:
    state = await start()
    older, newer = [await checkpoint(state, directory_store) for _ in range(2)]
    path = tmp_path / "checkpoints" / f"{newer.id}.manifest"
    path.unlink()
    path.mkdir()
    kinds = [info.kind for info in await list_checkpoints(directory_store)]
    assert kinds == ["full", "damaged"]
    assert (await restored(directory_store, tmp_path / "new"))[0].id == older.id
    with pytest.raises(DirectoryNotUsable, match=str(path)):
        await directory_store.withdraw(newer.id)


@pytest.mark.parametrize("code", [errno.EMFILE, errno.EACCES, errno.ESTALE])
async def test_what_is_no_fault_of_a_chunk_is_no_damage(
    directory_store: DirectoryStore, store_files: SpoiledFiles, tmp_path: Path, code: int
) -> None:
    key = ChunkKey("00000001-20260101T000000Z-0123abcd-00000000", 0)
    await directory_store.put_chunk(key, b"chunk")
    store_files.errors[".chunk"] = code
    for call in (directory_store.get_chunk(key), directory_store.chunk_bytes([key])):
        with pytest.raises(DirectoryNotUsable, match=chunk_name(key)):
            await call
    store_files.errors[".chunk"] = errno.EIO
    assert await directory_store.chunk_bytes([key]) == [0]
    with pytest.raises(ChunkUnreadable, match=chunk_name(key)):
        await directory_store.get_chunk(key)
