from __future__ import annotations

import ast
import copy
import inspect
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from persistence import errors
from persistence.errors import (
    CheckpointNotFound,
    CorruptionError,
    PersistenceError,
    SessionExists,
    SessionNotFound,
    printable,
)

CONTRACT = {
    "ConfigError",
    "SessionNotFound",
    "SessionExists",
    "SessionLimitReached",
    "RequestLimitReached",
    "ConflictError",
    "InvalidSessionId",
    "ValueNotSerializable",
    "ValueTooLarge",
    "CorruptionError",
    "DirectoryLocked",
    "DirectoryNotUsable",
    "DiskFull",
    "WriteOutcomeUnknown",
    "RemoteUnavailable",
    "CheckpointNotFound",
    "CheckpointDamaged",
    "TokenInvalid",
    "ManagerClosed",
}

HOSTILE_IDS = ["a\nb", "a\r\x1b[31mred", "nul\0", "ü" * 200, "x" * 2**20, "\udc80", "'\"\\"]


def classes() -> dict[str, type[BaseException]]:
    return {
        name: item
        for name, item in vars(errors).items()
        if inspect.isclass(item) and issubclass(item, BaseException)
    }


def test_every_error_of_the_contract_exists() -> None:
    assert classes().keys() >= CONTRACT


def test_every_error_is_below_the_base() -> None:
    assert all(issubclass(item, PersistenceError) for item in classes().values())
    assert issubclass(PersistenceError, Exception)


def test_the_tree_in_the_docstring_lists_every_error_exactly_once() -> None:
    drawn = re.findall(r"^[ │]*[├└]── ([A-Z]\w+) ", errors.__doc__ or "", re.MULTILINE)
    assert sorted(drawn) == sorted(classes().keys() - {"PersistenceError"})


def test_every_error_has_a_docstring_of_its_own() -> None:
    assert all(item.__doc__ for item in classes().values())


def test_the_module_imports_nothing_of_the_project() -> None:
    tree = ast.parse(Path(errors.__file__).read_text("utf-8"))
    imported = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    assert [ast.unparse(node) for node in imported] == ["from __future__ import annotations"]


# What one may catch


@pytest.mark.parametrize(
    ("name", "builtin"),
    [
        ("ConfigError", ValueError),
        ("InvalidSessionId", ValueError),
        ("ValueTooLarge", ValueError),
        ("ValueNotSerializable", TypeError),
        ("SessionNotFound", KeyError),
        ("CheckpointNotFound", KeyError),
    ],
)
def test_errors_that_python_has_a_word_for_are_that_as_well(
    name: str, builtin: type[Exception]
) -> None:
    assert issubclass(classes()[name], builtin)


def test_the_invalid_token_says_nothing_by_itself() -> None:
    assert str(errors.TokenInvalid()) == ""


# Messages


@pytest.mark.parametrize("kind", [SessionNotFound, SessionExists])
def test_messages_about_a_session_name_it_and_say_what_to_do(
    kind: type[SessionNotFound | SessionExists],
) -> None:
    error = kind("cart-7")
    assert error.session_id == "cart-7"
    assert str(error).startswith("session 'cart-7' ")
    assert "get_or_create_session()" in str(error)


@pytest.mark.parametrize("error", [SessionNotFound("a"), CheckpointNotFound("no checkpoint a")])
def test_key_errors_print_their_message_and_not_its_repr(error: Exception) -> None:
    assert str(error) == error.args[0]


def test_a_checkpoint_that_is_not_found_may_come_without_a_message() -> None:
    assert str(CheckpointNotFound()) == ""


def test_corruption_tells_file_offset_and_session() -> None:
    error = CorruptionError("/data/0000000003.seg", 4096, "a\nb", "its checksum is wrong")
    assert (error.path, error.offset, error.session_id) == ("/data/0000000003.seg", 4096, "a\nb")
    assert error.reason == "its checksum is wrong"
    assert "/data/0000000003.seg at offset 4096, session 'a\\nb': its checksum" in str(error)


def test_corruption_of_an_unknown_session_names_none() -> None:
    error = CorruptionError("/data/0000000003.seg", 4096)
    assert error.session_id is None
    assert "session None" not in str(error)


@pytest.mark.parametrize("session_id", HOSTILE_IDS)
@pytest.mark.parametrize(
    "make",
    [printable, SessionNotFound, SessionExists, lambda name: CorruptionError("/f", 1, name)],
)
def test_a_hostile_session_id_becomes_short_ascii_on_one_line(
    make: type[SessionNotFound], session_id: str
) -> None:
    text = str(make(session_id))
    assert text.replace("…", "").isascii()
    assert text.isprintable()
    assert len(text) < 400


def test_printable_shows_what_is_short_as_a_python_literal() -> None:
    assert printable("a'b") == '"a\'b"'
    assert printable("") == "''"
    assert printable(None) == "None"


def test_printable_tells_the_length_of_what_it_cuts() -> None:
    assert printable("x" * 1000).endswith("…(1002 characters)")


@pytest.mark.parametrize(
    "value", [10**5000, [10**5000], {"n": -(10**5000)}], ids=["int", "list", "dict"]
)
def test_printable_says_so_where_an_int_has_too_many_digits_to_be_printed(value: object) -> None:
    assert printable(value) == f"({type(value).__name__} too long to print)"


EVERY_ERROR = [
    SessionNotFound("a"),
    SessionExists("a"),
    CorruptionError("/f", 4096, "a", "damaged"),
    errors.RemoteDamaged("key", "foreign", "a"),
    errors.SchemaMismatch("a", "cart.items[0]", "str", "int", "Cart"),
    *(
        kind("what happened")
        for kind in classes().values()
        if kind
        not in {
            SessionNotFound,
            SessionExists,
            CorruptionError,
            errors.RemoteDamaged,
            errors.SchemaMismatch,
        }
    ),
]


@pytest.mark.parametrize("error", EVERY_ERROR, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize(
    "copied",
    [copy.copy, copy.deepcopy, lambda error: pickle.loads(pickle.dumps(error))],
    ids=["copy", "deepcopy", "pickle"],
)
def test_every_error_survives_copying_and_pickling(
    error: Exception, copied: Callable[[Exception], Exception]
) -> None:
    again = copied(error)
    assert type(again) is type(error)
    assert (str(again), again.args, vars(again)) == (str(error), error.args, vars(error))


def test_every_error_of_the_module_is_tried() -> None:
    assert {type(error) for error in EVERY_ERROR} == set(classes().values())
