"""Renders chat templates in processes of their own, which end when a template takes too long or too much.

A template comes with a downloaded checkpoint: it may loop for ever, or make a string of a gigabyte, perhaps only for
some conversation. In this process nothing could end it, and a single operation could hold the interpreter's lock for
minutes. `template_worker.py` is what runs there. Knows no messages and no tokenizers.
"""

import atexit
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from llm.errors import InvalidMessage, LLMError, UnsupportedModel

CPU_S = 2.0
"""CPU seconds that rendering one prompt may take. Real templates take 20 ms for 10,000 messages."""
WALL_S = 60.0
"""The same on the clock, should the machine be so busy that the worker gets no CPU time."""
MAX_MEMORY = 512 << 20
"""Bytes of address space of a worker, the interpreter's own included."""
MAX_CHARS = 1_000_000
MAX_GROWTH = 10
"""A prompt may have `MAX_CHARS`, or this many times as many characters as the conversation if that is more."""
MAX_WORKERS = 2
_LENGTH_BYTES = 8
_MAX_KIND = 64
"""Bytes of an answer besides its text."""
_LAST_S = 5.0
"""Seconds for a process to end that has closed its output."""


class TemplateRefusal(LLMError):
    """The template raised an error: this conversation is not for it. The message is the template's own."""


class TemplateRenderer:
    """Renders templates. Any number of threads may call it; `MAX_WORKERS` of them at once are served."""

    def __init__(self) -> None:
        self._places = threading.BoundedSemaphore(MAX_WORKERS)
        self._idle: list[_Worker] = []
        self._lock = threading.Lock()

    def render(self, template: str, variables: Mapping[str, Any]) -> str:
        """Render a template.

        Args:
            template: Jinja, as transformers' `apply_chat_template` takes it.
            variables: What it is given: `messages`, `add_generation_prompt`, special tokens. JSON alone.

        Raises:
            InvalidMessage: It takes too long, too much memory, or writes too much for this conversation.
            TemplateRefusal: It raised an error.
            UnsupportedModel: It is not valid Jinja, or there is no process to render it in.
        """
        rest = json.dumps(variables, ensure_ascii=False)
        max_chars = max(MAX_CHARS, MAX_GROWTH * len(rest))
        limits = json.dumps({"template": template, "max_chars": max_chars, "cpu_s": CPU_S})
        request = f'{limits[:-1]}, "variables": {rest}}}'.encode()
        with self._places:
            kind, text = self._ask(request, max_chars)
        match kind:
            case "prompt":
                return text
            case "too long":
                raise _excess(f"writes more than {max_chars} characters", variables)
            case "too much memory":
                raise _excess(f"needs more than {MAX_MEMORY >> 20} MiB of memory", variables)
            case "too slow":
                raise _excess(f"takes more than {CPU_S:g} s of CPU time", variables)
            case "no answer":
                raise _excess(f"was not done after {WALL_S:g} s", variables)
            case "broken":
                raise UnsupportedModel(f"the checkpoint's chat template is broken: {text}")
            case "ended":
                raise UnsupportedModel(f"the process that renders the checkpoint's chat template has ended {text}")
        raise TemplateRefusal(text)

    def _ask(self, request: bytes, max_chars: int) -> tuple[str, str]:
        worker = self._take()
        try:
            answer = worker.ask(request, max_bytes=4 * max_chars + _MAX_KIND)
        except TimeoutError:
            worker.close()
            return "no answer", ""
        except (OSError, EOFError):
            return worker.how_it_ended()
        except BaseException:
            worker.close()
            raise
        with self._lock:
            self._idle.append(worker)
        return answer

    def _take(self) -> "_Worker":
        with self._lock:
            while self._idle:
                worker = self._idle.pop()
                if worker.is_usable:
                    return worker
                worker.close()
        return _Worker()

    def close(self) -> None:
        """End the processes that wait for work. Others are started when they are needed."""
        with self._lock:
            idle, self._idle = self._idle, []
        for worker in idle:
            worker.close()


def _excess(what: str, variables: Mapping[str, Any]) -> InvalidMessage:
    count = len(variables.get("messages", ()))
    return InvalidMessage("messages", f"the model's chat template {what} for this conversation of {count} messages")


@cache
def shared_renderer() -> TemplateRenderer:
    """The renderer of this process. Its workers end with it."""
    renderer = TemplateRenderer()
    atexit.register(renderer.close)
    return renderer


class _Worker:
    """One process, which answers one request after the other."""

    def __init__(self) -> None:
        self._owner = os.getpid()
        ours, theirs = socket.socketpair()
        # It needs no variable of ours, among which there are keys and tokens; but the same modules.
        environment = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONDONTWRITEBYTECODE": "1"}
        script = Path(__file__).with_name("template_worker.py")
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(script), str(MAX_MEMORY)],
                stdin=theirs.fileno(),
                stdout=theirs.fileno(),
                stderr=subprocess.DEVNULL,
                env=environment,
                start_new_session=True,  # Ctrl-C is for us
            )
        except OSError as error:
            ours.close()
            raise UnsupportedModel(f"no process can be started for the chat template: {error}") from error
        finally:
            theirs.close()
        self._socket = ours

    @property
    def is_usable(self) -> bool:
        """False once it has ended, and in a process that was forked from the one that started it."""
        return self._owner == os.getpid() and self._process.poll() is None

    def how_it_ended(self) -> tuple[str, str]:
        """Why there is no answer, in the form of one."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_LAST_S)
        code = self._process.returncode
        self.close()
        if code == -signal.SIGPROF:
            return "too slow", ""
        if code == -signal.SIGKILL:  # by the kernel, for lack of memory
            return "too much memory", ""
        return "ended", f"by signal {-code}" if code and code < 0 else f"with code {code}"

    def ask(self, request: bytes, *, max_bytes: int) -> tuple[str, str]:
        """Send a request and wait for its answer. Raises OSError or EOFError if there is none in time."""
        deadline = time.monotonic() + WALL_S
        self._socket.settimeout(WALL_S)
        self._socket.sendall(len(request).to_bytes(_LENGTH_BYTES) + request)
        length = int.from_bytes(self._receive(_LENGTH_BYTES, deadline))
        if length > max_bytes:
            self._process.kill()
            raise EOFError("an answer that no worker of ours gives")
        kind, _, text = self._receive(length, deadline).decode().partition("\n")
        return kind, text

    def _receive(self, count: int, deadline: float) -> bytes:
        buffer = memoryview(bytearray(count))
        filled = 0
        while filled < count:
            self._socket.settimeout(max(0.001, deadline - time.monotonic()))
            received = self._socket.recv_into(buffer[filled:])
            if not received:
                raise EOFError("the worker has ended")
            filled += received
        return bytes(buffer)

    def close(self) -> None:
        """End the process."""
        self._socket.close()
        if self._owner == os.getpid():
            self._process.kill()
            self._process.wait()
