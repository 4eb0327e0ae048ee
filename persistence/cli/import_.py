"""``persistence import``: sessions from JSON Lines into a directory."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Annotated, Any

import typer

from persistence import (
    DiskConfig,
    Session,
    SessionConfig,
    SessionMetadata,
    ShutdownConfig,
    StateConfig,
    StateManager,
)
from persistence.cli import screen
from persistence.cli.failure import EXIT_OK, CommandError
from persistence.cli.jsonl import LineError, decode
from persistence.cli.options import DirectoryArgument, deep_values
from persistence.cli.running import run
from persistence.clock import SystemClock
from persistence.config import GIB
from persistence.errors import PersistenceError, printable
from persistence.record import check_field_name, pack_meta, pack_value


@dataclass(slots=True)
class Counts:
    """What became of the lines."""

    created: int = 0
    replaced: int = 0
    expired: int = 0


def command(
    directory: DirectoryArgument,
    input_file: Annotated[
        Path | None,
        typer.Option("--input", metavar="FILE", help="Where to read from; else stdin."),
    ] = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Replace sessions that exist; else they are refused.")
    ] = False,
) -> int:
    """Create a session for each line of JSON, as 'persistence export' writes them.

    All lines are checked before the first session is created: when one is wrong, or its session
    exists, nothing is imported. Version and times are the import's own; the TTL starts anew,
    except that a session which is not renewed keeps its deadline. What expired is left out.
    """
    with _opened(input_file) as file, deep_values():
        counts = run(_import(directory, file, is_replacing=replace))
    screen.note(
        f"{counts.created:,} sessions created, {counts.replaced:,} replaced, "
        f"{counts.expired:,} left out because they have expired"
    )
    return EXIT_OK


@contextmanager
def _opened(input_file: Path | None) -> Iterator[IO[bytes]]:
    """Open the input for reading it twice: what cannot be rewound is copied first."""
    if input_file is not None and input_file.is_file():
        with input_file.open("rb") as file:
            yield file
        return
    with TemporaryFile() as copy:
        if input_file is None:
            shutil.copyfileobj(sys.stdin.buffer, copy)
        else:
            with input_file.open("rb") as source:
                shutil.copyfileobj(source, copy)
        yield copy


async def _import(directory: Path, file: IO[bytes], *, is_replacing: bool) -> Counts:
    config = StateConfig(
        # What another configuration has accepted is not refused here.
        session=SessionConfig(max_bytes=GIB, cleanup_interval_seconds=0),
        # Nobody acts on a single line's acknowledgement: one sync, at the end, covers all.
        disk=DiskConfig(path=str(directory), fsync="interval"),
        shutdown=ShutdownConfig(checkpoint=False),
    )
    # A file without one good line should not leave a new directory behind.
    for _ in _lines(file):
        pass
    async with StateManager(config=config) as state:
        if not is_replacing:
            await _refuse_existing(state, file)
        counts = Counts()
        for number, fields in _lines(file):
            try:
                await _import_line(state, fields, counts, is_replacing=is_replacing)
            except PersistenceError as error:
                raise CommandError(
                    f"line {number}: {error} (the lines before it are imported)"
                ) from error
        await state.flush()
    return counts


def _lines(file: IO[bytes]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield line numbers and decoded, storable fields, from the start; blank lines are skipped."""
    file.seek(0)
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            fields = decode(line)
            _check_storable(fields)
        except (LineError, PersistenceError) as error:
            raise CommandError(f"line {number}: {error}; nothing was imported") from error
        yield number, fields


def _check_storable(fields: dict[str, Any]) -> None:
    for name, value in fields.get("data", {}).items():
        pack_value(value, check_field_name(name))
    metadata = fields.get("metadata", {})
    unknown = metadata.keys() - _METADATA
    if unknown:
        raise LineError(f"unknown metadata {min(unknown)!a}")
    pack_meta(metadata)


_METADATA = {"client_ip", "user_agent", "source", "attributes"}


async def _refuse_existing(state: StateManager, file: IO[bytes]) -> None:
    for number, fields in _lines(file):
        try:
            exists = await state.has_session(fields["id"])
        except PersistenceError as error:
            raise CommandError(f"line {number}: {error}; nothing was imported") from error
        if exists:
            raise CommandError(
                f"line {number}: session {printable(fields['id'])} exists already; nothing was "
                "imported (--replace replaces what exists)"
            )


async def _import_line(
    state: StateManager, fields: dict[str, Any], counts: Counts, *, is_replacing: bool
) -> None:
    ttl_seconds = fields.get("ttl_seconds")
    expires_at = fields.get("expires_at")
    if expires_at is not None:
        left = (expires_at - _now()).total_seconds()
        if left <= 0:
            counts.expired += 1
            return
        if not fields.get("auto_renew", True):
            ttl_seconds = left
    sid = fields["id"]
    data = fields.get("data", {})
    existing = await state.get_session(sid, renew=False) if is_replacing else None
    if existing is None:
        counts.created += 1
    else:
        counts.replaced += 1
        if _differs_in_data_only(existing, fields):
            # In one commit, which a crash or a full disk leaves whole or undone.
            await state.replace_session(sid, data, ttl_seconds=ttl_seconds)
            return
        await state.terminate_session(sid)
    await state.create_session(
        session_id=sid,
        user_id=fields.get("user_id"),
        metadata=SessionMetadata(**fields.get("metadata", {})),
        ttl_seconds=ttl_seconds,
        data=data,
        max_requests=fields.get("max_requests"),
        auto_renew=fields.get("auto_renew"),
    )


def _differs_in_data_only(session: Session, fields: dict[str, Any]) -> bool:
    return (
        session.user_id == fields.get("user_id")
        and session.max_requests == fields.get("max_requests")
        and session.auto_renew == fields.get("auto_renew", session.auto_renew)
        and session.metadata == SessionMetadata(**fields.get("metadata", {}))
    )


def _now() -> datetime:
    return datetime.fromtimestamp(SystemClock().wall(), UTC)
