"""An embedded persistence engine for long-running Python workers.

Hot sessions in memory, every update in a crash-safe log, cold sessions back on access.

The public names are loaded when the first of them is asked for (PEP 562). So whoever imports a
module of this package does not wait for all of it first: the command line can be interrupted, and
say so, while it loads.
"""

from typing import TYPE_CHECKING

from persistence import errors as errors

if TYPE_CHECKING:
    from persistence.exports import *  # noqa: F403 - __all__ says which
else:

    def __getattr__(name: str) -> object:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from persistence import exports  # noqa: PLC0415 - that is the purpose

        globals().update({each: getattr(exports, each) for each in __all__})
        return globals()[name]

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})


# ruff: noqa: F405 - a star import brings them
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
    "SessionChange",
    "SessionConfig",
    "SessionDraft",
    "SessionHealth",
    "SessionMetadata",
    "ShutdownConfig",
    "StateConfig",
    "StateManager",
    "Stats",
    "SystemClock",
    "Watch",
    "errors",
]
