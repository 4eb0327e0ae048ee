"""The manifest: which directory this is, and which segments belong to it.

A small JSON file (readable in an emergency) in one line, followed by its CRC-32C in a second.
It is replaced as a whole: after each rotation, and by a compaction as its single moment of truth.

Live segments are: the sealed ones it names, and every segment with a number that it does not know
yet (``>= next_number``: rotated in, or merged, after it was written). A segment in ``dropped`` is
dead even if its file is still there.
"""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass, field
from typing import Final

from crc32c import crc32c

from persistence.disk.filenames import MAX_SEGMENT_NUMBER
from persistence.disk.format import FORMAT_VERSION, PATCHES_VERSION, check_version
from persistence.sealer import KEY_ID_BYTES

_ID_BYTES: Final = 16
MAGIC: Final = "persistence directory"


_NONSENSE: Final = (KeyError, TypeError, ValueError, OverflowError, RecursionError)
"""What decoding raises where the checksum is right and the content is not."""


class MalformedManifest(ValueError):
    """The manifest's checksum or content is wrong."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """The decoded manifest.

    Attributes:
        directory_id: 16 random bytes, repeated in each segment's header.
        fingerprint_key: the secret key of the index' fingerprints, 16 bytes.
        sealed: numbers of the sealed segments.
        dropped: numbers of the segments that a compaction replaced.
        next_number: the lowest segment number that this manifest knows nothing of.
        keys: of an encrypted directory: (number, key id), in order: segments from that number on
            are sealed with that key. A directory is encrypted from its first day, or never.
        has_patches: there may be patches, so who does not know them must not open it.
    """

    directory_id: bytes
    fingerprint_key: bytes
    sealed: frozenset[int] = field(default_factory=frozenset)
    dropped: frozenset[int] = field(default_factory=frozenset)
    next_number: int = 1
    keys: tuple[tuple[int, bytes], ...] = ()
    has_patches: bool = False

    @property
    def format_version(self) -> int:
        """The format version of the directory."""
        return PATCHES_VERSION if self.has_patches else FORMAT_VERSION

    @staticmethod
    def fresh(key_id: bytes | None = None) -> Manifest:
        """Return the manifest of a new directory, encrypted with a key or not at all."""
        keys = () if key_id is None else ((1, key_id),)
        return Manifest(secrets.token_bytes(16), secrets.token_bytes(16), keys=keys)

    def key_of(self, number: int) -> bytes | None:
        """Return the id of the key that segment `number` is sealed with; None: it is not."""
        return next((key_id for first, key_id in reversed(self.keys) if first <= number), None)

    @property
    def keys_in_use(self) -> list[bytes]:
        """The ids of the keys that are needed to read what there is."""
        return list(dict.fromkeys(key_id for _, key_id in self.keys))


def encode_manifest(manifest: Manifest) -> bytes:
    """Encode `manifest`."""
    entries = {
        "what": MAGIC,
        "format_version": manifest.format_version,
        "directory_id": manifest.directory_id.hex(),
        "fingerprint_key": manifest.fingerprint_key.hex(),
        "sealed": sorted(manifest.sealed),
        "dropped": sorted(manifest.dropped),
        "next_number": manifest.next_number,
    }
    if manifest.keys:
        entries["keys"] = [(first, key_id.hex()) for first, key_id in manifest.keys]
    body = json.dumps(entries).encode()
    return body + b"\n%08x\n" % crc32c(body)


def decode_manifest(data: bytes) -> Manifest:
    """Decode a manifest.

    Raises:
        MalformedManifest: it is damaged, or no manifest.
        OtherFormat: it is of another format version.
    """
    body, _, rest = data.partition(b"\n")
    if rest != b"%08x\n" % crc32c(body):
        raise MalformedManifest("its checksum is wrong")
    try:
        entries = json.loads(body)
        version, what = int(entries["format_version"]), entries["what"]
    except _NONSENSE as error:
        raise MalformedManifest(f"its content is wrong ({error})") from error
    if what != MAGIC:
        raise MalformedManifest("it is not one of this library")
    check_version(version, FORMAT_VERSION, PATCHES_VERSION)
    try:
        manifest = Manifest(
            directory_id=bytes.fromhex(entries["directory_id"]),
            fingerprint_key=bytes.fromhex(entries["fingerprint_key"]),
            sealed=frozenset(map(int, entries["sealed"])),
            dropped=frozenset(map(int, entries["dropped"])),
            next_number=int(entries["next_number"]),
            keys=tuple(
                (int(first), bytes.fromhex(key_id)) for first, key_id in entries.get("keys", ())
            ),
            has_patches=version == PATCHES_VERSION,
        )
    except _NONSENSE as error:
        raise MalformedManifest(f"its content is wrong ({error})") from error
    _check(manifest)
    return manifest


def _check(manifest: Manifest) -> None:
    numbers = {manifest.next_number} | manifest.sealed | manifest.dropped
    if not all(0 < number <= MAX_SEGMENT_NUMBER + 1 for number in numbers):
        raise MalformedManifest("it names segments that cannot be")
    if {len(manifest.directory_id), len(manifest.fingerprint_key)} != {_ID_BYTES}:
        raise MalformedManifest("its ids have a wrong length")
    firsts = [first for first, _ in manifest.keys]
    if firsts != sorted(set(firsts)) or any(len(each) != KEY_ID_BYTES for _, each in manifest.keys):
        raise MalformedManifest("its keys are out of order")
