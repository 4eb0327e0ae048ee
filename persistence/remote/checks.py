"""What is looked at before a tier is used. Everything here only reads."""

from __future__ import annotations

import logging
import re
from typing import Any, Final

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
# As `checkpoint.manifest` makes them. Not compared with what is stored there: a chunk that is
# damaged is passed over when it is restored, and keeps no worker from its sessions.
_CHECKPOINT_ID: Final = re.compile(rb"\d{8}-\d{8}T\d{6}Z-[0-9a-f]{8}-[0-9a-f]{8}")
_CHUNK: Final = re.compile(rb"\{%b-\d{1,10}\}" % _CHECKPOINT_ID.pattern)
_MAX_FIELDS: Final = 20


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
    """Look at the lists of checkpoints, and at a sample of the keys under the prefix.

    Raises:
        ConfigError: one is not this library's.
        Fault: the server does not answer.
    """
    sample = await _sample(keys, link)
    lists = keys.checkpoints()
    sessions = [key for key in sample if _is_session(keys, key)]
    others = [key for key in sample if not _is_session(keys, key) and key not in lists]
    states = [Command(b"HGET", key, b"\xffstate") for key in sessions]
    types = [Command(b"TYPE", key) for key in others]
    # Some fields, without their values: those are manifests.
    fields = [Command(b"HRANDFIELD", key, b"%d" % _MAX_FIELDS) for key in lists]
    replies = iter(await link.exchange([*states, *types, *fields]))
    for key in sessions:
        reply = next(replies)
        if isinstance(reply, bytes) and _is_state(reply):
            continue
        if reply is None and await link.ask(b"EXISTS", key) == 0:
            continue  # it has expired meanwhile
        if isinstance(reply, Exception) and code_of(reply) != "WRONGTYPE":
            raise Refused(reply, link.where)
        _refuse(key, link)
    for key in others:
        reply = next(replies)
        if isinstance(reply, Exception):
            raise Refused(reply, link.where)
        if reply != b"none" and not _is_known(keys, key, reply):
            _refuse(key, link)
    for key in lists:
        _check_list(key, next(replies), link)


def _check_list(key: bytes, reply: Any, link: Link) -> None:
    """Check a list of checkpoints: among some of its fields there must be one of ours."""
    if not isinstance(reply, Exception):
        if reply and not any(map(_CHECKPOINT_ID.fullmatch, reply)):
            _refuse(key, link)
        return
    code = code_of(reply)
    if code == "WRONGTYPE":
        _refuse(key, link)
    if code == "NOPERM":
        _log.warning("Redis at %s does not tell what is in key %a: %s", link.where, key, reply)
    elif code != "MOVED":  # it is another node's of the Cluster, which is asked as well
        raise Refused(reply, link.where)


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
    chunks = keys.prefix + b":checkpoint:"
    return key.startswith(chunks) and _CHUNK.fullmatch(key, len(chunks)) is not None


def _refuse(key: bytes, link: Link) -> None:
    raise foreign(key.decode("utf-8", "backslashreplace"), link.where)


def foreign(key: str, where: str) -> ConfigError:
    """Return what to raise at the opening for a key of somebody else under the prefix."""
    return ConfigError(
        f"redis.namespace: key {key!a} in Redis at {where} was not written by this library; use "
        "another redis.namespace or another database, or remove that key if nobody needs it"
    )


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
