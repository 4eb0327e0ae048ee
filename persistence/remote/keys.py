"""Names of keys and channels. Pure.

======================================  ========================================================
key                                     what it is
======================================  ========================================================
``<namespace>:session:{<session id>}``  hash: one session or its tombstone (see `remote.layout`)
``<namespace>:epoch:{<tag>}``           string: random id of the content; one, or 16 on Cluster
``<namespace>:checkpoint…``             see `checkpoint.redis_store`
======================================  ========================================================

Channels: ``<namespace>:commits`` carries announcements, ``<namespace>:beat:<worker>`` the worker's
own heartbeat.

The namespace is percent-encoded, so it never holds a glob character nor a colon: one namespace's
pattern ``<namespace>:*`` matches no other's keys. A session id is in the key as it is; in patterns
its glob characters are escaped. The braces make its hash slot depend on nothing but the id.
"""

from __future__ import annotations

import binascii
import re
from typing import Final
from urllib.parse import quote

_GLOB: Final = re.compile(rb"([*?\[\]\\^-])")
CLUSTER_SLOTS: Final = 16_384
_CLUSTER_EPOCHS: Final = 16


class Keys:
    """The keys of one namespace.

    Args:
        namespace: as configured.
    """

    def __init__(self, namespace: str) -> None:
        self.prefix = quote(namespace, safe="").encode()
        """What all keys and channels start with, before a colon."""
        self.pattern = self.prefix + b":*"
        self.commits = self.prefix + b":commits"
        self.session_prefix = self.prefix + b":session:{"

    def session(self, session_id: str) -> bytes:
        """Return the key of a session."""
        return b"%b%b}" % (self.session_prefix, session_id.encode())

    def session_id(self, key: bytes) -> str:
        """Return whose key it is.

        Raises:
            ValueError: nobody's: somebody else wrote it.
        """
        if not (key.startswith(self.session_prefix) and key.endswith(b"}")):
            raise ValueError("not the key of a session")
        return key[len(self.session_prefix) : -1].decode()

    def sessions_pattern(self, id_prefix: str) -> bytes:
        """Return the glob pattern of the keys of all sessions whose id starts with `id_prefix`."""
        return self.session_prefix + _GLOB.sub(rb"\\\1", id_prefix.encode()) + b"*"

    def epochs(self, *, cluster: bool) -> list[bytes]:
        """Return the epoch keys: on Cluster so many that every usual primary has one."""
        tags = _spread_tags() if cluster else [b"0"]
        return [b"%b:epoch:{%b}" % (self.prefix, tag) for tag in tags]

    def checkpoints(self) -> tuple[bytes, bytes]:
        """Return the keys of the hashes of checkpoints: their manifests, and those begun."""
        return self.prefix + b":checkpoints", self.prefix + b":checkpoints:started"

    def beat(self, worker: bytes) -> bytes:
        """Return the channel of a worker's own heartbeat."""
        return b"%b:beat:%b" % (self.prefix, worker.hex().encode())


def slot_of(key: bytes) -> int:
    """Return the hash slot of a key, as Redis Cluster's specification has it."""
    start = key.find(b"{")
    if start >= 0:
        end = key.find(b"}", start + 1)
        if end > start + 1:
            key = key[start + 1 : end]
    return binascii.crc_hqx(key, 0) % CLUSTER_SLOTS


def _spread_tags() -> list[bytes]:
    """Return tags whose slots are spread evenly: one in each sixteenth of the slots."""
    width = CLUSTER_SLOTS // _CLUSTER_EPOCHS
    found: dict[int, bytes] = {}
    number = 0
    while len(found) < _CLUSTER_EPOCHS:
        tag = b"%d" % number
        found.setdefault(slot_of(tag) // width, tag)
        number += 1
    return [found[part] for part in range(_CLUSTER_EPOCHS)]
