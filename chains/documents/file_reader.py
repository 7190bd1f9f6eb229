"""The process that reads one file and ends: content on stdin, JSON on stdout.

`reader_process.py` starts it as a script: with "serve", as a server that loads everything once and forks a process for
each file; where it can't fork, for one file, with its limits as the argument. Whatever reads a file enters its sandbox
before it looks at the first byte of what it was given.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from contextlib import suppress
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from chains.documents.formats import FileText, Refusal

CHAINS = Path(__file__).parent.parent
AT_ONCE = 2**20
"""Bytes that are read at once."""


def find_modules() -> None:
    """Make the modules below `chains` importable, without the package's own imports: LangChain takes long to import."""
    package = sys.modules["chains"] = ModuleType("chains")
    package.__path__ = [str(CHAINS)]


def load() -> None:
    """Import whatever reading may need: in the sandbox no file can be opened."""
    import encodings
    import pwd  # noqa: F401

    import charset_normalizer  # noqa: F401
    import orjson  # noqa: F401

    import chains.documents.formats.detect  # noqa: F401

    for codec in iter_modules(encodings.__path__):
        # Some are for other systems.
        with suppress(ImportError):
            import_module(f"encodings.{codec.name}")


def answer(content: bytes, limits: dict[str, Any]) -> FileText | Refusal:
    """Read a file, whatever it is."""
    from chains.documents.formats import FileLimits, Refusal
    from chains.documents.formats.detect import read
    from chains.errors import InputError, TooLarge

    try:
        return read(content, FileLimits(**limits))
    except InputError as error:
        return Refusal("TooLarge" if isinstance(error, TooLarge) else "UnreadableFile", str(error))
    except MemoryError:
        memory = f"{limits['max_memory'] >> 20:,} MiB"
        return Refusal("UnreadableFile", f"the file needs more memory than {memory} to be read")
    except RecursionError:
        return Refusal("UnreadableFile", "the file is damaged: it is nested too deeply")


def receive() -> bytes:
    """Read stdin to its end."""
    parts = []
    while part := os.read(0, AT_ONCE):
        parts.append(part)
    return b"".join(parts)


def send(said: bytes) -> None:
    """Write all of it to stdout."""
    left = memoryview(said)
    while left:
        left = left[os.write(1, left) :]


def read_file(argument: str) -> None:
    """Read the file on stdin within the limits that the argument gives, and write its text to stdout."""
    import orjson

    from chains.documents import sandbox

    limits = json.loads(argument)
    sandbox.lower_priority()
    sandbox.hide_memory()
    sandbox.enter(max_memory=limits["max_memory"], cpu_s=limits.pop("granted_cpu_s"))
    began_s = time.process_time()
    result = answer(receive(), limits)
    text = getattr(result, "text", "")
    about = {**asdict(result), "text": ""} if text else asdict(result)
    send(orjson.dumps({"result": about, "cpu_s": time.process_time() - began_s}) + b"\n")
    for start in range(0, len(text), AT_ONCE):
        send(text[start : start + AT_ONCE].encode())


def serve() -> None:
    """Fork a process for each file that the service sends through the socket that is stdin."""
    from chains.documents import sandbox
    from chains.documents.fork_server import ForkServer

    # At the service's priority, as it also has to kill what takes too long.
    sandbox.hide_memory()
    load()
    ForkServer(socket.socket(fileno=0), read_file).run()


def main(argument: str) -> None:
    """Read files ("serve"), print which protections are in effect ("protections"), or read one file within limits."""
    find_modules()
    from chains.documents import sandbox

    if argument == "serve":
        serve()
        return
    sandbox.lower_priority()
    if argument == "protections":
        protections = sandbox.enter(max_memory=2**30, cpu_s=5)
        send(json.dumps(asdict(protections)).encode())
        return
    load()
    read_file(argument)


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except BaseException:
        # No traceback can be shown, and the interpreter's own way out needs system calls that are refused.
        os._exit(1)
    os._exit(0)
