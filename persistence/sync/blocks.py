"""``with`` and ``for`` in other threads, over what is asynchronous behind a loop thread."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from functools import partial
from types import TracebackType
from typing import Any, Final, Generic, Self, TypeVar, cast

from persistence.errors import InvalidArgument
from persistence.sync.loop import LoopThread
from persistence.watching.stream import Watch

T = TypeVar("T")

_AT_ONCE: Final = 256


class Block(AbstractContextManager[T]):
    """A block: what it enters and leaves runs on the loop, its body in this thread.

    Args:
        thread: runs the loop.
        make: makes the asynchronous context manager; called on the loop.

    Attributes:
        inner: that, once the block has been entered.
    """

    def __init__(
        self, thread: LoopThread, make: Callable[[], AbstractAsyncContextManager[T, Any]]
    ) -> None:
        self.inner: AbstractAsyncContextManager[T, Any] | None = None
        self._thread = thread
        self._make = make
        self._is_inside = False

    def __enter__(self) -> T:
        try:
            return self._thread.run(self._enter)
        except BaseException as error:
            # A signal may have interrupted the wait, and it may be entered this very moment.
            self._thread.post(partial(self._undo, error))
            raise

    async def _enter(self) -> T:
        self._is_inside = False
        self.inner = self._make()
        entered = await self.inner.__aenter__()
        self._is_inside = True
        return entered

    def _undo(self, error: BaseException) -> None:
        if self._is_inside and self.inner is not None:
            leaving = self.inner.__aexit__(type(error), error, None)
            self._leaving = self._thread.loop.create_task(_awaited(leaving))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool | None:
        inner = self.inner
        if inner is None or not self._is_inside:
            raise InvalidArgument("this block has been left already, or was never entered")
        self._is_inside = False
        swallowed: bool | None = self._thread.run(
            lambda: _awaited(inner.__aexit__(kind, error, trace))
        )
        return swallowed


async def _awaited(call: Any) -> Any:
    return await call


class Stream(Iterator[T], Generic[T]):
    """An iterator over what an asynchronous one yields. To be used by one thread at a time.

    ``close()``, which any thread may call, or the end of ``with``, end it before its time: a thread
    that waits for the next item then gets none. So does the end of the manager.

    Args:
        thread: runs the loop.
        source: the asynchronous iterator.
    """

    def __init__(self, thread: LoopThread, source: AsyncIterator[T]) -> None:
        self._thread = thread
        self._source = source
        self._permit = source.permit if isinstance(source, Watch) else None
        self._ready: deque[T] = deque()
        self._error: BaseException | None = None
        self._closed = False

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> T:
        if self._closed:
            raise StopIteration
        if not self._ready:
            if self._error is not None:
                error, self._error = self._error, None
                self._closed = True
                raise error
            self._ready.extend(self._thread.run(self._some))
        if not self._ready:
            self._closed = True
            raise StopIteration
        if self._permit is not None:
            self._permit.check()  # they may have been fetched long ago
        return self._ready.popleft()

    async def _some(self) -> list[T]:
        """Return what there is without waiting long, at least one; nothing: it is over."""
        items: list[T] = []
        try:
            items.append(await anext(self._source))
            if isinstance(self._source, Watch):
                items += cast(list[T], self._source.waiting())
            else:
                while len(items) < _AT_ONCE:
                    items.append(await anext(self._source))
        except StopAsyncIteration:
            pass
        except Exception as error:
            if not items:
                raise
            self._error = error  # behind what has come before it
        return items

    def close(self) -> None:
        """Yield nothing more. Idempotent, from any thread."""
        self._closed = True
        self._thread.post(self._let_go)

    def _let_go(self) -> None:
        self._closing = self._thread.loop.create_task(_closed(self._source))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


async def _closed(source: Any) -> None:
    try:
        await source.aclose()
    except RuntimeError:
        return  # an asynchronous generator that a thread waits for ends with that
