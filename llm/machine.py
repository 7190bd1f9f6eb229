"""How many CPUs this process may use, and how much memory it can still take.

A container, a systemd unit and `taskset` give a process less than the machine has, and neither `os.cpu_count` nor
/proc/meminfo shows it. On Linux the limits are in control groups (cgroups): the tightest one between the process's own
group and the root of the hierarchy counts. Both versions are read, also side by side ("hybrid").
https://docs.kernel.org/admin-guide/cgroup-v2.html, https://docs.kernel.org/admin-guide/cgroup-v1/memory.html

Does not import torch. Every function takes the root directory under which it looks for /proc and /sys.
"""

import math
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

ROOT = Path("/")
MAX_DIGITS = 30
"""Of a number in a control file. The kernel's have 20 at most."""
_USUAL = Path("sys/fs/cgroup")
"""Where cgroups are mounted on nearly every system. Used where mountinfo names no directory that exists (gVisor)."""


def num_cpus(root: Path = ROOT) -> int:
    """CPUs that this process may keep busy at once: those it may run on, and not more than its CPU quota.

    A fractional quota is rounded down, to 1 at least: with more threads than the quota, the kernel would stop all of
    them for the rest of each period, and the threads that serve HTTP need a share as well.
    """
    may_run_on = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.floor(min(may_run_on, cpu_quota(root))))


def available_memory(root: Path = ROOT) -> int:
    """Bytes that this process can still take before the machine or a cgroup runs out. Excludes swap."""
    import psutil  # type: ignore[import-untyped]

    return int(min(psutil.virtual_memory().available, available_in_cgroups(root)))


def limit_torch_threads() -> None:
    """Let torch compute with no more threads than `num_cpus`. Fewer stay fewer: OMP_NUM_THREADS, or a caller's own."""
    import torch

    if torch.get_num_threads() > (most := num_cpus()):
        torch.set_num_threads(most)


def cpu_quota(root: Path = ROOT) -> float:
    """CPUs that the tightest quota of this process's cgroups allows; infinite without one."""
    return min(
        (_quota_v2(group.path) if group.is_v2 else _quota_v1(group.path) for group in _groups(root, "cpu")),
        default=math.inf,
    )


def available_in_cgroups(root: Path = ROOT) -> float:
    """Bytes that the tightest memory limit of this process's cgroups leaves; infinite without one."""
    return min(
        (_left_v2(group.path) if group.is_v2 else _left_v1(group.path) for group in _groups(root, "memory")),
        default=math.inf,
    )


def _quota_v2(group: Path) -> float:
    quota, _, period = _text(group / "cpu.max").partition(" ")  # "max 100000" without a limit
    return _ratio(quota, period)


def _quota_v1(group: Path) -> float:
    return _ratio(_text(group / "cpu.cfs_quota_us"), _text(group / "cpu.cfs_period_us"))  # -1 without a limit


def _ratio(quota: str, period: str) -> float:
    if not (_is_number(quota) and _is_number(period) and int(period)):
        return math.inf
    return int(quota) / int(period)


def _left_v2(group: Path) -> float:
    # Above memory.high the kernel slows a group down so much that it may as well be the limit.
    limit = min(_bytes(group / "memory.max"), _bytes(group / "memory.high"))
    return _left(limit, group / "memory.current", group, "inactive_file")


def _left_v1(group: Path) -> float:
    limit = _bytes(group / "memory.limit_in_bytes")  # close to 2**63 without a limit
    return _left(limit, group / "memory.usage_in_bytes", group, "total_inactive_file")


def _left(limit: float, used: Path, group: Path, reclaimable: str) -> float:
    if limit == math.inf:
        return limit
    lines = (line.split() for line in _text(group / "memory.stat").splitlines())
    counters = {line[0]: line[1] for line in lines if len(line) == 2}
    # The page cache counts as used; the kernel frees what of it is inactive before it refuses memory.
    cached = counters.get(reclaimable, "0")
    in_use = _bytes(used) - (int(cached) if _is_number(cached) else 0)
    return limit if in_use == math.inf else max(0, limit - max(0, in_use))


def _bytes(file: Path) -> float:
    """The number in a file; infinite for "max", and where there is no file: the root group has none."""
    content = _text(file)
    return int(content) if _is_number(content) else math.inf


def _is_number(text: str) -> bool:
    """Whether a text is a number of a size that a kernel writes."""
    return text.isdecimal() and len(text) <= MAX_DIGITS


def _text(file: Path) -> str:
    try:
        return file.read_text().strip()
    except (OSError, ValueError):
        return ""


@dataclass(frozen=True, slots=True)
class _Group:
    path: Path
    is_v2: bool


@dataclass(frozen=True, slots=True)
class _Mount:
    """A cgroup file system: the directory `top` of its hierarchy is seen at `point`."""

    point: Path
    top: PurePosixPath
    is_v2: bool
    controllers: frozenset[str]


def _groups(root: Path, controller: str) -> Iterator[_Group]:
    """The directories of this process's groups, from its own up to the topmost that can be seen."""
    mounts = [mount for mount in _mounts(root) if mount.point.is_dir()]
    for is_v2, controllers, own in _memberships(root):
        if not is_v2 and controller not in controllers.split(","):
            continue
        fitting = [mount for mount in mounts if mount.is_v2 == is_v2 and (is_v2 or controller in mount.controllers)]
        if not fitting:
            names = [""] if is_v2 else [controllers, controller]
            points = [root / _USUAL / name for name in names]
            fitting = [_Mount(point, PurePosixPath("/"), is_v2, frozenset()) for point in points if point.is_dir()]
        # Another container's groups may be mounted, too: those above this process's own group come first.
        for mount in [mount for mount in fitting if own.is_relative_to(mount.top)] or fitting:
            yield from (_Group(path, is_v2) for path in _upwards(mount, own))


def _upwards(mount: _Mount, own: PurePosixPath) -> Iterator[Path]:
    # Without a cgroup namespace, a container sees its own group as the top, and the path is the one on the host.
    # With one, the path of a process that was put into it from outside begins with "/..": names that cannot be seen.
    below = own.relative_to(mount.top) if own.is_relative_to(mount.top) else PurePosixPath()
    inside = PurePosixPath(*(part for part in below.parts if part not in ("..", "/")))
    for path in (inside, *inside.parents):
        with suppress(OSError):  # a name that is too long, say
            if (directory := mount.point / path).is_dir():
                yield directory


def _memberships(root: Path) -> Iterator[tuple[bool, str, PurePosixPath]]:
    """For each hierarchy: whether it is version 2, its controllers, and this process's group in it."""
    for line in _text(root / "proc/self/cgroup").splitlines():  # "4:memory:/docker/x", "0::/docker/x"
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if path.startswith("/"):
            yield number == "0" and not controllers, controllers, PurePosixPath(path)


def _mounts(root: Path) -> Iterator[_Mount]:
    # 36 35 0:32 /top /sys/fs/cgroup/memory rw,relatime shared:1 - cgroup cgroup rw,memory
    for line in _text(root / "proc/self/mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        fields, kinds = before.split(" "), after.split(" ")
        if len(fields) < 5 or kinds[0] not in ("cgroup", "cgroup2"):
            continue
        top, point = (re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), field) for field in fields[3:5])
        controllers = frozenset(kinds[-1].split(","))
        yield _Mount(root / point.lstrip("/"), PurePosixPath(top), kinds[0] == "cgroup2", controllers)
