"""Reading from a mapping in memory, in the tightest loop there is."""

# ruff: noqa: D102 - the methods are documented once, in `Contender`

from __future__ import annotations

import random
from abc import abstractmethod
from collections.abc import MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import payloads
from benchmarks.contender import Contender, Metrics, Stopwatch
from benchmarks.optional import load


@dataclass
class MappingRead(Contender):
    """`mapping[key]` for every key, shuffled; then whatever `read` says about the value.

    Attributes:
        read: "get" stops there, "field" reads one small field, "whole" every field.
        packed: True when the mapping holds MessagePack that each reader decodes (every reader gets
            objects of his own, as with the engine); False when it holds the live objects, which
            all readers then share.
    """

    read: str
    packed: bool
    session_count: int
    read_count: int
    request_tasks: int = 32

    @abstractmethod
    def make(self) -> MutableMapping[str, Any]:
        """Return the empty mapping."""

    async def open(self, directory: Path) -> None:
        msgpack = load("msgpack")
        self._unpack = msgpack.unpackb
        self._mapping = self.make()
        for index in range(self.session_count):
            data = payloads.session(index)
            self._mapping[payloads.session_id(index)] = msgpack.packb(data) if self.packed else data
        self._keys = list(self._mapping)
        self._random = random.Random(1)
        self._random.shuffle(self._keys)

    async def measure(self) -> Metrics:
        rounds = max(1, self.read_count // self.session_count)
        loop = {
            ("get", False): _get,
            ("get", True): _get,
            ("field", False): _get_field,
            ("field", True): self._unpack_field,
            ("whole", False): _get_whole,
            ("whole", True): self._unpack_whole,
        }[self.read, self.packed]
        loop(self._mapping, self._keys)  # as for the engine: back into the CPU's caches
        with Stopwatch() as watch:
            for _ in range(rounds):
                loop(self._mapping, self._keys)
        return watch.rate(rounds * len(self._keys))

    async def request(self) -> None:
        value = self._mapping[self._keys[self._random.randrange(self.session_count)]]
        data = self._unpack(value) if self.packed and self.read != "get" else value
        if self.read == "field":
            data["prefs"]
        elif self.read == "whole":
            dict(data)

    def _unpack_field(self, mapping: MutableMapping[str, bytes], keys: list[str]) -> None:
        unpack = self._unpack
        for key in keys:
            unpack(mapping[key])["prefs"]

    def _unpack_whole(self, mapping: MutableMapping[str, bytes], keys: list[str]) -> None:
        unpack = self._unpack
        for key in keys:
            unpack(mapping[key])


def _get(mapping: MutableMapping[str, Any], keys: list[str]) -> None:
    for key in keys:
        mapping[key]


def _get_field(mapping: MutableMapping[str, Any], keys: list[str]) -> None:
    for key in keys:
        mapping[key]["prefs"]


def _get_whole(mapping: MutableMapping[str, Any], keys: list[str]) -> None:
    for key in keys:
        dict(mapping[key])
