"""Files that callers send: their text, read in a process of its own, with limits. Knows no format.

What parses a stranger's file may crash, hang, or take all memory. So it is another process that does: it gets the
bytes, no secrets and no time to spare, and whatever becomes of it, the caller gets a text or an `InputError`.
What that process can still do is in `sandbox.py`.
"""

import atexit
import codecs
import json
import logging
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import anyio
from pydantic import TypeAdapter, ValidationError

from chains.cancellable import checkpoint, run_cancellable
from chains.documents.formats import FIELD, FileLimits, FileText, Refusal
from chains.documents.reader_process import ReaderProcess, ReaderServer, command
from chains.documents.sandbox import Protections, hide_memory
from chains.errors import TooLarge, UnreadableFile

__all__ = ["FileLimits", "FileReader", "FileText", "protect", "protections"]

log = logging.getLogger(__name__)

READER = Path(__file__).with_name("file_reader.py")
SERVER = ReaderServer(READER)
"""What all readers of this process share: a server takes 0.3 s of CPU time to start, and 30 MB of memory."""
atexit.register(SERVER.close)
BYTES_PER_CHARACTER = 4
"""The most that UTF-8 takes for one."""
MAX_LINE = 2**16
"""Bytes of the line of JSON in an answer."""
PIECE = 2**20
"""Bytes that are handed to the reader at once: they are copied."""
PROTECTIONS_TIMEOUT_S = 10


@dataclass(frozen=True, slots=True)
class Answer:
    """What the reading process sends as JSON, in one line. The text of the file follows it: parsing millions of
    characters as JSON would hold the interpreter's lock for half a second."""

    result: FileText | Refusal
    cpu_s: float
    """What reading the file took, without starting the process."""


ANSWER = TypeAdapter(Answer)


class FileReader:
    """Reads the files of one request: PDF, DOCX, HTML, Markdown and plain text, a few at once.

    `FileLimits.timeout_s` and `FileLimits.cpu_s` are for all files that one `FileReader` reads.
    """

    def __init__(
        self,
        limits: FileLimits | None = None,
        *,
        turn: Callable[[], AbstractAsyncContextManager[Any]] | None = None,
        on_text: Callable[[int], None] | None = None,
    ) -> None:
        """Make a reader.

        Args:
            limits: Of each file, and of all together.
            turn: Entered to read a file; one that several readers share, for the files of all. None: this reader's
                own, for two files at once.
            on_text: Called with the bytes of memory that a text takes, before the turn ends. What it raises, `read`
                raises.
        """
        own = anyio.CapacityLimiter(2)
        self.limits = limits or FileLimits()
        self.turn = turn or (lambda: own)
        self.on_text = on_text
        self.left_s = self.limits.timeout_s
        self.cpu_left_s = self.limits.cpu_s

    async def read(self, content: bytes) -> FileText:
        """Read one file; what it is is found from its bytes.

        Raises:
            UnreadableFile: Broken, locked, empty, of no known type; or it takes more memory than is allowed, or more
                time than the request's files before it have left.
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
            began_s = time.monotonic()
            # All bytes of a request give it time, whatever file they are in.
            self.cpu_left_s += len(content) * self.limits.cpu_s_per_mib / 2**20
            try:
                said = await self.run(content, self.cpu_left_s)
                answer = await run_cancellable(parse, said)
            finally:
                self.left_s -= time.monotonic() - began_s
            # The process could claim to have taken no time. It can't take more than it was granted, or than `left_s`.
            self.cpu_left_s -= max(0.0, answer.cpu_s)
            read = await run_cancellable(text_of, answer.result)
            if self.on_text is not None:
                self.on_text(sys.getsizeof(read.text))
            return read

    async def run(self, content: bytes, cpu_s: float) -> list[bytes]:
        """Run the reading process to its end, and return what it said, as it came."""
        if self.left_s <= 0 or cpu_s <= 0:
            raise self.too_slow()
        limits = json.dumps({**asdict(self.limits), "granted_cpu_s": cpu_s})
        try:
            with anyio.fail_after(self.left_s):
                async with SERVER.process(limits) as process:
                    said = await converse(process, content, self.limits.max_text * BYTES_PER_CHARACTER + 2**16)
                    code = await process.wait()
        except TimeoutError:
            raise self.too_slow() from None
        if code == -signal.SIGXCPU:
            raise self.too_slow()
        if code != 0:
            memory = f"{self.limits.max_memory >> 20:,} MiB"
            message = f"the file made its reader crash: it is damaged, or needs more memory than {memory}"
            raise UnreadableFile(FIELD, message)
        return said

    def too_slow(self) -> UnreadableFile:
        """What to raise when the time for the request's files is over."""
        limits = self.limits
        return UnreadableFile(
            FIELD,
            f"the files of the request took too long to read: at most {limits.timeout_s:g} s, and of the CPU "
            f"{limits.cpu_s:g} s and {limits.cpu_s_per_mib:g} s for each MiB",
        )


async def converse(process: ReaderProcess, content: bytes, max_answer: int) -> list[bytes]:
    """Hand the content to the process and hear it out. Raises UnreadableFile for more than `max_answer` bytes."""
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


def parse(said: list[bytes]) -> Answer:
    """Parse what the process said: a line of JSON, then the text. Raises UnreadableFile."""
    line, pieces = bytearray(), iter(said)
    rest = b""
    for piece in pieces:
        before, is_end, rest = piece.partition(b"\n")
        line += before
        if is_end or len(line) > MAX_LINE:
            break
    try:
        answer = ANSWER.validate_json(bytes(line), strict=True)
        text = "".join(decoded(rest, pieces))
    except (ValidationError, UnicodeDecodeError):
        raise UnreadableFile(FIELD, "the file made its reader talk nonsense") from None
    if isinstance(answer.result, FileText):
        return replace(answer, result=replace(answer.result, text=text))
    return answer


def decoded(first: bytes, others: Iterator[bytes]) -> Iterator[str]:
    """Decode UTF-8 piece by piece. Raises UnicodeDecodeError."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    yield decoder.decode(first)
    for piece in others:
        checkpoint()
        yield decoder.decode(piece)
    yield decoder.decode(b"", final=True)


def text_of(result: FileText | Refusal) -> FileText:
    """Return a text; raise UnreadableFile or TooLarge if there is none."""
    if isinstance(result, Refusal):
        raise (TooLarge if result.refused == "TooLarge" else UnreadableFile)(FIELD, result.message)
    if not result.text.strip():  # which no reader of ours answers
        raise UnreadableFile(FIELD, "the file's reader answered without a text")
    return result


def protections() -> Protections:
    """Run the reading process without a file, and return which protections are in effect in it.

    Raises:
        OSError: It cannot be started.
        ValueError: It did not answer.
    """
    try:
        ran = subprocess.run(
            command(READER, "protections"),
            capture_output=True,
            cwd="/",
            env={},
            timeout=PROTECTIONS_TIMEOUT_S,
            check=True,
        )
    except subprocess.SubprocessError as error:
        raise ValueError(f"the process that reads files does not work: {error}") from error
    return TypeAdapter(Protections).validate_json(ran.stdout)


def protect() -> None:
    """Hide this process's memory from others of its user, and log what the kernel can't protect it from.

    For a service at its start.
    """
    missing = []
    if not hide_memory():
        missing.append("PR_SET_DUMPABLE (processes of the same user can read this service's memory and environment)")
    try:
        missing += protections().missing()
    except (OSError, ValueError) as error:
        missing.append(f"all that its check should have shown ({error})")
    if missing:
        log.warning("Files are read by a process without %s", "; without ".join(missing))
