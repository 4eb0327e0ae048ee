"""Configuration: every field of the engine, its unit, default, meaning and bounds.

`StateConfig` holds one section for each part of the engine. Sections are frozen; every wrong input
raises `ConfigError`, which lists all faults, one per line, each naming the field as a dotted path,
its value and what is allowed::

    memory.max_bytes = -1: must be a number of bytes or a size such as "64MiB", at least 1

Sizes in bytes may be given as text (``"256KiB"``, ``"1.5 MiB"``), and so may numbers and booleans,
because the environment has nothing but text.

`StateConfig(...)` looks at its arguments only. `StateConfig.load()` reads a TOML file and, over it,
variables such as ``PERSISTENCE_MEMORY__MAX_BYTES``.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    ClassVar,
    Final,
    Generic,
    Literal,
    NamedTuple,
    Self,
    TypeVar,
    get_args,
)

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)
from pydantic.fields import FieldInfo

from persistence.arguments import refused
from persistence.errors import ConfigError

Taken = TypeVar("Taken")
Kept = TypeVar("Kept")

KIB: Final = 2**10
MIB: Final = 2**20
GIB: Final = 2**30

ENV_PREFIX: Final = "PERSISTENCE_"
ENV_NESTED_DELIMITER: Final = "__"

_MAX_SECONDS: Final = 3_155_760_000  # 100 years: now plus any duration is still a datetime
_MAX_COUNT: Final = 2**63 - 1
_MAX_SEGMENT_BYTES: Final = GIB  # with a record as large behind it, offsets stay below 4 GiB
_MAX_SHOWN_CHARS: Final = 80

_UNIT_BYTES: Final = {
    "": 1,
    "b": 1,
    "k": KIB,
    "kib": KIB,
    "m": MIB,
    "mib": MIB,
    "g": GIB,
    "gib": GIB,
    "t": 2**40,
    "tib": 2**40,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
}
_SIZE: Final = re.compile(r"\s*([0-9]{1,19})(?:\.([0-9]{1,9}))?\s*([a-z]*)\s*", re.IGNORECASE)
_URL: Final = re.compile(r"(?:rediss?(?:\+sentinel|\+cluster)?|unix|postgres(?:ql)?)://\S+")
_NAMESPACE: Final = re.compile(r"[^\s{}\x00-\x1f\x7f]{1,128}")
_URL_USER: Final = re.compile(r"^(['\"]?(?:[\w+.-]+://)?).*@", re.DOTALL)
_URL_PASSWORD: Final = re.compile(r"(?<=password=)[^&'\"]*")
_KEY: Final = re.compile(
    r"(?<![\w+/-])(?:[0-9a-f]{64}|[\w+/-]{43}=?)(?![\w+/=-])", re.IGNORECASE | re.ASCII
)


def parse_bytes(text: str) -> int:
    """Return the bytes that `text` says: ``262144``, ``256KiB``, ``256k``, ``1.5 MiB``, ``1MB``.

    Units of 1,024 are written with an i or as one letter, units of 1,000 as KB, MB, GB, TB.

    Raises:
        ConfigError: it is no size, or no whole number of bytes.
    """
    match = _SIZE.fullmatch(text)
    unit_bytes = None if match is None else _UNIT_BYTES.get(match[3].lower())
    if match is None or unit_bytes is None:
        raise ConfigError(f"{_shown(text)} is no size; write for example 262144, 256KiB or 1.5MiB")
    fraction = match[2] or ""
    size_bytes, rest = divmod(int(match[1] + fraction) * unit_bytes, 10 ** len(fraction))
    if rest:
        raise ConfigError(f"{_shown(text)} is not a whole number of bytes")
    return int(size_bytes)


def format_bytes(size_bytes: int) -> str:
    """Return `size_bytes` exactly, in the largest unit that divides it: ``256KiB``, ``1000``."""
    for unit, unit_bytes in (("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if size_bytes and size_bytes % unit_bytes == 0:
            return f"{size_bytes // unit_bytes}{unit}"
    return str(size_bytes)


class _Noun(NamedTuple):
    """What kind of value a field takes, for its error message; its bounds are added to that."""

    text: str


def _not_bool(value: object) -> object:
    # True is an int to Python, but a switch given for an amount is a mistake.
    if isinstance(value, bool):
        raise ValueError("a boolean is no number")  # noqa: TRY004 - pydantic passes TypeError on
    return value


def _size_bytes(value: object) -> object:
    return parse_bytes(value) if isinstance(value, str) else _not_bool(value)


def _path_text(value: object) -> object:
    text = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(text, str) or not text or "\0" in text:
        raise ValueError("not a path")
    return text


def _store_text(value: object) -> object:
    text = _path_text(value)
    # As a path it would be a directory of that name, on the very disk that may be lost.
    if _URL.fullmatch(str(text)):
        raise ValueError("not a path")
    return text


def _url_text(value: object) -> object:
    # Deployment tools cannot unset a variable, they can only make it empty.
    if value is None or value == "":
        return None
    if not isinstance(value, str) or not _URL.fullmatch(value):
        raise ValueError("not a URL of a server")
    return value


def _file_text(value: object) -> object:
    return None if value is None or value == "" else _path_text(value)


def _secret_text(value: object) -> object:
    if value is None or value == "":
        return None
    if not isinstance(value, str):
        raise ValueError("no text")  # noqa: TRY004 - pydantic passes TypeError on
    return value


def _namespace_text(value: str) -> str:
    if not _NAMESPACE.fullmatch(value):
        raise ValueError("not a namespace")
    return value


_Seconds = Annotated[float, BeforeValidator(_not_bool), _Noun("a number of seconds")]
_Count = Annotated[int, BeforeValidator(_not_bool), _Noun("a whole number")]
_Fraction = Annotated[float, BeforeValidator(_not_bool), _Noun("a number")]
_SIZE_NOUN: Final = _Noun('a number of bytes or a size such as "64MiB"')
if TYPE_CHECKING:
    # A field of a descriptor's type takes what its __set__ takes and gives what its __get__ gives.
    class _Given(Generic[Taken, Kept]):
        def __get__(self, instance: object, owner: object) -> Kept: ...
        def __set__(self, instance: object, value: Taken) -> None: ...

    _Size = _Given[int | str, int]
    _Path = _Given[str | os.PathLike[str], str]
    _Store = _Given[str | os.PathLike[str], str]
    _File = _Given[str | os.PathLike[str] | None, str | None]
else:
    _Size = Annotated[int, BeforeValidator(_size_bytes), _SIZE_NOUN]
    _Path = Annotated[str, BeforeValidator(_path_text), _Noun("the path of a directory")]
    _Store = Annotated[
        str,
        BeforeValidator(_store_text),
        _Noun('"auto", "redis", "postgresql" or the path of a directory; a URL is for redis.url'),
    ]
    _File = Annotated[
        str | None, BeforeValidator(_file_text), _Noun("the path of a file, or empty for none")
    ]
_Secret = Annotated[
    str | None, BeforeValidator(_secret_text), _Noun("keys as text, or empty for none")
]
_Url = Annotated[
    str | None,
    BeforeValidator(_url_text),
    _Noun(
        "a URL that starts with redis://, rediss:// or unix:// (redis+sentinel:// and "
        "redis+cluster:// too) or with postgresql://, or empty for none"
    ),
]
_Namespace = Annotated[
    str,
    Field(strict=True),
    AfterValidator(_namespace_text),
    _Noun("1 to 128 characters without spaces, control characters and braces"),
]


def _default(value: Any) -> Any:
    """Return `value`: a default as `Field` takes it where a field's type is a descriptor's."""
    return value


class _Table(BaseModel):
    """What the sections and the whole have in common: frozen, nothing unknown, one error type."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    table: ClassVar[str] = ""

    def __init__(self, /, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError(_describe(type(self), error, values)) from None

    def __setattr__(self, name: str, value: object) -> None:
        section = self.table or "the configuration"
        raise ConfigError(
            f"{section}.{name}: a configuration does not change; make another one with "
            f"model_copy(update={{{name!r}: ...}})"
        )

    @classmethod
    def model_validate(cls, obj: Any, **options: Any) -> Self:
        """Return the configuration that `obj`, a mapping or an instance, describes.

        Raises:
            ConfigError: a field is wrong.
        """
        try:
            return super().model_validate(obj, **options)
        except ValidationError as error:
            raise ConfigError(_describe(cls, error, {})) from None

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Return a copy with the fields in `update` replaced, and checked like any other.

        Args:
            update: new values by field name.
            deep: of no effect, everything here is immutable.

        Raises:
            ConfigError: a field is wrong.
        """
        del deep
        return type(self)(**{**dict(self), **(update or {})})


class SessionConfig(_Table):
    """What a session may be: its lifetime, limits and housekeeping."""

    table: ClassVar[str] = "session"

    ttl_seconds: _Seconds = Field(
        default=3600.0,
        ge=0,
        le=_MAX_SECONDS,
        description="Seconds a session lives after its last access; 0 = never expires.",
    )
    max_lifetime_seconds: _Seconds = Field(
        default=0.0,
        ge=0,
        le=_MAX_SECONDS,
        description="Seconds a session lives at most, renewed or not; 0 = no such limit.",
    )
    auto_renew: bool = Field(
        default=True, description="Whether every access starts the session's TTL anew."
    )
    max_requests: _Count = Field(
        default=0,
        ge=0,
        le=_MAX_COUNT,
        description="Requests that one session may make; 0 = unlimited.",
    )
    max_sessions: _Count = Field(
        default=0,
        ge=0,
        le=_MAX_COUNT,
        description="Sessions alive at once, in all tiers of this worker; 0 = unlimited.",
    )
    max_bytes: _Size = Field(
        default=_default(64 * MIB),
        ge=1,
        le=_MAX_SEGMENT_BYTES,
        description=(
            "Bytes of one session's packed fields and metadata at most; a larger one is refused."
        ),
    )
    track_metrics: bool = Field(
        default=True, description="Whether requests are counted and timed for each session."
    )
    cleanup_interval_seconds: _Seconds = Field(
        default=300.0,
        ge=0,
        le=_MAX_SECONDS,
        description="Seconds between two removals of expired sessions; 0 = only on request.",
    )


class MemoryConfig(_Table):
    """The memory tier: its budget, and what happens when the budget is used up."""

    table: ClassVar[str] = "memory"

    max_bytes: _Size = Field(
        default=_default(100 * MIB),
        ge=1,
        le=_MAX_COUNT,
        description="Budget of the sessions held in memory, in bytes.",
    )
    spill_threshold: _Fraction = Field(
        default=0.80,
        gt=0,
        le=1,
        description="Fraction of the budget above which sessions leave for the disk.",
    )
    spill_target: _Fraction = Field(
        default=0.70,
        ge=0,
        le=1,
        description="Fraction of the budget at which they stop leaving; at most the threshold.",
    )
    policy: Literal["lru", "sieve", "s3fifo", "adaptive"] = Field(
        default="lru",
        description=(
            "Which sessions leave first: lru, sieve, s3fifo, or adaptive = the one that hits most."
        ),
    )
    check_interval_seconds: _Seconds = Field(
        default=1.0,
        ge=0,
        le=_MAX_SECONDS,
        description=(
            "Seconds between two looks at the memory that process, cgroup and machine have left; "
            "0 = never look."
        ),
    )

    @model_validator(mode="after")
    def _target_below_threshold(self) -> Self:
        if "spill_target" not in self.model_fields_set:
            # The model is frozen for its users; here it is still being made.
            self.__dict__["spill_target"] = min(self.spill_target, self.spill_threshold)
        if self.spill_target > self.spill_threshold:
            raise ConfigError(
                f"memory.spill_target = {self.spill_target}: must be at most "
                f"memory.spill_threshold, which is {self.spill_threshold}; set both"
            )
        return self


class DiskConfig(_Table):
    """The log on local disk: where it is, and what it guarantees."""

    table: ClassVar[str] = "disk"

    path: _Path = Field(
        default=_default(".persistence"),
        description="Directory of the log, created when missing; one process at a time owns it.",
    )
    fsync: Literal["always", "interval", "never"] = Field(
        default="always",
        description=(
            "When an update is acknowledged: always = once it is on the device; interval, never = "
            "once the kernel has it, and interval syncs every flush_interval_seconds."
        ),
    )
    flush_interval_seconds: _Seconds = Field(
        default=1.0,
        gt=0,
        le=_MAX_SECONDS,
        description='Seconds between two syncs with fsync = "interval".',
    )
    segment_bytes: _Size = Field(
        default=_default(64 * MIB),
        ge=64 * KIB,
        le=_MAX_SEGMENT_BYTES,
        description="Bytes after which the log goes on in a new file.",
    )
    compression: Literal["lz4", "none"] = Field(
        default="lz4", description="Compression of records for which it pays."
    )
    max_bytes: _Size = Field(
        default=_default(0),
        ge=0,
        le=_MAX_COUNT,
        description="Bytes that the log may take on disk; 0 = as many as there are.",
    )
    compaction_bytes_per_second: _Size = Field(
        default=_default(64 * MIB),
        ge=0,
        le=_MAX_COUNT,
        description="Bytes per second that compaction may copy; 0 = unlimited.",
    )
    queue_bytes: _Size = Field(
        default=_default(16 * MIB),
        ge=1,
        le=_MAX_COUNT,
        description="Bytes of updates that may wait for the disk before writers are held back.",
    )


class RedisConfig(_Table):
    """The tier that workers share. The representation of `url` shows no password."""

    table: ClassVar[str] = "redis"

    url: _Url = Field(
        default=None,
        description="Redis or PostgreSQL that workers share sessions through; empty = none.",
    )
    namespace: _Namespace = Field(
        default="persistence",
        description="Prefix of every key, so that several applications can share a server.",
    )
    write: Literal["through", "behind", "checkpoint"] = Field(
        default="through",
        description=(
            "When Redis learns of an update: through = before it is acknowledged, behind = soon "
            "after, checkpoint = never, only checkpoints go there."
        ),
    )
    on_outage: Literal["local", "fail"] = Field(
        default="local",
        description=(
            "What happens to updates while Redis is down: local = accepted here and replayed "
            "later, fail = refused."
        ),
    )
    flush_interval_seconds: _Seconds = Field(
        default=1.0,
        gt=0,
        le=_MAX_SECONDS,
        description="Seconds after which Redis learns of an update at the latest, with behind.",
    )
    timeout_seconds: _Seconds = Field(
        default=2.0,
        gt=0,
        le=_MAX_SECONDS,
        description="Seconds after which Redis counts as not answering.",
    )
    heartbeat_seconds: _Seconds = Field(
        default=5.0,
        gt=0,
        le=_MAX_SECONDS,
        description="Seconds between two proofs that announcements of other workers still arrive.",
    )
    tombstone_seconds: _Seconds = Field(
        default=86_400.0,
        gt=0,
        le=_MAX_SECONDS,
        description="Seconds for which Redis remembers that a session was terminated.",
    )
    max_connections: _Count = Field(
        default=8,
        ge=1,
        le=10_000,
        description="Connections to each Redis server, beside the one that listens.",
    )
    allow_eviction: bool = Field(
        default=False,
        description="Whether a Redis that evicts keys when its memory is full is accepted.",
    )

    def __repr_args__(self) -> Iterable[tuple[str | None, Any]]:
        for name, value in super().__repr_args__():
            yield name, _redacted(value) if name == "url" and value else value


class CheckpointConfig(_Table):
    """Restore points of the whole worker."""

    table: ClassVar[str] = "checkpoint"

    interval_seconds: _Seconds = Field(
        default=0.0,
        ge=0,
        le=_MAX_SECONDS,
        description="Seconds between two checkpoints; 0 = only on request and at shutdown.",
    )
    min_pause_seconds: _Seconds = Field(
        default=1.0,
        ge=0,
        le=_MAX_SECONDS,
        description="Seconds at least between the end of a checkpoint and the next one.",
    )
    compression: Literal["lz4", "none"] = Field(
        default="lz4", description="Compression of a checkpoint's chunks."
    )
    keep: _Count = Field(
        default=5, ge=1, le=_MAX_COUNT, description="How many checkpoints stay restorable."
    )
    store: _Store = Field(
        default=_default("auto"),
        description=(
            "Where checkpoints go: redis or postgresql, which redis.url leads to, the path of a "
            "directory, or auto = the one of redis.url when there is one, else a directory beside "
            "the log."
        ),
    )


class ShutdownConfig(_Table):
    """The end of a worker."""

    table: ClassVar[str] = "shutdown"

    checkpoint: bool = Field(
        default=True,
        description=(
            "Whether a shutdown ends with a checkpoint, if there is a Redis or a directory for "
            "them: beside the log it would save nothing that the log does not."
        ),
    )
    grace_seconds: _Seconds = Field(
        default=25.0,
        ge=0,
        le=_MAX_SECONDS,
        description="Seconds within which a shutdown must be over, from the signal to the exit.",
    )


class SecurityConfig(_Table):
    """Keys, tokens and encryption. No representation and no error shows a key."""

    table: ClassVar[str] = "security"

    key_file: _File = Field(
        default=_default(None),
        description=(
            "File with the keys, one a line, the newest last, made with a fresh key if it is "
            "missing; workers that share it accept each other's tokens; empty = none."
        ),
    )
    secret_keys: _Secret = Field(
        default=None,
        description=(
            "The keys themselves instead of a file, separated by commas, the newest last; best "
            "from the environment, in PERSISTENCE_SECURITY__SECRET_KEYS; empty = none."
        ),
    )
    encrypt: bool = Field(
        default=False,
        description=(
            "Whether sessions are encrypted in the log, in checkpoints and in Redis; needs keys, "
            "and a directory that was made with it."
        ),
    )
    token_ttl_seconds: _Seconds = Field(
        default=86_400.0,
        ge=0,
        le=_MAX_SECONDS,
        description="Seconds for which a token is valid at most; 0 = as long as its session.",
    )

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.key_file is not None and self.secret_keys is not None:
            raise ConfigError(
                "security.key_file and security.secret_keys both say the keys: give one"
            )
        if self.encrypt and self.key_file is None and self.secret_keys is None:
            raise ConfigError(
                "security.encrypt = True: needs keys: set security.key_file, or "
                "security.secret_keys (PERSISTENCE_SECURITY__SECRET_KEYS)"
            )
        return self

    def __repr_args__(self) -> Iterable[tuple[str | None, Any]]:
        for name, value in super().__repr_args__():
            yield name, "***" if name == "secret_keys" and value else value


class StateConfig(_Table):
    """The whole configuration, one section for each part of the engine.

    The constructor looks at its arguments only; each is a section or a mapping of its fields.

    Raises:
        ConfigError: a field is wrong or unknown; the message lists every fault, one per line.
    """

    session: SessionConfig = Field(
        default=SessionConfig(), description="What a session may be: lifetime, limits, cleanup."
    )
    memory: MemoryConfig = Field(
        default=MemoryConfig(), description="The sessions held in memory, and their budget."
    )
    disk: DiskConfig = Field(
        default=DiskConfig(), description="The log on local disk, and what it guarantees."
    )
    redis: RedisConfig = Field(default=RedisConfig(), description="The tier that workers share.")
    checkpoint: CheckpointConfig = Field(
        default=CheckpointConfig(), description="Restore points of the whole worker."
    )
    shutdown: ShutdownConfig = Field(
        default=ShutdownConfig(), description="What happens when the worker ends."
    )
    security: SecurityConfig = Field(
        default=SecurityConfig(), description="Keys, tokens and encryption."
    )

    @classmethod
    def load(cls, path: str | os.PathLike[str] | None = None) -> Self:
        """Return the defaults, overridden by the file at `path`, overridden by the environment.

        Args:
            path: a TOML file with one table for each section; None: no file.

        Raises:
            InvalidArgument: `path` is no path.
            ConfigError: the file cannot be read or is no TOML (file, line, reason), or fields,
                keys or variables that start with ``PERSISTENCE_`` are wrong or unknown. Each line
                of the message starts with the file or the variable that the fault is in.
        """
        if path is not None and not isinstance(path, str | os.PathLike):
            raise refused("path", path, "the path of a TOML file, or None")
        values = {} if path is None else _read_toml(path)
        faults = _unknown_variables(os.environ)
        overrides = _read_environment()
        try:
            config = cls(**_merged(values, overrides))
        except ConfigError as error:
            faults += _with_origins(str(error), path, overrides)
        if faults:
            raise ConfigError("\n".join(faults))
        return config


def render_toml(config: StateConfig) -> str:
    """Return `config` as TOML that loads to an equal one, each field below its description."""
    return "\n".join(
        line
        for name, section in StateConfig.model_fields.items()
        for line in (f"# {section.description}", *_render_table(name, getattr(config, name)))
    )


def _render_table(name: str, section: _Table) -> list[str]:
    lines = [f"[{name}]", ""]
    for key, field in type(section).model_fields.items():
        lines += [f"# {field.description}", f"{key} = {_toml(key, getattr(section, key))}", ""]
    return lines


def _toml(key: str, value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        text = format_bytes(value) if "bytes" in key else str(value)
        return text if text.isdigit() else f'"{text}"'
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() else repr(value)
    return _toml_string("" if value is None else str(value))


def _toml_string(text: str) -> str:
    escaped = re.sub(r'[\x00-\x1f\x7f"\\]', lambda match: f"\\u{ord(match[0]):04x}", text)
    return f'"{escaped}"'


# Loading


def _read_toml(path: str | os.PathLike[str]) -> dict[str, Any]:
    name = os.fspath(path)
    try:
        with open(path, "rb") as file:
            raw = file.read()
    except OSError as error:
        shown = name or repr(name)
        raise ConfigError(f"{shown}: cannot be read: {error.strerror or error}") from None
    except ValueError as error:  # a NUL in the path
        raise ConfigError(f"{name!a}: cannot be read: {error}") from None
    try:
        # Editors on Windows put a byte order mark in front.
        return tomllib.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{name}: line {line}: not valid TOML: no UTF-8 text") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{name}: {_toml_fault(str(error), raw)}") from None


def _toml_fault(reason: str, raw: bytes) -> str:
    """Return the reader's `reason` with the line in front, where a person looks for it."""
    match = re.search(r" \(at (?:line (\d+), column \d+|end of document)\)$", reason)
    if match is None:  # a number with thousands of digits, or brackets nested as deep
        return f"not valid TOML: {reason}"
    line = match[1] or len(raw.splitlines())
    return f"line {line}: not valid TOML: {reason[: match.start()]}"


def _read_environment() -> dict[str, Any]:
    """Return the overrides of the environment as they are written there, one table per section."""
    # A third of this module's own import time, which only those pay who load a configuration.
    from pydantic_settings import (  # noqa: PLC0415
        BaseSettings,
        EnvSettingsSource,
        SettingsError,
    )

    class Names(BaseSettings):
        session: SessionConfig
        memory: MemoryConfig
        disk: DiskConfig
        redis: RedisConfig
        checkpoint: CheckpointConfig
        shutdown: ShutdownConfig
        security: SecurityConfig

    source = EnvSettingsSource(
        Names, env_prefix=ENV_PREFIX, env_nested_delimiter=ENV_NESTED_DELIMITER
    )
    try:
        return source()
    except SettingsError as error:
        # A whole section may be given as one JSON object; this one is none.
        section = next((name for name in Names.model_fields if f'"{name}"' in str(error)), "")
        raise ConfigError(
            f"{_variable(section)}: must be a JSON object with the fields of the section"
        ) from None


def _unknown_variables(environ: Mapping[str, str]) -> list[str]:
    """Return a fault for each variable that is ours by its prefix and names no section."""
    faults = []
    for name in sorted(environ):
        if not name.upper().startswith(ENV_PREFIX):
            continue
        path = name[len(ENV_PREFIX) :].lower().replace(ENV_NESTED_DELIMITER, ".")
        if path.partition(".")[0] not in StateConfig.model_fields:
            faults.append(f"{name}: unknown; {_hint(path, _variable)}")
    return faults


def _variable(path: str) -> str:
    return ENV_PREFIX + path.replace(".", ENV_NESTED_DELIMITER).upper()


def _merged(values: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tables of both; where both have a field, that of `overrides`."""
    merged = dict(values)
    for name, table in overrides.items():
        below = merged.get(name, {})
        # What is no table stays as it is, to be reported.
        if isinstance(below, dict):
            merged[name] = {**below, **table} if isinstance(table, dict) else table
    return merged


def _with_origins(
    message: str, path: str | os.PathLike[str] | None, overrides: Mapping[str, Any]
) -> list[str]:
    """Return the faults in `message`, each behind the file or variable that it is in."""
    variables = {
        f"{name}.{key}": _variable(f"{name}.{key}")
        for name, table in overrides.items()
        if isinstance(table, dict)
        for key in table
    }
    # What is no table is the fault of the whole section's variable.
    variables |= {
        name: _variable(name) for name, table in overrides.items() if not isinstance(table, dict)
    }
    file = "" if path is None else os.fspath(path)
    faults = []
    for line in message.splitlines():
        origin = variables.get(line.partition(" = ")[0], file)
        faults.append(f"{origin}: {line}" if origin else line)
    return faults


# Faults


def _describe(table: type[_Table], error: ValidationError, given: Mapping[str, Any]) -> str:
    """Return all faults of `error`, one per line, with the values as they were given."""
    # The URL points to pydantic's manual, which knows nothing of these fields.
    return "\n".join(_fault(table, fault, given) for fault in error.errors(include_url=False))


def _fault(table: type[_Table], details: Mapping[str, Any], given: Mapping[str, Any]) -> str:
    name = str(details["loc"][0]) if details["loc"] else ""
    path = f"{table.table}.{name}" if table.table else name
    field = table.model_fields.get(name)
    cause = details.get("ctx", {}).get("error")
    # A section, or a check across fields, has said itself what is wrong.
    if isinstance(cause, ConfigError) and (field is None or path in StateConfig.model_fields):
        return str(cause)
    shown = f"{path or repr(path)} = {_shown(given.get(name, details['input']))}"
    if _may_be_secret(path):
        shown = f"{path} = ***"
    if not details["loc"]:  # no table at all was given for the whole
        return f"{shown}: must be a table, or a {table.__name__}"
    if field is None:
        return f"{shown}: unknown; {_hint(path)}"
    return f"{shown}: must be {_allowed(field)}"


def _may_be_secret(path: str) -> bool:
    """Whether what was given for a field may be a key, also where its name is misspelt."""
    section, _, name = path.partition(".")
    fields = SecurityConfig.model_fields.keys() - {"secret_keys"}
    return section == SecurityConfig.table and name not in fields


def _allowed(field: FieldInfo) -> str:
    """Return in words what `field` accepts."""
    annotation = field.annotation
    if isinstance(annotation, type) and issubclass(annotation, _Table):
        return f"a table, or a {annotation.__name__}"
    if annotation is bool:
        return "true or false"
    noun = next((known.text for known in field.metadata if isinstance(known, _Noun)), None)
    if noun is None:
        return " or ".join(f'"{choice}"' for choice in get_args(annotation))
    return noun + _bounds(field)


def _bounds(field: FieldInfo) -> str:
    show: Callable[[Any], str] = format_bytes if _SIZE_NOUN in field.metadata else str
    words = [
        f"{word} {show(bound)}"
        for name, word in (("ge", "at least"), ("gt", "above"), ("le", "at most"))
        for mark in field.metadata
        if (bound := getattr(mark, name, None)) is not None and bound != _MAX_COUNT
    ]
    return f", {' and '.join(words)}" if words else ""


def _hint(path: str, spelt: Callable[[str], str] = str) -> str:
    """Return what an unknown dotted path resembles, as `spelt`; where nothing, what there is."""
    fields = {section.table: list(section.model_fields) for section in _sections()}
    closest = _closest(path, fields)
    if closest:
        return f"the closest known is {spelt(closest)}"
    table = path.rpartition(".")[0]
    if table in fields:
        return f"the fields of {table} are {', '.join(fields[table])}"
    return f"the sections are {', '.join(fields)}"


def _closest(path: str, fields: Mapping[str, list[str]]) -> str:
    """Return the section or field that `path` was probably meant to be; empty: none."""
    table, _, name = path.rpartition(".")
    namesakes = [f"{other}.{name}" for other, names in fields.items() if name in names]
    if namesakes:  # a field in the wrong section, or in one that is misspelt
        return get_close_matches(path, namesakes, n=1, cutoff=0.0)[0]
    if table in fields:  # by the name alone: all of them have the section in common
        return "".join(f"{table}.{found}" for found in get_close_matches(name, fields[table], n=1))
    known = [f"{other}.{each}" for other, names in fields.items() for each in names]
    return "".join(get_close_matches(path, [*fields, *known], n=1))


def _sections() -> list[type[_Table]]:
    return [type(field.default) for field in StateConfig.model_fields.values()]


def _shown(value: object) -> str:
    """Return `value` on one line, shortened, without the password of a URL."""
    try:
        text = repr(value).replace("\n", " ")
    except ValueError:  # an int of more digits than Python prints
        return f"({type(value).__name__} too long to print)"
    text = _redacted(text)
    return text if len(text) <= _MAX_SHOWN_CHARS else f"{text[:_MAX_SHOWN_CHARS]}…"


def _redacted(text: str) -> str:
    # All in front of the last @: passwords with an unescaped @ or / are common, and so is a
    # password without a user.
    # And what looks like a key, also where it stands in a table with a misspelt name.
    return _KEY.sub("***", _URL_PASSWORD.sub("***", _URL_USER.sub(r"\1***@", text)))
