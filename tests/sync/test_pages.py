"""The code in docs/threads.md and docs/watching.md runs."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import pytest

from persistence import StateManager, sync
from tests.engine import Start

DOCS = Path(__file__).parents[2] / "docs"


def blocks(page: str) -> list[str]:
    text = (DOCS / page).read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def test_the_program_for_threads_prints_its_session(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    program, _ = blocks("threads.md")
    names: dict[str, Any] = {}
    exec(program, names)
    names["main"]()
    assert capsys.readouterr().out == "ada {'n': 1, 'seen': True}\n"


def test_the_mapping_does_what_is_shown(state: sync.StateManager) -> None:
    _, fragment = blocks("threads.md")
    exec(fragment, {"state": state})
    assert list(state.as_mapping()) == []


async def test_a_follower_reads_until_the_end(start: Start) -> None:
    state = await start()
    [program] = blocks("watching.md")
    names: dict[str, Any] = {"StateManager": StateManager}
    exec(program, names)
    sid = await state.create_session(data={"cart": []})
    following = asyncio.create_task(names["follow"](state, sid, 1))
    await state.update_session_data(sid, "cart", [1])
    await state.terminate_session(sid)
    async with asyncio.timeout(10):
        await following
