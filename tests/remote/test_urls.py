"""URLs: what they say, and what is wrong with them."""

from __future__ import annotations

import pytest

from persistence.config import RedisConfig
from persistence.errors import ConfigError
from persistence.remote.urls import Target, parse_url


@pytest.mark.parametrize(
    ("url", "target"),
    [
        ("redis://cache", Target("standalone", (("cache", 6379),))),
        ("redis://cache:7/3", Target("standalone", (("cache", 7),), database=3)),
        ("redis://[::1]:7", Target("standalone", (("::1", 7),))),
        ("redis://[::1]", Target("standalone", (("::1", 6379),))),
        ("redis://cache/?db=2", Target("standalone", (("cache", 6379),), database=2)),
        ("unix:///run/a%20b.sock", Target("standalone", (), path="/run/a b.sock")),
        ("unix:///run/s?db=1", Target("standalone", (), path="/run/s", database=1)),
        (
            "redis+sentinel://one,two:7/shop/2",
            Target("sentinel", (("one", 26379), ("two", 7)), service="shop", database=2),
        ),
        ("redis+cluster://one:1,two", Target("cluster", (("one", 1), ("two", 6379)))),
    ],
)
def test_a_url_says_where(url: str, target: Target) -> None:
    assert RedisConfig(url=url).url == url
    assert parse_url(url) == target


@pytest.mark.parametrize(
    ("url", "credentials"),
    [
        ("redis://:p@cache", {"password": "p"}),
        ("redis://u:p@cache", {"username": "u", "password": "p"}),
        ("redis://u:p%40%3A%2F@cache", {"username": "u", "password": "p@:/"}),
        ("redis://:p@q/r?s@cache", {"password": "p@q/r?s"}),
        ("redis://cache?username=u&password=p%26", {"username": "u", "password": "p&"}),
        ("redis://cache?password=p%40q", {"password": "p@q"}),
        ("unix://u:p@/run/s", {"username": "u", "password": "p"}),
    ],
)
def test_a_url_says_who(url: str, credentials: dict[str, str]) -> None:
    target = parse_url(url)
    assert target.credentials == credentials
    assert credentials["password"] not in repr(target) + target.shown or len(url) < 20


def test_tls_checks_certificates_unless_told_otherwise() -> None:
    assert parse_url("rediss://cache").tls_options == {
        "ssl_cert_reqs": "required",
        "ssl_check_hostname": True,
    }
    options = parse_url("rediss+cluster://c?ssl_cert_reqs=none&ssl_ca_certs=/ca.pem").tls_options
    assert options == {
        "ssl_cert_reqs": "none",
        "ssl_check_hostname": False,
        "ssl_ca_certs": "/ca.pem",
    }


def test_sentinels_may_have_credentials_of_their_own() -> None:
    target = parse_url("redis+sentinel://u:p@s/shop?sentinel_username=a&sentinel_password=b")
    assert target.credentials == {"username": "u", "password": "p"}
    assert target.sentinel_credentials == {"username": "a", "password": "b"}


@pytest.mark.parametrize(
    ("url", "fault"),
    [
        ("http://cache", "must start with redis://"),
        ("redis://", "is no host"),
        ("redis://cache:port", "is no host"),
        ("redis://cache:0", "is no host"),
        ("redis://cache:99999", "is no host"),
        ("redis://cache/one", "database 'one' is no number"),
        ("redis://cache/-1", "database '-1' is no number"),
        ("redis://cache/1/2", "database '1/2' is no number"),
        ("redis://cache/2147483648", "database '2147483648' is no number from 0 to 2147483647"),
        ("redis://cache/" + "9" * 5000, "database '9+….5002 characters. is no number"),
        ("redis://cache:" + "9" * 5000, "is no host"),
        ("redis://cach\udce9", "is no UTF-8"),
        ("redis://cache/1?db=2", "database '1/2' is no number"),
        ("redis://one,two", "several servers"),
        ("redis://hunter2@cache", "user without a password"),
        ("redis://cache?timeout=1", "option 'timeout' is unknown here"),
        ("redis://cache?ssl_ca_certs=x", "option 'ssl_ca_certs' is unknown here"),
        ("rediss://cache?ssl_cert_reqs=maybe", "must be required or none"),
        ("rediss://cache?ssl_check_hostname=1", "must be true or false"),
        ("unix://run/redis.sock", "absolute path of a socket"),
        ("unix://", "absolute path of a socket"),
        ("redis+sentinel://one", "name of the service is missing"),
        ("redis+cluster://one/1", "has only database 0"),
    ],
)
def test_what_is_wrong_is_said_without_the_password(url: str, fault: str) -> None:
    secret = url.replace("://", "://u:hunter2@", 1) if "@" not in url else url
    with pytest.raises(ConfigError, match=fault) as caught:
        parse_url(secret)
    assert "hunter2" not in str(caught.value)
    assert str(caught.value).startswith("redis.url: ")
