"""What a replay's parent and its workers say to each other: MessagePack over two pipes.

The parent's first message is the configuration of the worker, which answers with number 0 once it
is open. Then come questions, ``[number, operation, arguments]``, and in any order the answers,
``[number, error, result]``: the error is a text, or None. The end of the parent's pipe ends the
worker. An answer with number 0 that is an error is the worker's last word.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import fields
from operator import attrgetter
from typing import Any, Final

import msgpack

from persistence.cli.accesslog import Request

OPEN: Final = 0
"""Number of the answer to the configuration."""

# Texts of a log may hold what was no UTF-8, as lone surrogates.
_UNICODE_ERRORS: Final = "surrogateescape"
_READ_BYTES: Final = 64 * 1024

request_fields = attrgetter(*(field.name for field in fields(Request)))
"""Returns what a request is made again of: ``Request(*request_fields(request))``."""


def packed(message: Any) -> bytes:
    """Return a message as it goes through the pipe."""
    data: bytes = msgpack.packb(message, unicode_errors=_UNICODE_ERRORS)
    return data


async def messages(source: asyncio.StreamReader) -> AsyncIterator[Any]:
    """Yield messages until the pipe ends."""
    unpacker = msgpack.Unpacker(unicode_errors=_UNICODE_ERRORS)
    while chunk := await source.read(_READ_BYTES):
        unpacker.feed(chunk)
        for message in unpacker:
            yield message
