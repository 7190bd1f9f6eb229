"""A server with secrets that gives the probe a file to read, and prints what the probe reached. For test_sandbox.py.

Its argument is JSON: for each reader the script that it runs. The last one is read for by a server that has not hidden
its memory as `serve.py` does.
"""

import asyncio
import ctypes
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import anyio

# Without the package's own imports: LangChain takes long to import, and nothing here needs it.
package = sys.modules["chains"] = ModuleType("chains")
package.__path__ = [str(Path(__file__).parent.parent.parent.parent / "chains")]

from chains.documents import files  # noqa: E402
from chains.documents.files import FileLimits, FileReader  # noqa: E402
from chains.documents.sandbox import hide_memory  # noqa: E402
from tests.chains.documents.probe import Targets  # noqa: E402


def other_reader() -> "subprocess.Popen[bytes]":
    """The reading process of another tenant, in its sandbox and waiting for its file."""
    limits = json.dumps({**asdict(FileLimits()), "granted_cpu_s": 5.0})
    process = subprocess.Popen(
        [sys.executable, "-I", "-B", str(files.READER), limits],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        cwd="/",
        env={},
    )
    asleep = 0
    for _ in range(2_000):
        # It computes until it waits for its file.
        asleep = asleep + 1 if "State:\tS" in Path(f"/proc/{process.pid}/status").read_text() else 0
        if asleep == 5:
            break
        time.sleep(0.01)
    return process


def drop_capabilities() -> None:
    """An ordinary user has none; this one may have come with one, to find Python where root installed it."""
    ctypes.CDLL(None).capset(struct.pack("Ii", 0x20080522, 0), struct.pack("6I", *[0] * 6))


async def serve(script: str, *, is_hidden: bool) -> None:
    files.READER = Path(script)
    folder = Path(tempfile.mkdtemp())
    (folder / "keys").write_text("secret")
    (folder / ".env").write_text("SERVE_API_KEYS=secret")
    for name in ("keys", ".env"):
        (folder / name).chmod(0o600)
    signalled: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: signalled.append(number))
    tcp, udp = socket.create_server(("127.0.0.1", 0)), socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    udp.bind(("127.0.0.1", 0))
    unix, abstract = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
    unix.bind(str(folder / "socket"))
    abstract.bind(f"\0{folder.name}")
    unix.listen()
    abstract.listen()
    with other_reader() as other:
        opened = anyio.open_process

        async def open_process(*arguments: Any, **options: Any) -> Any:
            process = await opened(*arguments, **options)
            if os.geteuid() != 0:
                drop_capabilities()
            if is_hidden:
                hide_memory()
            return process

        anyio.open_process = open_process
        targets = Targets(
            parent=os.getpid(),
            other_reader=other.pid,
            key_file=str(folder / "keys"),
            environment_file=str(folder / ".env"),
            folder=str(folder),
            tcp=tcp.getsockname()[1],
            udp=udp.getsockname()[1],
            unix=str(folder / "socket"),
            abstract=folder.name,
        )
        found = await FileReader().read(json.dumps(targets._asdict()).encode())
        other.kill()
    secret = (folder / "keys").read_text() if (folder / "keys").exists() else "gone"
    shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps({"uid": os.geteuid(), "reached": json.loads(found.text), "signals": signalled, "key": secret}))


def main() -> None:
    scripts = json.loads(sys.argv[1])
    for script in scripts:
        # Each a process of its own: it gives up for good what the next one needs.
        server = os.fork()
        if server == 0:
            asyncio.run(serve(script, is_hidden=script != scripts[-1]))
            sys.stdout.flush()
            os._exit(0)
        if os.waitpid(server, 0)[1] != 0:
            sys.exit(1)


if __name__ == "__main__":
    main()
