"""An embedded persistence engine for long-running Python workers.

Hot sessions in memory, every update in a crash-safe log, cold sessions back on access.
"""

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

__all__ = [
    "CheckpointConfig",
    "ClientInfo",
    "Clock",
    "DiskConfig",
    "ManualClock",
    "MemoryConfig",
    "RedisConfig",
    "RequestMetrics",
    "SecurityConfig",
    "Session",
    "SessionConfig",
    "SessionDraft",
    "SessionHealth",
    "SessionMetadata",
    "ShutdownConfig",
    "StateConfig",
    "StateManager",
    "Stats",
    "SystemClock",
    "errors",
]
