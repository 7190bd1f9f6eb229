"""The seam between the engine's loop and a model: what runs sequences, step by step. Knows no queue and no text.

A runner is opened and used in the engine's thread and nowhere else.
"""

from typing import Protocol, TypeVar

from llm.checkpoint import Checkpoint
from llm.engine import Request
from llm.errors import LLMError
from llm.generation import Token


class Sequence(Protocol):
    """One request inside a runner: its prompt, and what was generated so far."""

    @property
    def num_to_read(self) -> int:
        """Tokens that the next `prefill` reads, at most; 0 once it can decode. All tokens but the last one are read by
        `prefill`; the last is its row in the next `decode`."""
        ...

    @property
    def num_cached(self) -> int:
        """Prompt tokens that did not have to be computed, counted for the whole request. Final once it decodes."""
        ...


S = TypeVar("S", bound=Sequence)


class Runner(Protocol[S]):
    """Runs the sequences of many requests together.

    A sequence is opened once. It has room on the device from each `admit` to the next `release`, and is passed to
    `prefill`, `grow` and `decode` only then. An error that `open`, `prefill` or `decode` raises ends the sequences that
    it was about, and they are released; after one that any other method raises the engine starts again. An `EngineDead`
    ends the engine, wherever it is raised.
    """

    @property
    def checkpoint(self) -> Checkpoint:
        """Names, ids and limits of the model."""
        ...

    @property
    def slots(self) -> int:
        """Sequences that can have room at once."""
        ...

    @property
    def prefill_budget(self) -> int:
        """Tokens that may be read between two decode steps, which is how long others wait for their next token. No
        `num_to_read` is more."""
        ...

    @property
    def memory_use(self) -> float:
        """From 0 to 1: the part of its memory for keys and values that sequences hold. What is kept only to be found
        again does not count: who needs it gets it."""
        ...

    def open(self, request: Request) -> S:
        """Begin a request. Cheap; takes nothing of the device."""
        ...

    def admit(self, sequence: S) -> bool:
        """Take room for all of its tokens so far. False: it does not fit now, and nothing was taken."""
        ...

    def prefill(self, sequence: S) -> None:
        """Read the next piece of its tokens."""
        ...

    def grow(self, sequence: S) -> bool:
        """Make sure of room for one token more; called before each `decode`. False: there is none now."""
        ...

    def decode(self, sequences: list[S]) -> list[Token | LLMError]:
        """One step: for each sequence exactly one token, or what kept it, and only it, from having one."""
        ...

    def release(self, sequence: S) -> None:
        """Give its room back. It may be admitted again, and then goes on where it was. (What it generated may
        then be read in a prompt's way, with floats rounded in another order.)"""
        ...

    def reset(self) -> None:
        """Forget all sequences after a failure of the loop. The weights stay."""
        ...

    def close(self) -> None:
        """Free everything."""
        ...
