"""A server with secrets that gives the probe a file to read, and prints what the probe reached. For test_sandbox.py.

Its argument is JSON: for each reader the script that it runs. The last one is read for by a server that has not hidden
its memory as `serve.py` does.
"""

import asyncio
import json
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import ModuleType

import anyio
import psutil  # type: ignore[import-untyped]
from anyio.abc import TaskStatus

# Without the package's own imports: LangChain takes long to import, and nothing here needs it.
package = sys.modules["chains"] = ModuleType("chains")
package.__path__ = [str(Path(__file__).parent.parent.parent.parent / "chains")]

from chains.documents import files  # noqa: E402
from chains.documents.files import FileLimits, FileReader  # noqa: E402
from chains.documents.reader_process import ReaderServer  # noqa: E402
from chains.documents.sandbox import hide_memory  # noqa: E402
from tests.chains.documents.probe import Targets, drop_capabilities  # noqa: E402


def waiting_reader(server: psutil.Process) -> psutil.Process | None:
    """The process that a reader server has forked, once it is in its sandbox and waits for its file."""
    for child in server.children():
        asleep = 0
        for _ in range(2_000):
            # It computes until it waits for its file.
            asleep = asleep + 1 if child.status() == psutil.STATUS_SLEEPING else 0
            if asleep == 5:
                return child
            time.sleep(0.01)
    return None


async def other_reader(server: ReaderServer, until: anyio.Event, *, task_status: TaskStatus[tuple[int, int]]) -> None:
    """Be the reader of another tenant whose file does not come; report the reader server and its child."""
    limits = json.dumps({**asdict(FileLimits()), "granted_cpu_s": 5.0})
    async with server.process(limits):
        while True:
            for child in psutil.Process().children():
                if waiting := waiting_reader(child):
                    task_status.started((child.pid, waiting.pid))
                    await until.wait()
                    return
            await anyio.sleep(0.01)


async def serve(script: str, *, is_hidden: bool) -> None:
    files.SERVER = ReaderServer(Path(script))
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
    done = anyio.Event()
    async with anyio.create_task_group() as group:
        reader_server, other = await group.start(partial(other_reader, files.SERVER, done))
        # After the start of the reader server, which needs it to find Python.
        if os.geteuid() != 0:
            drop_capabilities()
        if is_hidden:
            hide_memory()
        targets = Targets(
            parent=os.getpid(),
            reader_server=reader_server,
            other_reader=other,
            key_file=str(folder / "keys"),
            environment_file=str(folder / ".env"),
            folder=str(folder),
            tcp=tcp.getsockname()[1],
            udp=udp.getsockname()[1],
            unix=str(folder / "socket"),
            abstract=folder.name,
        )
        found = await FileReader().read(json.dumps(targets._asdict()).encode())
        done.set()
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
