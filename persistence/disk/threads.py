"""A small executor of our own: threads that run only calls which release the interpreter lock.

Never the loop's default executor, which an application may have filled with slow work. One thread
is the writer: appends and syncs happen in order. The others read and compact.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

_READERS: Final = 4


class Threads:
    """The disk tier's threads. Started on first use, joined by `close`."""

    def __init__(self) -> None:
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="persistence-writer")
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="persistence-reader")

    def write(
        self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> asyncio.Future[T]:
        """Run `call` in the writer thread, after all earlier ones."""
        return asyncio.get_running_loop().run_in_executor(
            self._writer, lambda: call(*args, **kwargs)
        )

    def read(
        self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> asyncio.Future[T]:
        """Run `call` in one of the other threads."""
        return asyncio.get_running_loop().run_in_executor(
            self._readers, lambda: call(*args, **kwargs)
        )

    def close(self) -> None:
        """Wait for what is running and end the threads."""
        self._writer.shutdown(wait=True)
        self._readers.shutdown(wait=True)
