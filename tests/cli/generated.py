"""Access logs made up for the tests: seeded, with the oddities that real ones have."""

from __future__ import annotations

import random
from pathlib import Path

_AGENTS = [
    b'"Mozilla/5.0 (X11; Linux x86_64) Firefox/115.0"',
    b'"curl/8.5.0"',
    b'"-"',
    b'"Bot \\"quoted\\" (+http://example.org/bot)"',
    b'"Opera/9.80 \xe4\xf6\xfc"',
    b'"Mozilla/5.0 (compatible; cut off',
    b"",
]
_BAD_LINES = [b"", b"not a log line", b'1.2.3.4 - - [t] "GET / HTTP/1.1" two 5', b"\xff\xfe\x00"]


def log_bytes(requests: int, clients: int = 40, bad_lines: int = 5, seed: int = 1) -> bytes:
    """Return a log of `requests` requests; a few clients make most of them."""
    rng = random.Random(seed)
    lines = [_line(rng, number, clients) for number in range(requests)]
    for _ in range(bad_lines):
        lines.insert(rng.randrange(len(lines) + 1), rng.choice(_BAD_LINES))
    return b"\n".join(lines) + b"\n"


def write_log(path: Path, requests: int, clients: int = 40, seed: int = 1) -> Path:
    """Write such a log, plain, and return its path."""
    path.write_bytes(log_bytes(requests, clients, seed=seed))
    return path


def _line(rng: random.Random, number: int, clients: int) -> bytes:
    client = int(rng.random() ** 2 * clients)
    address = b"2001:db8::%x" % client if client % 9 == 0 else b"10.0.0.%d" % client
    url = b"/page/%d?%s" % (number, b"x" * rng.randrange(60))
    status = rng.choice([b"200", b"200", b"200", b"304", b"404", b"500", b"-"])
    size = b"-" if status == b"304" else b"%d" % rng.randrange(100_000)
    agent = _AGENTS[client % len(_AGENTS)]
    return b'%s - - [17/May/2015:10:05:%02d +0000] "GET %s HTTP/1.1" %s %s "-" %s' % (
        address,
        number % 60,
        url,
        status,
        size,
        agent,
    )
