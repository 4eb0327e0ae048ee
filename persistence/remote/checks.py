"""What is looked at before a tier is used. Everything here only reads."""

from __future__ import annotations

import logging
from typing import Final

from persistence.errors import ConfigError, RemoteUnavailable
from persistence.remote.connect import Server, ask_server
from persistence.remote.faults import CREDENTIALS, Refused, code_of
from persistence.remote.keys import Keys
from persistence.remote.layout import decode_state
from persistence.remote.link import Command, Link
from persistence.remote.urls import Target

_log = logging.getLogger("persistence.remote")

OLDEST_VERSION: Final = (6, 2)
EPOCH_MAGIC: Final = b"persistence-epoch-1:"
_MAX_SAMPLE: Final = 200
_SCAN_COUNT: Final = b"1000"
_MAX_SCANS: Final = 10


async def check_server(target: Target, link: Link, *, allow_eviction: bool) -> Server:
    """Check that a server can hold sessions.

    Raises:
        ConfigError: it never can.
        RemoteUnavailable: it cannot now.
        Fault: it does not answer.
    """
    server = await ask_server(link)
    _check_version(server, link)
    _check_mode(target, server, link)
    await _check_eviction(link, allow_eviction=allow_eviction)
    if server.is_replica:
        raise RemoteUnavailable(
            f"Redis at {link.where} is a replica and takes no writes; redis.url must lead to the "
            "primary (redis+sentinel:// finds it)"
        )
    return server


def _check_version(server: Server, link: Link) -> None:
    if server.version < OLDEST_VERSION:
        raise ConfigError(
            f"redis.url: the server at {link.where} is Redis {_dotted(server.version)}; "
            f"{_dotted(OLDEST_VERSION)} or newer is needed"
        )


def _check_mode(target: Target, server: Server, link: Link) -> None:
    expected = "cluster" if target.kind == "cluster" else "standalone"
    if server.mode == expected:
        return
    scheme = "redis" if server.mode == "standalone" else f"redis+{server.mode}"
    raise ConfigError(
        f"redis.url: the server at {link.where} runs in {server.mode} mode; write {scheme}:// "
        f"(rediss for TLS) instead"
    )


async def _check_eviction(link: Link, *, allow_eviction: bool) -> None:
    if allow_eviction:
        return
    reply = await link.ask(b"INFO", b"memory")
    if isinstance(reply, Exception):
        if code_of(reply) in CREDENTIALS:
            _log.warning("Redis at %s does not tell its maxmemory-policy: %s", link.where, reply)
            return
        raise Refused(reply, link.where)
    policy = _policy_in(reply)
    if policy not in ("", "noeviction"):
        raise ConfigError(
            f"redis.url: Redis at {link.where} has maxmemory-policy {policy}, which throws "
            "sessions away when its memory is full; set it to noeviction, or accept that with "
            "redis.allow_eviction = true"
        )


def _policy_in(info: object) -> str:
    text = info.decode("utf-8", "replace") if isinstance(info, bytes) else str(info)
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name == "maxmemory_policy":
            return value.strip()
    return ""


async def check_keys(keys: Keys, link: Link) -> None:
    """Look at a sample of the keys under the prefix: all of them must be this library's.

    Raises:
        ConfigError: one is not.
        Fault: the server does not answer.
    """
    sample = await _sample(keys, link)
    states = [Command(b"HGET", key, b"\xffstate") for key in sample if _is_session(keys, key)]
    others = [Command(b"TYPE", key) for key in sample if not _is_session(keys, key)]
    for command, reply in zip(states, await link.exchange(states), strict=True):
        if isinstance(reply, bytes) and _is_state(reply):
            continue
        if reply is None and await link.ask(b"EXISTS", command.arguments[1]) == 0:
            continue  # it has expired meanwhile
        if isinstance(reply, Exception) and code_of(reply) != "WRONGTYPE":
            raise Refused(reply, link.where)
        _refuse(command.arguments[1], link)
    for command, reply in zip(others, await link.exchange(others), strict=True):
        if isinstance(reply, Exception):
            raise Refused(reply, link.where)
        if reply == b"none" or _is_known(keys, command.arguments[1], reply):
            continue
        _refuse(command.arguments[1], link)


async def _sample(keys: Keys, link: Link) -> list[bytes]:
    found: list[bytes] = []
    cursor = b"0"
    for _ in range(_MAX_SCANS):
        reply = await link.ask(b"SCAN", cursor, b"MATCH", keys.pattern, b"COUNT", _SCAN_COUNT)
        if isinstance(reply, Exception):
            raise Refused(reply, link.where)
        cursor, page = reply
        found += page
        if cursor == b"0" or len(found) >= _MAX_SAMPLE:
            break
    return found[:_MAX_SAMPLE]


def _is_session(keys: Keys, key: bytes) -> bool:
    return key.startswith(keys.session_prefix)


def _is_state(value: bytes) -> bool:
    try:
        decode_state(value)
    except ValueError:
        return False
    return True


def _is_known(keys: Keys, key: bytes, kind: bytes) -> bool:
    """Whether a key that is no session's may be there: epochs, and what other parts keep."""
    if key.startswith(keys.prefix + b":epoch:"):
        return kind == b"string"
    if key in keys.checkpoints():
        return kind == b"hash"
    return key.startswith(keys.prefix + b":checkpoint")


def _refuse(key: bytes, link: Link) -> None:
    raise foreign(key.decode("utf-8", "backslashreplace"), link.where)


def foreign(key: str, where: str) -> ConfigError:
    """Return what to raise at the opening for a key of somebody else under the prefix."""
    return ConfigError(
        f"redis.namespace: key {key!a} in Redis at {where} was not written by this library; use "
        "another redis.namespace or another database"
    )


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
