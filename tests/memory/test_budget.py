from __future__ import annotations

import resource
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from persistence.memory.budget import (
    FLOOR_DIVISOR,
    STEP_DIVISOR,
    CgroupLevel,
    Constraint,
    MemoryPressure,
    MemoryReader,
    ProcessMemory,
    cgroup_levels,
    effective_budget_bytes,
    host_memory,
    process_limits,
    process_memory,
    read_text_file,
)

MIB = 2**20
GIB = 2**30

V1_UNLIMITED = "9223372036854771712\n"
OWN = ProcessMemory(rss_bytes=50 * MIB, virtual_bytes=400 * MIB, data_bytes=90 * MIB)
HOST = Constraint(limit_bytes=16 * GIB, used_bytes=4 * GIB, source="host")

V2_MOUNT = "30 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"
V1_MOUNT = "35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n"
V1_CPU_MOUNT = "34 31 0:31 / /sys/fs/cgroup/cpu rw,relatime shared:9 - cgroup cgroup rw,cpu\n"
UNIFIED_MOUNT = "41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n"


def reader(
    files: dict[str, str],
    *,
    own: ProcessMemory = OWN,
    host: Constraint = HOST,
    limits: dict[str, int] | None = None,
) -> MemoryReader:
    return MemoryReader(
        read_text=files.get,
        own_memory=lambda: own,
        host=lambda: host,
        limits=lambda: limits or {},
    )


def v2_tree(files: dict[str, str]) -> dict[str, str]:
    """A process in /pod/worker of a version 2 hierarchy, with `files` below the mount point."""
    return {
        "/proc/self/cgroup": "0::/pod/worker\n",
        "/proc/self/mountinfo": V2_MOUNT,
        **{f"/sys/fs/cgroup/{name}": text for name, text in files.items()},
    }


def v1_tree(files: dict[str, str]) -> dict[str, str]:
    """The same in a version 1 hierarchy."""
    return {
        "/proc/self/cgroup": "5:cpu,cpuacct:/pod\n4:memory:/pod/worker\n1:name=systemd:/\n",
        "/proc/self/mountinfo": V1_CPU_MOUNT + V1_MOUNT,
        **{f"/sys/fs/cgroup/memory/{name}": text for name, text in files.items()},
    }


# Where the cgroup is


def test_the_levels_of_version_2_go_from_the_own_cgroup_to_the_mount_point() -> None:
    assert cgroup_levels("0::/pod/worker\n", V2_MOUNT) == [
        CgroupLevel("/sys/fs/cgroup/pod/worker", is_v2=True),
        CgroupLevel("/sys/fs/cgroup/pod", is_v2=True),
        CgroupLevel("/sys/fs/cgroup", is_v2=True),
    ]


def test_version_1_takes_only_the_hierarchy_of_the_memory_controller() -> None:
    text = "5:cpu,cpuacct:/elsewhere\n4:memory:/pod\n"
    assert cgroup_levels(text, V1_CPU_MOUNT + V1_MOUNT) == [
        CgroupLevel("/sys/fs/cgroup/memory/pod", is_v2=False),
        CgroupLevel("/sys/fs/cgroup/memory", is_v2=False),
    ]


def test_the_hybrid_layout_has_the_levels_of_both_versions() -> None:
    text = "4:memory:/pod\n0::/user\n"
    assert cgroup_levels(text, V1_MOUNT + UNIFIED_MOUNT) == [
        CgroupLevel("/sys/fs/cgroup/memory/pod", is_v2=False),
        CgroupLevel("/sys/fs/cgroup/memory", is_v2=False),
        CgroupLevel("/sys/fs/cgroup/unified/user", is_v2=True),
        CgroupLevel("/sys/fs/cgroup/unified", is_v2=True),
    ]


def test_a_mount_that_is_the_containers_own_cgroup_is_where_its_files_are() -> None:
    mount = V1_MOUNT.replace(" / /sys", " /docker/abc /sys")
    assert cgroup_levels("4:memory:/docker/abc\n", mount) == [
        CgroupLevel("/sys/fs/cgroup/memory", is_v2=False)
    ]
    assert cgroup_levels("4:memory:/docker/abc/inner\n", mount)[0] == CgroupLevel(
        "/sys/fs/cgroup/memory/inner", is_v2=False
    )


@pytest.mark.parametrize("path", ["/elsewhere", "/..", "/../other"])
def test_a_path_outside_of_the_mount_falls_back_to_the_mount_point(path: str) -> None:
    mount = V2_MOUNT.replace(" / /sys", " /docker/abc /sys")
    assert cgroup_levels(f"0::{path}\n", mount) == [CgroupLevel("/sys/fs/cgroup", is_v2=True)]
    assert cgroup_levels("0::/../up\n", V2_MOUNT) == [CgroupLevel("/sys/fs/cgroup", is_v2=True)]


def test_a_mount_point_with_escaped_spaces_is_read_as_it_is() -> None:
    mount = V2_MOUNT.replace("/sys/fs/cgroup", r"/mnt/c\040groups\134x")
    assert cgroup_levels("0::/\n", mount)[0].directory == "/mnt/c groups\\x"


def test_a_cgroup_whose_name_has_a_colon_is_found() -> None:
    levels = cgroup_levels("0::/a:b\n", V2_MOUNT)
    assert levels[0].directory == "/sys/fs/cgroup/a:b"


@pytest.mark.parametrize("text", ["", "\n", "nonsense", "0:", "4:memory", "0::", ": :"])
@pytest.mark.parametrize("mounts", ["", "nonsense", "1 2 3 - cgroup2", V2_MOUNT + V1_MOUNT])
def test_unexpected_text_is_no_error(text: str, mounts: str) -> None:
    assert isinstance(cgroup_levels(text, mounts), list)


# Which limit counts


def test_without_any_cgroup_the_machine_is_the_limit() -> None:
    pressure = reader({}).read()
    assert pressure == MemoryPressure(16 * GIB, 4 * GIB, 50 * MIB, "host")


def test_anonymous_memory_is_counted_and_page_cache_is_not() -> None:
    files = v2_tree(
        {
            "pod/worker/memory.max": f"{GIB}\n",
            "pod/worker/memory.current": f"{GIB}\n",
            "pod/worker/memory.stat": f"anon {300 * MIB}\nfile {700 * MIB}\n",
        }
    )
    assert reader(files).read() == MemoryPressure(
        GIB, 300 * MIB, 50 * MIB, "cgroup /sys/fs/cgroup/pod/worker"
    )


def test_the_smallest_limit_of_all_ancestors_counts() -> None:
    files = v2_tree(
        {
            "pod/worker/memory.max": "max\n",
            "pod/memory.max": f"{512 * MIB}\n",
            "pod/memory.stat": f"anon {100 * MIB}\n",
            "memory.max": f"{GIB}\n",
            "memory.stat": f"anon {100 * MIB}\n",
        }
    )
    assert reader(files).read().limit_bytes == 512 * MIB


def test_a_large_limit_that_is_nearly_used_up_counts_before_a_small_one_that_is_not() -> None:
    files = v2_tree(
        {
            "pod/worker/memory.max": f"{512 * MIB}\n",
            "pod/worker/memory.stat": f"anon {100 * MIB}\n",
            "pod/memory.max": f"{GIB}\n",
            "pod/memory.stat": f"anon {1000 * MIB}\n",
        }
    )
    assert reader(files).read().source == "cgroup /sys/fs/cgroup/pod"


def test_memory_high_limits_like_memory_max() -> None:
    files = v2_tree(
        {
            "pod/worker/memory.max": f"{GIB}\n",
            "pod/worker/memory.high": f"{800 * MIB}\n",
            "pod/worker/memory.stat": f"anon {MIB}\n",
        }
    )
    assert reader(files).read().limit_bytes == 800 * MIB


def test_max_and_the_largest_number_mean_no_limit() -> None:
    v2 = v2_tree({"pod/worker/memory.max": "max\n", "pod/worker/memory.high": "max\n"})
    assert reader(v2).read().source == "host"
    v1 = v1_tree(
        {
            "pod/worker/memory.limit_in_bytes": V1_UNLIMITED,
            "pod/worker/memory.stat": f"total_rss 5\nhierarchical_memory_limit {V1_UNLIMITED}",
        }
    )
    assert reader(v1).read().source == "host"


@pytest.mark.parametrize("text", ["", "0", "-1", "12x", "max max", "1e9"])
def test_a_limit_that_is_no_positive_number_is_none(text: str) -> None:
    assert reader(v2_tree({"pod/worker/memory.max": text})).read().source == "host"


def test_version_1_counts_the_memory_of_the_whole_subtree() -> None:
    files = v1_tree(
        {
            "pod/worker/memory.limit_in_bytes": f"{GIB}\n",
            "pod/worker/memory.stat": f"cache 1\nrss 7\ntotal_cache 9\ntotal_rss {200 * MIB}\n",
        }
    )
    pressure = reader(files).read()
    assert (pressure.limit_bytes, pressure.anonymous_bytes) == (GIB, 200 * MIB)


def test_version_1_knows_the_limit_of_ancestors_that_cannot_be_seen() -> None:
    files = v1_tree(
        {
            "pod/worker/memory.limit_in_bytes": V1_UNLIMITED,
            "pod/worker/memory.stat": f"total_rss 5\nhierarchical_memory_limit {256 * MIB}\n",
        }
    )
    assert reader(files).read().limit_bytes == 256 * MIB


def test_in_the_hybrid_layout_the_limit_is_found_where_the_controller_is() -> None:
    files = {
        "/proc/self/cgroup": "4:memory:/pod\n0::/pod\n",
        "/proc/self/mountinfo": V1_MOUNT + UNIFIED_MOUNT,
        "/sys/fs/cgroup/memory/pod/memory.limit_in_bytes": f"{GIB}\n",
        "/sys/fs/cgroup/memory/pod/memory.stat": "total_rss 1000\n",
    }
    assert reader(files).read().source == "cgroup /sys/fs/cgroup/memory/pod"


def test_without_statistics_the_resident_set_is_what_is_used() -> None:
    files = v2_tree({"pod/worker/memory.max": f"{GIB}\n"})
    assert reader(files).read().anonymous_bytes == OWN.rss_bytes


def test_a_cgroup_limit_above_the_machines_memory_does_not_hide_the_machine() -> None:
    files = v2_tree(
        {"pod/worker/memory.max": f"{64 * GIB}\n", "pod/worker/memory.stat": f"anon {GIB}\n"}
    )
    assert reader(files).read().source == "host"


def test_a_full_machine_is_of_no_interest_to_a_process_with_a_limit_of_its_own() -> None:
    files = v2_tree(
        {"pod/worker/memory.max": f"{GIB}\n", "pod/worker/memory.stat": f"anon {MIB}\n"}
    )
    full = Constraint(16 * GIB, 16 * GIB, "host")
    assert reader(files, host=full).read().limit_bytes == GIB


def test_rlimits_bound_the_address_space_and_the_data() -> None:
    space = reader({}, limits={"RLIMIT_AS": 500 * MIB}).read()
    assert (space.anonymous_bytes, space.source) == (OWN.virtual_bytes, "RLIMIT_AS")
    data = reader({}, limits={"RLIMIT_DATA": 100 * MIB}).read()
    assert (data.anonymous_bytes, data.source) == (OWN.data_bytes, "RLIMIT_DATA")


def test_a_limit_that_changes_and_a_move_to_another_cgroup_are_seen_by_the_next_read() -> None:
    files = v2_tree(
        {
            "pod/worker/memory.max": f"{GIB}\n",
            "pod/worker/memory.stat": "anon 1\n",
            "other/memory.max": f"{3 * GIB}\n",
            "other/memory.stat": "anon 1\n",
        }
    )
    watched = reader(files)
    assert watched.read().limit_bytes == GIB
    files["/sys/fs/cgroup/pod/worker/memory.max"] = f"{2 * GIB}\n"
    assert watched.read().limit_bytes == 2 * GIB
    files["/proc/self/cgroup"] = "0::/other\n"
    assert watched.read().limit_bytes == 3 * GIB


def test_the_list_of_mounts_is_read_once() -> None:
    files = v2_tree({"pod/worker/memory.max": f"{GIB}\n"})
    reads: list[str] = []

    def read_text(path: str) -> str | None:
        reads.append(path)
        return files.get(path)

    watched = MemoryReader(read_text=read_text, own_memory=lambda: OWN, host=lambda: HOST)
    watched.read()
    watched.read()
    assert reads.count("/proc/self/mountinfo") == 1


# The real system


def test_the_real_system_can_be_read() -> None:
    pressure = MemoryReader().read()
    assert pressure.rss_bytes > 0
    assert 0 < pressure.limit_bytes <= host_memory().limit_bytes
    assert pressure.source


def test_the_resident_set_grows_with_what_is_allocated() -> None:
    before = process_memory()
    block = bytearray(b"x") * (32 * MIB)
    assert process_memory().rss_bytes - before.rss_bytes > 16 * MIB
    assert len(block) == 32 * MIB


def test_unlimited_rlimits_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    set_limits = {resource.RLIMIT_AS: GIB, resource.RLIMIT_DATA: resource.RLIM_INFINITY}
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (set_limits[kind], GIB))
    assert process_limits() == {"RLIMIT_AS": GIB}


def test_a_file_that_is_not_there_has_no_text(tmp_path_factory: pytest.TempPathFactory) -> None:
    assert read_text_file(str(tmp_path_factory.mktemp("empty") / "memory.max")) is None


# What the budget is


def pressure_at(fraction: float, limit_bytes: int = GIB) -> MemoryPressure:
    return MemoryPressure(limit_bytes, int(limit_bytes * fraction), 0)


CONFIGURED = 160 * MIB
STEP = CONFIGURED // STEP_DIVISOR
FLOOR = CONFIGURED // FLOOR_DIVISOR


def test_above_the_upper_mark_the_budget_shrinks_by_one_step() -> None:
    shrunk = effective_budget_bytes(CONFIGURED, CONFIGURED, pressure_at(0.95))
    assert shrunk == CONFIGURED - STEP


def test_it_never_falls_below_the_floor() -> None:
    budget = CONFIGURED
    for _ in range(50):
        budget = effective_budget_bytes(CONFIGURED, budget, pressure_at(0.99))
    assert budget == FLOOR


def test_between_the_marks_it_stays() -> None:
    for fraction in (0.81, 0.85, 0.90):
        assert effective_budget_bytes(CONFIGURED, 3 * STEP, pressure_at(fraction)) == 3 * STEP


def test_below_the_lower_mark_it_grows_back_to_what_is_configured_and_no_further() -> None:
    budgets = [FLOOR]
    for _ in range(12):
        budgets.append(effective_budget_bytes(CONFIGURED, budgets[-1], pressure_at(0.30)))
    assert all(after - before <= STEP for before, after in pairwise(budgets))
    assert budgets[-1] == CONFIGURED


def test_a_budget_that_is_filled_at_once_does_not_swing() -> None:
    # 800 MiB belong to others, the rest of a limit of 1 GiB is used by a budget of up to 640 MiB.
    configured, budget, history = 640 * MIB, 640 * MIB, []
    for _ in range(40):
        used = 800 * MIB + budget
        budget = effective_budget_bytes(configured, budget, MemoryPressure(GIB, used, used))
        history.append(budget)
    assert len(set(history[-10:])) == 1


def test_without_a_limit_the_budget_returns_to_what_is_configured() -> None:
    nothing = MemoryPressure(0, 10 * GIB, 0)
    assert effective_budget_bytes(CONFIGURED, CONFIGURED - STEP, nothing) == CONFIGURED


def test_a_lower_configured_budget_takes_effect_at_once() -> None:
    assert effective_budget_bytes(STEP, CONFIGURED, pressure_at(0.85)) == STEP


@given(
    configured=st.integers(1, 2**45),
    current=st.integers(0, 2**45),
    limit=st.integers(0, 2**45),
    used=st.integers(0, 2**46),
)
def test_the_budget_stays_in_bounds_and_moves_by_at_most_one_step(
    configured: int, current: int, limit: int, used: int
) -> None:
    budget = effective_budget_bytes(configured, current, MemoryPressure(limit, used, 0))
    floor = max(1, configured // FLOOR_DIVISOR)
    assert floor <= budget <= configured
    inside = min(max(current, floor), configured)
    assert abs(budget - inside) <= max(1, configured // STEP_DIVISOR)
