"""Files that callers send: their text, read in a process of its own, with limits. Knows no format.

What parses a stranger's file may crash, hang, or take all memory. So it is another process that does: it gets the
bytes, no secrets and no time to spare, and whatever becomes of it, the caller gets a text or an `InputError`.
"""

import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import orjson
from anyio.abc import Process
from pydantic import TypeAdapter, ValidationError

from chains.documents.formats import FIELD, FileLimits, FileText, Refusal
from chains.errors import TooLarge, UnreadableFile

__all__ = ["FileLimits", "FileReader", "FileText"]

READER = Path(__file__).with_name("file_reader.py")
BYTES_PER_CHARACTER = 6
"""The most that JSON takes for one."""
PIECE = 2**20
"""Bytes that are handed to the reader at once: they are copied."""
ANSWER: TypeAdapter[FileText | Refusal] = TypeAdapter(FileText | Refusal)


class FileReader:
    """Reads PDF, DOCX, HTML, Markdown and plain text, a few files at once; the others wait their turn."""

    def __init__(
        self,
        limits: FileLimits | None = None,
        *,
        turn: Callable[[], AbstractAsyncContextManager[Any]] | None = None,
    ) -> None:
        """Make a reader.

        Args:
            limits: Of each file.
            turn: Entered to read a file; one that several readers share, for the files of all. None: this reader's
                own, for two files at once.
        """
        own = anyio.CapacityLimiter(2)
        self.limits = limits or FileLimits()
        self.turn = turn or (lambda: own)

    async def read(self, content: bytes) -> FileText:
        """Read one file; what it is is found from its bytes.

        Raises:
            UnreadableFile: Broken, locked, empty, of no known type; or it takes more time or memory than is allowed.
            TooLarge: It has more bytes, pages or text than is allowed.
        """
        if not content:
            raise UnreadableFile(FIELD, "the file is empty: it has 0 bytes")
        if len(content) > self.limits.max_file:
            raise TooLarge(
                FIELD,
                f"the file has {len(content):,} bytes; at most {self.limits.max_file:,} are read (SERVE_MAX_FILE)",
            )
        async with self.turn():
            said = await self.run(content)
            return await anyio.to_thread.run_sync(result, said)

    async def run(self, content: bytes) -> list[bytes]:
        """Run the reading process to its end, and return what it said, as it came."""
        process = await anyio.open_process(
            # Isolated: no variable, directory or user's site decides what it imports.
            [sys.executable, "-I", "-B", str(READER), orjson.dumps(asdict(self.limits)).decode()],
            stderr=subprocess.DEVNULL,
            cwd="/",
            env={},
            # Ctrl-C is for the server, which then ends this one.
            start_new_session=True,
        )
        try:
            with anyio.fail_after(self.limits.timeout_s):
                said = await converse(process, content, self.limits.max_text * BYTES_PER_CHARACTER + 2**16)
                code = await process.wait()
        except TimeoutError:
            raise UnreadableFile(FIELD, f"the file took longer than {self.limits.timeout_s:g} s to read") from None
        finally:
            with anyio.CancelScope(shield=True):
                await end(process)
        if code != 0:
            raise UnreadableFile(FIELD, self.why_it_died(code))
        return said

    def why_it_died(self, code: int) -> str:
        """Say what an exit code means, as far as it can be known from outside."""
        if code == -signal.SIGXCPU:
            return f"the file took longer than {math.ceil(self.limits.timeout_s)} s to read"
        memory = f"{self.limits.max_memory >> 20:,} MiB"
        return f"the file made its reader crash: it is damaged, or needs more memory than {memory}"


async def converse(process: Process, content: bytes, max_answer: int) -> list[bytes]:
    """Hand the content to the process and hear it out. Raises UnreadableFile for more than `max_answer` bytes."""
    assert process.stdin is not None
    assert process.stdout is not None
    # It may end before it has read everything; its exit code says why.
    with suppress(anyio.BrokenResourceError, anyio.ClosedResourceError):
        for start in range(0, len(content), PIECE):
            await process.stdin.send(content[start : start + PIECE])
    await process.stdin.aclose()
    parts, length = [], 0
    async for part in process.stdout:
        parts.append(part)
        length += len(part)
        if length > max_answer:
            raise UnreadableFile(FIELD, "the file made its reader talk without end")
    return parts


async def end(process: Process) -> None:
    """Kill the process with all that it may have started, unless it is over; take back what it held."""
    if process.returncode is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    await process.aclose()


def result(said: list[bytes]) -> FileText:
    """Read what the process said: a text, or why there is none. Raises UnreadableFile, TooLarge."""
    try:
        answer = ANSWER.validate_json(b"".join(said), strict=True)
    except ValidationError:
        raise UnreadableFile(FIELD, "the file made its reader talk nonsense") from None
    if isinstance(answer, Refusal):
        raise (TooLarge if answer.refused == "TooLarge" else UnreadableFile)(FIELD, answer.message)
    return answer
