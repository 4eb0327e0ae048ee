from __future__ import annotations

import gzip
import json
import lzma
import struct
from pathlib import Path

import pytest

from benchmarks import traces
from benchmarks.payloads import Data
from benchmarks.sizes import TINY


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the recorded traces are looked for; empty."""
    monkeypatch.setenv("BENCHMARK_DATA", str(tmp_path))
    return tmp_path


def _final(steps: list[tuple[str, traces.Change]]) -> dict[str, Data]:
    sessions: dict[str, Data] = {}
    for session_id, change in steps:
        change(sessions.setdefault(session_id, {}))
    return sessions


def test_without_recorded_traces_the_same_ones_are_made_up_each_time(directory: Path) -> None:
    for make in (traces.web, traces.conversation):
        trace = make(TINY)
        assert trace.source.startswith("generated: ")
        assert len(trace.requests) == TINY.traced_requests
        assert trace.requests == make(TINY).requests
    assert traces.keys(TINY)[0].startswith("generated: ")
    assert len(traces.keys(TINY)[1]) == TINY.hit_accesses
    assert traces.sources().count("generated: ") == 3


def test_another_prefix_means_other_sessions(directory: Path) -> None:
    trace = traces.web(TINY)
    first, second = (_final(trace.steps(prefix)) for prefix in ("1-", "2-"))
    assert not first.keys() & second.keys()
    assert list(first.values()) == list(second.values())


def test_an_access_log_makes_a_session_per_client_and_browser(directory: Path) -> None:
    line = '{} - - [17/May/2015:10:05:03 +0000] "GET {} HTTP/1.1" 200 9 "-" "{}"\n'
    lines = [line.format("10.0.0.1", f"/{number}", "a") for number in range(25)]
    lines += [line.format("10.0.0.1", "/other", "b"), "no request at all\n"]
    with gzip.open(directory / "web-apache_logs.log.gz", "wt") as file:
        file.writelines(lines)
    sessions = list(_final(traces.web(TINY).steps()).values())
    assert sessions[0] == {"requests": 25, "pages": [f"/{number}" for number in range(5, 25)]}
    assert [session["requests"] for session in sessions[1:]] == [1, 1]


def test_a_conversation_grows_by_what_was_answered(directory: Path) -> None:
    requests = [
        {"hash_ids": [0, 7, 8], "output_length": 3},
        {"hash_ids": [0, 9], "output_length": 1},
        {"hash_ids": [0, 7, 8, 5], "output_length": 2},
    ]
    with gzip.open(directory / "kv-mooncake-conversation_trace.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(request) + "\n" for request in requests)
    sessions = _final(traces.conversation(TINY).steps())
    lengths = {
        name: [len(message["content"]) for message in session["messages"]]
        for name, session in sessions.items()
    }
    assert lengths == {"conversation-7": [12, 8], "conversation-9": [4]}


def test_keys_are_read_as_big_endian_numbers(directory: Path) -> None:
    with lzma.open(directory / "web-cache2k-web12.trace.xz", "wb") as file:
        file.write(struct.pack(">3i", 1, 256, -1))
    assert traces.keys(TINY) == ("web-cache2k-web12.trace.xz", [1, 256, -1])
