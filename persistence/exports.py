"""The public names; `persistence` loads this module when the first of them is asked for."""

# ruff: noqa: PLC0414 - to type checkers these say: handed on

from persistence import errors as errors
from persistence.clock import Clock as Clock
from persistence.clock import ManualClock as ManualClock
from persistence.clock import SystemClock as SystemClock
from persistence.config import CheckpointConfig as CheckpointConfig
from persistence.config import DiskConfig as DiskConfig
from persistence.config import MemoryConfig as MemoryConfig
from persistence.config import RedisConfig as RedisConfig
from persistence.config import SecurityConfig as SecurityConfig
from persistence.config import SessionConfig as SessionConfig
from persistence.config import ShutdownConfig as ShutdownConfig
from persistence.config import StateConfig as StateConfig
from persistence.manager import StateManager as StateManager
from persistence.observe.health import SessionHealth as SessionHealth
from persistence.observe.metrics import RequestMetrics as RequestMetrics
from persistence.session import ClientInfo as ClientInfo
from persistence.session import Session as Session
from persistence.session import SessionDraft as SessionDraft
from persistence.session import SessionMetadata as SessionMetadata
from persistence.stats import Stats as Stats
from persistence.watching.changes import SessionChange as SessionChange
from persistence.watching.stream import Watch as Watch
