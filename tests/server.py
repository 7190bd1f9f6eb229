"""A real server in a process of its own, for tests that talk to it over the network."""

import os
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from random import randrange
from types import TracebackType
from typing import Any, Self

import httpx
from langserve import RemoteRunnable

ROOT = Path(__file__).parent.parent
START_TIMEOUT_S = 120
PORTS_PER_WORKER = 3_000


class Server:
    """Runs `serve.py`, or a script or command that serves something like it, on a free port of the loopback interface.

    Use it as a context manager: inside it, `awaited` answers with 200. What it logs goes to `log`.
    """

    def __init__(
        self,
        log: Path,
        *,
        script: str | Path = "serve.py",
        command: Sequence[str] = (),
        arguments: Sequence[str] = (),
        directory: Path = ROOT,
        awaited: str = "/ready",
        certificate: Path | None = None,
        **settings: str,
    ) -> None:
        self.log = log
        self.port = free_port()
        self.url = f"{'http' if certificate is None else 'https'}://127.0.0.1:{self.port}"
        self.trust = ssl.create_default_context(cafile=certificate)
        self.arguments = arguments
        self._command = [*command] or [sys.executable, str(ROOT / script)]
        self._directory = directory
        self._awaited = awaited
        self._settings = {f"SERVE_{name.upper()}": value for name, value in settings.items()}
        self.process: subprocess.Popen[bytes]

    def __enter__(self) -> Self:
        environment = {
            **os.environ,
            "SERVE_PORT": str(self.port),
            **self._settings,
            "PYTHONPATH": str(ROOT),
            "PYTHONFAULTHANDLER": "1",
        }
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*self._command, *self.arguments],
                cwd=self._directory,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        try:
            self._wait()
        except BaseException:
            self.process.kill()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self, timeout_s: float = 30) -> int:
        """Send SIGTERM and return the exit code. Raises TimeoutError with the end of its log if it does not."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGABRT)  # the stacks of its threads go to the log
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(5)
            self.process.kill()
            self.process.wait()
            said = self.log.read_text(errors="replace")[-10_000:]
            raise TimeoutError(f"the server did not end within {timeout_s} s:\n{said}") from None

    def chain(self, name: str, **headers: str) -> RemoteRunnable[Any, Any]:
        """A hosted chain, through LangServe's client.

        It keeps no connections: it would close them when it is collected, which may be after a test's event loop.
        """
        limits = httpx.Limits(max_keepalive_connections=0)
        return RemoteRunnable(f"{self.url}/{name}", timeout=100, headers=headers, client_kwargs={"limits": limits})

    def health(self) -> dict[str, object]:
        """What `/health` says of the engine."""
        engine: dict[str, object] = httpx.get(f"{self.url}/health").json()["engine"]
        return engine

    def _wait(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise RuntimeError(f"the server ended with {self.process.returncode}:\n{self.log.read_text()}")
            try:
                if httpx.get(f"{self.url}{self._awaited}", verify=self.trust).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.1)
        raise TimeoutError(f"the server is not ready after {START_TIMEOUT_S} s:\n{self.log.read_text()}")


def free_port() -> int:
    """A port that nobody has, and nobody gets by chance: below those that the system gives out, and this worker's."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    while True:
        port = 20_000 + worker * PORTS_PER_WORKER + randrange(PORTS_PER_WORKER)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
