"""The access-log parser, on lines that real servers write, and the reader of files."""

from __future__ import annotations

import bz2
import gzip
import lzma
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from persistence.cli.accesslog import MAX_LINE_BYTES, Request, parse_line, read_lines
from persistence.cli.failure import CommandError

START = '83.149.9.216 - frank [17/May/2015:10:05:03 +0000] "GET /a.png HTTP/1.1" 200 203023'
COMBINED = START + ' "http://semicomplete.com/" "Mozilla/5.0 (X11)"'


def parsed(line: str) -> Request:
    request = parse_line(line)
    assert request is not None, line
    return request


def test_a_combined_line_gives_every_field() -> None:
    assert parse_line(COMBINED) == Request(
        client="83.149.9.216",
        user="frank",
        time="17/May/2015:10:05:03 +0000",
        method="GET",
        url="/a.png",
        protocol="HTTP/1.1",
        status=200,
        bytes=203023,
        referer="http://semicomplete.com/",
        agent="Mozilla/5.0 (X11)",
    )


def test_a_common_line_has_neither_referer_nor_agent() -> None:
    request = parsed(START)
    assert (request.client, request.bytes) == ("83.149.9.216", 203023)
    assert (request.referer, request.agent) == (None, None)


def test_a_missing_agent_leaves_the_referer() -> None:
    request = parsed(START + ' "http://r/"')
    assert (request.referer, request.agent) == ("http://r/", None)


def test_an_agent_cut_off_in_the_middle_keeps_what_is_there() -> None:
    assert (
        parsed(START + ' "-" "Mozilla/5.0 (compatible; Goo').agent == "Mozilla/5.0 (compatible; Goo"
    )


def test_a_line_cut_off_behind_a_backslash_is_still_a_request() -> None:
    assert parsed(START + ' "-" "Moz\\').agent == "Moz"


def test_dashes_are_absent_fields() -> None:
    request = parsed('h - - [t] "-" - - "-" "-"')
    assert request == Request("h", None, "t", None, None, None, None, 0, None, None)


def test_escaped_quotes_and_backslashes_are_unescaped() -> None:
    request = parsed(r'h - - [t] "GET /\"x\" HTTP/1.1" 200 5 "a\\" "say \"hi\" \xe4"')
    assert request.url == '/"x"'
    assert request.referer == "a\\"
    assert request.agent == r'say "hi" \xe4'


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("GET /a b c HTTP/1.0", ("GET", "/a b c", "HTTP/1.0")),
        ("GET /old", ("GET", "/old", None)),
        ("GET /a b", ("GET", "/a b", None)),
        (r"\x16\x03\x01", (None, r"\x16\x03\x01", None)),
        ("", (None, None, None)),
    ],
)
def test_odd_request_lines_are_split_as_far_as_they_go(
    line: str, parts: tuple[str | None, str | None, str | None]
) -> None:
    request = parsed(f'h - - [t] "{line}" 400 0')
    assert (request.method, request.url, request.protocol) == parts


def test_a_user_may_contain_spaces_and_a_client_be_ipv6() -> None:
    request = parsed('2001:db8::1 - John Doe [t] "GET / HTTP/2" 200 5')
    assert (request.client, request.user) == ("2001:db8::1", "John Doe")


def test_fields_behind_the_agent_are_ignored() -> None:
    assert parsed(COMBINED + ' "10.0.0.1" 0.003 host=x').agent == "Mozilla/5.0 (X11)"


@pytest.mark.parametrize("end", ["\n", "\r\n", ""])
def test_line_ends_do_not_matter(end: str) -> None:
    assert parse_line(COMBINED + end) == parse_line(COMBINED)


@pytest.mark.parametrize(
    "line",
    [
        "",
        "   ",
        "hello",
        "h - - [t] GET / HTTP/1.1 200 5",
        'h - - t "GET / HTTP/1.1" 200 5',
        'h - - [t] "GET / HTTP/1.1" 2000 5',
        'h - - [t] "GET / HTTP/1.1" 200 5x',
        'h - - [t] "GET / HTTP/1.1" 200 99999999999999999999',
        'h - - [t] "GET / HTTP/1.1 200 5',
        ' - - [t] "GET / HTTP/1.1" 200 5',
    ],
)
def test_what_is_in_neither_format_is_none(line: str) -> None:
    assert parse_line(line) is None


@settings(deadline=None)
@given(st.text(alphabet=st.characters(), max_size=300))
def test_no_text_breaks_the_parser(line: str) -> None:
    parse_line(line)


WORD = st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1, max_size=12)
QUOTED = st.text(st.characters(exclude_characters="\r\n\0"), max_size=40)


@settings(deadline=None)
@given(
    client=WORD,
    agent=QUOTED,
    referer=QUOTED,
    status=st.integers(100, 999),
    size=st.integers(0, 10**18 - 1),
)
def test_a_written_line_is_read_back(
    client: str, agent: str, referer: str, status: int, size: int
) -> None:
    def quoted(text: str) -> str:
        return text.replace("\\", "\\\\").replace('"', '\\"')

    line = (
        f'{client} - - [t] "GET / HTTP/1.1" {status} {size} "{quoted(referer)}" "{quoted(agent)}"'
    )
    request = parsed(line)
    assert (request.client, request.status, request.bytes) == (client, status, size)
    assert request.agent == (None if agent in ("", "-") else agent)
    assert request.referer == (None if referer in ("", "-") else referer)


@pytest.mark.parametrize(
    "line",
    [
        "h - - " + " [t] " * 20_000,
        'h - - [t] "' + "\\" * 100_000,
        'h - - [t] "' + '\\"' * 50_000,
        "h - " + '[t] "' * 25_000,
        START + ' "' * 50_000,
        " " * 100_000,
        "a" * 100_000,
    ],
)
def test_a_hostile_line_takes_no_time(line: str) -> None:
    started = time.process_time()
    parse_line(line)
    assert time.process_time() - started < 2


# --- files ------------------------------------------------------------------------------------

Writer = Callable[[Path, bytes], None]


def write_plain(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def write_gzip(path: Path, data: bytes) -> None:
    path.write_bytes(gzip.compress(data))


def write_xz(path: Path, data: bytes) -> None:
    path.write_bytes(lzma.compress(data))


def write_bzip2(path: Path, data: bytes) -> None:
    path.write_bytes(bz2.compress(data))


KINDS = [("log", write_plain), ("gz", write_gzip), ("xz", write_xz), ("bz2", write_bzip2)]


@pytest.mark.parametrize(("suffix", "write"), KINDS)
def test_every_kind_of_file_gives_the_same_lines(
    tmp_path: Path, suffix: str, write: Writer
) -> None:
    path = tmp_path / f"access.{suffix}"
    write(path, b"one\r\ntwo\n\nl\xe4st")
    assert list(read_lines(path)) == ["one", "two", "", "l\udce4st"]


@pytest.mark.parametrize(("suffix", "write"), KINDS[1:])
def test_an_archive_is_known_by_its_first_bytes_too(
    tmp_path: Path, suffix: str, write: Writer
) -> None:
    path = tmp_path / "access.log.3"
    write(path, b"one\n")
    assert list(read_lines(path)) == ["one"]


@pytest.mark.parametrize(("suffix", "write"), KINDS[1:])
@pytest.mark.parametrize("damage", ["cut", "flip", "not an archive", "trailing"])
def test_a_damaged_archive_is_an_error_that_names_the_file(
    tmp_path: Path, suffix: str, write: Writer, damage: str
) -> None:
    path = tmp_path / f"access.{suffix}"
    write(path, b"".join(b"line %d\n" % number for number in range(5000)))
    data = bytearray(path.read_bytes())
    if damage == "cut":
        del data[len(data) // 2 :]
    elif damage == "flip":
        data[len(data) // 2] ^= 0xFF
    elif damage == "not an archive":
        data[:] = b"just some text\n"
    else:
        data += b"garbage" if suffix == "gz" else b""
        data = data if suffix == "gz" else data[:-3]
    path.write_bytes(data)
    with pytest.raises(CommandError, match=rf"access\.{suffix}: damaged"):
        list(read_lines(path))


def test_an_over_long_line_is_one_skipped_line(tmp_path: Path) -> None:
    path = tmp_path / "access.log"
    path.write_bytes(b"a\n" + b"x" * (3 * MAX_LINE_BYTES) + b"\nb\n" + b"y" * MAX_LINE_BYTES)
    assert list(read_lines(path)) == ["a", None, "b", None]


def test_a_line_of_just_the_limit_is_read(tmp_path: Path) -> None:
    path = tmp_path / "access.log"
    path.write_bytes(b"x" * (MAX_LINE_BYTES - 1) + b"\nb\n")
    assert [len(line or "") for line in read_lines(path)] == [MAX_LINE_BYTES - 1, 1]


def test_a_missing_file_and_a_directory_are_errors_that_name_them(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match=r"nothing\.log does not exist"):
        list(read_lines(tmp_path / "nothing.log"))
    with pytest.raises(CommandError, match="is not a regular file"):
        list(read_lines(tmp_path))
