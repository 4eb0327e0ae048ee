"""What servers answer, and what is made of it."""

from __future__ import annotations

import pytest
from redis import exceptions as redis_errors

from persistence.errors import ConfigError, RemoteDamaged, RemoteUnavailable, WriteOutcomeUnknown
from persistence.remote.exchanges import Lost, Unsent
from persistence.remote.faults import (
    Refused,
    as_config_error,
    code_in,
    code_of,
    explain,
    explain_key,
    unknown,
)


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("OOM command not allowed when used memory > 'maxmemory'.", "OOM"),
        ("-OOM command not allowed when used memory > 'maxmemory'.", "OOM"),
        ("@user_script: 12: -READONLY You can't write against a read only replica.", "READONLY"),
        ("WRONGTYPE Operation against a key holding the wrong kind of value", "WRONGTYPE"),
        ("BUSY Redis is busy running a script.", "BUSY"),
        ("ERR something BUSYNESS", ""),
        ("", ""),
    ],
)
def test_codes_are_found_in_texts(text: str, code: str) -> None:
    assert code_in(text) == code
    assert code_of(redis_errors.ResponseError(text)) == code


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (redis_errors.BusyLoadingError("x"), "LOADING"),
        (redis_errors.NoScriptError("x"), "NOSCRIPT"),
        (redis_errors.ReadOnlyError("x"), "READONLY"),
        (redis_errors.OutOfMemoryError("x"), "OOM"),
        (redis_errors.MovedError("1 127.0.0.1:7000"), "MOVED"),
        (redis_errors.AskError("1 127.0.0.1:7000"), "ASK"),
        (redis_errors.AuthenticationError("x"), "WRONGPASS"),
        (Refused(redis_errors.NoPermissionError("x"), "here"), "NOPERM"),
    ],
)
def test_codes_that_redis_py_took_off_are_known_by_class(error: Exception, code: str) -> None:
    assert code_of(error) == code


@pytest.mark.parametrize("code", ["LOADING", "OOM", "BUSY", "READONLY", "NOPERM", "CLUSTERDOWN"])
def test_a_message_says_what_where_and_what_to_do(code: str) -> None:
    error = explain(redis_errors.ResponseError(f"{code} really"), "cache:6379", "load session 'a'")
    assert type(error) is RemoteUnavailable
    assert str(error).startswith("load session 'a': Redis at cache:6379 answers ")
    assert "not known to the library" not in str(error)


def test_an_unknown_answer_is_shown() -> None:
    error = explain(redis_errors.ResponseError("ERR odd\r\nmore"), "cache", "ping")
    assert "answers 'ERR odd': this answer is not known" in str(error)


def test_lost_and_unsent_say_what_happened() -> None:
    for fault in (Lost("gone"), Unsent("gone")):
        assert str(explain(fault, "cache", "ping")) == "ping: gone"
    assert type(unknown(Lost("gone"), "commit session 'a'")) is WriteOutcomeUnknown


def test_only_a_wrong_type_is_about_the_key() -> None:
    assert isinstance(explain_key("WRONGTYPE", "text", "k", "a"), RemoteDamaged)
    assert explain_key("OOM", "text", "k", "a") is None


@pytest.mark.parametrize(
    "error",
    [
        redis_errors.AuthenticationError("invalid username-password pair"),
        redis_errors.ResponseError("NOAUTH Authentication required."),
        redis_errors.ResponseError("DB index is out of range"),
        redis_errors.ResponseError("unknown command 'HELLO'"),
        redis_errors.ResponseError("This instance has cluster support disabled"),
    ],
)
def test_faults_of_the_configuration_are_told_apart(error: Exception) -> None:
    assert isinstance(as_config_error(Refused(error, "cache"), "cache"), ConfigError)


def test_what_may_pass_is_no_fault_of_the_configuration() -> None:
    for error in (Lost("x"), Unsent("x"), Refused(redis_errors.BusyLoadingError("x"), "cache")):
        assert as_config_error(error, "cache") is None
