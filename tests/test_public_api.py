from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import persistence
from persistence import StateConfig, StateManager, errors
from persistence.errors import ConfigError

ROOT = Path(__file__).parent.parent
CONTRACT = {
    "CheckpointConfig",
    "ClientInfo",
    "DiskConfig",
    "MemoryConfig",
    "RedisConfig",
    "Session",
    "SessionConfig",
    "SessionMetadata",
    "ShutdownConfig",
    "StateConfig",
    "StateManager",
    "errors",
}

# Parameters as (name, default); `...` where there is none. "*" stands before keyword-only ones.
METHODS = {
    "create_session": (
        ("user_id", None),
        ("metadata", None),
        ("ttl_seconds", None),
        ("data", None),
        ("session_id", None),
        "*",
        ("max_requests", None),
        ("auto_renew", None),
    ),
    "get_session": (("session_id", ...), "*", ("fresh", False)),
    "get_or_create_session": (("session_id", None), "**"),
    "has_session": (("session_id", ...),),
    "update_session_data": (("session_id", ...), ("field", ...), ("value", ...)),
    "update_session": (("session_id", ...), ("function", ...)),
    "update_session_metadata": (("session_id", ...), "**"),
    "replace_session": (("session_id", ...), ("data", ...), ("ttl_seconds", None)),
    "set_ttl": (("session_id", ...), ("ttl_seconds", ...)),
    "edit": (("session_id", ...),),
    "watch": (("session_id", None), "*", ("after", None)),
    "terminate_session": (("session_id", ...),),
    "get_active_sessions": ("*", ("namespace", False)),
    "iter_sessions": (("prefix", ""), "*", ("namespace", False)),
    "find_sessions": ("*", ("user_id", ...)),
    "cleanup_expired": (),
    "cleanup_old_sessions": (("max_age_seconds", ...),),
    "spill_session": (("session_id", ...),),
    "restore_session": (("session_id", ...),),
    "flush": (),
    "stats": (),
    "open": (),
    "close": (),
    "request": (("session_id", ...), ("name", "")),
    "record_request": (
        ("session_id", ...),
        ("name", ""),
        ("seconds", 0.0),
        "*",
        ("error", None),
    ),
    "record_error": (("session_id", ...), ("error", ...)),
    "is_request_limit_reached": (("session_id", ...),),
    "session_metrics": (("session_id", ...),),
    "session_health": (("session_id", ...),),
    "resources": (("session_id", ...), ("name", ...), ("factory", ...), ("close", None)),
    "scratch_dir": (("session_id", ...),),
    "typed": (("session", ...),),
    "get_typed": (("session_id", ...), "*", ("fresh", False)),
    "update_typed": (("session_id", ...), ("function", ...)),
    "edit_typed": (("session_id", ...),),
}

NOT_COROUTINES = {"edit", "iter_sessions", "watch", "request", "typed", "edit_typed"}


def shape(function: object) -> tuple[object, ...]:
    """Return the parameters of a method in the notation of `METHODS`."""
    assert callable(function)
    found: list[object] = []
    for parameter in list(inspect.signature(function).parameters.values())[1:]:
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            found.append("**")
            continue
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and "*" not in found:
            found.append("*")
        default = parameter.default
        found.append((parameter.name, ... if default is inspect.Parameter.empty else default))
    return tuple(found)


def test_the_package_exports_the_names_of_the_contract() -> None:
    assert set(persistence.__all__) >= CONTRACT
    assert all(hasattr(persistence, name) for name in persistence.__all__)


def test_the_exports_are_sorted_and_listed_once() -> None:
    assert persistence.__all__ == sorted(set(persistence.__all__))


def test_a_star_import_brings_exactly_the_exports() -> None:
    namespace: dict[str, object] = {}
    exec("from persistence import *", namespace)
    assert namespace.keys() - {"__builtins__"} == set(persistence.__all__)


@pytest.mark.parametrize(
    "asked",
    [
        "persistence.StateManager().config",
        "persistence.errors.ConfigError",
        "[name for name in persistence.__all__ if name not in dir(persistence)] == [] or 1 / 0",
        "__import__('persistence', fromlist=['StateManager']).StateManager",
        "hasattr(persistence, 'Nonsense') and 1 / 0",
    ],
)
def test_the_names_are_there_before_the_first_is_asked_for(asked: str) -> None:
    program = f"import sys, persistence; 'persistence.manager' in sys.modules and 1 / 0; {asked}"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_every_export_is_documented() -> None:
    undocumented = [
        name for name in persistence.__all__ if not inspect.getdoc(getattr(persistence, name))
    ]
    assert undocumented == []


def test_the_module_does_nothing_but_export() -> None:
    source = Path(inspect.getfile(persistence)).read_text("utf-8")
    assert not any(line.startswith(("def ", "class ", "async ")) for line in source.splitlines())
    assert importlib.import_module("persistence.errors") is errors


@pytest.mark.parametrize("name", METHODS)
def test_a_method_takes_what_the_contract_says(name: str) -> None:
    wanted = METHODS[name]
    found = shape(getattr(StateManager, name))
    # More keyword-only parameters with defaults may follow.
    assert found[: len(wanted)] == wanted


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_a_documented_coroutine(name: str) -> None:
    method = getattr(StateManager, name)
    assert inspect.getdoc(method)
    assert inspect.iscoroutinefunction(method) is (name not in NOT_COROUTINES)


def test_the_manager_takes_a_url_a_configuration_and_a_clock() -> None:
    found = shape(StateManager.__init__)
    assert found[:4] == (("url", None), ("config", None), "*", ("clock", None))


def test_a_manager_without_arguments_has_the_default_configuration() -> None:
    assert StateManager().config == StateConfig()


def test_the_url_given_to_the_manager_is_the_one_it_uses() -> None:
    config = StateConfig.model_validate({"redis": {"url": "redis://elsewhere", "write": "behind"}})
    redis = StateManager("redis://localhost:6379", config).config.redis
    assert (redis.url, redis.write) == ("redis://localhost:6379", "behind")


def test_a_wrong_url_is_a_configuration_error() -> None:
    with pytest.raises(ConfigError, match="url"):
        StateManager("http://localhost")
