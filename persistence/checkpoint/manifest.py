"""THE format of checkpoints: manifests and chunks. Pure: no event loop, no IO, no clock.

A *chunk* holds frames exactly as they lie in the log (`disk.format`), grouped in runs whose frames
share a segment's salt. Little-endian, nothing padded:

============ ========= ========================================================================
field        size      meaning
============ ========= ========================================================================
magic        8         ``PERSCHK`` and the byte 0x01
version      2         2; any other is refused
flags        2         bit 0: the body is an LZ4 frame; bit 1: it is sealed, behind the LZ4
runs         4         how many runs there are
frames       4         how many frames there are in all runs
raw_bytes    8         length of the body once decompressed
table        8 * runs  for each run 4 + 4 bytes: CRC-32C of its salt, its length
body         ...       the runs, one behind the other
checksum     4         CRC-32C of everything before
============ ========= ========================================================================

A *manifest* is laid out as follows. It lists every chunk that restoring needs, those of earlier
checkpoints too, so that no restore point depends on another one's manifest. Each is listed with its
length and its checksum, so a chunk that is intact, but another one, is found out.

============ ========= ========================================================================
field        size      meaning
============ ========= ========================================================================
magic        8         ``PERSMAN`` and the byte 0x01, or 0x02 where the body is sealed
version      2         2; any other is refused, whatever comes behind it
body         ...       MessagePack map, see `Manifest`
checksum     4         CRC-32C of everything before
============ ========= ========================================================================

An encrypted directory's manifests and chunks are sealed: a manifest is bound to its id, a chunk to
the checkpoint that wrote it, its number, header and table.

Decoders never raise anything but `MalformedCheckpoint` and
`OtherFormat`, whatever they are given.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from struct import Struct
from typing import Any, Final, NamedTuple, NoReturn

import lz4.frame
import msgpack
from crc32c import crc32c

from persistence.disk.format import OtherFormat, check_version
from persistence.sealer import KEY_ID_BYTES, Sealer, key_id_of

FORMAT_VERSION: Final = 2

_ANY_MANIFEST: Final = b"PERSMAN"
_MANIFEST_MAGIC: Final = b"PERSMAN\x01"
_SEALED_MAGIC: Final = b"PERSMAN\x02"
_MANIFEST_HEADER: Final = Struct("<8sH")
_CHUNK_MAGIC: Final = b"PERSCHK\x01"
_CHUNK_HEADER: Final = Struct("<8sHHIIQ")
_RUN: Final = Struct("<II")
_CHECKSUM: Final = Struct("<I")
_LZ4: Final = 1
_SEALED: Final = 2
# Measured on sessions of 592 bytes: with this acceleration and blocks that stand alone a quarter
# faster than with the defaults, and a fifteenth larger.
_LZ4_ACCELERATION: Final = -2
_MAX_EXPANSION: Final = 256  # LZ4 expands less
MAX_RAW_BYTES: Final = 2**32 - 1
CHUNK_OVERHEAD_BYTES: Final = _CHUNK_HEADER.size + _CHECKSUM.size

_ID: Final = re.compile(r"(\d{8})-\d{8}T\d{6}Z-([0-9a-f]{8})-[0-9a-f]{8}", re.ASCII)
# From here on a number is nobody's: one checkpoint a second would come to it after three years.
_MAX_ID_NUMBER: Final = 9 * 10**7


class MalformedCheckpoint(ValueError):
    """The bytes are damaged, or no manifest or chunk at all."""


class Locked(OtherFormat):
    """The bytes are sealed, and nothing is wrong with them but that the key is not here."""


def _opened(sealed: bytes | memoryview, about: bytes, sealer: Sealer | None, what: str) -> bytes:
    """Return what was sealed.

    Raises:
        Locked: the key is not here.
        MalformedCheckpoint: it is not what was sealed.
    """
    sealer = _check_known(key_id_of(sealed), sealer)
    plain = sealer.open(sealed, about)
    if plain is None:
        raise MalformedCheckpoint(f"{what} is not what was sealed")
    return plain


def _check_known(key_id: bytes, sealer: Sealer | None) -> Sealer:
    """Return the sealer, if it knows the key.

    Raises:
        Locked: the key is not here.
    """
    if sealer is None or not sealer.knows(key_id):
        where = "security.encrypt is off" if sealer is None else "that is not among the keys given"
        raise Locked(
            f"it is encrypted with key {key_id.hex()}, and {where}: turn security.encrypt on, and "
            "give its keys with security.key_file or security.secret_keys ('--key-file FILE' for "
            "commands)"
        )
    return sealer


# --- ids ----------------------------------------------------------------------------------------


def make_id(number: int, created: str, worker: str, random: bytes) -> str:
    """Return the id of a checkpoint.

    Args:
        number: see `number_after`.
        created: wall time as ``YYYYMMDDTHHMMSSZ``.
        worker: who makes it, hexadecimal.
        random: 4 bytes.
    """
    assert number <= _MAX_ID_NUMBER, number
    made = f"{number:08d}-{created}-{worker[:8]}-{random.hex()}"
    assert _ID.fullmatch(made), made
    return made


def is_id(text: str) -> bool:
    """Whether `text` has the form of a checkpoint's id; nothing else ever names a key or file."""
    return _ID.fullmatch(text) is not None


def number_of(checkpoint_id: str) -> int:
    """Return the number in an id."""
    return int(checkpoint_id[:8])


def number_after(ids: Iterable[str]) -> int:
    """Return the number of the checkpoint that is made next.

    One more than any other has: the order of ids as text is the order in which checkpoints were
    made, whatever the clock did. Ids that could not be followed for ever are not: their numbers
    are none that anybody came to by counting.
    """
    followed = [number for number in map(number_of, ids) if number < _MAX_ID_NUMBER]
    return max(followed, default=0) + 1


def worker_of(checkpoint_id: str) -> str:
    """Return the first 8 digits of the worker in an id."""
    return checkpoint_id[-17:-9]


# --- manifests ----------------------------------------------------------------------------------


class ChunkRef(NamedTuple):
    """A chunk as a manifest lists it.

    Attributes:
        checkpoint: id of the checkpoint that wrote it.
        number: which of that one's chunks, from 0.
        stored_bytes: its length.
        checksum: its checksum (the last field of the chunk).
        frames: how many frames are in it.
        raw_bytes: length of its body once decompressed.
    """

    checkpoint: str
    number: int
    stored_bytes: int
    checksum: int
    frames: int
    raw_bytes: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """A restore point.

    Attributes:
        id: its id.
        parent: the checkpoint that it goes on from; "" for a full one.
        base: the full one at the start of its chain; its own id for a full one.
        since: sequence number of the parent's cut; 0 for a full one.
        sequence: sequence number of the cut.
        created: wall seconds.
        reason: why it was made, for people.
        sessions: how many sessions there were when it was cut.
        namespace: of the worker.
        worker: who made it: the id of its directory, hexadecimal.
        chunks: everything that restoring needs, in the order in which it was shipped.
        keys: ids of the keys that it, its chunks or the frames in them are sealed with; none: they
            are not sealed.
    """

    id: str
    parent: str
    base: str
    since: int
    sequence: int
    created: float
    reason: str
    sessions: int
    namespace: str
    worker: str
    chunks: tuple[ChunkRef, ...]
    keys: tuple[bytes, ...] = ()

    @property
    def is_sealed(self) -> bool:
        """Whether its chunks and itself are sealed."""
        return bool(self.keys)

    @property
    def own_chunks(self) -> list[ChunkRef]:
        """The chunks that this checkpoint wrote itself."""
        return [chunk for chunk in self.chunks if chunk.checkpoint == self.id]

    @property
    def base_bytes(self) -> int:
        """Stored bytes of the full checkpoint at the start of the chain."""
        return sum(chunk.stored_bytes for chunk in self.chunks if chunk.checkpoint == self.base)

    @property
    def total_bytes(self) -> int:
        """Stored bytes of all its chunks."""
        return sum(chunk.stored_bytes for chunk in self.chunks)


_FIELDS: Final[dict[str, type | tuple[type, ...]]] = {
    "id": str,
    "parent": str,
    "base": str,
    "since": int,
    "sequence": int,
    "created": (float, int),
    "reason": str,
    "sessions": int,
    "namespace": str,
    "worker": str,
    "chunks": list,
}


def encode_manifest(manifest: Manifest, sealer: Sealer | None = None) -> bytes:
    """Encode `manifest`, sealed if there is a `sealer`."""
    entries = {name: getattr(manifest, name) for name in _FIELDS}
    if sealer is not None:
        entries["keys"] = manifest.keys
    body: bytes = msgpack.packb(entries)
    magic = _MANIFEST_MAGIC
    if sealer is not None:
        magic = _SEALED_MAGIC
        body = sealer.seal(body, b"manifest " + manifest.id.encode())
    data = _MANIFEST_HEADER.pack(magic, FORMAT_VERSION) + body
    return data + _CHECKSUM.pack(crc32c(data))


def decode_manifest(data: bytes, checkpoint_id: str, sealer: Sealer | None = None) -> Manifest:
    """Decode the manifest that lies under `checkpoint_id`.

    Raises:
        MalformedCheckpoint: it is damaged, or that of another checkpoint.
        OtherFormat: it is of another format version, or `Locked`.
    """
    behind = len(data) - _CHECKSUM.size
    if behind < _MANIFEST_HEADER.size:
        raise MalformedCheckpoint(f"the manifest has {len(data)} bytes, and is cut off")
    magic, version = _MANIFEST_HEADER.unpack_from(data)
    if not magic.startswith(_ANY_MANIFEST):
        raise MalformedCheckpoint("the manifest is no manifest")
    body = data[_MANIFEST_HEADER.size : behind]
    if magic not in (_MANIFEST_MAGIC, _SEALED_MAGIC) or version != FORMAT_VERSION:
        _check_other(body, checksum_of(data), version)
    if checksum_of(data) != crc32c(data[:behind]):
        raise MalformedCheckpoint("the manifest fails its checksum")
    sealed_with: tuple[bytes, ...] = ()
    if magic == _SEALED_MAGIC:
        sealed_with = (key_id_of(body),)
        body = _opened(body, b"manifest " + checkpoint_id.encode(), sealer, "the manifest")
    manifest = _manifest_of(body, sealed_with)
    for key_id in manifest.keys:
        _check_known(key_id, sealer)
    if manifest.id != checkpoint_id:
        raise MalformedCheckpoint(f"the manifest is that of {manifest.id!a}")
    return manifest


def _check_other(body: bytes, checksum: int, version: int) -> NoReturn:
    """Tell a manifest of another format from one of ours whose header is damaged.

    Another format may end with something else than our checksum. So a wrong one says nothing; but
    one that is right with a header of ours in front says what the header was.

    Raises:
        MalformedCheckpoint: it is one of ours.
        OtherFormat: it is not.
    """
    for magic in (_MANIFEST_MAGIC, _SEALED_MAGIC):
        if crc32c(body, crc32c(_MANIFEST_HEADER.pack(magic, FORMAT_VERSION))) == checksum:
            raise MalformedCheckpoint("the manifest's header is damaged")
    check_version(version, FORMAT_VERSION)
    raise OtherFormat("another kind of manifest: use a newer version of the library")


def _manifest_of(packed: bytes, sealed_with: tuple[bytes, ...]) -> Manifest:
    try:
        body = msgpack.unpackb(packed)
        fields = {name: body[name] for name in _FIELDS}
        wrong = [name for name, kind in _FIELDS.items() if not isinstance(fields[name], kind)]
        if wrong:
            raise TypeError(wrong)  # noqa: TRY301 - one handler for all that may be wrong
        fields["chunks"] = tuple(_chunk_ref(entry) for entry in fields["chunks"])
        # Manifests of before they were noted have none.
        keys = [_key_id(entry) for entry in body.get("keys", ())] if sealed_with else ()
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise MalformedCheckpoint(f"the manifest's content is wrong ({error!r})") from error
    return Manifest(**fields, keys=tuple(dict.fromkeys((*sealed_with, *keys))))


def _key_id(entry: object) -> bytes:
    if not isinstance(entry, bytes) or len(entry) != KEY_ID_BYTES:
        raise ValueError("the id of a key")
    return entry


def _chunk_ref(entry: Sequence[Any]) -> ChunkRef:
    ref = ChunkRef(*entry)
    if not is_id(ref.checkpoint) or not all(type(item) is int and item >= 0 for item in ref[1:]):
        raise ValueError("a chunk's entry")
    return ref


# --- chunks -------------------------------------------------------------------------------------


class PackedRun(NamedTuple):
    """Frames of one segment: the CRC-32C of its salt, and their bytes."""

    salt_checksum: int
    frames: bytes | memoryview


def encode_chunk(
    runs: Sequence[PackedRun],
    frames: int,
    *,
    compress: bool,
    sealer: Sealer | None = None,
    name: bytes = b"",
) -> bytes:
    """Encode a chunk. Nearly all of it lets go of the interpreter's lock, but for the sealing.

    Args:
        runs: what goes into it.
        frames: how many frames that are.
        compress: whether it is compressed.
        sealer: seals it; None: it is not sealed.
        name: what it is bound to when it is sealed, see `chunk_name`.
    """
    table = b"".join([_RUN.pack(run.salt_checksum, len(run.frames)) for run in runs])
    # Usually there is one run, of some MiB, which is not worth copying.
    body = runs[0].frames if len(runs) == 1 else b"".join([run.frames for run in runs])
    raw_bytes = len(body)
    assert raw_bytes <= MAX_RAW_BYTES, raw_bytes
    flags = 0
    if compress:
        flags = _LZ4
        body = lz4.frame.compress(
            body,
            compression_level=_LZ4_ACCELERATION,
            block_size=lz4.frame.BLOCKSIZE_MAX64KB,
            block_linked=False,
            store_size=False,
        )
    if sealer is not None:
        flags |= _SEALED
    header = _CHUNK_HEADER.pack(_CHUNK_MAGIC, FORMAT_VERSION, flags, len(runs), frames, raw_bytes)
    start = header + table
    if sealer is not None:
        body = sealer.seal(body, name + start)
    return b"".join((start, body, _CHECKSUM.pack(crc32c(body, crc32c(start)))))


def chunk_name(checkpoint_id: str, number: int) -> bytes:
    """Return what chunk `number` of a checkpoint is bound to when it is sealed."""
    return f"chunk {checkpoint_id} {number} ".encode()


def checksum_of(chunk: bytes) -> int:
    """Return the checksum that an encoded chunk or manifest ends with."""
    checksum: int = _CHECKSUM.unpack_from(chunk, len(chunk) - _CHECKSUM.size)[0]
    return checksum


def ref_of(chunk: bytes, checkpoint_id: str, number: int) -> ChunkRef:
    """Return the entry of a chunk that was just encoded."""
    *_, frames, raw_bytes = _CHUNK_HEADER.unpack_from(chunk)
    return ChunkRef(checkpoint_id, number, len(chunk), checksum_of(chunk), frames, raw_bytes)


def decode_chunk(data: bytes, ref: ChunkRef, sealer: Sealer | None = None) -> list[PackedRun]:
    """Return the runs of a chunk, as `ref` lists it; their frames are not looked at.

    Memory is bounded by what `ref` says, and by how much LZ4 can expand. With a `sealer` it must be
    sealed.

    Raises:
        MalformedCheckpoint: it is damaged, or another chunk.
        OtherFormat: it is of another format version, or `Locked`.
    """
    if len(data) != ref.stored_bytes or len(data) < CHUNK_OVERHEAD_BYTES:
        raise MalformedCheckpoint(f"it has {len(data)} bytes instead of {ref.stored_bytes}")
    view = memoryview(data)
    checksum = crc32c(view[: -_CHECKSUM.size])
    if checksum != ref.checksum or checksum != checksum_of(data):
        raise MalformedCheckpoint("it fails its checksum")
    magic, version, flags, count, frames, raw_bytes = _CHUNK_HEADER.unpack_from(data)
    if magic != _CHUNK_MAGIC:
        raise MalformedCheckpoint("it is no chunk")
    check_version(version, FORMAT_VERSION)
    if flags & ~(_LZ4 | _SEALED) or (frames, raw_bytes) != (ref.frames, ref.raw_bytes):
        raise MalformedCheckpoint("its header and its entry in the manifest differ")
    body_at = _CHUNK_HEADER.size + count * _RUN.size
    if body_at > len(data) - _CHECKSUM.size:
        raise MalformedCheckpoint("its table of runs is cut off")
    body = view[body_at : -_CHECKSUM.size]
    if flags & _SEALED:
        about = chunk_name(ref.checkpoint, ref.number) + data[:body_at]
        body = memoryview(_opened(body, about, sealer, "it"))
    elif sealer is not None:
        raise MalformedCheckpoint("it is not sealed")
    if flags & _LZ4:
        body = _decompressed(body, raw_bytes)
    if len(body) != raw_bytes:
        raise MalformedCheckpoint("its body has a wrong length")
    return _runs_in(view[_CHUNK_HEADER.size : body_at], body)


def _decompressed(body: memoryview, raw_bytes: int) -> memoryview:
    if raw_bytes > _MAX_EXPANSION * len(body):
        raise MalformedCheckpoint("its length once decompressed is impossible")
    try:
        unpacker = lz4.frame.LZ4FrameDecompressor()
        raw = unpacker.decompress(body, max_length=raw_bytes + 1)
    except RuntimeError as error:
        raise MalformedCheckpoint("it does not decompress") from error
    if not unpacker.eof or unpacker.unused_data:
        raise MalformedCheckpoint("it does not decompress to what it should")
    return memoryview(raw)


def _runs_in(table: memoryview, body: memoryview) -> list[PackedRun]:
    runs = []
    at = 0
    for salt_checksum, nbytes in _RUN.iter_unpack(table):
        runs.append(PackedRun(salt_checksum, body[at : at + nbytes]))
        at += nbytes
    if at != len(body):
        raise MalformedCheckpoint("its runs have a wrong length")
    return runs


def total_frames(chunks: Iterable[ChunkRef]) -> int:
    """Return how many frames there are in `chunks`."""
    return sum(chunk.frames for chunk in chunks)
