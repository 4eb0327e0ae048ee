"""Variables of the environment that stand for a whole section."""

from __future__ import annotations

import pytest

from persistence import StateConfig
from persistence.errors import ConfigError


@pytest.mark.parametrize("value", ["5", "[]", '"text"', "true"])
def test_a_section_that_is_no_table_is_told_with_its_variable(
    monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("PERSISTENCE_MEMORY", value)
    with pytest.raises(ConfigError, match=r"^PERSISTENCE_MEMORY: memory"):
        StateConfig.load()
