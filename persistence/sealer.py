"""What the tiers ask of encryption: the seam between them and the `security` room.

A tier that has no `Sealer` stores bytes as they are, by the same code: no call is made for it.
"""

from __future__ import annotations

from typing import Final, NamedTuple, Protocol

KEY_ID_BYTES: Final = 4
SEAL_BYTES: Final = KEY_ID_BYTES + 12 + 16
"""How much longer sealed bytes are: key id, nonce and tag."""


class Sealer(Protocol):
    """Seals bytes for one purpose: authenticated encryption with the newest key.

    Attributes:
        newest: id of the key that seals.
    """

    newest: bytes

    def knows(self, key_id: bytes) -> bool:
        """Whether what was sealed with this key can be opened."""

    def seal(self, plain: bytes | memoryview, about: bytes, group: bytes = b"") -> bytes:
        """Seal `plain`, which becomes `SEAL_BYTES` longer.

        Args:
            plain: what nobody may read.
            about: what it belongs to, and is opened with; it is not part of the result.
            group: at most one byte; what is in different groups has different keys, so that none
                of them seals too much.
        """

    def open(self, sealed: bytes | memoryview, about: bytes, group: bytes = b"") -> bytes | None:
        """Return what was sealed about the same; None: it was not, or not with a key of ours."""


class Seals(NamedTuple):
    """A sealer for each purpose: what one of them has sealed, no other opens.

    Attributes:
        records: the payloads of the log.
        remote: the values in the shared tier.
        checkpoints: chunks and manifests of checkpoints.
        conflicts: conflict records.
    """

    records: Sealer
    remote: Sealer
    checkpoints: Sealer
    conflicts: Sealer


def key_id_of(sealed: bytes | memoryview) -> bytes:
    """Return the id of the key that `sealed` says it was sealed with."""
    return bytes(sealed[:KEY_ID_BYTES])
