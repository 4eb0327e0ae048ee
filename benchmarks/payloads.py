"""What the benchmarks store: the 592-byte session, and documents of a real size distribution.

Everything is deterministic per index, so that a session can be checked after a restart without
keeping a copy of it.
"""

from __future__ import annotations

import gzip
import json
from bisect import bisect_right
from collections.abc import Iterator
from functools import cache
from itertools import islice
from random import Random
from typing import Any

from benchmarks import data

SESSION_BYTES = 592
"""Size of one packed `session`: MessagePack of the whole dict, nothing around it."""

DOCUMENTS_FILE = data.path("payload-taubench.jsonl.gz")
"""Customer profiles, orders and chat transcripts; optional."""

# Packed sizes of those 4,288 documents: (share of documents, bytes), linear in between.
DOCUMENT_QUANTILES = (
    (0.00, 241),
    (0.05, 295),
    (0.10, 369),
    (0.25, 461),
    (0.50, 557),
    (0.75, 675),
    (0.90, 968),
    (0.93, 1_122),
    (0.95, 9_601),
    (0.97, 13_067),
    (0.99, 20_597),
    (1.00, 38_099),
)

Data = dict[str, Any]

_GOLDEN = 0x9E3779B97F4A7C15  # 2**64 / golden ratio: consecutive products spread evenly
_COLOURS = ("black", "white", "green", "brown")
_THEMES = ("dark", "dawn")
_LANGUAGES = ("de", "en", "fr", "pl")
_WORDS = (
    "order",
    "refund",
    "flight",
    "shipping",
    "address",
    "account",
    "payment",
    "cancel",
    "return",
    "exchange",
    "please",
    "confirm",
    "customer",
    "agent",
    "details",
    "reservation",
    "passenger",
    "baggage",
    "insurance",
    "help",
)


LARGE_SESSION_MESSAGES = 40
_LARGE_SESSIONS = 16  # different ones


@cache
def _messages(index: int) -> list[str]:
    chosen = Random(index).choices
    return [" ".join(chosen(_WORDS, k=125)) for _ in range(LARGE_SESSION_MESSAGES)]


def large_session(index: int) -> Data:
    """Build a session of about 40 KB: a conversation, and a small field that changes."""
    return {"messages": _messages(index % _LARGE_SESSIONS), "step": 0}


def session_id(index: int) -> str:
    """Name the session `index`."""
    return f"session-{index:09d}"


def session(index: int) -> Data:
    """Build session `index`: a cart, preferences and a history, `SESSION_BYTES` when packed.

    Every part has a fixed packed width, so that all sessions weigh the same and an update that
    counts a visit does not change the size.
    """
    mixed = (index * _GOLDEN) & 0xFFFFFFFFFFFFFFFF
    return {
        "cart": {"items": [_item(mixed >> shift) for shift in (7, 19, 31, 41)], "coupon": "NEW"},
        "prefs": {
            "theme": _THEMES[mixed & 1],
            "lang": _LANGUAGES[mixed >> 2 & 3],
            "mail": bool(mixed & 16),
            "visits": 70_000 + index % 1_000_000,
        },
        "history": [_visit(mixed >> shift) for shift in (3, 11, 23, 29, 37)] + [_search(mixed)],
    }


def count_visit(changed: Data) -> None:
    """Do the update that every workload does: one more visit, nested in one small field."""
    changed["prefs"]["visits"] += 1


def _item(mixed: int) -> Data:
    return {
        "sku": f"SKU-{mixed % 10**8:08d}",
        "name": f"T-shirt {_COLOURS[mixed & 3]} size {mixed % 90 + 10}",
        "qty": mixed % 9 + 1,
        "price": mixed % 10_000 / 100,
    }


def _visit(mixed: int) -> str:
    return f"/shop/products/{mixed % 10**6:06d}?ref=home&page={mixed % 10}"


def _search(mixed: int) -> str:
    return f"/search?q={_COLOURS[mixed >> 5 & 3]}+shirt&sort=price&session={mixed:016x}"


def documents(count: int) -> Iterator[Data]:
    """Yield `count` documents: the real ones when they are at hand (repeated), else generated."""
    real = _real_documents()
    if real:
        return (real[index % len(real)] for index in range(count))
    return (document(index) for index in range(count))


def documents_source() -> str:
    """Say in one phrase where `documents` come from, for the report."""
    if DOCUMENTS_FILE.exists():
        return f"{DOCUMENTS_FILE.name} ({len(_real_documents()):,} documents)"
    return f"generated, in the size distribution of {DOCUMENTS_FILE.name}"


@cache
def _real_documents() -> list[Data]:
    if not DOCUMENTS_FILE.exists():
        return []
    with gzip.open(DOCUMENTS_FILE, "rt", encoding="utf-8") as lines:
        return [_as_session(json.loads(line)["doc"]) for line in lines]


def _as_session(found: Any) -> Data:
    """Make a session's data of a document; a few are bare lists of messages."""
    return found if isinstance(found, dict) else {"messages": found}


def document(index: int) -> Data:
    """Generate document `index`: a profile and as many chat messages as its size asks for."""
    mixed = (index * _GOLDEN) & 0xFFFFFFFFFFFFFFFF
    wanted_bytes = _size_at(mixed / 2**64)
    profile = {"id": f"user-{index:09d}", "name": _text(mixed, 3), "tier": mixed % 3}
    messages: list[Data] = []
    used_bytes = 100
    while used_bytes < wanted_bytes:
        word_count = min(60, max(1, (wanted_bytes - used_bytes - 30) // 8))
        content = _text(mixed + len(messages), word_count)
        messages.append({"role": ("user", "agent")[len(messages) % 2], "content": content})
        used_bytes += len(content) + 30
    return {"profile": profile, "messages": messages}


def _size_at(share: float) -> int:
    """Return the size, bytes, below which `share` of the documents lie."""
    right = bisect_right(DOCUMENT_QUANTILES, share, key=lambda point: point[0])
    right = min(right, len(DOCUMENT_QUANTILES) - 1)
    (low, low_bytes), (high, high_bytes) = DOCUMENT_QUANTILES[right - 1 : right + 1]
    return round(low_bytes + (high_bytes - low_bytes) * (share - low) / (high - low))


def _text(seed: int, word_count: int) -> str:
    return " ".join(islice(_words(seed), word_count))


def _words(seed: int) -> Iterator[str]:
    while True:
        seed = (seed * 6364136223846793005 + 1442695040888963407) & 0xFFFFFFFFFFFFFFFF
        yield _WORDS[(seed >> 33) % len(_WORDS)]
