"""Scripts in the place of what reads a file, for tests of the processes around it."""

import asyncio
import textwrap
from contextlib import suppress
from pathlib import Path

import anyio
import pytest

from chains.documents import files
from chains.documents.reader_process import ReaderServer

HEAD = """
import json, os, sys
def tell(*values, cpu_s=0.0):
    while os.read(0, 2**20):
        pass
    result = {"title": "", "text": "", "kind": "text", "pages": None}
    os.write(1, (json.dumps({"result": result, "cpu_s": cpu_s}) + "\\n" + json.dumps(values)).encode())
    os._exit(0)
"""


class Becomes:
    """Has a script run where a file would be read, before any sandbox.

    In it, `tell(*values)` answers with a text: their JSON. `sys.argv[1]` are the limits.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.monkeypatch = monkeypatch
        self.folder = folder
        self.servers: list[ReaderServer] = []

    def __call__(self, script: str) -> None:
        self.servers.append(ReaderServer(write_reader(self.folder / f"reader-{len(self.servers)}.py", script)))
        self.monkeypatch.setattr(files, "SERVER", self.servers[-1])

    def close(self) -> None:
        for server in self.servers:
            server.close()


def write_reader(path: Path, script: str) -> Path:
    """Write a `file_reader.py` that loads nothing and runs a script instead of reading a file."""
    path.write_text(
        f"""
import runpy, sys
def run(limits):
    sys.argv[1:] = [limits]
    exec({HEAD + textwrap.dedent(script)!r}, {{"__name__": "script"}})
    sys.stdout.flush()
reader = runpy.run_path({str(files.READER)!r})
reader["main"].__globals__.update(load=lambda: None, read_file=run)
reader["main"](sys.argv[1])
"""
    )
    return path


async def written(file: Path) -> list[int]:
    """Wait for a process to write numbers and a newline; return them."""
    for _ in range(1_000):
        with suppress(FileNotFoundError):
            text = await anyio.Path(file).read_text()
            if text.endswith("\n"):
                return [int(each) for each in text.split()]
        await asyncio.sleep(0.01)
    raise AssertionError("the process did not start")
