"""A real nginx in front of a server, for tests that come through a proxy."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
from langserve import RemoteRunnable

from tests.server import Server, free_port

START_TIMEOUT_S = 20

LOCATION = """\
location /llama/ {
    proxy_pass http://127.0.0.1:8000/;
    proxy_http_version 1.1;
    proxy_set_header Host $http_host;
    proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;
    proxy_set_header X-Forwarded-Proto $scheme;
    proxy_read_timeout 600s;
    client_max_body_size 32m;
}
"""
"""What nginx needs to be told for a service with SERVE_ROOT_PATH=/llama."""

CONFIG = """\
daemon off;
master_process off;  # its workers would be another user's, to whom the folder of a test is closed
pid {folder}/pid;
error_log {folder}/error.log;
events {{}}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    server {{
        listen 127.0.0.1:{port};
{location}
    }}
}}
"""


def find_nginx() -> str | None:
    """Where nginx is, if it is installed. Only root has the folder for it on the PATH."""
    return shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/local/sbin:/usr/sbin")


class Nginx:
    """Runs nginx on a free port of the loopback interface. Use it as a context manager: inside it, it answers.

    Args:
        folder: An empty one for its files.
        server: What is behind it.
        location: Its configuration, for a server on port 8000.
    """

    def __init__(self, folder: Path, server: Server, *, location: str = LOCATION) -> None:
        self.folder = folder
        self.server = server
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}/llama"
        self._location = location.replace("127.0.0.1:8000", f"127.0.0.1:{server.port}")
        self.process: subprocess.Popen[bytes]

    def __enter__(self) -> Self:
        nginx = find_nginx()
        assert nginx, "no nginx is installed on this machine"
        config = self.folder / "nginx.conf"
        config.write_text(CONFIG.format(folder=self.folder, port=self.port, location=self._location))
        self.process = subprocess.Popen(
            [nginx, "-c", config, "-p", self.folder, "-e", self.folder / "error.log"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
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
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(30)

    def chain(self, name: str) -> RemoteRunnable[Any, Any]:
        """A hosted chain, as `Server.chain`."""
        limits = httpx.Limits(max_keepalive_connections=0)
        return RemoteRunnable(f"{self.url}/{name}", timeout=100, client_kwargs={"limits": limits})

    def _wait(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise RuntimeError(f"nginx ended with {self.process.returncode}:\n{self._log()}")
            try:
                httpx.get(f"{self.url}/health")
            except httpx.TransportError:
                time.sleep(0.05)
            else:
                return
        raise TimeoutError(f"nginx does not answer after {START_TIMEOUT_S} s:\n{self._log()}")

    def _log(self) -> str:
        log = self.folder / "error.log"
        return log.read_text() if log.exists() else ""
