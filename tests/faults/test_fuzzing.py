"""Hostile bytes for every decoder, in short; ``python -m tests.faults fuzz`` goes on for hours."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from random import Random

import msgpack
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from persistence import record as rec
from persistence.checkpoint import manifest as checkpoint
from persistence.disk import format as fmt
from persistence.disk.journal import decode_entries
from persistence.disk.manifest import decode_manifest
from persistence.remote import layout
from persistence.remote.contract import RemoteSession
from tests.faults.fuzzing import _ID as TARGET_ID
from tests.faults.fuzzing import TARGETS, Target, check, mutated

ROUNDS = 400


def test_what_fuzzing_begins_with_is_valid() -> None:
    """Else it would be refused at once, and nothing behind that be reached."""
    first = {name: target.seeds[0] for name, target in TARGETS.items()}
    for name, target in TARGETS.items():
        assert target.seal(first[name]) == first[name], name
    assert fmt.decode_segment_header(first["segment header"]) is not None
    assert isinstance(fmt.decode_frame(first["frame"], 0, 7), fmt.Frame)
    rec.validate(first["record"])
    covered = fmt.covered_by(first["cache"])
    assert covered is not None
    assert fmt.decode_cache(first["cache"], b"d" * 16, covered) is not None
    assert decode_manifest(first["manifest"]).next_number == 1
    assert len(decode_entries(b"d" * 16, first["journal"])[0]) == 2
    chunk = first["chunk"]
    chunk_id = TARGET_ID
    assert len(checkpoint.decode_chunk(chunk, checkpoint.ref_of(chunk, chunk_id, 0))) == 2
    assert checkpoint.decode_manifest(first["checkpoint"], chunk_id).sessions == 3
    assert len(layout.decode_announcements(first["announcement"])) == 2
    fields = dict(msgpack.unpackb(first["hash"]))
    assert isinstance(layout.decode_session(b"k", "a", fields), RemoteSession)


@pytest.mark.parametrize("name", TARGETS)
def test_changed_input_is_refused_as_promised(
    name: str, fault_seed: int, scaled: Callable[[int], int]
) -> None:
    target, chance = TARGETS[name], Random(f"{fault_seed} {name}")
    for data in target.seeds:
        check(target, data)
    for _ in range(scaled(ROUNDS)):
        data = mutated(target.seeds, chance)
        try:
            check(target, data)
        except BaseException as error:
            error.add_note(repr(data))
            raise


@pytest.mark.parametrize("name", TARGETS)
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.binary(max_size=300))
def test_any_bytes_are_refused_as_promised(name: str, data: bytes) -> None:
    check(TARGETS[name], data)


@pytest.mark.parametrize("name", ["frame", "value", "chunk", "record"])
def test_what_claims_to_be_large_takes_no_memory_before_it_is_refused(name: str) -> None:
    target: Target = TARGETS[name]
    tracemalloc.start()
    try:
        for data in target.seeds:
            for size in (b"\xff" * 4, b"\xff\xff\xff\x7f"):
                for at in range(0, min(len(data), 120), 3):
                    check(target, data[:at] + size + data[at + 4 :])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 32 * 2**20
