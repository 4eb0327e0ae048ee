from __future__ import annotations

import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from persistence.config import (
    GIB,
    KIB,
    MIB,
    CheckpointConfig,
    DiskConfig,
    MemoryConfig,
    RedisConfig,
    SecurityConfig,
    SessionConfig,
    ShutdownConfig,
    StateConfig,
    format_bytes,
    parse_bytes,
    render_toml,
)
from persistence.errors import ConfigError, InvalidArgument, PersistenceError

ROOT = Path(__file__).parent.parent
CONFIG_FILES = sorted((ROOT / "config").glob("*.toml"))
SECTIONS = (
    SessionConfig,
    MemoryConfig,
    DiskConfig,
    RedisConfig,
    CheckpointConfig,
    ShutdownConfig,
    SecurityConfig,
)
ALL_FIELDS = [(section, name) for section in SECTIONS for name in section.model_fields]


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name in os.environ:
        if name.upper().startswith("PERSISTENCE_"):
            monkeypatch.delenv(name)


def faults(section: type[Any], **values: object) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        section(**values)
    return str(caught.value).splitlines()


def fault(section: type[Any], **values: object) -> str:
    [only] = faults(section, **values)
    return only


def load_fault(path: Path | None = None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        StateConfig.load(path)
    return str(caught.value).splitlines()


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


# Values


def test_the_defaults_are_the_documented_ones() -> None:
    assert StateConfig().model_dump() == {
        "session": {
            "ttl_seconds": 3600,
            "max_lifetime_seconds": 0,
            "auto_renew": True,
            "max_requests": 0,
            "max_sessions": 0,
            "max_bytes": 64 * MIB,
            "track_metrics": True,
            "cleanup_interval_seconds": 300,
        },
        "memory": {
            "max_bytes": 100 * MIB,
            "spill_threshold": 0.80,
            "spill_target": 0.70,
            "policy": "lru",
            "check_interval_seconds": 1.0,
        },
        "disk": {
            "path": ".persistence",
            "fsync": "always",
            "flush_interval_seconds": 1.0,
            "segment_bytes": 64 * MIB,
            "compression": "lz4",
            "max_bytes": 0,
            "compaction_bytes_per_second": 64 * MIB,
            "queue_bytes": 16 * MIB,
        },
        "redis": {
            "url": None,
            "namespace": "persistence",
            "write": "through",
            "on_outage": "local",
            "flush_interval_seconds": 1,
            "timeout_seconds": 2,
            "heartbeat_seconds": 5,
            "tombstone_seconds": 86_400,
            "max_connections": 8,
            "allow_eviction": False,
        },
        "checkpoint": {
            "interval_seconds": 0,
            "min_pause_seconds": 1,
            "compression": "lz4",
            "keep": 5,
            "store": "auto",
        },
        "shutdown": {"checkpoint": True, "grace_seconds": 25},
        "security": {
            "key_file": None,
            "secret_keys": None,
            "encrypt": False,
            "token_ttl_seconds": 86_400,
        },
    }


@pytest.mark.parametrize(("section", "name"), ALL_FIELDS)
def test_every_default_is_allowed_and_has_the_type_of_its_field(
    section: type[Any], name: str
) -> None:
    default = getattr(section(), name)
    again = getattr(section(**{name: default}), name)
    assert (again, type(again)) == (default, type(default))


def test_a_configuration_cannot_be_changed_and_equal_ones_are_equal() -> None:
    config = StateConfig(memory=MemoryConfig(max_bytes=MIB))
    with pytest.raises(ConfigError, match=r"memory.max_bytes: .* make another one with model_copy"):
        config.memory.max_bytes = 5
    assert config == StateConfig(memory=MemoryConfig(max_bytes=MIB))
    assert hash(config) == hash(StateConfig(memory=MemoryConfig(max_bytes=MIB)))
    assert config != StateConfig()


def test_sections_may_be_given_as_mappings() -> None:
    values: dict[str, Any] = {"memory": {"max_bytes": MIB}}
    assert StateConfig(**values) == StateConfig(memory=MemoryConfig(max_bytes=MIB))


def test_a_copy_with_changes_is_checked_like_the_original() -> None:
    config = StateConfig().memory.model_copy(update={"max_bytes": MIB})
    assert config == MemoryConfig(max_bytes=MIB)
    with pytest.raises(ConfigError, match=r"memory\.max_bytes = -1"):
        config.model_copy(update={"max_bytes": -1})


def test_a_mapping_is_validated_with_the_same_error() -> None:
    assert StateConfig.model_validate({"memory": {"max_bytes": "1MiB"}}).memory.max_bytes == MIB
    with pytest.raises(ConfigError, match=r"^memory\.max_bytes = -1: must be"):
        StateConfig.model_validate({"memory": {"max_bytes": -1}})


def test_paths_may_be_path_objects_and_are_kept_as_text() -> None:
    path: Any = PurePosixPath("/a/b")
    assert DiskConfig(path=path).path == "/a/b"
    assert CheckpointConfig(store=path).store == "/a/b"


# Sizes


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("262144", 262144),
        ("256KiB", 256 * KIB),
        ("256 kib", 256 * KIB),
        ("256k", 256 * KIB),
        (" 64MiB ", 64 * MIB),
        ("1.5GiB", 3 * GIB // 2),
        ("2TiB", 2 * 2**40),
        ("12B", 12),
        ("64KB", 64_000),
        ("1.5MB", 1_500_000),
        ("0", 0),
    ],
)
def test_sizes_are_read_with_their_units(text: Any, size_bytes: int) -> None:
    assert parse_bytes(text) == size_bytes
    assert DiskConfig(max_bytes=text).max_bytes == size_bytes


@pytest.mark.parametrize(
    "text", ["", "MiB", "-1MiB", "1,5MiB", "64 Mib/s", "0x10", "1e6", "٣MiB", "1.3B", "9" * 30]
)
def test_what_is_no_size_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ConfigError, match=r"write for example|whole number"):
        parse_bytes(text)
    assert "or a size such as" in fault(MemoryConfig, max_bytes=text)


@given(st.integers(0, 2**50))
def test_a_size_that_was_formatted_reads_back_exactly(size_bytes: int) -> None:
    assert parse_bytes(format_bytes(size_bytes)) == size_bytes


# Faults


def test_a_fault_names_the_field_its_value_and_what_is_allowed() -> None:
    assert fault(MemoryConfig, max_bytes=-1) == (
        'memory.max_bytes = -1: must be a number of bytes or a size such as "64MiB", at least 1'
    )


def test_the_error_is_ours_and_a_value_error() -> None:
    with pytest.raises(ValueError, match=r"memory\.max_bytes") as caught:
        MemoryConfig(max_bytes=-1)
    assert type(caught.value) is ConfigError
    assert isinstance(caught.value, PersistenceError)
    assert caught.value.__suppress_context__


def test_all_faults_are_listed_one_per_line() -> None:
    lines = faults(
        StateConfig,
        memory={"max_bytes": "lots", "policy": "mru"},
        disk={"segment_bytes": "5 KiB"},
        shutdown=7,
        tier={},
    )
    assert [line.partition(":")[0] for line in lines] == [
        "memory.max_bytes = 'lots'",
        "memory.policy = 'mru'",
        "disk.segment_bytes = '5 KiB'",
        "shutdown = 7",
        "tier = {}",
    ]


@pytest.mark.parametrize(
    ("section", "values", "allowed"),
    [
        (SessionConfig, {"ttl_seconds": -1}, "a number of seconds, at least 0 and at most"),
        (SessionConfig, {"ttl_seconds": float("nan")}, "a number of seconds"),
        (SessionConfig, {"ttl_seconds": float("inf")}, "a number of seconds"),
        (SessionConfig, {"ttl_seconds": "nan"}, "a number of seconds"),
        (SessionConfig, {"ttl_seconds": True}, "a number of seconds"),
        (SessionConfig, {"ttl_seconds": None}, "a number of seconds"),
        (SessionConfig, {"ttl_seconds": 1e300}, "at most 3155760000"),
        (SessionConfig, {"max_sessions": 1.5}, "a whole number, at least 0"),
        (SessionConfig, {"max_sessions": False}, "a whole number, at least 0"),
        (SessionConfig, {"auto_renew": "perhaps"}, "true or false"),
        (SessionConfig, {"auto_renew": None}, "true or false"),
        (SessionConfig, {"max_bytes": "2GiB"}, "at most 1GiB"),
        (MemoryConfig, {"max_bytes": 0}, "at least 1"),
        (MemoryConfig, {"max_bytes": True}, "a number of bytes"),
        (MemoryConfig, {"max_bytes": 2**70}, "a number of bytes"),
        (MemoryConfig, {"max_bytes": 10**5000}, "a number of bytes"),
        (MemoryConfig, {"max_bytes": [1]}, "a number of bytes"),
        (MemoryConfig, {"spill_threshold": 0}, "above 0 and at most 1"),
        (MemoryConfig, {"spill_threshold": 80}, "above 0 and at most 1"),
        (MemoryConfig, {"policy": "LRU"}, '"lru"'),
        (DiskConfig, {"fsync": "sometimes"}, '"always" or "interval" or "never"'),
        (DiskConfig, {"fsync": True}, '"always" or "interval" or "never"'),
        (DiskConfig, {"flush_interval_seconds": 0}, "above 0"),
        (DiskConfig, {"segment_bytes": 64 * KIB - 1}, "at least 64KiB and at most 1GiB"),
        (DiskConfig, {"segment_bytes": GIB + 1}, "at least 64KiB and at most 1GiB"),
        (DiskConfig, {"path": ""}, "the path of a directory"),
        (DiskConfig, {"path": b"bytes"}, "the path of a directory"),
        (DiskConfig, {"path": "nul\0"}, "the path of a directory"),
        (DiskConfig, {"path": None}, "the path of a directory"),
        (RedisConfig, {"url": "localhost:6379"}, "redis://, rediss:// or unix://"),
        (RedisConfig, {"url": 5}, "redis://, rediss:// or unix://"),
        (RedisConfig, {"namespace": ""}, "without spaces, control characters and braces"),
        (RedisConfig, {"namespace": "a{b}"}, "without spaces, control characters and braces"),
        (RedisConfig, {"namespace": b"ab"}, "without spaces, control characters and braces"),
        (CheckpointConfig, {"keep": 0}, "a whole number, at least 1"),
        (
            CheckpointConfig,
            {"store": ""},
            '"auto", "redis", "postgresql" or the path of a directory; a URL is for redis.url',
        ),
        (StateConfig, {"memory": None}, "a table, or a MemoryConfig"),
        (StateConfig, {"memory": SessionConfig()}, "a table, or a MemoryConfig"),
    ],
)
def test_a_wrong_value_is_refused_and_the_message_says_what_is_allowed(
    section: type[Any], values: dict[str, object], allowed: str
) -> None:
    line = fault(section, **values)
    name = ".".join(filter(None, (section.table, *values)))
    assert line.startswith(f"{name} = ")
    assert allowed in line


@pytest.mark.parametrize(("section", "name"), ALL_FIELDS)
def test_every_field_refuses_a_value_of_no_type_at_all(section: type[Any], name: str) -> None:
    line = fault(section, **{name: object()})
    shown = "***" if name == "secret_keys" else "<object object"  # a key may be anything
    assert line.startswith(f"{section.table}.{name} = {shown}")
    assert ": must be " in line


def test_the_spill_target_may_not_exceed_the_threshold() -> None:
    assert MemoryConfig(spill_threshold=0.5, spill_target=0.5).spill_target == 0.5
    assert fault(MemoryConfig, spill_threshold=0.5, spill_target=0.7) == (
        "memory.spill_target = 0.7: must be at most memory.spill_threshold, which is 0.5; set both"
    )
    wrong = {"spill_threshold": 0.5, "spill_target": 0.7}
    assert fault(StateConfig, memory=wrong).startswith("memory.spill_target")


@pytest.mark.parametrize(("threshold", "target"), [(0.5, 0.5), ("0.6", 0.6), (0.9, 0.7)])
def test_a_target_that_is_not_given_is_not_above_the_threshold(
    threshold: Any, target: float
) -> None:
    config = MemoryConfig(spill_threshold=threshold)
    assert config.spill_target == target
    assert config.model_copy(update={"max_bytes": 5}).spill_target == target


@pytest.mark.parametrize(
    ("section", "name", "closest"),
    [
        (MemoryConfig, "max_byte", "memory.max_bytes"),
        (MemoryConfig, "ttl_seconds", "session.ttl_seconds"),
        (MemoryConfig, "url", "redis.url"),
        (StateConfig, "memoory", "memory"),
        (StateConfig, "Disk", "disk"),
        (StateConfig, "spill_target", "memory.spill_target"),
    ],
)
def test_an_unknown_field_is_refused_and_the_closest_known_is_named(
    section: type[Any], name: str, closest: str
) -> None:
    assert fault(section, **{name: 1}).endswith(f": unknown; the closest known is {closest}")


@pytest.mark.parametrize("name", ["self", "foobarbaz", "x", "", "ключ"])
def test_an_unknown_field_that_resembles_none_is_told_which_there_are(name: str) -> None:
    assert fault(ShutdownConfig, **{name: 1}) == (
        f"shutdown.{name} = 1: unknown; the fields of shutdown are checkpoint, grace_seconds"
    )


@pytest.mark.parametrize(("name", "shown"), [("zzz", "zzz"), ("", "''")])
def test_an_unknown_section_that_resembles_none_is_told_which_there_are(
    name: str, shown: str
) -> None:
    sections = ", ".join(section.table for section in SECTIONS)
    assert fault(StateConfig, **{name: 1}) == (f"{shown} = 1: unknown; the sections are {sections}")


@pytest.mark.parametrize("given", [5, None, [], "worker.toml"])
def test_what_is_no_table_is_not_taken_for_an_unknown_field(given: object) -> None:
    with pytest.raises(ConfigError, match=r"must be a table, or a StateConfig$"):
        StateConfig.model_validate(given)


@pytest.mark.parametrize("url", ["redis://localhost", "postgresql://user:word@host/db"])
def test_a_url_is_no_directory_for_checkpoints(url: str) -> None:
    """It would be made as one, on the disk that checkpoints should outlive."""
    line = fault(CheckpointConfig, store=url)
    assert line.endswith("a URL is for redis.url")
    assert "word" not in line


def test_a_long_value_is_shortened_and_stays_on_one_line() -> None:
    line = fault(DiskConfig, fsync="x\n" * 5000)
    assert len(line) < 250


# Passwords


@pytest.mark.parametrize(
    "url",
    [
        "redis://:hunter2@cache:6379/0",
        "rediss://user:hunter2@cache:6379/0",
        "redis://user:p@/hunter2@cache",
        "redis://hunter2@cache",
        "unix://:hunter2@/run/redis.sock?db=1",
        "redis://cache?password=hunter2&db=1",
        "redis+sentinel://:hunter2@one:26379,two:26379/shop?sentinel_password=hunter2",
        "rediss+cluster://app:hunter2@one:7000,two:7000",
    ],
)
def test_a_password_is_in_the_url_and_in_no_representation(url: str) -> None:
    config = StateConfig(redis=RedisConfig(url=url))
    assert config.redis.url == url
    for text in (repr(config), str(config), repr(config.redis), str(config.redis)):
        assert "hunter2" not in text
        assert "***" in text


@pytest.mark.parametrize(
    ("section", "values"),
    [
        (RedisConfig, {"url": "http://:hunter2@cache"}),
        (RedisConfig, {"url": "user:hunter2@cache"}),
        (RedisConfig, {"url": "redis://:hunter2@cache with spaces"}),
        (RedisConfig, {"url": b"redis://:hunter2@cache"}),
        (RedisConfig, {"uri": "redis://:hunter2@cache"}),
        (StateConfig, {"redis": "redis://:hunter2@cache"}),
        (StateConfig, {"redis": {"url": "http://:hunter2@cache"}}),
        (StateConfig, {"reddis": {"url": "redis://:hunter2@cache"}}),
    ],
)
def test_a_password_is_in_no_fault(section: type[Any], values: dict[str, object]) -> None:
    line = fault(section, **values)
    assert "hunter2" not in line
    assert "***" in line


# Keys

KEY = "c0ffee" * 10 + "cafe"


def test_a_key_is_in_the_field_and_in_no_representation() -> None:
    config = StateConfig(security=SecurityConfig(secret_keys=KEY))
    assert config.security.secret_keys == KEY
    for text in (repr(config), str(config), repr(config.security), str(config.security)):
        assert "c0ffee" not in text
        assert "***" in text


@pytest.mark.parametrize(
    ("section", "values"),
    [
        (SecurityConfig, {"secret_keys": [KEY]}),
        (SecurityConfig, {"secret_keys": KEY.encode()}),
        (SecurityConfig, {"key": KEY}),
        (SecurityConfig, {"Keys": KEY}),
        (StateConfig, {"security": KEY}),
        (StateConfig, {"security": [KEY]}),
        (StateConfig, {"security": {"kyes": KEY}}),
        (StateConfig, {"security": {"secret_keys": {"a": KEY}}}),
    ],
)
def test_a_key_is_in_no_fault(section: type[Any], values: dict[str, object]) -> None:
    line = fault(section, **values)
    assert "c0ffee" not in line
    assert "= ***: " in line


@pytest.mark.parametrize("key", [KEY, KEY.upper(), "c0ffee/+" * 5 + "abc", "c0ffee-_" * 5 + "abc="])
def test_a_key_in_a_table_that_does_not_exist_is_not_shown(key: str) -> None:
    for table in ({"kyes": key}, {"kyes": f"{key},{key}"}, [key], key):
        line = fault(StateConfig, securty=table)
        assert "c0ffee" not in line.lower()
        assert "***" in line
        assert "the closest known is security" in line


def test_a_key_is_in_no_fault_of_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERSISTENCE_SECURITY__SECRET_KYES", KEY)
    [line] = load_fault()
    assert "c0ffee" not in line
    assert "the closest known is security.secret_keys" in line


def test_encryption_needs_keys_and_keys_have_one_source() -> None:
    assert "needs keys" in fault(SecurityConfig, encrypt=True)
    assert "give one" in fault(SecurityConfig, secret_keys=KEY, key_file="keys")
    assert SecurityConfig(encrypt=True, key_file=Path("keys")).key_file == "keys"
    assert SecurityConfig(secret_keys="", key_file="") == SecurityConfig()


def test_an_empty_url_means_none() -> None:
    assert RedisConfig(url="").url is None
    assert repr(RedisConfig()).startswith("RedisConfig(url=None")


# Files


def test_a_file_is_read_and_what_it_leaves_out_is_the_default(tmp_path: Path) -> None:
    path = write(tmp_path / "worker.toml", '[memory]\nmax_bytes = "1MiB"\nspill_target = 0.5\n')
    expected = StateConfig(memory=MemoryConfig(max_bytes=MIB, spill_target=0.5))
    assert StateConfig.load(path) == expected
    assert StateConfig.load(str(path)) == expected


def test_without_a_file_the_defaults_are_loaded() -> None:
    assert StateConfig.load() == StateConfig()


@pytest.mark.parametrize("path", [5, 1.5, b"worker.toml", [], {}])
def test_a_path_that_is_none_is_an_invalid_argument(path: Any) -> None:
    with pytest.raises(InvalidArgument, match=r"^path = .*: must be the path of a TOML file"):
        StateConfig.load(path)


def test_an_empty_path_is_shown_as_one() -> None:
    with pytest.raises(ConfigError, match=r"^'': cannot be read"):
        StateConfig.load("")


def test_a_byte_order_mark_is_no_fault(tmp_path: Path) -> None:
    path = write(tmp_path / "worker.toml", "\ufeff[disk]\nmax_bytes = 5\n")
    assert StateConfig.load(path).disk.max_bytes == 5


def test_a_fault_in_a_file_names_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "worker.toml", "[memory]\nmax_bytes = -1\npolicy = 3\n[memoory]\n")
    assert load_fault(path) == [
        f"{path}: memory.max_bytes = -1: must be a number of bytes or a size such as "
        '"64MiB", at least 1',
        f'{path}: memory.policy = 3: must be "lru" or "sieve" or "s3fifo" or "adaptive"',
        f"{path}: memoory = {{}}: unknown; the closest known is memory",
    ]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("[memory]\nmax_bytes 5\n", 2),
        ("[memory]\n\n\nmax_bytes = \n", 4),
        ("[memory]\npolicy = '''lru\n", 2),
        ("[memory\n", 1),
        ("[disk]\nmax_bytes = 1\nmax_bytes = 2\n", 3),
    ],
)
def test_malformed_toml_names_file_line_and_reason(tmp_path: Path, text: str, line: int) -> None:
    path = write(tmp_path / "worker.toml", text)
    [message] = load_fault(path)
    assert message.startswith(f"{path}: line {line}: not valid TOML: ")


def test_a_file_that_is_no_text_names_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "worker.toml"
    path.write_bytes(b"[memory]\n# caf\xe9\n")
    assert load_fault(path) == [f"{path}: line 2: not valid TOML: no UTF-8 text"]


@pytest.mark.parametrize("text", ["x = " + "9" * 5000, "x = " + "[" * 100_000])
def test_toml_that_overwhelms_its_reader_is_a_fault_like_any_other(
    tmp_path: Path, text: str
) -> None:
    path = write(tmp_path / "worker.toml", text)
    [message] = load_fault(path)
    assert message.startswith(f"{path}: ")
    assert "not valid TOML" in message


def test_a_file_that_cannot_be_read_is_named_with_the_reason(tmp_path: Path) -> None:
    missing = tmp_path / "missing.toml"
    assert load_fault(missing) == [f"{missing}: cannot be read: No such file or directory"]
    assert load_fault(tmp_path) == [f"{tmp_path}: cannot be read: Is a directory"]
    with pytest.raises(ConfigError, match="null byte"):
        StateConfig.load("nul\0.toml")


# The environment


def test_variables_override_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = write(tmp_path / "worker.toml", "[memory]\nmax_bytes = 5\nspill_target = 0.5\n")
    monkeypatch.setenv("PERSISTENCE_MEMORY__MAX_BYTES", "256KiB")
    monkeypatch.setenv("PERSISTENCE_SESSION__AUTO_RENEW", "false")
    monkeypatch.setenv("PERSISTENCE_SESSION__TTL_SECONDS", "1.5")
    monkeypatch.setenv("PERSISTENCE_SESSION__MAX_REQUESTS", "7")
    monkeypatch.setenv("PERSISTENCE_REDIS__URL", "")
    assert StateConfig.load(path) == StateConfig(
        memory=MemoryConfig(max_bytes=256 * KIB, spill_target=0.5),
        session=SessionConfig(auto_renew=False, ttl_seconds=1.5, max_requests=7),
    )


def test_constructors_read_no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERSISTENCE_MEMORY__MAX_BYTES", "5")
    assert StateConfig() == StateConfig(memory=MemoryConfig(max_bytes=100 * MIB))


def test_every_field_has_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    for section, name in ALL_FIELDS:
        default = getattr(section(), name)
        text = "" if default is None else str(default).lower()
        monkeypatch.setenv(f"PERSISTENCE_{section.table}__{name}".upper(), text)
    assert StateConfig.load() == StateConfig()


def test_a_section_may_be_one_json_object(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERSISTENCE_MEMORY", '{"max_bytes": "1MiB", "spill_target": 0.5}')
    monkeypatch.setenv("PERSISTENCE_MEMORY__SPILL_TARGET", "0.6")
    assert StateConfig.load().memory == MemoryConfig(max_bytes=MIB, spill_target=0.6)


@pytest.mark.parametrize("text", ["{", "5x", ""])
def test_a_section_that_is_no_json_names_its_variable(
    monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setenv("PERSISTENCE_MEMORY", text)
    [line] = load_fault()
    assert line == "PERSISTENCE_MEMORY: must be a JSON object with the fields of the section"


def test_a_fault_in_a_variable_names_the_variable(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = write(tmp_path / "worker.toml", "[disk]\nfsync = 5\n")
    monkeypatch.setenv("PERSISTENCE_MEMORY__MAX_BYTES", "lots")
    monkeypatch.setenv("PERSISTENCE_MEMORY__MAX_BYTE", "1")
    monkeypatch.setenv("PERSISTENCE_MEMOORY__MAX_BYTES", "1")
    assert load_fault(path) == [
        "PERSISTENCE_MEMOORY__MAX_BYTES: unknown; "
        "the closest known is PERSISTENCE_MEMORY__MAX_BYTES",
        "PERSISTENCE_MEMORY__MAX_BYTES: memory.max_bytes = 'lots': must be a number of bytes or "
        'a size such as "64MiB", at least 1',
        "PERSISTENCE_MEMORY__MAX_BYTE: memory.max_byte = '1': unknown; "
        "the closest known is memory.max_bytes",
        f'{path}: disk.fsync = 5: must be "always" or "interval" or "never"',
    ]


@pytest.mark.parametrize(
    "name", ["PERSISTENCE_X", "PERSISTENCE_", "PERSISTENCE___", "persistence_x"]
)
def test_a_variable_with_our_prefix_that_means_nothing_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "1")
    [line] = load_fault()
    sections = ", ".join(section.table for section in SECTIONS)
    assert line == f"{name}: unknown; the sections are {sections}"


def test_a_table_that_the_file_gives_as_a_number_is_a_fault_whatever_the_environment_says(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = write(tmp_path / "worker.toml", "memory = 5\n")
    monkeypatch.setenv("PERSISTENCE_MEMORY__MAX_BYTES", "1")
    assert load_fault(path) == [f"{path}: memory = 5: must be a table, or a MemoryConfig"]


# The files in config/


def comments_above_keys(text: str) -> Iterator[tuple[str, str]]:
    """Yield (dotted path of a key, the comment line right above it)."""
    table, above = "", ""
    for line in text.splitlines():
        if line.startswith("["):
            table = line.strip("[]")
        elif line and not line.startswith("#"):
            yield f"{table}.{line.partition(' = ')[0]}", above
        above = line


def test_the_default_file_has_every_field_below_its_description() -> None:
    text = (ROOT / "config" / "default.toml").read_text(encoding="utf-8")
    assert dict(comments_above_keys(text)) == {
        f"{section.table}.{name}": f"# {section.model_fields[name].description}"
        for section, name in ALL_FIELDS
    }


def test_the_default_file_is_what_the_models_render() -> None:
    text = (ROOT / "config" / "default.toml").read_text(encoding="utf-8")
    assert text.endswith(render_toml(StateConfig())), (
        "write it anew, below the comment at its top: "
        "python -c 'from persistence.config import *; print(render_toml(StateConfig()), end=\"\")'"
    )


def test_the_default_file_loads_to_the_defaults() -> None:
    assert StateConfig.load(ROOT / "config" / "default.toml") == StateConfig()


@pytest.mark.parametrize("path", CONFIG_FILES, ids=lambda path: str(path.name))
def test_every_file_of_the_project_loads_and_each_of_its_keys_has_a_comment(path: Path) -> None:
    StateConfig.load(path)
    above = dict(comments_above_keys(path.read_text(encoding="utf-8")))
    assert above
    assert [key for key, comment in above.items() if not comment.startswith("# ")] == []


def test_every_field_has_a_description_of_one_sentence() -> None:
    for section, name in ALL_FIELDS:
        description = section.model_fields[name].description
        assert description
        assert description.endswith(".")
        assert ". " not in description
        assert "\n" not in description


def test_a_configuration_survives_being_rendered_and_loaded(tmp_path: Path) -> None:
    config = StateConfig(
        session=SessionConfig(ttl_seconds=0.25, auto_renew=False, max_bytes=1000),
        disk=DiskConfig(path='C:\\odd "path"\twith\nlines é', fsync="interval"),
        redis=RedisConfig(url="redis://:secret@cache/0"),
        checkpoint=CheckpointConfig(keep=2000),
    )
    text = render_toml(config)
    assert tomllib.loads(text)["session"]["max_bytes"] == 1000
    assert StateConfig.load(write(tmp_path / "rendered.toml", text)) == config


# The import


def test_importing_the_configuration_leaves_out_what_only_loading_needs() -> None:
    program = (
        "import sys, persistence.config; print({'pydantic_settings', 'dotenv'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.strip() == "set()"


# The types


def test_the_types_allow_what_the_fields_accept_and_say_what_they_hold() -> None:
    # Checked by mypy --strict, which looks at the tests as well.
    session = SessionConfig(max_bytes="64MiB")
    disk = DiskConfig(path=Path("state"), segment_bytes="1MiB", queue_bytes=2**20)
    max_bytes: int = session.max_bytes
    path: str = disk.path
    assert (max_bytes, path, disk.segment_bytes) == (2**26, "state", 2**20)


@pytest.mark.parametrize("section", SECTIONS)
def test_every_section_is_copied_and_made_a_dict_of(section: type[Any]) -> None:
    assert dict(section()) == section().model_dump()
    assert section().model_copy(update={}) == section()
