"""Allocations that fail: an operation happens whole or not at all."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from tests.faults import nomemory


@pytest.mark.skipif(not nomemory.is_here(), reason="this Python has no _testcapi")
def test_an_operation_that_lacks_memory_happens_whole_or_not_at_all() -> None:
    # In a process of its own, for each attempt is a fork.
    command = [sys.executable, "-m", "tests.faults", "memory", "--seconds", "60", "--part", "7/100"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"memory: [2-4]\d failed allocations", done.stdout), done.stdout
