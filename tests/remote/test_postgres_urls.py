"""URLs of PostgreSQL: each says one thing, or is refused without showing its password."""

from __future__ import annotations

import pytest

from persistence.config import RedisConfig
from persistence.errors import ConfigError
from persistence.remote.postgres_urls import PostgresTarget, is_postgres, parse_postgres_url


@pytest.mark.parametrize(
    ("url", "target"),
    [
        ("postgresql://host/shop", PostgresTarget((("host", 5432),), "shop")),
        ("postgres://host:1/shop", PostgresTarget((("host", 1),), "shop")),
        (
            "postgresql://ada:s%40:/?crea@host/shop",
            PostgresTarget((("host", 5432),), "shop", "ada", "s@:/?crea"),
        ),
        ("postgresql://ada@[::1]:7/a%2Db", PostgresTarget((("::1", 7),), "a-b", "ada")),
        (
            "postgresql://a:1,b:2/shop?target_session_attrs=primary",
            PostgresTarget(
                (("a", 1), ("b", 2)), "shop", options={"target_session_attrs": "primary"}
            ),
        ),
        (
            "postgresql:///shop?host=/run/postgresql",
            PostgresTarget((("/run/postgresql", 5432),), "shop"),
        ),
        (
            "postgresql://h/s?sslmode=verify-full&sslrootcert=/a%20b.pem",
            PostgresTarget(
                (("h", 5432),),
                "s",
                options={"sslmode": "verify-full", "sslrootcert": "/a b.pem"},
            ),
        ),
    ],
)
def test_a_url_says_where_the_database_is(url: str, target: PostgresTarget) -> None:
    assert is_postgres(url)
    assert parse_postgres_url(url) == target
    assert RedisConfig(url=url).url == url


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("redis://ada:secret@host/shop", "must start with postgresql"),
        ("postgresql://ada:secret@host", "name of the database"),
        ("postgresql://ada:secret@host/", "name of the database"),
        ("postgresql://ada:secret@host/a/b", "name of the database"),
        ("postgresql://ada:secret@host/a%00", "name of the database"),
        ("postgresql://ada:secret@/shop", "name a host"),
        ("postgresql://ada:secret@host/shop?host=/run", "name a host"),
        ("postgresql://ada:secret@/shop?host=run", "directory of a socket"),
        ("postgresql://ada:secret@host:x/shop", "no host and port"),
        ("postgresql://ada:secret@host:70000/shop", "no host and port"),
        ("postgresql://ada:secret@a,/shop", "no host and port"),
        ("postgresql://ada:secret@host/shop?sslmod=require", "option 'sslmod' is unknown"),
        ("postgresql://ada:secret@host/shop?sslmode=maybe", "must be one of disable"),
        ("postgresql://ada:secret@host/shop?target_session_attrs=any", "must be one of primary"),
    ],
)
def test_a_wrong_url_is_refused_without_its_password(url: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason) as caught:
        parse_postgres_url(url)
    assert "secret" not in str(caught.value)


def test_a_password_is_never_shown() -> None:
    target = parse_postgres_url("postgresql://ada:secret@host/shop")
    assert "secret" not in f"{target!r} {target.shown}"
    assert "secret" not in repr(RedisConfig(url="postgresql://ada:secret@host/shop"))


def test_what_goes_to_the_client_is_what_the_url_says() -> None:
    target = parse_postgres_url("postgresql://ada:s%2F@a:1,b/shop?sslmode=require&sslcert=/%26")
    assert target.arguments == {
        "host": ["a", "b"],
        "port": [1, 5432],
        "database": "shop",
        "user": "ada",
        "password": "s/",
        "dsn": "postgresql://?sslmode=require&sslcert=%2F%26",
    }
