"""What the process that reads files gives up before it looks at a file: priority, user, files, network, system calls.

Standard library only, and knows no format. `file_reader.py` calls `lower_priority` and then, with everything imported,
`enter`.
Each protection is used where the kernel has it; `enter` returns those that are in effect.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import struct
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

NICE = 10
"""Against the engine's threads a reader gets a tenth of the processor, and so it still ends where they never rest."""
MAX_DESCRIPTORS = 1024
"""The descriptors of a reader, and of the server that forks it, are below this number."""
CAP_KILL = 5
"""https://man7.org/linux/man-pages/man7/capabilities.7.html"""
CAPABILITY_VERSION = 0x20080522
PR_SET_PDEATHSIG, PR_GET_DUMPABLE, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 3, 4, 22, 38
"""https://man7.org/linux/man-pages/man2/prctl.2.html"""

NOBODY = 65534
USERS = (range(0x70000000, 0x70400000), range(32_768, 60_000))
"""User ids for readers, one for each process id. The first range has one for every process id that Linux can give and
is unused in systemd's list of user ids (https://systemd.io/UIDS-GIDS/). The second is for containers whose user
namespace has 65,536 ids."""

LANDLOCK_CREATE_RULESET, LANDLOCK_RESTRICT_SELF = 444, 446
"""The same numbers on all architectures. https://docs.kernel.org/userspace-api/landlock.html"""
LANDLOCK_VERSION = 1
LANDLOCK_FILES = {1: (1 << 13) - 1, 2: 1 << 13, 3: 1 << 14, 5: 1 << 15}
"""Rights on files that a version of Landlock adds: all that it knows are refused."""
LANDLOCK_TCP = 0b11
"""Since version 4: bind, connect."""
LANDLOCK_SCOPES = 0b11
"""Since version 6: abstract Unix sockets and signals to processes outside."""

SECCOMP_MODE_FILTER = 2
SECCOMP_KILL, SECCOMP_EPERM, SECCOMP_ALLOW = 0x80000000, 0x00050001, 0x7FFF0000
X32 = 0x40000000
PROT_EXEC = 4
FUTEX_OPERATION = 0x7F
"""Without the flags. Of the operations, waiting (0, 9) and waking (1, 10) are allowed."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """What a seccomp filter has to know of a processor: its number, and those of the system calls."""

    audit: int
    calls: Mapping[str, int]


# A file is read from descriptor 0, its text written to descriptor 1; all else is memory, time and the end.
ARCHITECTURES = {
    "x86_64": Architecture(
        0xC000003E,
        {
            "read": 0,
            "write": 1,
            "mmap": 9,
            "mprotect": 10,
            "munmap": 11,
            "brk": 12,
            "rt_sigprocmask": 14,
            "rt_sigreturn": 15,
        }
        | {
            "sched_yield": 24,
            "mremap": 25,
            "madvise": 28,
            "getpid": 39,
            "exit": 60,
            "gettimeofday": 96,
            "gettid": 186,
            "time": 201,
        }
        | {"futex": 202, "restart_syscall": 219, "clock_gettime": 228, "exit_group": 231, "getrandom": 318},
    ),
    "aarch64": Architecture(
        0xC00000B7,
        {
            "read": 63,
            "write": 64,
            "mmap": 222,
            "mprotect": 226,
            "munmap": 215,
            "brk": 214,
            "rt_sigprocmask": 135,
            "rt_sigreturn": 139,
        }
        | {
            "sched_yield": 124,
            "mremap": 216,
            "madvise": 233,
            "getpid": 172,
            "exit": 93,
            "gettimeofday": 169,
            "gettid": 178,
        }
        | {"futex": 98, "restart_syscall": 128, "clock_gettime": 113, "exit_group": 94, "getrandom": 278},
    ),
}


@dataclass(frozen=True, slots=True)
class Protections:
    """What is in effect in a reading process."""

    own_user: bool
    """It has a user id that no other process has. Only a server that runs as root can give it one."""
    not_dumpable: bool
    """Processes of the same user cannot read its memory and environment."""
    landlock: int
    """The version of Landlock that restricts it; 0: none."""
    seccomp: bool
    """It can make only the system calls that reading takes."""

    def missing(self) -> list[str]:
        """What the kernel does not give, each with what that means; empty if nothing is missing."""
        found = []
        if not self.seccomp:
            refused = ["open files or sockets (no descriptor is left for them)"]
            if self.landlock >= 6:
                refused.append("send signals to the service")
            found.append(
                "seccomp (code that takes the reader over can make any system call, and start processes where the "
                f"service is root; it can still not {' or '.join(refused)})"
            )
        if not self.landlock:
            found.append("Landlock (only seccomp and the limit on descriptors keep it from files, TCP and signals)")
        elif self.landlock < 6:
            refuses = "files" if self.landlock < 4 else "files and TCP"
            found.append(f"Landlock 6 (version {self.landlock} refuses {refuses}; signals are left to seccomp)")
        if not self.not_dumpable:
            found.append("PR_SET_DUMPABLE (processes of the same user can read the reader's memory)")
        return found


def libc() -> ctypes.CDLL:
    """The C library of this process."""
    return ctypes.CDLL(None, use_errno=True)


def hide_memory() -> bool:
    """Keep processes of the same user from this one's memory, environment and descriptors. Linux only.

    It also turns core dumps off, and a debugger or profiler has to run as root.
    """
    return sys.platform == "linux" and bool(libc().prctl(PR_SET_DUMPABLE, 0, 0, 0, 0) == 0)


def lower_priority() -> None:
    """Let other processes go first, and be in a process group of its own.

    Not in a session of its own: Linux gives each session an equal share of the processor (autogroups), whatever
    priorities its processes have.
    """
    with suppress(OSError):
        os.setpgid(0, 0)
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, NICE)
    if sys.platform == "linux":
        with suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def enter(*, max_memory: int, cpu_s: float) -> Protections:
    """Take from this process what reading a file does not need. What is already stricter stays so.

    After it nothing can be opened or imported, and the process has to end with `os._exit`.

    Args:
        max_memory: Bytes of address space.
        cpu_s: CPU seconds from now on, rounded up.
    """
    os.closerange(3, MAX_DESCRIPTORS)
    limit_resources(max_memory, cpu_s)
    own_user = become_user_of_its_own()
    if sys.platform == "linux":
        drop_capabilities()
        # After the change of user, which takes both back.
        libc().prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        hide_memory()
        libc().prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    landlock = restrict_by_landlock()
    # No descriptor can be made any more, for a file or for a socket. Landlock needed one.
    lower_limit(resource.RLIMIT_NOFILE, 0)
    not_dumpable = sys.platform == "linux" and libc().prctl(PR_GET_DUMPABLE, 0, 0, 0, 0) == 0
    return Protections(own_user, not_dumpable, landlock, restrict_by_seccomp())


def limit_resources(max_memory: int, cpu_s: float) -> None:
    """Set the limits that every Unix has."""
    # macOS counts what all programs share as well, which is more than any limit that we would set.
    if sys.platform != "darwin":
        lower_limit(resource.RLIMIT_AS, max_memory)
    used = resource.getrusage(resource.RUSAGE_SELF)
    # Ends what spins, also if no process is left to kill it: by SIGXCPU, and a second later by SIGKILL.
    lower_limit(resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime + cpu_s) + 1, margin=1)
    for limit in (resource.RLIMIT_FSIZE, resource.RLIMIT_CORE, resource.RLIMIT_NPROC):
        lower_limit(limit, 0)


def lower_limit(limit: int, value: int, margin: int = 0) -> None:
    """Set a resource limit for good: the soft one to `value`, the hard one to `margin` more."""
    hard = resource.getrlimit(limit)[1]
    most = value + margin if hard == resource.RLIM_INFINITY else min(value + margin, hard)
    resource.setrlimit(limit, (min(value, most), most))


def become_user_of_its_own() -> bool:
    """Stop being root, which may read everything and start processes whatever its limits say.

    Returns whether this process is now the only one of its user.
    """
    if os.geteuid() != 0 or not can_end_others():
        return False
    user = free_user()
    for each in (user, NOBODY):
        if each is None:
            continue
        # A container may not let its root become another user.
        with suppress(OSError):
            os.setgroups([])
            os.setgid(each)
            os.setuid(each)
            return each == user
    return False


def can_end_others() -> bool:
    """Return whether root may end another user's process.

    The process that forked or started this one has as much, and has to be able to end it.
    """
    if sys.platform != "linux":
        return True
    _, _, after = Path("/proc/self/status").read_text().partition("CapEff:")
    return bool(int(after.split()[0], 16) >> CAP_KILL & 1)


def free_user() -> int | None:
    """A user id that goes with this process's id and has no account. Returns None if there is none."""
    import pwd

    mapped = [range(2**32 - 1)]
    with suppress(OSError):
        lines = Path("/proc/self/uid_map").read_text().splitlines()
        mapped = [range(int(first), int(first) + int(count)) for first, _, count in map(str.split, lines)]
    for users in USERS:
        user = users[os.getpid() % len(users)]
        if any(user in each for each in mapped):
            try:
                pwd.getpwuid(user)
            except KeyError:
                return user
    return None


def drop_capabilities() -> None:
    """Give up what root can do beyond its files, also where it could not become another user."""
    libc().capset(struct.pack("Ii", CAPABILITY_VERSION, 0), struct.pack("6I", *[0] * 6))


def landlock_version() -> int:
    """The version of Landlock that the kernel has; 0: none."""
    if sys.platform != "linux":
        return 0
    version = libc().syscall(ctypes.c_long(LANDLOCK_CREATE_RULESET), None, ctypes.c_size_t(0), LANDLOCK_VERSION)
    return max(0, int(version))


def restrict_by_landlock() -> int:
    """Refuse all files, and TCP, abstract Unix sockets and signals to others where the kernel can.

    Returns the version of Landlock that does; 0: none.
    """
    version = landlock_version()
    if version == 0:
        return 0
    files = sum(rights for since, rights in LANDLOCK_FILES.items() if since <= version)
    handled = struct.pack("QQQ", files, LANDLOCK_TCP, LANDLOCK_SCOPES)
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    call = libc().syscall
    ruleset = call(ctypes.c_long(LANDLOCK_CREATE_RULESET), handled, ctypes.c_size_t(size), 0)
    if ruleset < 0:
        return 0
    try:
        return version if call(ctypes.c_long(LANDLOCK_RESTRICT_SELF), ruleset, 0) == 0 else 0
    finally:
        os.close(ruleset)


def restrict_by_seccomp() -> bool:
    """Refuse all system calls but those that reading takes. Returns whether the kernel does."""
    architecture = ARCHITECTURES.get(os.uname().machine)
    if sys.platform != "linux" or architecture is None or struct.calcsize("P") != 8:
        return False
    program = seccomp_filter(architecture)
    instructions = ctypes.create_string_buffer(program, len(program))
    about = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(instructions))
    return bool(libc().prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, about, 0, 0) == 0)


def seccomp_filter(architecture: Architecture) -> bytes:
    """The filter as a BPF program. https://docs.kernel.org/userspace-api/seccomp_filter.html"""
    load, equal, at_least, any_bit, mask, leave = 0x20, 0x15, 0x35, 0x45, 0x54, 0x06

    def argument(number: int) -> tuple[int, int, int, int]:
        return load, 0, 0, 16 + 8 * number  # its lower half: both architectures are little-endian

    allow, refuse, kill = ((leave, 0, 0, result) for result in (SECCOMP_ALLOW, SECCOMP_EPERM, SECCOMP_KILL))
    checked: dict[str, Sequence[tuple[int, int, int, int]]] = {
        "read": [argument(0), (equal, 0, 1, 0), allow, refuse],
        "write": [argument(0), (equal, 0, 1, 1), allow, refuse],
        # No code but what is loaded.
        "mmap": [argument(2), (any_bit, 0, 1, PROT_EXEC), refuse, allow],
        "mprotect": [argument(2), (any_bit, 0, 1, PROT_EXEC), refuse, allow],
        # A negative clock is another process's.
        "clock_gettime": [argument(0), (any_bit, 0, 1, 1 << 31), refuse, allow],
        "futex": [
            argument(1),
            (mask, 0, 0, FUTEX_OPERATION),
            *((equal, 4 - place, 0, operation) for place, operation in enumerate((0, 1, 9, 10))),
            refuse,
            allow,
        ],
    }
    program = [(load, 0, 0, 4), (equal, 1, 0, architecture.audit), kill, (load, 0, 0, 0)]
    if architecture is ARCHITECTURES["x86_64"]:
        # The same calls under other numbers.
        program += [(at_least, 0, 1, X32), kill]
    for name, number in architecture.calls.items():
        then = checked.get(name, [allow])
        program += [(equal, 0, len(then), number), *then]
    program.append(refuse)
    return b"".join(struct.pack("HBBI", *instruction) for instruction in program)
