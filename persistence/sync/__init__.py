"""The engine for programs of threads: `StateManager` without ``await``; see docs/threads.md."""

from persistence.sync.blocks import Block as Block
from persistence.sync.blocks import Stream as Stream
from persistence.sync.manager import StateManager as StateManager
from persistence.sync.mapping import SessionMapping as SessionMapping

__all__ = ["Block", "SessionMapping", "StateManager", "Stream"]
