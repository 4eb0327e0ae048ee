"""``persistence import``: sessions from JSON Lines into a directory."""

from __future__ import annotations

import math
import shutil
import sys
from codecs import BOM_UTF8
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Annotated, Any

import typer

from persistence import (
    DiskConfig,
    SecurityConfig,
    SessionConfig,
    ShutdownConfig,
    StateConfig,
    StateManager,
)
from persistence.arguments import MAX_TTL_SECONDS, check_count_or_none, check_ttl
from persistence.cli import screen
from persistence.cli.failure import EXIT_OK, CommandError
from persistence.cli.jsonl import LineError, decode
from persistence.cli.key_source import KeyFileOption, security_for
from persistence.cli.options import STANDARD_STREAM, DirectoryArgument, deep_values
from persistence.cli.running import run
from persistence.clock import SystemClock
from persistence.commit import committed
from persistence.config import GIB
from persistence.errors import PersistenceError, printable
from persistence.ids import check_session_id
from persistence.record import (
    NO_ID,
    PREFIX_BYTES,
    assemble,
    check_field_name,
    pack_meta,
    pack_value,
)
from persistence.session import MAX_REQUESTS, USER_ID, check_metadata


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
        typer.Option("--input", metavar="FILE", help="Where to read from; else, or with -, stdin."),
    ] = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Replace sessions that exist; else they are refused.")
    ] = False,
    key_file: KeyFileOption = None,
) -> int:
    """Create a session for each line of JSON, as 'persistence export' writes them.

    All lines are checked before the first session is created: when one is wrong, or its session
    exists or is there twice, nothing is imported. Version and times are the import's own; the TTL
    starts anew, except that a session which is not renewed keeps its deadline, and an absolute
    limit on a session's lifetime stays. What expired is left out. With --key-file a new
    directory is an encrypted one.
    """
    security = security_for(directory, key_file)
    with _opened(input_file) as file, deep_values():
        counts = run(_import(directory, file, security, is_replacing=replace))
    screen.note(
        f"{counts.created:,} sessions created, {counts.replaced:,} replaced, "
        f"{counts.expired:,} left out because they have expired"
    )
    return EXIT_OK


@contextmanager
def _opened(input_file: Path | None) -> Iterator[IO[bytes]]:
    """Open the input for reading it twice: what cannot be rewound is copied first."""
    if input_file == STANDARD_STREAM:
        input_file = None
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


async def _import(
    directory: Path, file: IO[bytes], security: SecurityConfig, *, is_replacing: bool
) -> Counts:
    config = StateConfig(
        # What another configuration has accepted is not refused here.
        session=SessionConfig(max_bytes=GIB, cleanup_interval_seconds=0),
        # Nobody acts on a single line's acknowledgement: one sync, at the end, covers all.
        disk=DiskConfig(path=str(directory), fsync="interval"),
        shutdown=ShutdownConfig(checkpoint=False),
        security=security,
    )
    # A file with a wrong line should not leave a new directory behind.
    _check_all(file, may_repeat=is_replacing)
    async with StateManager(config=config) as state:
        if not is_replacing:
            await _refuse_existing(state, file)
        counts = Counts()
        for number, line in _lines(file):
            try:
                await _import_line(state, line, counts)
            except PersistenceError as error:
                raise CommandError(
                    f"line {number}: {error} (the lines before it are imported)"
                ) from error
        await state.flush()
    return counts


# --- checking ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Line:
    """What a line says, checked and packed; times in wall seconds.

    Attributes:
        deadline: when a session that no access renews expires; None: a TTL from now.
        cap: when it ends at the latest, renewed or not; None: no such limit.
        ends: when it has expired.
    """

    session_id: str
    key: bytes
    user_id: str | None
    fields: dict[str, bytes | memoryview]
    meta: bytes
    ttl_seconds: float
    renews: bool
    deadline: float | None
    cap: float | None
    ends: float


def _lines(file: IO[bytes]) -> Iterator[tuple[int, Line]]:
    """Yield line numbers and what the lines say, from the start; blank lines are skipped."""
    file.seek(0)
    if file.read(len(BOM_UTF8)) != BOM_UTF8:  # which editors on Windows put in front
        file.seek(0)
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            packed = _packed(decode(line))
        except (LineError, PersistenceError) as error:
            raise CommandError(f"line {number}: {error}; nothing was imported") from error
        yield number, packed


def _check_all(file: IO[bytes], *, may_repeat: bool) -> None:
    """Check every line, and that no session is there twice, unless one may replace the other.

    Raises:
        CommandError: a line is wrong.
    """
    seen: set[bytes] = set()
    for number, line in _lines(file):
        digest = blake2b(line.key, digest_size=16).digest()
        if digest in seen and not may_repeat:
            raise CommandError(
                f"line {number}: session {printable(line.session_id)} is there a second time; "
                "nothing was imported (--replace takes the last one)"
            )
        seen.add(digest)


def _packed(fields: dict[str, Any]) -> Line:
    """Check the fields of a line as far as creating the session would, and pack them."""
    sid = fields["id"]
    key = check_session_id(sid)
    ttl_seconds = check_ttl(fields.get("ttl_seconds", SessionConfig().ttl_seconds))
    renews = fields.get("auto_renew", True)
    expires_at, ends_at = _seconds(fields, "expires_at"), _seconds(fields, "lifetime_ends_at")
    times = [time for time in (expires_at, ends_at) if time is not None]
    line = Line(
        session_id=sid,
        key=key,
        user_id=fields.get("user_id"),
        fields={
            check_field_name(name): pack_value(value, name)
            for name, value in fields.get("data", {}).items()
        },
        meta=_packed_meta(fields),
        ttl_seconds=ttl_seconds,
        renews=renews,
        deadline=None if renews else expires_at,
        cap=ends_at,
        ends=min(times, default=math.inf),
    )
    _check_record(line)
    return line


def _seconds(fields: dict[str, Any], name: str) -> float | None:
    if name not in fields:
        return None
    seconds: float = fields[name].timestamp()
    if seconds > SystemClock().wall() + MAX_TTL_SECONDS:
        raise LineError(f"{name} is more than 100 years away")
    return seconds


def _packed_meta(fields: dict[str, Any]) -> bytes:
    metadata = fields.get("metadata", {})
    try:
        check_metadata(**metadata)
    except TypeError:
        known = {"client_ip", "user_agent", "source", "attributes"}
        raise LineError(f"unknown metadata {min(metadata.keys() - known, key=str)!a}") from None
    max_requests = check_count_or_none("max_requests", fields.get("max_requests"))
    return pack_meta({USER_ID: fields.get("user_id"), MAX_REQUESTS: max_requests, **metadata})


def _check_record(line: Line) -> None:
    """Check what only shows when the parts are put together: the fields' names, and the size."""
    record = assemble(
        incarnation=NO_ID,
        commit=NO_ID,
        version=1,
        created=0.0,
        ttl_seconds=line.ttl_seconds,
        flags=0,
        user=0,
        meta=line.meta,
        fields=line.fields,
    )
    if len(record) - PREFIX_BYTES > GIB:
        raise LineError(f"the session has {len(record) - PREFIX_BYTES} bytes; at most 1 GiB")


async def _refuse_existing(state: StateManager, file: IO[bytes]) -> None:
    for number, line in _lines(file):
        if await state.has_session(line.session_id):
            raise CommandError(
                f"line {number}: session {printable(line.session_id)} exists already; nothing was "
                "imported (--replace replaces what exists)"
            )


# --- writing ----------------------------------------------------------------------------------


async def _import_line(state: StateManager, line: Line, counts: Counts) -> None:
    """Create the session, or replace it: in one commit, which is written whole or not at all."""
    if line.ends <= SystemClock().wall():
        counts.expired += 1
        return
    exists = await state.has_session(line.session_id)
    await state._updates.admit()
    commit = state._updates.create(
        line.session_id,
        line.key,
        fields=line.fields,
        meta=line.meta,
        user_id=line.user_id,
        ttl_seconds=line.ttl_seconds,
        renews=line.renews,
        deadline=line.deadline,
        cap=line.cap,
    )
    await committed(commit)
    counts.replaced += exists
    counts.created += not exists
