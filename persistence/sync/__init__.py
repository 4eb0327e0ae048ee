"""The engine for programs of threads: `StateManager` without ``await``; see docs/threads.md."""

from persistence.sync.blocks import Block as Block
from persistence.sync.blocks import Stream as Stream
from persistence.sync.handle import SessionHandle as SessionHandle
from persistence.sync.manager import StateManager as StateManager
from persistence.sync.mapping import SessionMapping as SessionMapping

__all__ = ["Block", "SessionHandle", "SessionMapping", "StateManager", "Stream"]
