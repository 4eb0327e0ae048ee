"""The results of a run as data: what is written as JSON, and what every report is made of.

The JSON is versioned. A field is added freely; one that is renamed, removed, or gets another
meaning makes a new version, and files of another version are refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from benchmarks.bars import paired
from benchmarks.contender import Metric, median

VERSION: Final = 1  # as in `RunResult.version`


class ResultsError(Exception):
    """A file holds no results that this version can read; the message says why."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True)


class Unit(_Part):
    """What a workload measures; `unit` is shown behind the number."""

    name: str
    unit: str
    higher_is_better: bool

    @staticmethod
    def of(metric: Metric) -> Unit:
        """Return the same as a part of results."""
        return Unit(
            name=metric.name,
            unit=metric.unit.strip(),
            higher_is_better=metric.higher_is_better,
        )


class Measured(_Part):
    """One metric of a row: a sample per repetition, in their order."""

    unit: str
    median: float
    samples: list[float] = Field(min_length=1)


class Distribution(_Part):
    """How long something took, milliseconds: `points` are (share of the samples, at most)."""

    count: int = Field(ge=1)
    p50: float
    p99: float
    p99_9: float
    max: float
    points: list[tuple[float, float]] = []


class Failed(_Part):
    """Why a row has no number: it is "unavailable" here, it answered "wrong", or it "crashed"."""

    kind: str
    reason: str


class RowResult(_Part):
    """One contender.

    Attributes:
        durability: what an acknowledged write survives.
        called: how asyncio code calls it: "await", "inline" (blocking), "to_thread".
        role: "engine", "peer", or "limit" (what the machine, or theory, sets).
        series, size: in a growth curve, the name that its rows share, and its place.
        lag: of the event loop, while the contender works.
        latency: of a request, among others, on that event loop.
    """

    contender: str
    durability: str = Field(pattern="^(nothing|process crash|power loss)$")
    called: str
    role: Literal["engine", "peer", "limit"]
    series: str = ""
    size: float | None = None
    failure: Failed | None = None
    metrics: dict[str, Measured] = {}
    lag: Distribution | None = None
    latency: Distribution | None = None

    def samples(self, metric: str) -> list[float]:
        """Return the samples of a metric; [] when it was not measured."""
        measured = self.metrics.get(metric)
        return measured.samples if measured else []


class BarResult(_Part):
    """A bar and whether it was reached; None: a number for it is missing."""

    claim: str
    measured: str
    passed: bool | None


class WorkloadResult(_Part):
    """One workload; the first of `units` is the metric that matters."""

    name: str
    definition: str
    seconds: float
    size_unit: str = ""
    units: list[Unit] = Field(min_length=1)
    rows: list[RowResult]
    bars: list[BarResult]

    def reference(self, row: RowResult) -> RowResult | None:
        """Return the engine's row that `row` is compared with: its first one, of the same size."""
        ours = (each for each in self.rows if each.role == "engine" and each.size == row.size)
        return next((each for each in ours if each.metrics), None)

    def advantage(self, row: RowResult, unit: Unit | None = None) -> float | None:
        """Return how many times as good as `row` the engine is, at what matters (or `unit`).

        That is the median of the ratios within a repetition. None: not comparable.
        """
        unit = unit or self.units[0]
        reference = self.reference(row)
        if reference is None or reference is row:
            return None
        ours, theirs = reference.samples(unit.name), row.samples(unit.name)
        if not ours or not theirs or not all(ours) or not all(theirs):
            return None
        ratio = paired(ours, theirs, lambda our, their: our / their)
        return ratio if unit.higher_is_better else 1 / ratio

    def is_lost(self, row: RowResult) -> bool:
        """Whether a peer's row is ahead of the engine's, at what matters."""
        advantage = self.advantage(row)
        return row.role == "peer" and advantage is not None and advantage < 1


class RunResult(_Part):
    """A whole run.

    Attributes:
        environment: hardware, versions, settings.
        idle: lag of an event loop on which nothing happens.
    """

    version: Literal[1] = Field(alias="schema_version")
    created: str
    environment: dict[str, str]
    sizes: dict[str, Any]
    idle: Distribution
    workloads: list[WorkloadResult]

    @field_validator("sizes")
    @classmethod
    def _has_a_name(cls, sizes: dict[str, Any]) -> dict[str, Any]:
        if not sizes.get("name"):
            raise ValueError("has no name")
        return sizes

    def as_json(self) -> str:
        """Return it as a JSON document."""
        return self.model_dump_json(indent=1, by_alias=True, exclude_none=False) + "\n"


def measured(unit: str, samples: list[float]) -> Measured:
    """Return the samples with their median."""
    return Measured(unit=unit, median=median(samples), samples=samples)


def read(path: Path) -> RunResult:
    """Read the results in a file.

    Raises:
        ResultsError: it cannot be read, or holds no results of this version.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ResultsError(f"{path}: {error}") from error
    try:
        return RunResult.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        raise ResultsError(
            f"{path} holds no results of version {VERSION} of the benchmarks' JSON: "
            f"{place}: {first['msg']}"
        ) from error
