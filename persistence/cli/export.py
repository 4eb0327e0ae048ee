"""``persistence export``: the sessions of a directory as JSON Lines."""

from __future__ import annotations

import os
import secrets
import stat
import sys
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager, suppress
from pathlib import Path
from typing import IO, Annotated, Any

import typer

from persistence import (
    DiskConfig,
    SecurityConfig,
    Session,
    SessionConfig,
    ShutdownConfig,
    StateConfig,
    StateManager,
)
from persistence.cli import screen
from persistence.cli.directory import require_directory
from persistence.cli.failure import EXIT_FAILED, EXIT_OK, CommandError
from persistence.cli.jsonl import encode
from persistence.cli.key_source import KeyFileOption, security_for
from persistence.cli.options import STANDARD_STREAM, DirectoryArgument, deep_values
from persistence.cli.running import run
from persistence.errors import CorruptionError


def command(
    directory: DirectoryArgument,
    output: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Where to write to; else, or with -, stdout."),
    ] = None,
    key_file: KeyFileOption = None,
) -> int:
    """Write every live session as one line of JSON, with its values as what they are.

    The directory must not be open elsewhere. Sessions are neither changed nor renewed. What is
    damaged is left out and named, be it a session or a whole segment, and the exit code is 1.
    """
    require_directory(directory)
    security = security_for(directory, key_file)
    damages: list[CorruptionError] = []
    with _opened(output) as file, deep_values():
        count = run(_export(directory, file, damages, security))
    for damage in damages:
        screen.note(f"left out: {damage}")
    screen.note(f"{count:,} sessions exported")
    return EXIT_FAILED if damages else EXIT_OK


@contextmanager
def _opened(output: Path | None) -> Iterator[IO[bytes]]:
    """Open the output; a file appears under its name only when it is complete.

    What is no file, such as /dev/null or a named pipe, is written to as it is: to put a file in its
    place would take it away from everybody. Behind a link, the file it leads to is replaced.

    Raises:
        CommandError: it is a directory.
    """
    if output is None or output == STANDARD_STREAM:
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    if output.is_dir():
        raise CommandError(f"{output} is a directory; name a file for the sessions")
    if output.exists() and not output.is_file():
        with output.open("wb") as stream:
            yield stream
        return
    output = output.resolve()
    # As private as what was there; as the sessions are in the directory, where nothing was.
    mode = stat.S_IMODE(output.stat().st_mode) if output.exists() else 0o600
    partial = output.with_name(f"{output.name}.{secrets.token_hex(4)}.partial")
    try:
        handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(handle, "wb") as file:
            os.fchmod(handle, mode)
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(output)
    finally:
        with suppress(OSError):
            partial.unlink()


async def _export(
    directory: Path, file: IO[bytes], damages: list[CorruptionError], security: SecurityConfig
) -> int:
    count = 0
    # Closed here and now, so that the engine is, when the output takes no more.
    async with aclosing(sessions_in(directory, damages, security)) as sessions:
        async for session in sessions:
            file.write(encode(line_fields(session)))
            count += 1
    return count


async def sessions_in(
    directory: Path, damages: list[CorruptionError], security: SecurityConfig | None = None
) -> AsyncGenerator[Session, None]:
    """Yield the live sessions of `directory`, without renewing them.

    Damaged ones are added to `damages`, with whatever else was found damaged: they are no reason
    to hold back the others.
    """
    config = StateConfig(
        session=SessionConfig(cleanup_interval_seconds=0),
        disk=DiskConfig(path=str(directory)),
        shutdown=ShutdownConfig(checkpoint=False),
        security=security or SecurityConfig(),
    )
    async with StateManager(config=config) as state:
        async for sid in state.iter_sessions():
            try:
                session = await state.get_session(sid, renew=False)
            except CorruptionError as error:
                damages.append(error)
                continue
            if session is not None:  # it may have expired since it was listed
                yield session
        known = {(error.path, error.offset) for error in damages}
        damages += [
            CorruptionError(found.path, found.offset, found.session_id, found.reason)
            for found in state._disk.damages
            if (found.path, found.offset) not in known
        ]


def line_fields(session: Session) -> dict[str, Any]:
    """Return what the line of `session` says."""
    metadata = session.metadata
    known = {
        "client_ip": metadata.client_ip,
        "user_agent": metadata.user_agent,
        "source": metadata.source,
        "attributes": metadata.attributes or None,
    }
    return {
        "id": session.id,
        "user_id": session.user_id,
        "metadata": {name: value for name, value in known.items() if value is not None},
        "ttl_seconds": session.ttl_seconds,
        "auto_renew": session.auto_renew,
        "max_requests": session.max_requests,
        "version": session.version,
        "created_at": session.created_at,
        "last_accessed": session.last_accessed,
        "expires_at": session.expires_at,
        "lifetime_ends_at": session.lifetime_ends_at,
        "data": session.data,
    }
