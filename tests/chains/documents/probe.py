"""Code that has taken over the process that reads a file: it tries what it should not be able to do.

`start` runs the real reader up to the point where it would parse the file, and there tries everything in `attempts`.
The "file" is JSON: `Targets`. What worked comes back as the file's text. It also runs without a sandbox, as root: so no
attempt changes anything outside of the server that it was given and that server's folder.
"""

import ctypes
import errno
import json
import os
import resource
import runpy
import signal
import socket
import struct
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

libc = ctypes.CDLL(None, use_errno=True)
IS_ARM = os.uname().machine == "aarch64"
Attempt = Callable[[], object]


class Targets(NamedTuple):
    """What there is to be reached: the service (`parent`), its reader server, another tenant's reader, the machine."""

    parent: int
    reader_server: int
    other_reader: int
    key_file: str
    environment_file: str
    folder: str
    tcp: int
    udp: int
    unix: str
    abstract: str


def start(reader: str, without: Sequence[str]) -> None:
    """Be the reader, with some functions of its sandbox doing nothing."""
    found = runpy.run_path(reader)
    found["find_modules"]()
    from chains.documents import sandbox
    from chains.documents.formats import FileText

    for name in without:
        setattr(sandbox, name, lambda **_: 0)
    names = found["main"].__globals__
    names["load"] = load

    def answer(content: bytes, _limits: dict[str, Any]) -> Any:
        if not content:  # the reader of the other tenant
            os._exit(0)
        reached = sorted(reached_of(Targets(**json.loads(content))))
        return FileText(title="", text=json.dumps(reached), kind="text", pages=None)

    names["answer"] = answer
    found["main"](sys.argv[1])
    os._exit(0)


def load() -> None:
    """Import what the probe takes. An ordinary user's server then gives up the right that found Python (`ORDINARY`)."""
    import pwd  # noqa: F401

    import orjson  # noqa: F401

    if os.geteuid() != 0:
        drop_capabilities()


def drop_capabilities() -> None:
    libc.capset(struct.pack("Ii", 0x20080522, 0), struct.pack("6I", *[0] * 6))


def reached_of(targets: Targets) -> Iterator[str]:
    """The names of the attempts that are not refused."""
    for name, attempt in attempts(targets):
        try:
            attempt()
        except (OSError, ValueError):  # `resource` makes the latter of some
            continue
        yield name


def checked(result: int, *also: int) -> int:
    """The result of a C function; raises OSError for an error, unless one in `also`: that comes after being allowed."""
    if result == -1 and (error := ctypes.get_errno()) not in also:
        raise OSError(error, os.strerror(error))
    return result


def call(x86: int, arm: int, *arguments: Any, also: Sequence[int] = ()) -> Attempt:
    """A system call by its numbers."""
    numbered = ctypes.c_long(arm if IS_ARM else x86)
    given = [ctypes.c_long(each) if isinstance(each, int) else each for each in arguments]
    return lambda: checked(libc.syscall(numbered, *given), *also)


def attempts(targets: Targets) -> Iterator[tuple[str, Attempt]]:
    yield from of_processes("parent", targets.parent)
    yield from of_processes("reader server", targets.reader_server)
    yield from of_processes("other reader", targets.other_reader)
    yield from of_files(targets)
    yield from of_network(targets)
    yield from of_kernel(targets.parent)
    yield from of_itself()


def of_processes(name: str, pid: int) -> Iterator[tuple[str, Attempt]]:
    for file in ("environ", "mem", "maps", "auxv", "status", "cmdline", "fd/0", "fd/1", "root/etc/passwd"):
        yield f"{name}: open {file}", partial(os.open, f"/proc/{pid}/{file}", os.O_RDONLY | os.O_NONBLOCK)
    for link in ("cwd", "root", "exe", "fd/0"):
        yield f"{name}: link {link}", partial(os.readlink, f"/proc/{pid}/{link}")
    yield f"{name}: list fd", lambda: os.listdir(f"/proc/{pid}/fd")

    def trace() -> None:
        checked(libc.ptrace(0x4206, pid, None, None))  # PTRACE_SEIZE

    yield f"{name}: ptrace", trace
    buffer = ctypes.create_string_buffer(16)
    here = struct.pack("PN", ctypes.addressof(buffer), 16)
    for act, numbers in (("read", (310, 270)), ("write", (311, 271))):
        # No address is right, and that is found out last.
        there = struct.pack("PN", 4096, 16)
        yield f"{name}: process_vm_{act}v", call(*numbers, pid, here, 1, there, 1, 0, also=[errno.EFAULT])
    yield f"{name}: kill 0", lambda: os.kill(pid, 0)
    if name != "other reader":
        yield f"{name}: SIGTERM", lambda: os.kill(pid, signal.SIGTERM)
        yield f"{name}: SIGTERM by tgkill", call(234, 131, pid, pid, signal.SIGTERM)
    yield f"{name}: setpriority", lambda: os.setpriority(os.PRIO_PROCESS, pid, 19)
    yield f"{name}: affinity", lambda: os.sched_setaffinity(pid, os.sched_getaffinity(0))
    yield f"{name}: limits", lambda: resource.prlimit(pid, resource.RLIMIT_CORE, (0, 0))
    yield f"{name}: pidfd_open", call(434, 434, pid, 0)
    yield f"{name}: kcmp", call(312, 272, os.getpid(), pid, 1, 0, 0)
    yield f"{name}: process_madvise", call(440, 440, pid, here, 1, 20, 0, also=[errno.EBADF])
    yield f"{name}: robust list", call(274, 100, pid, here, here)
    yield f"{name}: move_pages", call(279, 239, pid, 0, 0, 0, 0, 0)


def of_files(targets: Targets) -> Iterator[tuple[str, Attempt]]:
    folder = targets.folder
    for name, path in (
        ("key file", targets.key_file),
        (".env", targets.environment_file),
        ("/etc/passwd", "/etc/passwd"),
        ("own environ", "/proc/self/environ"),
        ("/dev/null", "/dev/null"),
    ):
        yield f"open {name}", partial(os.open, path, os.O_RDONLY)
        yield f"openat2 {name}", call(437, 437, -100, path.encode(), struct.pack("QQQ", 0, 0, 0), 24)
        yield f"stat {name}", partial(os.stat, path)
        yield f"statx {name}", call(332, 291, -100, path.encode(), 0, 1, ctypes.create_string_buffer(256))
    yield "list /", lambda: os.listdir("/")
    yield "create a file", lambda: os.open(f"{folder}/made", os.O_WRONLY | os.O_CREAT)
    yield "make a folder", lambda: os.mkdir(f"{folder}/made-folder")
    yield "rename", lambda: os.rename(targets.environment_file, f"{folder}/renamed")
    yield "chmod", lambda: os.chmod(targets.key_file, 0o644)
    yield "truncate", lambda: os.truncate(targets.key_file, 0)
    yield "link", lambda: os.symlink("/etc/passwd", f"{folder}/link")
    yield "unlink", lambda: os.unlink(targets.key_file)
    yield "chdir", lambda: os.chdir("/")
    yield "inotify", call(294, 26, 0)
    yield "open_by_handle_at", call(304, 265, -100, struct.pack("IiQ", 8, 1, 2), 0, also=[errno.ESTALE])
    yield "memfd_create", call(319, 279, b"x", 0)
    yield "read an inherited descriptor", lambda: any_of(lambda number: os.read(number, 0), range(2, 64))
    yield "write elsewhere than to the answer", lambda: any_of(lambda number: os.write(number, b"x"), range(2, 64))
    yield "send a request to the reader server", lambda: any_of(request, range(64))
    yield "receive what the reader server is sent", lambda: any_of(receive_request, range(64))
    yield "duplicate a descriptor", lambda: os.dup(1)
    yield "pipe", os.pipe
    yield "ioctl", call(16, 29, 0, 0x541B, ctypes.create_string_buffer(8))  # FIONREAD


def seqpacket(number: int) -> socket.socket:
    """The socket to the reader server, if an inherited descriptor is one."""
    inherited = socket.socket(fileno=number)
    if inherited.type != socket.SOCK_SEQPACKET:
        inherited.detach()
        raise OSError(errno.EPROTOTYPE, os.strerror(errno.EPROTOTYPE))
    return inherited


def request(number: int) -> None:
    socket.send_fds(seqpacket(number), [b"{}"], [0, 1, 1])


def receive_request(number: int) -> None:
    with suppress(BlockingIOError):
        seqpacket(number).recv(1, socket.MSG_DONTWAIT)


def any_of(act: Callable[[int], object], numbers: range) -> None:
    """Raises OSError if it raises for all of them."""
    for number in numbers:
        with suppress(OSError):
            act(number)
            return
    raise OSError(errno.EBADF, "none")


def of_network(targets: Targets) -> Iterator[tuple[str, Attempt]]:
    def connect(family: int, kind: int, address: Any) -> Attempt:
        def act() -> None:
            with socket.socket(family, kind) as client:
                client.connect(address)
                client.send(b"x")

        return act

    def listen(family: int, address: Any) -> Attempt:
        def act() -> None:
            with socket.socket(family) as server:
                server.bind(address)
                server.listen()

        return act

    yield "TCP connect", connect(socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", targets.tcp))
    yield "UDP send", connect(socket.AF_INET, socket.SOCK_DGRAM, ("127.0.0.1", targets.udp))
    yield "Unix socket", connect(socket.AF_UNIX, socket.SOCK_STREAM, targets.unix)
    yield "abstract socket", connect(socket.AF_UNIX, socket.SOCK_STREAM, "\0" + targets.abstract)
    yield "TCP listen", listen(socket.AF_INET, ("127.0.0.1", 0))
    yield "Unix listen", listen(socket.AF_UNIX, f"{targets.folder}/listening")
    for family in ("AF_INET6", "AF_NETLINK", "AF_PACKET", "AF_VSOCK", "AF_ALG"):
        number = getattr(socket, family)
        yield f"socket {family}", partial(socket.socket, number, socket.SOCK_RAW if number == 17 else 2)
    yield "socketpair", socket.socketpair


def of_kernel(parent: int) -> Iterator[tuple[str, Attempt]]:
    room = ctypes.create_string_buffer(256)
    yield "io_uring", call(425, 425, 8, room)
    yield "userfaultfd", call(323, 282, 1)
    yield "bpf", call(321, 280, 0, struct.pack("IIIIxxxx", 2, 4, 4, 1) + bytes(100), 72)
    yield "perf_event_open", call(298, 241, struct.pack("IIQ", 1, 112, 0) + bytes(96), 0, -1, -1, 0)
    yield "keyctl", call(250, 219, 0, -3, 1)
    yield "add_key", call(248, 217, b"user", b"x", b"x", 1, -2)
    yield "prepare a mount", call(430, 430, b"tmpfs", 0)  # fsopen
    yield "unshare a user namespace", lambda: checked(libc.unshare(0x10000000))
    yield "unshare files", lambda: checked(libc.unshare(0x400))
    yield "setns", lambda: checked(libc.setns(1, 0), errno.EINVAL)
    yield "chroot", lambda: os.chroot("/")
    yield "personality", lambda: checked(libc.personality(0xFFFFFFFF))
    # Found or not, nothing is made that would stay.
    yield "shared memory", call(29, 194, 1, 0, 0, also=[errno.ENOENT])
    yield "message queue", call(68, 186, 1, 0, also=[errno.ENOENT])
    yield "semaphore", call(64, 190, 1, 0, 0, also=[errno.ENOENT])
    yield "fanotify", call(300, 262, 0, 0)
    yield "timer", call(222, 107, 0, 0, room)
    yield "interval timer", lambda: signal.setitimer(signal.ITIMER_REAL, 0)
    yield "kernel log", lambda: checked(libc.klogctl(10, None, 0))
    yield "epoll", call(291, 20, 0)
    yield "event descriptor", call(290, 19, 0, 0)
    yield "clock of another process", call(228, 113, ~parent << 3 | 2, room)
    yield "raise its limits", lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    yield "another Landlock ruleset", call(444, 444, 0, 0, 1)


def of_itself() -> Iterator[tuple[str, Attempt]]:
    yield "be root", lambda: os.setuid(0)
    yield "be dumpable", lambda: checked(libc.prctl(4, 1, 0, 0, 0))
    yield "ignore the CPU limit", lambda: signal.signal(signal.SIGXCPU, signal.SIG_IGN)

    def executable_memory() -> None:
        libc.mmap.restype = ctypes.c_void_p
        address = libc.mmap(None, ctypes.c_size_t(4096), 7, 0x22, -1, ctypes.c_long(0))
        checked(-1 if address == ctypes.c_void_p(-1).value else 0)

    yield "executable memory", executable_memory
    page = ctypes.create_string_buffer(8192)
    start_of = ctypes.c_void_p(ctypes.addressof(page) + 4095 & ~4095)
    yield "make memory executable", lambda: checked(libc.mprotect(start_of, ctypes.c_size_t(4096), 7))

    def fork() -> None:
        if os.fork() == 0:
            os._exit(0)

    def thread() -> None:
        try:
            threading.Thread(target=int).start()
        except RuntimeError as error:
            raise OSError(errno.EAGAIN, str(error)) from error

    yield "fork", fork
    yield "thread", thread
    yield "clone3", call(435, 435, 0, 0, also=[errno.EINVAL, errno.EFAULT])
    # A wrong address for the arguments, so that it does not really start.
    yield "exec", call(59, 221, b"/bin/sh", 1, 0, also=[errno.EFAULT])
    yield "execveat", call(322, 281, -100, b"/bin/sh", 1, 0, 0, also=[errno.EFAULT])
