"""The process that forks a process for each file: a loop over requests, their ends, and the ends of the children.

Standard library only, and knows no format. `file_reader.py` runs it once everything that reading takes is imported; the
service's side of it is `reader_process.py`. It passes descriptors on and never reads from them, so that its memory,
which every child starts with, holds nothing of any file.

The trade-off of forking: all children of one server share its address-space layout, its stack canary and its hash
seed. What one hostile file finds out about them holds for the next files too, where a process that is started for each
file has its own. So the service replaces a server after some crashes, as guessing at the layout ends in crashes.
"""

import gc
import os
import resource
import selectors
import signal
import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from chains.documents.sandbox import MAX_DESCRIPTORS

MAX_MESSAGE = 2**16


@dataclass(frozen=True, slots=True)
class Child:
    """A process that reads one file."""

    pid: int
    control: socket.socket
    """The service closes its end to have the process killed; otherwise it gets the exit status."""


class ForkServer:
    """Forks a process for each request of the service, until the service closes its end of the socket.

    A request is one message with three descriptors: the stdin and stdout of the child, and its control socket. The end
    of a control socket without an exit status says that the child could not be forked.
    """

    def __init__(self, requests: socket.socket, work: Callable[[str], None]) -> None:
        """Make a server.

        Args:
            requests: The end of a SOCK_SEQPACKET pair.
            work: What a child does with its message.
        """
        self.requests = requests
        self.work = work
        self.children: dict[int, Child] = {}
        self.is_open = True
        self.selector = selectors.DefaultSelector()

    def run(self) -> None:
        """Serve until the service closes its end, and until the children that it still waits for have ended."""
        # Children close the descriptors below this number; there are no others.
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        most = MAX_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MAX_DESCRIPTORS)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        # systemd sends SIGTERM to all processes of a service that may first finish its requests, a terminal SIGINT.
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        wakeup, wake = socket.socketpair()
        for end in (wakeup, wake):
            end.setblocking(False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
        self.selector.register(self.requests, selectors.EVENT_READ, self.accept)
        self.selector.register(wakeup, selectors.EVENT_READ, partial(self.reap, wakeup))
        # The children leave the memory shared that their garbage collectors do not look at.
        gc.collect()
        gc.freeze()
        while self.is_open or self.children:
            for key, _ in self.selector.select():
                key.data()

    def accept(self) -> None:
        """Fork a child for the next request, if there is one."""
        message, descriptors, _, _ = socket.recv_fds(self.requests, MAX_MESSAGE, 3)
        try:
            if not message:
                self.is_open = False
                self.selector.unregister(self.requests)
            elif len(descriptors) == 3:
                stdin, stdout, control = descriptors
                self.fork(message.decode(), stdin, stdout, control)
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def fork(self, message: str, stdin: int, stdout: int, control: int) -> None:
        """Fork a child, unless the system has no process left."""
        with suppress(OSError):
            own_control = socket.socket(fileno=os.dup(control))
            try:
                pid = os.fork()
            except OSError:
                own_control.close()
                raise
            if pid == 0:
                self.be_child(message, stdin, stdout)
            child = self.children[pid] = Child(pid, own_control)
            self.selector.register(own_control, selectors.EVENT_READ, partial(self.kill, child))

    def be_child(self, message: str, stdin: int, stdout: int) -> None:
        """In a child: leave everything that is the server's or another child's, do the work and end."""
        try:
            os.dup2(stdin, 0)
            os.dup2(stdout, 1)
            # Descriptor 2 is the server's: /dev/null.
            os.closerange(3, MAX_DESCRIPTORS)
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            self.work(message)
            os._exit(0)
        finally:
            # No traceback can be shown, and the loop is the server's.
            os._exit(1)

    def kill(self, child: Child) -> None:
        """Kill a child, with what it may have started, as the service wants no more of it."""
        self.selector.unregister(child.control)
        # It may not have made its process group yet. Until it is waited for, no other process has its number.
        for kill in (os.killpg, os.kill):
            with suppress(OSError):
                kill(child.pid, signal.SIGKILL)

    def reap(self, wakeup: socket.socket) -> None:
        """Report the exit status of each child that has ended."""
        with suppress(BlockingIOError):
            while wakeup.recv(4096):
                pass
        for child in list(self.children.values()):
            pid, status = os.waitpid(child.pid, os.WNOHANG)
            if pid == 0:
                continue
            del self.children[child.pid]
            with suppress(KeyError):
                self.selector.unregister(child.control)
            with child.control, suppress(OSError):
                child.control.send(str(os.waitstatus_to_exitcode(status)).encode())
