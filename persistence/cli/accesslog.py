r"""Access logs: the parser of Common and Combined Log Format, and the streaming reader of files.

The parser is pure: one line in, a `Request` or None out. Both formats are one grammar, in which
the last two fields may be absent::

    client ident user [time] "request" status bytes "referer" "agent"

What real logs do to that grammar, and what becomes of it here:

- ``-`` stands for an absent field and becomes None (0 for the byte count);
- servers escape a quote inside a quoted field as ``\"``: unescaped, together with ``\\``; their
  other escapes (``\xe4``, ``\t``) are left as they were written;
- bytes that are no UTF-8 arrive as surrogate escapes and stay so, so that different bytes stay
  different; who stores a field cleans it first;
- a request line that is no HTTP (a TLS hello, a bare word) is all URL, without method;
- a line cut off inside its last quoted field keeps what is there of that field;
- fields behind the agent (proxies append some) are ignored.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final, cast

from persistence.cli.failure import CommandError

MAX_LINE_BYTES: Final = 128 * 1024
"""Longer lines are skipped without being held in memory. Servers accept about 8 KB each of request
line, referer and agent, and may write each byte as four."""


@dataclass(frozen=True, slots=True)
class Request:
    """One line of an access log.

    Attributes:
        client: the client's address or host name.
        user: the authenticated user.
        time: the time as it is written, unparsed: logs exist whose clock goes backwards.
        method: of the request line; None where that is no HTTP.
        url: of the request line.
        protocol: of the request line; None before HTTP/1.0.
        status: the response's status code.
        bytes: the response's size; 0 where none is given.
        referer: the page the client came from.
        agent: the client's program.
    """

    client: str
    user: str | None
    time: str
    method: str | None
    url: str | None
    protocol: str | None
    status: int | None
    bytes: int
    referer: str | None
    agent: str | None


# Every repetition is bounded by a character that it cannot contain, so that a hostile line costs
# time in proportion to its length. Sizes have at most 18 digits: they fit in 64 bits, always.
_TEXT: Final = r'[^"\\]*(?:\\.[^"\\]*)*'
_END: Final = r'(?:"|\\?\Z)'
_LINE: Final = re.compile(
    r"(?P<client>\S+) \S+ (?P<user>.{1,512}?) \[(?P<time>[^\[\]]{1,64})\] "
    rf'"(?P<request>{_TEXT})" (?P<status>[0-9]{{3}}|-) (?P<bytes>[0-9]{{1,18}}|-)'
    rf'(?:[ \t]+"(?P<referer>{_TEXT}){_END}(?:[ \t]+"(?P<agent>{_TEXT}){_END})?)?(?:\s|\Z)',
    re.DOTALL,
)
_ESCAPED: Final = re.compile(r'\\(["\\])')


def parse_line(line: str) -> Request | None:
    """Parse one line, with or without its line end; None where it is not in either format."""
    match = _LINE.match(line.rstrip("\r\n"))
    if match is None:
        return None
    status = match["status"]
    size = match["bytes"]
    method, url, protocol = _split_request(_field(match["request"]))
    return Request(
        client=match["client"],
        user=_field(match["user"]),
        time=match["time"],
        method=method,
        url=url,
        protocol=protocol,
        status=None if status == "-" else int(status),
        bytes=0 if size == "-" else int(size),
        referer=_field(match["referer"]),
        agent=_field(match["agent"]),
    )


def _field(text: str | None) -> str | None:
    """Unescape a field; None where it is absent, empty or a dash."""
    if text is None or text in ("", "-"):
        return None
    return _ESCAPED.sub(r"\1", text) if "\\" in text else text


def _split_request(line: str | None) -> tuple[str | None, str | None, str | None]:
    """Split a request line into method, URL and protocol. The URL may contain spaces."""
    if line is None:
        return None, None, None
    method, space, rest = line.partition(" ")
    if not space:
        return None, line, None
    url, space, protocol = rest.rpartition(" ")
    if space and protocol.startswith("HTTP/"):
        return method, url, protocol
    return method, rest, None


# --- files ------------------------------------------------------------------------------------

_MAGIC: Final = {
    b"\x1f\x8b": "gzip",
    b"\xfd7zXZ\x00": "xz",
    b"BZh": "bzip2",
}
_SUFFIXES: Final = {".gz": "gzip", ".xz": "xz", ".bz2": "bzip2"}


def _compression(path: Path) -> str | None:
    """Return how `path` is compressed: by its suffix, or else by its first bytes.

    The suffix comes first: what calls itself an archive and is none is damaged, not a log. Rotated
    logs (``access.log.3``) are often compressed without saying so in their names.
    """
    by_suffix = _SUFFIXES.get(path.suffix.lower())
    if by_suffix is not None:
        return by_suffix
    with path.open("rb") as file:
        first = file.read(max(map(len, _MAGIC)))
    return next((kind for magic, kind in _MAGIC.items() if first.startswith(magic)), None)


def _open(path: Path, kind: str | None) -> IO[bytes]:
    if kind == "gzip":
        return cast(IO[bytes], gzip.open(path, "rb"))
    if kind == "xz":
        return lzma.open(path, "rb")
    if kind == "bzip2":
        return bz2.open(path, "rb")
    return path.open("rb")


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """Open a plain or compressed file for reading bytes.

    Raises:
        CommandError: it cannot be read, or, also while the context lasts, its archive is damaged.
    """
    kind = None
    try:
        if not path.is_file():
            # Logs are read twice (replay, then verification), so a pipe would not do.
            reason = "is not a regular file" if path.exists() else "does not exist"
            raise CommandError(f"{path} {reason}")
        kind = _compression(path)
        with _open(path, kind) as file:
            yield file
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise CommandError(f"{path}: damaged {kind} archive: {error}") from error
    except OSError as error:
        if kind == "bzip2" and error.errno is None:  # how bz2 reports bad data
            raise CommandError(f"{path}: damaged {kind} archive: {error}") from error
        raise CommandError(f"{path}: {error.strerror or error}") from error


def read_lines(path: Path) -> Iterator[str | None]:
    """Yield the lines of a log without their ends; None for one over `MAX_LINE_BYTES`.

    Raises:
        CommandError: the file cannot be read, or its archive is damaged; names the file.
    """
    with _opened(path) as file:
        while line := file.readline(MAX_LINE_BYTES):
            if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
                _skip_line(file)
                yield None
            else:
                yield line.rstrip(b"\r\n").decode("utf-8", "surrogateescape")


def _skip_line(file: IO[bytes]) -> None:
    while (rest := file.readline(MAX_LINE_BYTES)) and not rest.endswith(b"\n"):
        pass
