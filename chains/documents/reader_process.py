"""The processes that read files, as the service sees them: forked by a server that has loaded everything, or started.

Starting one takes 0.3 s of CPU time for its imports, forking one takes some milliseconds. What a forked one shares with
the others is in `fork_server.py`. Knows no file and no limit.
"""

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import anyio
from anyio.abc import ByteReceiveStream, ByteSendStream, Process, UNIXSocketStream

CAN_FORK = sys.platform == "linux"
"""Elsewhere a process is started for each file: macOS has no SOCK_SEQPACKET, and its libraries do not survive forks."""
MAX_CRASHES = 16
"""A server is replaced after so many: its children share one address-space layout, and guesses at it end in crashes."""
CRASHES = {
    -number
    for number in (signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGABRT, signal.SIGFPE, signal.SIGTRAP)
    + ((signal.SIGSYS,) if sys.platform == "linux" else ())
}
LOST = -signal.SIGKILL
"""The exit code of a process whose server has died, which kills it, or could not fork it."""
KILL_TIMEOUT_S = 5.0
"""How long a server may take to kill a process. Then the server is killed, and so are all its processes."""
CLOSE_TIMEOUT_S = 1.0
"""How long a server that is closed may take to end, before it is killed."""
BUSY_S = 0.01
"""How long to wait before the next attempt to hand a request to a server that has too many to take."""


class ReaderProcess(Protocol):
    """One process that reads one file."""

    @property
    def stdin(self) -> ByteSendStream:
        """Where it gets the file."""

    @property
    def stdout(self) -> ByteReceiveStream:
        """What it answers."""

    async def wait(self) -> int:
        """Wait for its end; return its exit code, that of a signal below zero."""


@dataclass(slots=True, eq=False)
class RunningServer:
    """One process of a `ReaderServer`."""

    process: "subprocess.Popen[bytes]"
    requests: socket.socket
    service_pid: int
    num_crashes: int = 0


class ReaderServer:
    """Starts processes that read files. One serves all threads and event loops of a Python process.

    Its own process starts with the first file, ends with the service, and is replaced at the next file once it is dead,
    cannot fork, or has seen `MAX_CRASHES`.
    """

    def __init__(self, script: Path) -> None:
        """Start nothing yet.

        Args:
            script: `file_reader.py`.
        """
        self.script = script
        self._lock = threading.Lock()
        self._running: RunningServer | None = None
        self._retired: list[subprocess.Popen[bytes]] = []

    def process(self, limits: str) -> AbstractAsyncContextManager[ReaderProcess]:
        """Run a process within `limits`, which are JSON. It is dead when the context ends."""
        return self._forked(limits) if CAN_FORK else started(self.script, limits)

    def retire(self) -> None:
        """Let the server end with the files that it reads now. The next file starts another."""
        with self._lock:
            if self._running is not None:
                self._retire(self._running)

    def close(self) -> None:
        """End the server, with those that were retired before. Whatever they still read is lost."""
        self.retire()
        for process in self._retired:
            try:
                process.wait(CLOSE_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    @asynccontextmanager
    async def _forked(self, limits: str) -> AsyncIterator[ReaderProcess]:
        with ExitStack() as sockets:
            pairs = [tuple(map(sockets.enter_context, socket.socketpair())) for _ in range(3)]
            stdin, stdout, control = [await UNIXSocketStream.from_socket(ours) for ours, _ in pairs]
            try:
                server = await self._request(limits, [theirs.fileno() for _, theirs in pairs])
                for _, theirs in pairs:
                    theirs.close()  # else the ends of their streams would not be seen
                process = ForkedProcess(stdin, stdout, control)
                try:
                    yield process
                finally:
                    with anyio.CancelScope(shield=True):
                        await process.end()
                    self._note_end(server, process)
            finally:
                with anyio.CancelScope(shield=True):
                    for stream in (stdin, stdout, control):
                        await stream.aclose()

    async def _request(self, limits: str, descriptors: list[int]) -> RunningServer:
        """Hand a request to the server as soon as it has room for it."""
        while True:
            server = self._send(limits.encode(), descriptors)
            if server is not None:
                return server
            await anyio.sleep(BUSY_S)

    def _send(self, message: bytes, descriptors: list[int]) -> RunningServer | None:
        """Send a request to a living server. Returns None if it has no room for it. Never waits."""
        with self._lock:
            server = self._living()
            try:
                socket.send_fds(server.requests, [message], descriptors)
            except BlockingIOError:
                return None
            except (BrokenPipeError, ConnectionResetError):
                self._retire(server)
                server = self._living()
                socket.send_fds(server.requests, [message], descriptors)
            return server

    def _living(self) -> RunningServer:
        """The server; started if there is none. With the lock."""
        if self._running is not None and self._running.service_pid != os.getpid():
            # This process was forked from the one that started it.
            self._retire(self._running)
        if self._running is None:
            self._retired = [process for process in self._retired if process.poll() is None]
            self._running = self._start()
        return self._running

    def _start(self) -> RunningServer:
        ours, theirs = socket.socketpair(type=socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        with theirs:
            try:
                process = subprocess.Popen(
                    command(self.script, "serve"),
                    stdin=theirs.fileno(),
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    cwd="/",
                    env={},
                    process_group=0,
                )
            except BaseException:
                ours.close()
                raise
        return RunningServer(process, ours, os.getpid())

    def _note_end(self, server: RunningServer, process: "ForkedProcess") -> None:
        """Retire the server if the end of one of its processes says that it should not fork another."""
        with self._lock:
            server.num_crashes += process.code in CRASHES
            if process.is_lost or server.num_crashes >= MAX_CRASHES:
                self._retire(server)
            if process.code is None:
                server.process.kill()

    def _retire(self, server: RunningServer) -> None:
        """Send nothing more to a server: it ends with the processes that it has. With the lock."""
        server.requests.close()
        if self._running is server:
            self._running = None
            self._retired.append(server.process)


class ForkedProcess:
    """A process that a server has forked."""

    def __init__(self, stdin: UNIXSocketStream, stdout: UNIXSocketStream, control: UNIXSocketStream) -> None:
        self.stdin = stdin
        self.stdout = stdout
        self.control = control
        self.code: int | None = None
        self.is_lost = False
        """Whether the server has died or could not fork."""

    async def wait(self) -> int:
        if self.code is None:
            try:
                self.code = int(await self.control.receive())
            except (anyio.EndOfStream, anyio.BrokenResourceError):
                self.code, self.is_lost = LOST, True
        return self.code

    async def end(self) -> None:
        """Kill it unless it has ended, and wait for its end. Its exit code is None if the server does not respond."""
        if self.code is None:
            with suppress(OSError, anyio.BrokenResourceError):
                await self.control.send_eof()
            with anyio.move_on_after(KILL_TIMEOUT_S) as scope:
                await self.wait()
            self.is_lost = self.is_lost or scope.cancelled_caught


class StartedProcess:
    """A process that was started for its file."""

    def __init__(self, process: Process) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self.process = process
        self.stdin = process.stdin
        self.stdout = process.stdout

    async def wait(self) -> int:
        return await self.process.wait()

    async def end(self) -> None:
        """Kill it with all that it may have started, unless it is over; take back what it held."""
        if self.process.returncode is None:
            # It may not have made its process group yet.
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            with suppress(ProcessLookupError):
                self.process.kill()
        await self.process.aclose()


@asynccontextmanager
async def started(script: Path, limits: str) -> AsyncIterator[ReaderProcess]:
    """Start a process for one file, where no server can fork one."""
    process = StartedProcess(
        await anyio.open_process(command(script, limits), stderr=subprocess.DEVNULL, cwd="/", env={})
    )
    try:
        yield process
    finally:
        with anyio.CancelScope(shield=True):
            await process.end()


def command(script: Path, argument: str) -> list[str]:
    """How Python runs the reader's script. Isolated: no variable, directory or user's site decides what it imports."""
    return [sys.executable, "-I", "-B", str(script), argument]
