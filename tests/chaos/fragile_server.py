"""Serves the hosted chains over a scripted model that speaks at a steady pace, and breaks as the message tells it.

It says the last message again, a byte in a step. Where the message holds one of these words, it comes to this:

FAIL-FIRST     the request fails before its first token
FAIL-BETWEEN   the request fails after half of the message
BREAK-STEP     the step in which its 150th token would be made fails, for all that are in it
BREAK-LOOP     the engine's loop fails before that step, and starts again
DIE            the engine ends for good
"""

import os
import socket
import sys
from collections import deque
from collections.abc import Iterator

from llm.batching_engine import BatchingEngine
from llm.errors import LLMError
from llm.generation import Token
from llm.scripted_engine import Answer, ScriptRunner
from serve import listen, run
from service.settings import read_settings

STEP_S = float(os.environ.get("FRAGILE_STEP_S", "0.002"))
"""Time that a step takes: one byte for everybody."""

SEND_BUFFER = int(os.environ.get("FRAGILE_SEND_BUFFER", "0"))
"""Bytes that the system takes over for a connection; 0: as it likes."""

CONTEXT = 20_000
DUE = 150
"""Tokens."""


def script(message: str) -> Iterator[str]:
    """Say it again, or do as it says."""
    if "FAIL-FIRST" in message:
        raise RuntimeError("secret detail")
    if "FAIL-BETWEEN" in message:
        yield message[: len(message) // 2]
        raise RuntimeError("secret detail")
    if "DIE" in message:
        raise SystemExit("out of luck")
    yield message


class FragileRunner(ScriptRunner):
    """Breaks in ways that concern others, too."""

    def __init__(self, slots: int) -> None:
        super().__init__(script, "scripted", CONTEXT, STEP_S, slots, deque(maxlen=1))
        self._steps_left: dict[Answer, int] = {}
        """Until those break that will."""

    def prefill(self, sequence: Answer) -> None:
        super().prefill(sequence)
        if "BREAK-" in self._prompts[-1]:
            self._steps_left[sequence] = DUE

    def grow(self, sequence: Answer) -> bool:
        if self._is_due(sequence, "BREAK-LOOP"):
            raise RuntimeError("secret detail")
        return True

    def decode(self, sequences: list[Answer]) -> list[Token | LLMError]:
        if any(self._is_due(sequence, "BREAK-STEP") for sequence in sequences):
            raise RuntimeError("secret detail")
        for sequence in self._steps_left:
            self._steps_left[sequence] -= 1
        return super().decode(sequences)

    def release(self, sequence: Answer) -> None:
        self._steps_left.pop(sequence, None)

    def reset(self) -> None:
        self._steps_left.clear()

    def _is_due(self, sequence: Answer, word: str) -> bool:
        if self._steps_left.get(sequence, DUE) > 0:
            return False
        return word in self._backend.decode(sequence.request.prompt)


def main() -> int:
    """Serve it, with buffers as small as wished for."""
    settings = read_settings(sys.argv[1:])
    listener = listen(settings)
    if SEND_BUFFER:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
    slots = settings.max_slots or 16
    return run(settings, BatchingEngine("scripted", lambda: FragileRunner(slots)), listener)


if __name__ == "__main__":
    sys.exit(main())
