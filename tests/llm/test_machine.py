import math
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest

from llm import machine

ROOT = Path(__file__).parents[2]
MIB = 2**20
V2_MOUNT = "30 20 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate"
V1_MOUNTS = (
    "33 30 0:30 {top} /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
    "34 30 0:31 {top} /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory"
)


def system(root: Path, own: str, mounts: str, groups: Mapping[str, Mapping[str, str]]) -> Path:
    """A root directory with /proc and /sys as a process sees them; groups by their path below /sys/fs/cgroup."""
    process = root / "proc/self"
    process.mkdir(parents=True)
    (process / "cgroup").write_text(own + "\n")
    (process / "mountinfo").write_text(f"22 1 8:1 / / rw - ext4 /dev/sda rw\n{mounts}\n")
    for path, files in groups.items():
        group = root / "sys/fs/cgroup" / path
        group.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (group / name).write_text(content + "\n")
    return root


def v2(cpu: str = "max 100000", limit: object = "max", used: int = 0, inactive: int = 0) -> dict[str, str]:
    stat = f"anon 600\ninactive_file {inactive}\nactive_file 60"
    return {"cpu.max": cpu, "memory.max": str(limit), "memory.current": str(used), "memory.stat": stat}


def v1_cpu(quota: int) -> dict[str, str]:
    return {"cpu.cfs_quota_us": str(quota), "cpu.cfs_period_us": "100000"}


def v1_memory(limit: int, used: int, inactive: int) -> dict[str, str]:
    stat = f"inactive_file 1\ntotal_inactive_file {inactive}"
    return {"memory.limit_in_bytes": str(limit), "memory.usage_in_bytes": str(used), "memory.stat": stat}


V1_UNLIMITED = 9223372036854771712


@pytest.mark.parametrize(
    ("own", "groups", "cpus", "left"),
    [
        pytest.param("0::/", {"": v2("150000 100000", 1000, 700, 40)}, 1.5, 340, id="a container's own root"),
        pytest.param("0::/", {"": v2(limit=1000, used=1100)}, math.inf, 0, id="over its limit"),
        pytest.param("0::/", {"": v2(limit="max", used=700)}, math.inf, math.inf, id="no limit"),
        pytest.param("0::/", {"": {}}, math.inf, math.inf, id="the root group, which has no such files"),
        pytest.param(
            "0::/system.slice/x.service",
            {"system.slice": v2(), "system.slice/x.service": v2("200000 100000", 1000, 100)},
            2,
            900,
            id="a systemd unit",
        ),
        pytest.param(
            "0::/pod/box",
            {"pod": v2("50000 100000", 1000, 900), "pod/box": v2("400000 100000", 500, 10)},
            0.5,
            100,
            id="the tightest is what its pod has left",
        ),
        pytest.param("0::/", {"": {**v2(limit=1000, used=100), "memory.high": "600"}}, math.inf, 500, id="memory.high"),
        pytest.param("0::/", {"": {"memory.max": "1000"}}, math.inf, 1000, id="a limit alone"),
        pytest.param("0::/", {"": {"memory.max": "many", "cpu.max": "x"}}, math.inf, math.inf, id="nonsense"),
        pytest.param("0::/gone", {"": v2("100000 100000", 1000, 0)}, 1, 1000, id="a group that cannot be seen"),
        pytest.param("0::/../box", {"box": v2("100000 100000", 1000, 0)}, 1, 1000, id="outside of the namespace"),
    ],
)
def test_cgroup_v2(tmp_path: Path, own: str, groups: dict[str, dict[str, str]], cpus: float, left: float) -> None:
    root = system(tmp_path, own, V2_MOUNT, groups)

    assert (machine.cpu_quota(root), machine.available_in_cgroups(root)) == (cpus, left)


@pytest.mark.parametrize(
    ("path", "top"), [("/docker/x", "/"), ("/docker/x", "/docker/x"), ("/docker/x/sub", "/docker/x"), ("/", "/")]
)
def test_cgroup_v1(tmp_path: Path, path: str, top: str) -> None:
    """Docker mounts a container's own group, and shows the path that the host knows it by."""
    below = path.removeprefix(top.rstrip("/")).strip("/")
    groups = {
        f"cpu,cpuacct/{below}": v1_cpu(250_000),
        f"memory/{below}": v1_memory(1000, 700, 40),
        "memory": v1_memory(V1_UNLIMITED, 10**9, 0) if below else v1_memory(1000, 700, 40),
    }
    root = system(tmp_path, f"5:memory:{path}\n4:cpu,cpuacct:{path}", V1_MOUNTS.format(top=top), groups)

    assert (machine.cpu_quota(root), machine.available_in_cgroups(root)) == (2.5, 340)


def test_cgroup_v1_without_limits(tmp_path: Path) -> None:
    groups = {"cpu,cpuacct": v1_cpu(-1), "memory": v1_memory(V1_UNLIMITED, 1000, 0)}
    root = system(tmp_path, "5:memory:/\n4:cpu,cpuacct:/", V1_MOUNTS.format(top="/"), groups)

    assert machine.cpu_quota(root) == math.inf
    assert machine.available_in_cgroups(root) > 2**62


def test_hybrid_hierarchies_are_both_read(tmp_path: Path) -> None:
    mounts = V1_MOUNTS.format(top="/") + "\n41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw"
    groups = {"memory/a": v1_memory(1000, 100, 0), "unified/b": v2("100000 100000")}
    root = system(tmp_path, "5:memory:/a\n0::/b", mounts, groups)

    assert (machine.cpu_quota(root), machine.available_in_cgroups(root)) == (1, 900)


def test_groups_of_another_container_that_are_mounted_too_do_not_count(tmp_path: Path) -> None:
    mounts = V2_MOUNT.replace(" / /", " /own /") + "\n31 20 0:26 /other /sys/fs/cgroup/other rw - cgroup2 cgroup2 rw"
    groups = {"": v2("400000 100000", 4000), "other": v2("100000 100000", 1000)}

    assert machine.cpu_quota(system(tmp_path, "0::/own", mounts, groups)) == 4


def test_a_mount_point_with_spaces_is_found(tmp_path: Path) -> None:
    mounts = V2_MOUNT.replace("/sys/fs/cgroup", r"/sys/fs/cgroup/a\040b")

    assert machine.cpu_quota(system(tmp_path, "0::/", mounts, {"a b": v2("300000 100000")})) == 3


@pytest.mark.parametrize("mounts", ["", V2_MOUNT.replace("/sys/fs/cgroup", "/gone")])
def test_where_mountinfo_is_of_no_help_the_usual_directory_is_read(tmp_path: Path, mounts: str) -> None:
    assert machine.cpu_quota(system(tmp_path, "0::/", mounts, {"": v2("300000 100000")})) == 3


def test_without_cgroups_the_machine_counts(tmp_path: Path) -> None:
    assert machine.cpu_quota(tmp_path) == math.inf
    assert machine.num_cpus(tmp_path) == len(os.sched_getaffinity(0))
    assert 0 < machine.available_memory(tmp_path) < psutil.virtual_memory().total


@pytest.mark.parametrize(("quota", "cpus"), [("10000 100000", 1), ("190000 100000", 1), ("99999999 100000", None)])
def test_a_quota_is_rounded_down_to_one_at_least(tmp_path: Path, quota: str, cpus: int | None) -> None:
    root = system(tmp_path, "0::/", V2_MOUNT, {"": v2(quota)})

    assert machine.num_cpus(root) == (cpus or len(os.sched_getaffinity(0)))


def test_memory_is_what_a_limit_leaves(tmp_path: Path) -> None:
    root = system(tmp_path, "0::/", V2_MOUNT, {"": v2(limit=64 * MIB, used=4 * MIB)})

    assert machine.available_memory(root) == 60 * MIB


def test_torch_computes_with_no_more_threads_than_there_are_cpus() -> None:
    """In a process of its own: the number is torch's for all threads. One that starts later has it, too."""
    script = (
        "import threading, torch\n"
        "from llm import machine\n"
        "seen = [torch.get_num_threads()]\n"  # OMP_NUM_THREADS
        "def look(cpus):\n"
        "    machine.num_cpus = lambda: cpus\n"
        "    machine.limit_torch_threads()\n"
        "    seen.append(torch.get_num_threads())\n"
        "look(4)\n"
        "torch.set_num_threads(8)\n"
        "look(3)\n"
        "thread = threading.Thread(target=look, args=(4,))\n"
        "thread.start(); thread.join()\n"
        "print(*seen)"
    )
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        [sys.executable, "-c", script], env=env, cwd=ROOT, capture_output=True, text=True, timeout=100, check=True
    )

    assert ran.stdout.split() == ["1", "1", "3", "3"]


@pytest.mark.parametrize(
    "group",
    [
        v2(cpu=f"{'9' * 400} 100000"),
        v2(cpu=f"100000 {'9' * 5000}"),
        v2(limit="9" * 5000),
        {**v2(limit=1000), "memory.stat": f"inactive_file {'9' * 5000}", "memory.current": ""},
    ],
)
def test_numbers_that_no_kernel_writes_are_no_limits(tmp_path: Path, group: dict[str, str]) -> None:
    root = system(tmp_path, "0::/", V2_MOUNT, {"": group})
    assert machine.cpu_quota(root) == math.inf
    assert machine.available_in_cgroups(root) in (1000, math.inf)


def test_a_path_that_is_too_long_for_the_system_is_no_group(tmp_path: Path) -> None:
    root = system(tmp_path, f"0::/{'x' * 300}/{'y' * 6000}", V2_MOUNT, {"": v2(cpu="200000 100000")})
    assert machine.cpu_quota(root) == 2
