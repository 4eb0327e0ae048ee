"""The port of a unix socket, which is a part of its file's name."""

from __future__ import annotations

import pytest

from persistence.errors import ConfigError
from persistence.remote.postgres_urls import parse_postgres_url


@pytest.mark.parametrize(
    ("url", "port"),
    [
        ("postgresql:///shop?host=/run/pg", 5432),
        ("postgresql://:6000/shop?host=/run/pg", 6000),
        ("postgresql://ada:secret@:6000/shop?host=/run/pg", 6000),
        ("postgresql:///shop?host=/run/pg&port=6000", 6000),
    ],
)
def test_a_socket_has_the_port_of_the_url(url: str, port: int) -> None:
    target = parse_postgres_url(url)
    assert target.addresses == (("/run/pg", port),)
    assert target.arguments["port"] == [port]


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("postgresql://:x/shop?host=/run/pg", "'x': must be a number from 1 to 65535"),
        ("postgresql:///shop?host=/run/pg&port=0", "'0': must be a number"),
        ("postgresql:///shop?host=/run/pg&port=99999", "'99999': must be a number"),
        ("postgresql://:1/shop?host=/run/pg&port=2", "name a host, or the directory"),
        ("postgresql://:6000/shop", "no host"),
        ("postgresql://host/shop?port=6000", "write host:port"),
    ],
)
def test_a_port_that_is_none_or_in_the_wrong_place_is_refused(url: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_postgres_url(url)
