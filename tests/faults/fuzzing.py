"""Hostile bytes for every decoder: nothing but the errors that it promises, in little memory.

A `Target` is a decoder, the valid inputs to begin with, and how their checksums are made right
again after a change, without which nothing would get past them. `python -m tests.faults fuzz`
searches guided by coverage where `atheris` is installed, else by chance; the short form in
`test_fuzzing.py` is hypothesis.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from random import Random
from struct import error as struct_error
from typing import Any, Final, NamedTuple

import lz4.block
import msgpack
from crc32c import crc32c

from persistence import StateConfig, errors
from persistence import record as rec
from persistence.checkpoint import manifest as checkpoint
from persistence.cli.accesslog import parse_line
from persistence.cli.import_ import _packed
from persistence.cli.jsonl import LineError
from persistence.cli.jsonl import decode as decode_line
from persistence.cli.jsonl import encode as encode_line
from persistence.disk import format as fmt
from persistence.disk import patches
from persistence.disk.caches import _decode_snapshot
from persistence.disk.index import SHARDS, Index
from persistence.disk.journal import MAGIC as JOURNAL_MAGIC
from persistence.disk.journal import decode_entries, encode_entry
from persistence.disk.manifest import MalformedManifest, Manifest, decode_manifest, encode_manifest
from persistence.ids import check_session_id
from persistence.record import NO_ID
from persistence.remote import layout
from persistence.remote.keys import Keys
from persistence.sharing.conflicts import decode_conflict

MOST_BYTES: Final = 64 * 1024
"""Of one input."""
MEMORY_BYTES: Final = 512 * 2**20
"""That a fuzzing process may take beside what it has when it begins: a bomb does not fit."""
INPUT_SECONDS: Final = 10
_SALT: Final = 7
_ID: Final = "00000001-20260101T000000Z-0123abcd-00000000"


class Target(NamedTuple):
    """One decoder.

    Attributes:
        decode: takes any bytes; raises nothing but what it promises, which it swallows.
        seeds: valid inputs.
        seal: makes the checksums of changed input right.
    """

    decode: Callable[[bytes], object]
    seeds: list[bytes]
    seal: Callable[[bytes], bytes] = bytes


def _behind(data: bytes, start: int = 0, seed: int = 0) -> bytes:
    """Return `data` with the CRC-32C of the rest in its last 4 bytes."""
    body = data[:-4]
    return body + crc32c(body[start:], seed).to_bytes(4, "little")


# --- the log --------------------------------------------------------------------------------------


def _record(data: dict[str, Any] | None = None) -> bytes:
    fields = {"n": 1, "text": "x" * 50, "nested": {"a": [1, 2.5, None]}} if data is None else data
    return rec.assemble(
        incarnation=b"i" * 16,
        commit=b"c" * 16,
        version=3,
        created=1.7e9,
        ttl_seconds=60.0,
        flags=rec.RENEWS,
        user=7,
        meta=rec.pack_meta({"user_id": "ada"}),
        fields={name: rec.pack_value(value, name) for name, value in fields.items()},
    )


def _frame(record: bytes) -> bytes:
    flags, payload = fmt.compress(record[32:])
    return fmt.encode_frame(
        *(_SALT, fmt.PUT, b"a", payload, 5, 4, record[:32] + NO_ID, 1.0, 2.0, 3.0, 7, flags),
        len(record) - 32,
    )


def _seal_frame(data: bytes) -> bytes:
    if len(data) < fmt.FRAME_OVERHEAD_BYTES:
        return data
    key_bytes = int.from_bytes(data[6:8], "little")
    at = fmt.FRAME_HEADER_BYTES
    header = data[: at - 4]
    key = data[at : at + key_bytes]
    head = header + crc32c(key, crc32c(header, _SALT)).to_bytes(4, "little")
    return _behind(head + data[at:], seed=_SALT)


def _decode_frame(data: bytes) -> None:
    found = fmt.decode_frame(data, 0, _SALT)
    fmt.frame_length(data, 0)
    fmt.read_put(data, b"a", _SALT)
    if len(data) >= fmt.FRAME_HEADER_BYTES:
        fmt.corrupt_behind_header(data, "fuzzed")
    if isinstance(found, fmt.Frame) and found.type == fmt.PUT:
        record = fmt.record_of(found)
        if record is not None:
            assert len(record) <= 255 * len(data) + 128, "no bomb"
            _decode_record(record)


def _patched() -> bytes:
    record = _record()
    changed = {"n": rec.pack_value(2, "n")}
    now = rec.patched(record, b"d" * 16, changed, rec.layout_of(record))
    put = _frame(record)
    made = patches.patch_on(patches.Base(0, 10**6, 5, b"c" * 16), now, b"d" * 16, changed)
    assert made is not None
    where = patches.Base(0, len(put), 5, b"").packed
    patch = fmt.encode_frame(
        *(_SALT, fmt.PATCH, b"a", where + made[1], 6, 5, now[:32] + NO_ID),
        raw_bytes=len(made[1]),
    )
    return put + patch


def _seal_patched(data: bytes) -> bytes:
    """Make the checksums of both frames right, and leave all else as it is."""
    put_bytes = fmt.frame_length(data, 0) or 0
    return _seal_frame(data[:put_bytes]) + _seal_frame(data[put_bytes:])


def _decode_patched(data: bytes) -> None:
    at = fmt.frame_length(data, 0) or 0
    found = patches.read_patched(
        lambda offset, size: data[offset : offset + size], at, _SALT, patches.PlainRecords(), b"a"
    )
    assert found is not None
    if isinstance(found, patches.Patched):
        assert len(found.record) <= 2 * (255 * len(data) + 128), "no bomb"
        _decode_record(found.record)
    for record in (_record(), _record({})):
        made = patches.patched_record(record, record[:32], data)
        if made is not None:
            _decode_record(made)


def _decode_record(data: bytes) -> None:
    try:
        rec.validate(data)
    except rec.MalformedValue:
        return
    rec.head(data)
    names = rec.field_names(data)
    fields = rec.packed_fields(data)
    assert tuple(fields) == names
    with suppress(rec.MalformedValue):
        rec.meta_of(data)
    for packed in fields.values():
        _decode_value(bytes(packed))


def _decode_value(data: bytes) -> None:
    try:
        value = rec.unpack_value(data)
    except rec.MalformedValue:
        return
    with suppress(errors.ValueNotSerializable):  # nested deeper than what is written, for example
        packed = rec.pack_value(value, "x")
        assert rec.pack_value(rec.unpack_value(packed), "x") == packed


def _header() -> bytes:
    return fmt.encode_segment_header(
        fmt.SegmentHeader(
            kind=fmt.SegmentKind.LOG,
            number=3,
            base_sequence=9,
            directory_id=b"d" * 16,
            salt=b"s" * 16,
        )
    )


def _decode_header(data: bytes) -> None:
    with suppress(fmt.OtherFormat):
        fmt.decode_segment_header(data)


def _cache() -> bytes:
    body = (9).to_bytes(8, "little") + bytes(8) + b"".join(Index().images())
    return fmt.encode_cache_header(b"d" * 16, b"v" * 16, 0.0, body) + body


def _seal_cache(data: bytes) -> bytes:
    size = fmt.CACHE_HEADER_BYTES
    if len(data) < size:
        return data
    body = data[size:]
    header = data[:12] + crc32c(body).to_bytes(4, "little") + data[16 : size - 4]
    return header + crc32c(header).to_bytes(4, "little") + body


def _decode_cache(data: bytes) -> None:
    covered = fmt.covered_by(data)
    decoded = fmt.decode_cache(data, data[16:32], b"" if covered is None else covered)
    if decoded is not None:
        with suppress(ValueError, struct_error):  # what `read_snapshot` takes for "none"
            _decode_snapshot(decoded[1])


def _decode_manifest(data: bytes) -> None:
    with suppress(MalformedManifest, fmt.OtherFormat):
        decode_manifest(data)


def _seal_manifest(data: bytes) -> bytes:
    body, _, _ = data.partition(b"\n")
    return body + b"\n%08x\n" % crc32c(body)


def _disk_manifest() -> bytes:
    return encode_manifest(Manifest(directory_id=b"d" * 16, fingerprint_key=b"k" * 16))


def _journal() -> bytes:
    record = _record()
    conflict = msgpack.packb(("a", 1.0, record, b"b" * 16, 3, False))
    owner = b"d" * 16
    return JOURNAL_MAGIC + owner + encode_entry(owner, b"x") + encode_entry(owner, conflict)


def _decode_journal(data: bytes) -> None:
    entries, end = decode_entries(b"d" * 16, data)
    assert end <= len(data)
    for entry in entries:
        with suppress(ValueError, TypeError, RecursionError, msgpack.UnpackException):
            decode_conflict(entry)


# --- checkpoints ----------------------------------------------------------------------------------


def _chunk(*, compress: bool) -> bytes:
    runs = [checkpoint.PackedRun(_SALT, _frame(_record())), checkpoint.PackedRun(8, b"x" * 300)]
    return checkpoint.encode_chunk(runs, 2, compress=compress)


def _decode_chunk(data: bytes) -> None:
    """As listed by an entry that fits its header: the entry is checked against it first."""
    try:
        ref = checkpoint.ref_of(data, _ID, 0)
    except struct_error:
        return
    with suppress(checkpoint.MalformedCheckpoint, fmt.OtherFormat):
        runs = checkpoint.decode_chunk(data, ref)
        assert sum(len(run.frames) for run in runs) <= 256 * len(data), "no bomb"


def _decode_checkpoint(data: bytes) -> None:
    with suppress(checkpoint.MalformedCheckpoint, fmt.OtherFormat):
        checkpoint.decode_manifest(data, _ID)


def _checkpoint() -> bytes:
    return checkpoint.encode_manifest(
        checkpoint.Manifest(
            id=_ID,
            parent="",
            base=_ID,
            since=0,
            sequence=9,
            created=1.5,
            reason="manual",
            sessions=3,
            namespace="n",
            worker="0123abcd",
            chunks=(checkpoint.ref_of(_chunk(compress=True), _ID, 0),),
        )
    )


# --- Redis ----------------------------------------------------------------------------------------


def _announcement() -> bytes:
    change = b"L" + (3).to_bytes(8, "little") + b"c" * 16 + (1).to_bytes(2, "little") + b"a"
    return b"w" * 16 + change * 2


def _decode_announcement(data: bytes) -> None:
    layout.announcing_worker(data)
    with suppress(ValueError):
        layout.decode_announcements(data)


def _hash() -> bytes:
    """A session's hash, as pairs that one packs."""
    record = _record()
    fields: dict[bytes, bytes] = {layout.STATE: b"L" + bytes(8) + record[:32]}
    names = rec.packed_fields(record)
    fields.update({name.encode(): bytes(value) for name, value in names.items()})
    start = record[: rec.meta_end_of(record)]
    head = layout._HEAD.pack(1.0, 2.0, 3.0, crc32c(record)) + start
    fields[layout.HEAD] = head
    fields[layout.ORDER] = msgpack.packb(list(names))
    return bytes(msgpack.packb(list(fields.items())))


def _decode_hash(data: bytes) -> None:
    try:
        pairs = msgpack.unpackb(data, strict_map_key=False)
        fields = {key: value for key, value in pairs if type(key) is type(value) is bytes}
    except (ValueError, TypeError, msgpack.UnpackException, RecursionError):
        return
    with suppress(errors.RemoteDamaged):
        layout.decode_session(b"k", "a", fields)
    with suppress(ValueError):
        layout.decode_state(fields.get(layout.STATE, b""))


# --- text -----------------------------------------------------------------------------------------


def _decode_config(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "c.toml")
        path.write_bytes(data)
        with suppress(errors.ConfigError):
            StateConfig.load(path)


def _decode_access(data: bytes) -> None:
    parse_line(data.decode("utf-8", "surrogateescape"))


def _decode_import(data: bytes) -> None:
    with suppress(LineError, errors.PersistenceError):
        _packed(decode_line(data))


def _decode_id(data: bytes) -> None:
    """An id is refused, or a plain key that never meets another one."""
    text = data.decode("utf-8", "surrogatepass") if data[:1] != b"\xff" else data.decode("latin-1")
    shown = errors.printable(text)
    assert shown.isprintable(), "nothing gets into a log unescaped"
    try:
        key = check_session_id(text)
    except errors.InvalidSessionId:
        return
    keys = Keys("name*space")
    assert keys.session_id(keys.session(text)) == text
    assert key.decode() == text
    assert len(key) <= 512


def _decode_any_id(data: bytes) -> None:
    with suppress(UnicodeDecodeError):
        _decode_id(data)


_LINE: Final = (
    b'203.0.113.9 - ada [10/Oct/2000:13:55:36 -0700] "GET /a?b=c HTTP/1.0" 200 2326 "-" "curl/8"\n'
)
_BOMB: Final = lz4.block.compress(bytes(2**20), store_size=False)


def _bomb_frame() -> bytes:
    """A put whose payload expands 254 times."""
    ids = b"i" * 48
    flags = fmt.COMPRESSED
    return fmt.encode_frame(
        *(_SALT, fmt.PUT, b"a", _BOMB, 5, 4, ids, 1.0, 2.0, 3.0, 7, flags, 2**32 - 1)
    )


TARGETS: Final[dict[str, Target]] = {
    "segment header": Target(_decode_header, [_header()], _behind),
    "frame": Target(_decode_frame, [_frame(_record()), _bomb_frame()], _seal_frame),
    "patch": Target(_decode_patched, [_patched()], _seal_patched),
    "record": Target(_decode_record, [_record(), _record({}), _record({"a": {1, 2}})]),
    "value": Target(
        _decode_value,
        [rec.pack_value({"a": [1, {2}, (3.5, b"x")]}, "x"), b"\xdd\xff\xff\xff\xff", b"\x91" * 500],
    ),
    "cache": Target(_decode_cache, [_cache()], _seal_cache),
    "manifest": Target(_decode_manifest, [_disk_manifest()], _seal_manifest),
    "journal": Target(_decode_journal, [_journal()]),
    "chunk": Target(_decode_chunk, [_chunk(compress=True), _chunk(compress=False)], _behind),
    "checkpoint": Target(_decode_checkpoint, [_checkpoint()], _behind),
    "announcement": Target(_decode_announcement, [_announcement()]),
    "hash": Target(_decode_hash, [_hash()]),
    "configuration": Target(
        _decode_config, [b'[memory]\nmax_bytes = "1GiB"\n[disk]\nfsync = "never"\n', b"a = 1e999"]
    ),
    "access log": Target(_decode_access, [_LINE, b'::1 - - [x] "\\x00" - -\n']),
    "import": Target(
        _decode_import,
        [
            encode_line({"id": "a", "data": {"x": {1, 2}, "y": b"z"}, "ttl_seconds": 5.0}),
            b'{"id":"a","expires_at":{"$datetime":"0001-01-01T00:00:00+23:59"}}',
            b'{"id":"a","data":{"x":' + b"[" * 5000 + b"]" * 5000 + b"}}",
            json.dumps({"id": "../..\0\n", "data": {"x": {"$int": "9" * 4000}}}).encode(),
        ],
    ),
    "session id": Target(
        _decode_any_id,
        [b"a", b"../../x", b"\0", b"a\nb", b"x" * 513, b"\xed\xb2\x80", b"*?[a]{b}", b""],
    ),
}

assert SHARDS, "the snapshot has that many images"


def mutated(seeds: list[bytes], chance: Random) -> bytes:
    """Return one of the seeds, changed in a few places."""
    data = bytearray(chance.choice(seeds))
    for _ in range(chance.randrange(1, 6)):
        at = chance.randrange(len(data) + 1)
        kind = chance.randrange(6)
        if kind == 0 and data:
            data[at % len(data)] ^= 1 << chance.randrange(8)
        elif kind == 1:
            del data[at : at + chance.randrange(1, 20)]
        elif kind == 2:
            data[at:at] = chance.randbytes(chance.randrange(1, 20))
        elif kind == 3:
            other = chance.choice(seeds)
            start = chance.randrange(len(other) + 1)
            data[at : at + chance.randrange(8)] = other[start : start + chance.randrange(40)]
        elif kind == 4:
            data[at : at + 4] = chance.choice([b"\xff" * 4, bytes(4), b"\xff\xff\xff\x7f"])
        else:
            data[at : at + 1] = bytes([chance.choice([0, 0x7F, 0x80, 0xC1, 0xDD, 0xFF])])
    return bytes(data[:MOST_BYTES])


def check(target: Target, data: bytes) -> None:
    """Decode `data` as it is, and with its checksums made right."""
    target.decode(data)
    target.decode(target.seal(data))


# --- the long form --------------------------------------------------------------------------------


def _cap_memory() -> None:
    """Let this process have little more memory than it has."""
    with Path("/proc/self/statm").open() as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES, used + MEMORY_BYTES))


def fuzz_by_chance(name: str, seconds: float, seed: int) -> int:
    """Change valid inputs by chance until the time is over; return how many there were."""
    target, chance, count = TARGETS[name], Random(f"{seed} {name}"), 0
    end = time.monotonic() + seconds
    _cap_memory()
    for data in target.seeds:
        check(target, data)
    while time.monotonic() < end:
        data = mutated(target.seeds, chance)
        signal.alarm(INPUT_SECONDS)  # whatever takes longer ends the process
        try:
            check(target, data)
        except BaseException as error:
            error.add_note(f"{name}: {data!r}")
            raise
        count += 1
    signal.alarm(0)
    return count


def fuzz_guided(name: str, seconds: float, seed: int) -> None:
    """The same, guided by coverage. Ends the process."""
    atheris: Any = import_module("atheris")
    target = TARGETS[name]
    with tempfile.TemporaryDirectory() as corpus:
        for number, data in enumerate(target.seeds):
            Path(corpus, str(number)).write_bytes(data)
        options = [
            f"-max_total_time={max(1, int(seconds))}",
            f"-seed={seed}",
            f"-max_len={MOST_BYTES}",
            f"-timeout={INPUT_SECONDS}",
            f"-rss_limit_mb={MEMORY_BYTES // 2**20}",
            "-print_final_stats=1",
        ]
        atheris.Setup([sys.argv[0], *options, corpus], lambda data: check(target, data))
        atheris.Fuzz()


def is_guided() -> bool:
    """Whether `atheris` is installed."""
    return find_spec("atheris") is not None


def run_one(name: str, seconds: float, seed: int) -> tuple[int, str]:
    """Fuzz one decoder in a process of its own; return how many inputs, and what went wrong."""
    if is_guided():
        start = "import atheris\nwith atheris.instrument_imports(include=['persistence']):\n    "
        end = "f.fuzz_guided(name, seconds, seed)"
    else:
        start, end = "", "print('inputs', f.fuzz_by_chance(name, seconds, seed))"
    code = (
        f"import sys\n{start}from tests.faults import fuzzing as f\n"
        f"name, seconds, seed = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])\n{end}\n"
    )
    with tempfile.TemporaryDirectory() as scratch:
        ended = subprocess.run(
            [sys.executable, "-c", code, name, str(seconds), str(seed)],
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            cwd=scratch,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        )
    said = ended.stdout + ended.stderr
    counts = [line.split()[-1] for line in said.splitlines() if _counts(line)]
    count = int(counts[-1]) if counts and counts[-1].isdigit() else 0
    return count, "" if ended.returncode == 0 else said[-4000:] or f"ended with {ended.returncode}"


def _counts(line: str) -> bool:
    return line.startswith(("inputs ", "stat::number_of_executed_units:"))
