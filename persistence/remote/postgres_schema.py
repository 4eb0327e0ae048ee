"""The tables and the function of the shared tier in PostgreSQL: looked for, installed, checked.

They are in the first schema of the user's ``search_path``. Where all is there already nothing is
installed, so a worker's user needs no right to create anything; see ``docs/providers.md``.
"""

from __future__ import annotations

import hashlib
from importlib import resources
from typing import Any, Final

from asyncpg import InterfaceError, PostgresError

from persistence.errors import ConfigError, RemoteUnavailable
from persistence.remote.exchanges import Lost
from persistence.remote.postgres_faults import Refused, first_line
from persistence.remote.postgres_link import PostgresLink

OLDEST_MAJOR: Final = 14
SESSIONS: Final = "persistence_sessions_1"
CHUNKS: Final = "persistence_chunks_1"
CHECKPOINTS: Final = "persistence_checkpoints_1"

_COLUMNS: Final = {
    "namespace": "text",
    "id": "bytea",
    "kind": "text",
    "version": "bigint",
    "incarnation": "bytea",
    "commits": "bytea[]",
    "record": "bytea",
    "checksum": "bigint",
    "accessed": "double precision",
    "deadline": "double precision",
    "cap": "double precision",
    "expires": "double precision",
}
_ADVISORY_LOCK: Final = 0x7065727369737431  # any number: workers that start together take turns
_HASH: Final = "@hash@"


def _source(name: str) -> str:
    return resources.files(__package__).joinpath("sql", name).read_text(encoding="utf-8")


_COMMIT: Final = _source("commit.sql")
_COMMIT_HASH: Final = hashlib.sha256(_COMMIT.encode()).hexdigest()[:12]
COMMIT: Final = f"persistence_commit_{_COMMIT_HASH}"
"""The function that commits; its name changes with its source."""

_LOOK: Final = f"""
SELECT current_setting('server_version_num')::integer / 10000 AS major,
  pg_is_in_recovery() AS is_standby,
  to_regclass('{SESSIONS}') IS NOT NULL AND to_regclass('{CHUNKS}') IS NOT NULL
    AND to_regclass('{CHECKPOINTS}') IS NOT NULL AND to_regproc('{COMMIT}') IS NOT NULL
    AS is_installed
"""
_LOOK_AT_COLUMNS: Final = f"""
SELECT attname::text AS name, format_type(atttypid, atttypmod) AS type FROM pg_attribute
WHERE attrelid = to_regclass('{SESSIONS}') AND attnum > 0 AND NOT attisdropped
"""  # noqa: S608


def schema_sql() -> str:
    """Return all that has to be installed, as SQL that an administrator can run."""
    return _source("schema.sql") + "\n" + _COMMIT.replace(_HASH, _COMMIT_HASH)


async def prepare(link: PostgresLink) -> None:
    """Check that a database can hold sessions; install what is missing.

    Raises:
        ConfigError: it never can.
        RemoteUnavailable: it cannot now.
        PostgresError: an answer of the server.
        Fault: it does not answer.
    """
    [found] = await _asked(link, _LOOK)
    if found["major"] < OLDEST_MAJOR:
        raise ConfigError(
            f"redis.url: the server at {link.where} is PostgreSQL {found['major']}; "
            f"{OLDEST_MAJOR} or newer is needed"
        )
    if found["is_standby"]:
        raise RemoteUnavailable(
            f"PostgreSQL at {link.where} is a standby and takes no writes; redis.url must lead to "
            "the primary (several hosts and target_session_attrs=primary find it)"
        )
    columns = {row["name"]: row["type"] for row in await _asked(link, _LOOK_AT_COLUMNS)}
    if columns not in ({}, _COLUMNS):
        raise ConfigError(
            f"redis.url: table {SESSIONS} in PostgreSQL at {link.where} was not made by this "
            "library; use another database, or a user with a search_path of its own"
        )
    if not found["is_installed"]:
        await install(link)


async def install(link: PostgresLink) -> None:
    """Create tables and function where they are missing.

    Raises:
        PostgresError, Fault: see `prepare`.
    """
    async with link.lease() as connection:
        try:
            # One text is one transaction.
            await connection.execute(
                f"SELECT pg_advisory_xact_lock({_ADVISORY_LOCK});\n{schema_sql()}"
            )
        except PostgresError as error:
            raise Refused(error, link.where) from error
        except (InterfaceError, OSError) as error:
            raise Lost(f"PostgreSQL at {link.where}: {first_line(error)}") from error


async def _asked(link: PostgresLink, statement: str) -> list[dict[str, Any]]:
    rows = await link.rows(statement)
    if isinstance(rows, PostgresError):
        raise Refused(rows, link.where)
    return [dict(row) for row in rows]
