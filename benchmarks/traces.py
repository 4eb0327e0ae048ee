"""Recorded traffic: who is asked for, in which order, and what is stored.

Traces, when they are at hand (see `data`); else traffic of the same shape is made up:

- `web`: an access log; a session per client and browser, which keeps its last 20 pages.
- `conversation`: a chat service; a session per conversation, which gets a message per request.
- `documents`: profiles, orders and transcripts, each of which becomes a session.
- `keys`: the product pages of a shop, keys only, to measure hit ratios with.
"""

from __future__ import annotations

import gzip
import json
import lzma
import random
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from benchmarks import data, payloads
from benchmarks.access import Accesses
from benchmarks.payloads import Data
from benchmarks.sizes import Sizes

_KEPT_PAGES = 20
_CHARS_PER_TOKEN = 4
_WEB = "web-apache_logs.log.gz"
_CONVERSATION = "kv-mooncake-conversation_trace.jsonl.gz"
_KEYS = "web-cache2k-web12.trace.xz"
_MADE_UP = "generated: "

_PARAGRAPH = "The order was shipped yesterday; the refund takes five to seven business days. " * 500


Change = Callable[[Data], None]


@dataclass(frozen=True)
class Trace:
    """The requests of a trace, in order.

    Attributes:
        source: where it comes from, for the report.
        requests: (session, what the change stores).
        change: makes a change of the latter.
    """

    source: str
    requests: list[tuple[str, str]]
    change: Callable[[str], Change]

    def steps(self, prefix: str = "") -> list[tuple[str, Change]]:
        """Return (session id, change) of each request; another `prefix`, other sessions."""
        return [(f"{prefix}{name}", self.change(text)) for name, text in self.requests]


def web(sizes: Sizes) -> Trace:
    """Return the access log: each request adds its page to its session."""
    path = data.path(_WEB)
    count = sizes.traced_requests
    if path.exists():
        with gzip.open(path, "rt", encoding="utf-8", errors="replace") as lines:
            found = [_web_request(line) for line in islice(lines, count)]
        return Trace(_WEB, found, _visit)
    made = [
        (f"client-{index}", f"/page/{index * 7 % 997}?from=search")
        for index in Accesses(max(1, count // 5), count, zipf=0.9).indexes()
    ]
    return Trace(_MADE_UP + "an access log", made, _visit)


def _web_request(line: str) -> tuple[str, str]:
    agent = line.rsplit('"', 2)[-2] if line.count('"') > 1 else ""
    words = line.split('"', 2)[1].split() if '"' in line else []
    page = words[1] if len(words) > 1 else "/"
    return f"{line.split(' ', 1)[0]}-{_hash_of(agent)}", page[:200]


def _hash_of(text: str) -> int:
    """Return a small number for `text`, the same in every process."""
    number = 0
    for byte in text.encode("utf-8", "replace"):
        number = (number * 31 + byte) & 0xFFFFFFFF
    return number


def _visit(page: str) -> Change:
    def change(session: Data) -> None:
        session["requests"] = session.get("requests", 0) + 1
        pages = session.get("pages", [])
        session["pages"] = [*pages[1 - _KEPT_PAGES :], page]

    return change


def conversation(sizes: Sizes) -> Trace:
    """Return the chat service's hour: each request adds the answer to its conversation.

    The trace has lengths and no text, so an answer of n tokens is 4 n characters of a paragraph.
    """
    path = data.path(_CONVERSATION)
    count = sizes.traced_requests
    if path.exists():
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            found = [_turn(json.loads(line)) for line in islice(lines, count)]
        return Trace(_CONVERSATION, found, _say)
    chance = random.Random(4)
    made = [
        (f"conversation-{index}", _answer(min(2000, int(chance.lognormvariate(5.8, 0.5)))))
        for index in Accesses(max(1, count * 6 // 10), count, zipf=0.6).indexes()
    ]
    return Trace(_MADE_UP + "conversations", made, _say)


def _turn(request: Data) -> tuple[str, str]:
    opening = request["hash_ids"][:2][-1]  # the first block opens every conversation
    return f"conversation-{opening}", _answer(request["output_length"])


def _answer(tokens: int) -> str:
    return _PARAGRAPH[: tokens * _CHARS_PER_TOKEN]


def _say(text: str) -> Change:
    def change(session: Data) -> None:
        messages = session.get("messages", [])
        session["messages"] = [*messages, {"role": "assistant", "content": text}]

    return change


def documents(sizes: Sizes) -> Trace:
    """Return the documents (see `payloads.documents`) as JSON, a session for each."""
    count = min(sizes.traced_requests, 4288)
    requests = [
        (f"document-{number}", json.dumps(document))
        for number, document in enumerate(payloads.documents(count))
    ]
    return Trace(payloads.documents_source(), requests, _become)


def _become(text: str) -> Change:
    document: Data = json.loads(text)  # when the steps are made, not while they are measured

    def change(session: Data) -> None:
        session.update(document)

    return change


def keys(sizes: Sizes) -> tuple[str, list[int]]:
    """Return the source of the key trace, and its keys, in order of access."""
    path = data.path(_KEYS)
    if path.exists():
        return _KEYS, list(islice(_big_endian(path), sizes.hit_accesses))
    count = sizes.hit_accesses
    accesses = Accesses(max(1, count // 7), count, zipf=0.8)
    return _MADE_UP + "Zipf-popular keys", accesses.indexes()


def _big_endian(path: Path) -> Iterator[int]:
    numbers = array("i")
    with lzma.open(path) as file:
        numbers.frombytes(file.read())
    numbers.byteswap()
    return iter(numbers)


def sources() -> str:
    """Say in one phrase where the traces come from, for the report."""
    return ", ".join(
        name if data.path(name).exists() else f"{_MADE_UP}like {name}"
        for name in (_WEB, _CONVERSATION, _KEYS)
    )
