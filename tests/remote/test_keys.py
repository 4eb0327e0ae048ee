"""Names of keys: injective, one namespace apart from the other, hash slots as Redis has them."""

from __future__ import annotations

from fnmatch import fnmatchcase

import pytest
from hypothesis import given
from hypothesis import strategies as st
from redis.crc import key_slot

from persistence.remote.keys import CLUSTER_SLOTS, Keys, slot_of
from tests.redis_servers import RedisServer

IDS = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20)


@given(session_id=IDS)
def test_the_id_is_read_back_from_the_key(session_id: str) -> None:
    keys = Keys("shop:eu")
    assert keys.session_id(keys.session(session_id)) == session_id


@given(session_id=IDS)
def test_slots_are_those_of_redis(session_id: str) -> None:
    key = Keys("shop").session(session_id)
    assert slot_of(key) == key_slot(key)


@pytest.mark.parametrize("key", [b"{a}b", b"a{b}c", b"{}a", b"{a", b"a}", b"{{a}}", b"", b"{a}{b}"])
def test_slots_of_odd_keys_are_those_of_redis(key: bytes) -> None:
    assert slot_of(key) == key_slot(key)


@given(one=IDS, two=IDS)
def test_patterns_of_one_namespace_match_no_key_of_another(one: str, two: str) -> None:
    if one != two:
        key = Keys(two).session("a").decode()
        assert not fnmatchcase(key, Keys(one).pattern.decode())


@pytest.mark.parametrize("prefix", ["*", "a?", "[x]", "\\", "^-", "{a}", "ü"])
def test_a_prefix_is_taken_literally(shared_server: RedisServer, prefix: str) -> None:
    keys = Keys("test")
    wanted = {keys.session(f"{prefix}{n}") for n in range(3)}
    for key in (*wanted, *(keys.session(name) for name in ("a1", "x", "b", "-", prefix[1:] + "z"))):
        shared_server.ask("SET", key, "x")
    pattern = keys.sessions_pattern(prefix)
    assert set(shared_server.client().scan_iter(match=pattern)) == wanted


def test_the_epochs_of_a_cluster_are_spread_over_its_slots() -> None:
    keys = Keys("test").epochs(cluster=True)
    width = CLUSTER_SLOTS // 16
    assert [slot_of(key) // width for key in keys] == list(range(16))
    assert len(Keys("test").epochs(cluster=False)) == 1
