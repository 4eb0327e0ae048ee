"""All workloads, in the order in which they run."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.sizes import Sizes
from benchmarks.workload import Workload
from benchmarks.workloads import growth, hot, larger, lifecycle, shared, traffic, updates

_SUBJECTS = (hot, updates, larger, lifecycle, shared, traffic, growth)

WORKLOADS: tuple[Workload, ...] = tuple(
    workload for subject in _SUBJECTS for workload in subject.WORKLOADS
)

DEFINITIONS = "\n".join(subject.__doc__ or "" for subject in _SUBJECTS)
"""What all of them are, as text."""


def chosen(names: Sequence[str]) -> list[Workload]:
    """Return the workloads that `names` choose; all of them for none.

    A name chooses the workload of that name, or else those whose names start so.

    Raises:
        ValueError: a name that no workload has.
    """
    for name in names:
        if not any(workload.name.startswith(name) for workload in WORKLOADS):
            known = ", ".join(workload.name for workload in WORKLOADS)
            raise ValueError(f"there is no workload {name!r}; there are {known}")
    if not names:
        return list(WORKLOADS)
    exact = {each.name for each in WORKLOADS}
    prefixes = tuple(name for name in names if name not in exact)
    return [each for each in WORKLOADS if each.name in names or each.name.startswith(prefixes)]


def fitting(names: Sequence[str], sizes: Sizes) -> list[Workload]:
    """Return those of `chosen` that there are at `sizes`; ones that are named, in any case."""
    return [each for each in chosen(names) if names or each.sizes_chosen(sizes)]
